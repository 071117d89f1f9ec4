"""Builders that all tests share: models written as ONNX text, feeds, and the target the project ships."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, settings

from qcompile.core import model as models
from qcompile.core.target import Target

ROOT = Path(__file__).parent.parent

# Derandomized, so that a run depends on the code alone; deadlines would only measure how busy the machine is.
settings.register_profile(
    "qcompile", derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("qcompile")

Array = np.ndarray[Any, np.dtype[Any]]


def proto_from_text(text: str, opset: int = 17, **weights: Array) -> onnx.ModelProto:
    """Parse ``(inputs) => (outputs) { nodes }``; keyword arguments become initializers."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> g {text}')
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return proto


@pytest.fixture(scope="session")
def proto_of() -> Callable[..., onnx.ModelProto]:
    """Build a ModelProto from ONNX text, unchecked."""
    return proto_from_text


@pytest.fixture(scope="session")
def model_of() -> Callable[..., ir.Model]:
    """Build a model from ONNX text, with the checks of `qcompile.core.model.load`."""
    return lambda text, opset=17, **weights: models.from_proto(proto_from_text(text, opset, **weights))


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the repository's folder."""
    return ROOT


@pytest.fixture(scope="session")
def cpu() -> Target:
    """Return the CPU target as it is shipped, but for its times: all that can be in integers is."""
    here = importlib.resources.files("qcompile.backends.ort")
    return replace(Target.from_toml(here / "targets" / "cpu.toml", here / "costs"), costs=None)


@pytest.fixture
def random() -> np.random.Generator:
    """Return a generator with a fixed seed."""
    return np.random.default_rng(20240607)
