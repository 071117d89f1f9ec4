"""Whatever the graph, factors that are said to fold do: groups of random graphs, folded, compute the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.core import runtime
from qcompile.core.plan import ChannelFactors, How
from qcompile.passes.canonicalize.fix_names import FixNames
from qcompile.passes.canonicalize.infer_shapes import InferShapes
from qcompile.passes.patterns import recognise
from qcompile.passes.scale_groups import ScaleGroup, linear_readings, scale_group
from qcompile.passes.smooth import Smooth

Build = Callable[..., ir.Model]
#: Everything is [2, 4, 4], so that any axis may be taken for any other: {a} and {b} are earlier results.
STEPS = (
    *["MatMul({a}, {w})"] * 3, *["MatMul({a}, {b})"] * 3, *["Transpose <perm = [0,2,1]> ({a})"] * 2, "Add({a}, {b})",
    "Mul({a}, {b})", "Relu({a})", "Softmax({a})", "LayerNormalization({a}, {g}, {g}b)", "Halves(-1)", "Halves(1)",
    *["Attention", "Scores"] * 2,
)  # fmt: skip
HALVES = """{o}a = Slice({a}, start, middle, {axis}) {o}b = Slice({b}, middle, end, {axis})
    {o} = Concat <axis = {at}> ({o}b, {o}a)"""
#: Values are a projection of what the queries are, so that a linear operator reads these.
ATTENTION = """{o}q = Reshape({a}, heads) {o}t = Transpose <perm = [0,2,1,3]> ({o}q) {o}k = Reshape({b}, heads)
    {o}u = Transpose <perm = [0,2,3,1]> ({o}k) {o}s = MatMul({o}t, {o}u) {o}p = Softmax({o}s) {o}v = MatMul({a}, {w})
    {o}h = Reshape({o}v, heads) {o}i = Transpose <perm = [0,2,1,3]> ({o}h) {o}m = MatMul({o}p, {o}i)
    {o}n = Transpose <perm = [0,2,1,3]> ({o}m) {o} = Reshape({o}n, whole)"""
SCORES = """{o}t = Transpose <perm = [0,2,1]> ({b}) {o}s = MatMul({a}, {o}t) {o}p = Sigmoid({o}s)
    {o}v = MatMul({b}, {w}) {o} = MatMul({o}p, {o}v)"""
INTEGERS = {
    "start": [0],
    "middle": [2],
    "end": [4],
    "last": [-1],
    "one": [1],
    "heads": [2, 4, 2, 2],
    "whole": [2, 4, 4],
}


def random_graph(model_of: Build, random: np.random.Generator) -> ir.Model:
    lines, made = list[str](), ["x"]
    constants = {name: np.array(numbers) for name, numbers in INTEGERS.items()}
    for index in range(int(random.integers(3, 9))):
        # Mostly the last ones, else nothing would depend on anything.
        a, b = (made[-1 - min(len(made), int(random.geometric(0.35))) + 1] for _ in range(2))
        step, names = str(random.choice(STEPS)), {"o": f"v{index}", "a": a, "b": b, "w": f"w{index}", "g": f"g{index}"}
        if step.startswith("Halves"):
            at = step[7:-1]
            lines.append(HALVES.format(**names, at=at, axis="last" if at == "-1" else "one"))
        elif step in ("Attention", "Scores"):
            lines.append((ATTENTION if step == "Attention" else SCORES).format(**names))
        else:
            lines.append(f"v{index} = {step.format(**names)}")
        constants[f"w{index}"] = random.normal(size=(4, 4)).astype(np.float32)
        constants |= {f"g{index}{end}": random.normal(size=4).astype(np.float32) for end in ("", "b")}
        made.append(f"v{index}")
    constants["w"] = random.normal(size=(4, 4)).astype(np.float32)
    text = f"(float[2,4,4] x) => (float[2,4,4] y) {{ {' '.join(lines)} h = MatMul({made[-1]}, w) y = Identity(h) }}"
    model = model_of(text, 21, **constants)
    InferShapes()(model)
    FixNames()(model)
    return model


@settings(max_examples=200)
@given(st.integers(0, 2**32 - 1))
def test_groups_of_random_graphs_fold(model_of: Build, seed: int) -> None:
    random = np.random.default_rng(seed)
    model = random_graph(model_of, random)
    patterns, every = recognise(model.graph), {str(node.name) for node in model.graph}
    feeds = {"x": random.normal(size=(2, 4, 4)).astype(np.float32)}
    expected = runtime.Session(model, optimize=False).run(feeds)["y"]
    for value, axis in linear_readings(model.graph, every):
        group = scale_group(value, axis, patterns, How.FOLD)
        if not isinstance(group, ScaleGroup):
            continue
        log2 = np.append(0.0, random.integers(1, 4, group.factors) * random.choice([-1, 1], group.factors))
        of_channels = tuple(map(float, log2[np.abs(group.classes)] * np.sign(group.classes)))
        result = Smooth({str(value.name): ChannelFactors(How.FOLD, of_channels)})(model.clone())
        assert result.modified and result.refusals == ()
        found = runtime.Session(result.model, optimize=False).run(feeds)["y"]
        np.testing.assert_array_equal(found, expected, "powers of two change no digit")
