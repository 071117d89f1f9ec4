"""A model's whole way through placing, measuring, allocating and inserting, and a second opinion on the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from qcompile.calib.collect import Statistics, collect
from qcompile.calib.data import Dataset, input_specs
from qcompile.calib.observers import Observer
from qcompile.core import model as models
from qcompile.core import runtime, validate
from qcompile.core.plan import Precision, QuantPlan, Role, TensorQuant
from qcompile.core.target import Target
from qcompile.passes.allocate_bits import allocate_bits
from qcompile.passes.canonicalize.fix_names import FixNames
from qcompile.passes.canonicalize.infer_shapes import InferShapes
from qcompile.passes.insert_qdq import InsertQdq
from qcompile.passes.place import Placement, Wish, place

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Quantized:
    """One model at every stage."""

    float_model: ir.Model
    placement: Placement
    plan: QuantPlan
    model: ir.Model

    @property
    def ops(self) -> dict[str, tuple[str, str]]:
        """Precision and reason of every operator."""
        return {name: (op.precision.value, op.reason) for name, op in self.plan.ops.items()}


def prepared(model: ir.Model) -> ir.Model:
    InferShapes()(model)
    FixNames()(model)
    return model


def measured(model: ir.Model, placement: Placement, count: int = 4) -> Statistics:
    samples = [runtime.synthetic_feeds(model, seed) for seed in range(count)]
    data = Dataset("synthetic", lambda: samples, input_specs(model))
    return collect(model, placement.activations, data, lambda items, *_: items)


def inserted(model: ir.Model, plan: QuantPlan) -> ir.Model:
    copy = model.clone()
    InsertQdq(plan)(copy)
    validate.check_model(copy, "quantized")
    assert [(v.name, v.dtype, v.shape) for v in (*copy.graph.inputs, *copy.graph.outputs)] == [
        (v.name, v.dtype, v.shape) for v in (*model.graph.inputs, *model.graph.outputs)
    ]
    return copy


@pytest.fixture
def w() -> Array:
    """Return weights of a Conv from three channels to four."""
    return np.random.default_rng(1).standard_normal((4, 3, 3, 3)).astype(np.float32)


@pytest.fixture
def m() -> Array:
    """Return a square matrix of weights."""
    return np.random.default_rng(2).standard_normal((8, 8)).astype(np.float32)


@pytest.fixture(scope="session")
def eager(cpu: Target) -> Target:
    """Return the CPU target, which takes small operators as well, for small operators are what tests have."""
    return replace(cpu, ops={op_type: replace(rule, fewest_weights=0) for op_type, rule in cpu.ops.items()})


@pytest.fixture
def quantized(eager: Target) -> Callable[..., Quantized]:
    """Quantize a float model with what random samples measure."""

    def quantized(
        model: ir.Model,
        target: Target = eager,
        weights: bool = True,
        activations: bool = True,
        dyadic: bool = False,
        wishes: Mapping[str, Wish] | None = None,
    ) -> Quantized:
        prepared(model)
        before = models.serialize(model)
        placement = place(model, target, weights, activations, wishes)
        plan = allocate_bits(
            model, placement, measured(model, placement), target, dict.fromkeys(placement.activations, Observer.MINMAX)
        )
        assert models.serialize(model) == before, "deciding leaves the graph as it is"
        if dyadic:
            plan = replace(plan, tensors={name: dyadic_scales(quant) for name, quant in plan.tensors.items()})
        return Quantized(model, placement, plan, inserted(model, plan))

    return quantized


@pytest.fixture
def decided(eager: Target) -> Callable[..., dict[str, tuple[str, str]]]:
    """Place a model's operators: precision and reason by node name."""

    def decided(
        model: ir.Model, target: Target = eager, weights: bool = True, activations: bool = True
    ) -> dict[str, tuple[str, str]]:
        placement = place(prepared(model), target, weights, activations)
        return {name: (op.precision.value, op.reason) for name, op in placement.ops.items()}

    return decided


def dyadic_scales(quant: TensorQuant) -> TensorQuant:
    """Round scales to powers of two, with which float32 sums of codes are exact in whatever order they are formed.

    Weights' codes end at 64, so that no pair of products saturates on CPUs that add them in 16 bits.
    """
    exponents = np.log2(quant.scale)
    rounded = np.ceil(exponents + np.log2(127 / 64)) if quant.role is Role.WEIGHT else np.rint(exponents)
    return replace(quant, scale=tuple(map(float, np.exp2(rounded))))


def executed(model: ir.Model, folder: Path) -> list[onnx.NodeProto]:
    models.save(model, folder / "quantized.onnx")
    return runtime.optimized_nodes(folder / "quantized.onnx")


#: Around its NHWC kernels ONNX Runtime adds Transposes; Q and DQ stand at the borders to float.
AROUND = frozenset({"DequantizeLinear", "QuantizeLinear", "Transpose"})


@pytest.fixture
def kernels(tmp_path: Path) -> Callable[[ir.Model], list[str]]:
    """Return the operator types that ONNX Runtime executes for a model, sorted, without those of `AROUND`."""
    return lambda model: sorted(
        node.op_type.removeprefix("Nhwc") for node in executed(model, tmp_path) if node.op_type not in AROUND
    )


def through(quant: TensorQuant, x: Array) -> Array:
    """Quantize and dequantize, written out anew so that the pass is not held against itself."""
    shape = [1] * x.ndim
    if quant.axis is not None:
        shape[quant.axis] = -1
    scale = np.float32(quant.scale).reshape(shape if len(quant.scale) > 1 else ())
    zero = np.int64(quant.zero_point).reshape(shape if len(quant.scale) > 1 else ())
    info = np.iinfo(quant.dtype)
    lowest = -int(info.max) if quant.role is Role.WEIGHT else int(info.min)
    codes = np.clip(np.rint(x / scale) + zero, lowest, info.max)
    return ((codes - zero).astype(np.float32) * scale).astype(np.float32)


def emulated(model: ir.Model, plan: QuantPlan, feeds: dict[str, Array]) -> dict[str, Array]:
    """Run the float model node by node and put every planned tensor through its codes where the plan says so."""
    proto = ir.to_proto(model)
    values: dict[str, Array] = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer} | feeds
    leaving = {op.output for op in plan.ops.values() if op.output}
    for node in proto.graph.node:
        op = plan.ops[node.name]
        inputs = {name: values[name] for name in node.input if name}
        for name in inputs:
            quant = plan.tensors.get(name)
            if quant is None:
                continue
            weight = quant.role is Role.WEIGHT and op.precision is not Precision.FLOAT
            if weight or (quant.role is Role.ACTIVATION and op.precision is Precision.INTEGER):
                inputs[name] = through(quant, inputs[name])
        if op.precision is Precision.INTEGER and node.op_type in ("Conv", "Gemm") and len(node.input) > 2:
            inputs[node.input[2]] = bias_through(plan, node, values[node.input[2]])
        outputs = ReferenceEvaluator(node_model(node, proto)).run(None, inputs)
        for name, array in zip(node.output, outputs, strict=True):
            values[name] = through(plan.tensors[name], array) if name in leaving else array
    return {output.name: values[output.name] for output in proto.graph.output}


def bias_through(plan: QuantPlan, node: onnx.NodeProto, bias: Array) -> Array:
    step = np.float32(plan.tensors[node.input[0]].scale) * np.float32(plan.tensors[node.input[1]].scale)
    return (np.rint(bias.astype(np.float64) / step) * step).astype(np.float32)


def node_model(node: onnx.NodeProto, proto: onnx.ModelProto) -> onnx.ModelProto:
    infos = [onnx.ValueInfoProto(name=name) for name in dict.fromkeys(node.input) if name]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output]
    graph = onnx.helper.make_graph([node], "one", infos, outputs)
    return onnx.helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)


@pytest.fixture
def as_emulated() -> Callable[[Quantized], None]:
    """Hold an unoptimized run of a model with dyadic scales against the emulation of its plan, bit for bit."""

    def as_emulated(result: Quantized) -> None:
        session = runtime.Session(result.model, optimize=False)
        for seed in range(10, 13):
            feeds = runtime.synthetic_feeds(result.float_model, seed)
            outputs = session.run(feeds)
            for name, expected in emulated(result.float_model, result.plan, feeds).items():
                np.testing.assert_array_equal(outputs[name], expected)
                assert len(np.unique(expected)) > 3, "an output of few values proves little"

    return as_emulated
