"""A trained network in integers: against float, against its QDQ model, and as other tools quantize it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from random_graphs.quantized import quantized

from qcompile.backends.integer import operations as ops
from qcompile.backends.integer.interpret import dequantize_output, interpret, quantize_input
from qcompile.backends.integer.lower import lower
from qcompile.backends.integer.program import Program
from qcompile.calib.data import input_specs, open_data
from qcompile.core import model as models
from qcompile.core import numerics, runtime
from qcompile.passes.canonicalize import Canonicalize

Feeds = dict[str, np.ndarray[Any, np.dtype[Any]]]


@pytest.fixture(scope="module")
def resnet8(root: Path) -> ir.Model:
    return models.load(root / "models" / "resnet8.onnx")


def samples_of(root: Path, model: ir.Model, part: str, count: int) -> list[Feeds]:
    data = open_data(str(root / "models" / f"resnet8_{part}.npz"), input_specs(model))
    return [dict(feeds) for feeds in islice(data, count)]


def outputs_of(program: Program, feeds: Feeds) -> Feeds:
    codes = interpret(program, {port.name: quantize_input(program, port, feeds[port.name]) for port in program.inputs})
    return {port.name: dequantize_output(program, port, codes[port.name]) for port in program.outputs}


def test_a_trained_network_loses_no_more_than_its_qdq_model(root: Path, resnet8: ir.Model) -> None:
    qdq = quantized(resnet8.clone(), samples_of(root, resnet8, "calib", 32))
    program = lower(qdq)
    kinds = [type(operation) for operation in program.operations]
    assert kinds.count(ops.Conv) == 9 and kinds.count(ops.Add) == 3
    assert kinds[-4:] == [ops.AveragePool, ops.View, ops.Dense, ops.Softmax]
    session, simulated = runtime.Session(resnet8), runtime.Session(qdq, optimize=False)
    expected, written, found = [], [], []
    for feeds in samples_of(root, resnet8, "eval", 30):
        expected.append(session.run(feeds)["probabilities"])
        written.append(simulated.run(feeds)["probabilities"])
        found.append(outputs_of(program, feeds)["probabilities"])
    lost = numerics.sqnr(np.array(expected), np.array(written))
    assert numerics.sqnr(np.array(expected), np.array(found)) >= lost - 0.5
    apart = np.abs(np.array(written) - np.array(found)) / program.tensors[program.outputs[0].tensor].scale
    assert np.mean(apart < 0.5) > 0.97  # a tie that goes the other way early on moves a few outputs


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hands samples to onnxruntime's quantizer."""

    def __init__(self, samples: list[Feeds]) -> None:
        self.samples: Iterator[Feeds] = iter(samples)

    def get_next(self) -> Feeds | None:
        return next(self.samples, None)


@pytest.mark.parametrize("activations", [QuantType.QInt8, QuantType.QUInt8])
@pytest.mark.parametrize("per_channel", [True, False])
def test_a_network_that_onnxruntime_quantized(
    root: Path, resnet8: ir.Model, tmp_path: Path, activations: QuantType, per_channel: bool
) -> None:
    folded = resnet8.clone()
    Canonicalize(13)(folded)
    models.save(folded, tmp_path / "float.onnx")
    reader = Reader(samples_of(root, resnet8, "calib", 8))
    quantize_static(tmp_path / "float.onnx", tmp_path / "qdq.onnx", reader, quant_format=QuantFormat.QDQ,
                    activation_type=activations, weight_type=QuantType.QInt8, per_channel=per_channel)  # fmt: skip
    qdq = models.load(tmp_path / "qdq.onnx")
    program = lower(qdq)
    assert [type(operation) for operation in program.operations].count(ops.Conv) == 9
    assert not any(isinstance(operation, ops.Transpose | ops.Lookup) for operation in program.operations)
    session, simulated = runtime.Session(resnet8), runtime.Session(qdq, optimize=False)
    evaluated = samples_of(root, resnet8, "eval", 8)
    expected = np.array([session.run(feeds)["probabilities"] for feeds in evaluated])
    written = np.array([simulated.run(feeds)["probabilities"] for feeds in evaluated])
    found = np.array([outputs_of(program, feeds)["probabilities"] for feeds in evaluated])
    assert numerics.sqnr(expected, found) >= numerics.sqnr(expected, written) - 0.5
