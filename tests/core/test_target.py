from collections.abc import Callable
from pathlib import Path

import pytest

from qcompile.core.errors import TargetError
from qcompile.core.target import OpKind, OpRule, Target

HEAD = """
name = "toy"
backend = "ort"
summary = "a toy"
opset = 21
activation_dtype = "uint8"
weight_dtype = "int8"
per_channel = true
"""


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str], Target]:
    def read(text: str) -> Target:
        path = tmp_path / "toy.toml"
        path.write_text(text, encoding="utf-8")
        return Target.from_toml(path)

    return read


def test_the_cpu_target_loads(cpu: Target) -> None:
    assert (cpu.name, cpu.backend, cpu.activation_dtype, cpu.weight_dtype) == ("cpu", "ort", "uint8", "int8")
    assert cpu.ops["Conv"].kind is OpKind.LINEAR and cpu.ops["Conv"].quantized_output
    assert not cpu.ops["Gemm"].quantized_output and not cpu.ops["MatMul"].quantized_output
    assert cpu.ops["MaxPool"].kind is OpKind.PASSTHROUGH
    assert "Softmax" not in cpu.ops


def test_a_small_target(read: Callable[[str], Target]) -> None:
    target = read(HEAD + '[ops.Conv]\nkind = "linear"\nfuses = ["Relu"]\nfewest_weights = 8\n[settings]\nthreads = 2\n')
    assert target.ops == {"Conv": OpRule(OpKind.LINEAR, fuses=("Relu",), fewest_weights=8)}
    assert target.settings == {"threads": 2}


@pytest.mark.parametrize("key", ["name", "backend", "summary", "opset", "activation_dtype", "weight_dtype"])
def test_a_missing_key_is_refused(key: str, read: Callable[[str], Target]) -> None:
    text = "\n".join(line for line in HEAD.splitlines() if not line.startswith(key)) + "\n[ops]\n"
    with pytest.raises(TargetError, match=rf"^toy\.toml: is not a target file .*{key}"):
        read(text)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (HEAD, "ops"),
        (HEAD + "per_chanel = true\n[ops]\n", "per_chanel"),
        (HEAD + '[ops.Conv]\nkind = "liner"\n', "liner"),
        (HEAD + "[ops.Conv]\nweight_only = true\n", "kind"),
        (HEAD + '[ops.Conv]\nkind = "linear"\nfuse = ["Relu"]\n', "fuse"),
        (HEAD + "ops = 3\n", "ops|int"),
        (HEAD + "[ops]\nConv = 3\n", "int"),
        ("name = ", "value"),
    ],
)
def test_a_file_that_is_no_target_is_refused(text: str, named: str, read: Callable[[str], Target]) -> None:
    with pytest.raises(TargetError, match=rf"^toy\.toml: is not a target file \(.*({named})"):
        read(text)


def test_one_activation_in_place_of_a_list_is_refused(read: Callable[[str], Target]) -> None:
    # tuple("Relu") would be four letters, and nothing would fuse, in silence.
    with pytest.raises(TargetError, match="fuses"):
        read(HEAD + '[ops.Conv]\nkind = "linear"\nfuses = "Relu"\n')


def test_the_deployed_opset(read: Callable[[str], Target]) -> None:
    assert read(HEAD + "[ops]\n").deployed_opset is None
    assert read(HEAD + "deployed_opset = 13\n[ops]\n").deployed_opset == 13
