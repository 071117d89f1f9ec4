"""The compiler's whole way to an integer program, run by its interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from random_graphs.quantized import integer_target

import qcompile
from qcompile.backends import base
from qcompile.backends.base import Lowered
from qcompile.backends.integer.interpret import dequantize_output, interpret, quantize_input
from qcompile.backends.integer.lower import lower
from qcompile.backends.integer.program import Program
from qcompile.core import model as models
from qcompile.core.errors import TargetError
from qcompile.core.plan import Precision, QuantPlan
from qcompile.core.runtime import Feeds, Outputs
from qcompile.core.target import Target
from qcompile.options import Options
from qcompile.override import Override

MODELS = Path(__file__).parents[2] / "models"


class Interpreted(base.Unpriced, base.Unbounded):
    """A backend whose artifact is the QDQ model, and which runs the program that this becomes."""

    name = "none"
    program: Program

    def targets(self) -> Iterable[Target]:
        return [integer_target()]

    def available(self) -> bool:
        return True

    def check(self, target: Target) -> None:
        pass

    def lower(self, model: ir.Model, plan: QuantPlan, target: Target, folder: Path) -> Lowered:
        self.program = lower(model)
        models.save(model, folder / "model.onnx")
        return Lowered(("model.onnx",), {}, ())

    def size(self, model: ir.Model) -> int:
        return models.file_bytes(model)

    def open(self, folder: Path, files: tuple[str, ...], threads: int = 1) -> Callable[[Feeds], Outputs]:
        program = self.program

        def run(feeds: Feeds) -> Outputs:
            inputs = {port.name: quantize_input(program, port, feeds[port.name]) for port in program.inputs}
            codes = interpret(program, inputs)
            return {port.name: dequantize_output(program, port, codes[port.name]) for port in program.outputs}

        return run


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Interpreted:
    backend = Interpreted()
    monkeypatch.setattr(base, "backends", lambda: {"none": backend})
    return backend


def some_images(folder: Path) -> str:
    """Return a file of a few of the images that there are for calibration."""
    np.savez(folder / "some.npz", x=np.load(MODELS / "resnet8_calib.npz")["x"][::4])
    return str(folder / "some.npz")


def options(output: Path, **others: Any) -> Options:
    evaluation = str(MODELS / "resnet8_eval.npz")
    return Options(
        target="integer", eval=evaluation, output=output, observer="minmax", smoothing="none", rotation="none", **others
    )


def test_a_network_is_planned_and_lowered_without_float(interpreted: Interpreted, tmp_path: Path) -> None:
    data = some_images(tmp_path)
    result = qcompile.compile(MODELS / "resnet8.onnx", options(tmp_path / "out", data=data))
    assert {op.precision for op in result.plan.ops.values()} == {Precision.INTEGER}
    assert result.report["fidelity"]["outputs"]["probabilities"]["sqnr"] >= 20.0  # below that a compile warns
    accuracy = result.report["fidelity"]["accuracy"]
    assert accuracy["artifact_correct"] >= accuracy["float_correct"] == 18
    assert {tensor.dtype for tensor in interpreted.program.tensors.values()} == {"int8"}


def test_without_data_the_remedy_is_data(interpreted: Interpreted, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"Conv '.*': reads 'to_channels_first' in float; .*give --data"):
        qcompile.compile(MODELS / "resnet8.onnx", options(tmp_path / "out", activations="none"))
    assert not (tmp_path / "out").exists()


def test_what_is_kept_in_float_is_refused(interpreted: Interpreted, tmp_path: Path) -> None:
    data = some_images(tmp_path)
    overrides = (Override(match=("conv2d_3",), keep_float=True),)
    with pytest.raises(TargetError, match="conv2d_3"):
        qcompile.compile(MODELS / "resnet8.onnx", options(tmp_path / "out", data=data, overrides=overrides))
    assert not (tmp_path / "out").exists()
