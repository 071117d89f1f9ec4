"""Random valid models over the operators that canonicalize knows, as a hypothesis strategy.

Shapes are tracked while a graph grows, so that every operator fits its operands. Weights come from a generator whose
seed is drawn; hypothesis draws the structure, and so can shrink it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper

from random_graphs import compute, move
from random_graphs.builder import BATCH, Builder, Dims, Tensor

Step = Callable[[Builder], None]
#: What is named more than once is drawn more often.
STEPS: tuple[Step, ...] = (
    *(compute.conv,) * 4, compute.conv_transpose, compute.batch_norm, *(compute.gemm,) * 2, *(compute.matmul,) * 2,
    *(compute.affine,) * 2, *(compute.factors,) * 2, compute.neutral,
    *(compute.combine,) * 2, compute.repeat, *(compute.activation,) * 2,
    *(compute.bound,) * 2, compute.pool, compute.reduce, compute.softmax, compute.layer_norm, compute.casts,
    compute.idle, compute.branch, *(move.residual,) * 2, *(move.pad,) * 2, *(move.transpose,) * 2,
    *(move.reshape,) * 3, *(move.view,) * 2, move.concat, move.split, move.cut, move.expand,
    move.mirror,
)  # fmt: skip


@st.composite
def models(draw: Callable[[st.SearchStrategy[Any]], Any]) -> onnx.ModelProto:
    """Draw a model of four to sixteen steps; some of its intermediate values are outputs as well."""
    seed = draw(st.integers(0, 2**16))
    opset = draw(st.sampled_from((21, 21, 21, 13, 17, 18)))
    b = Builder(draw, np.random.default_rng(seed), opset, half=draw(st.integers(0, 9)) == 0)
    first: int | str = draw(st.sampled_from(("N", BATCH)))
    dims: Dims = draw(st.sampled_from(((first, 3, 6, 6), (first, 4, 5, 6), (first, 6, 4), (first, 5))))
    own = TensorProto.FLOAT16 if b.half else TensorProto.FLOAT
    b.values.append(Tensor("x", dims))
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=4, max_size=16)):
        step(b)
    made = b.values[1:]
    if not made:
        made = [b.add("Relu", ["x"], dims)]
    outputs = {made[-1].name: made[-1]}
    for _ in range(draw(st.integers(0, 2))):
        extra = made[draw(st.integers(0, len(made) - 1))]
        outputs[extra.name] = extra
    inputs = [helper.make_tensor_value_info("x", own, dims)]
    inputs += [helper.make_tensor_value_info("flag", TensorProto.BOOL, ())] if b.flag else []
    results = [helper.make_tensor_value_info(tensor.name, own, tensor.dims) for tensor in outputs.values()]
    graph = helper.make_graph(b.nodes, "random", inputs, results, b.initializers)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(proto, full_check=True)
    return proto
