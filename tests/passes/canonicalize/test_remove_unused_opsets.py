from collections.abc import Callable
from typing import Any

import onnx
import pytest

from qcompile.core import model as models
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.canonicalize.remove_unused_opsets import RemoveUnusedOpsets

Build = Callable[..., Any]


@pytest.fixture
def importing(proto_of: Build) -> Callable[..., Any]:
    """Build a model of some nodes that imports some domains besides."""

    def importing(text: str, *domains: str) -> Any:
        proto = proto_of(text, 21)
        proto.opset_import.extend(onnx.helper.make_opsetid(domain, 1) for domain in domains)
        return models.from_proto(proto)

    return importing


def test_what_no_operator_is_of_goes(importing: Build, rewritten: Build) -> None:
    text = "(float[2] x) => (float[2] y) { h = com.microsoft.Gelu (x) y = Abs (h) }"
    model, _ = rewritten(RemoveUnusedOpsets(), importing(text, "com.microsoft", "ai.onnx.ml"))
    assert model.opset_imports == {"": 21, "com.microsoft": 1}


def test_operators_in_branches_count(importing: Build, rewritten: Build) -> None:
    text = """(float[2] x, bool c) => (float[2] y) {
        y = If (c) <then_branch = t () => (float[2] a) { a = com.microsoft.Gelu (x) },
                    else_branch = e () => (float[2] b) { b = Abs (x) }>
    }"""
    model, _ = rewritten(RemoveUnusedOpsets(), importing(text, "com.microsoft", "ai.onnx.ml"))
    assert model.opset_imports == {"": 21, "com.microsoft": 1}


def test_the_default_domain_stays(importing: Build) -> None:
    model = importing("(float[2] x) => (float[2] y) { y = com.microsoft.Gelu (x) }", "com.microsoft")
    RemoveUnusedOpsets()(model)
    assert model.opset_imports == {"": 21, "com.microsoft": 1}


def test_canonicalize_drops_the_domains_of_functions_that_it_inlines(importing: Build) -> None:
    model = importing("(float[2] x) => (float[2] y) { y = Abs (x) }", "pkg.onnxscript.torch_lib", "ai.onnx.ml")
    Canonicalize(21)(model)
    assert model.opset_imports == {"": 21}
