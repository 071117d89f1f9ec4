"""Small models that give every pass work to do, for `planted_bugs.py`: with data, options, and what is to be chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import numpy_helper, parser

from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.core.orthogonal import Orthogonal
from qcompile.core.plan import ChannelFactors, How
from qcompile.core.rotation import InputRotation, Rotations
from qcompile.equivalence import Equivalences
from qcompile.passes import structure
from qcompile.passes.patterns import recognise
from qcompile.passes.rotate import spread_evenly
from qcompile.passes.rotate_inputs import obstacle
from qcompile.passes.rotations import rotatable
from qcompile.passes.scale_groups import ScaleGroup, linear_readings, scale_group

Arrays = Mapping[str, npt.NDArray[Any]]
EXPORTS = Path(__file__).parent.parent / "tests/passes/exports"
SAMPLES = 10

#: What exporters leave behind, in front of, behind and between convolutions.
IMAGES = """
<ir_version: 10, opset_import: ["": 17]>
images (float[1, 3, 12, 12] x) => (float[1, 8] y)
{
    m = Mul (x, deviations)
    s = Sub (m, means)
    c0 = Conv (s, w0, b0)
    n0 = BatchNormalization (c0, gamma, beta, mean, variance)
    lo = Max (n0, zero)
    hi = Min (lo, six)
    p = Pad (hi, pads)
    c1 = Conv (p, w1, b1)
    d = Div (c1, divisors)
    r = Relu (d)
    a = Add (r, hi)
    k1 = Mul (a, two)
    k2 = Mul (k1, half)
    t1 = Transpose <perm = [0, 2, 3, 1]> (k2)
    o = Add (t1, offsets)
    l = Relu (o)
    t2 = Transpose <perm = [0, 3, 1, 2]> (l)
    s1 = Slice (t2, start, end, rows)
    s2 = Slice (s1, start, end, columns)
    c2 = Conv <strides = [1, 1], group = 2> (s2, w2)
    la = LeakyRelu <alpha = 0.125> (c2)
    lb = LeakyRelu <alpha = 0.5> (c2)
    ia = Concat <axis = 1> (la, lb)
    ib = Concat <axis = 1> (ia, c2)
    c3 = Conv (ib, w3, b3)
    t3 = Transpose <perm = [0, 2, 3, 1]> (c3)
    f = Reshape (t3, flat)
    g = Gemm <alpha = 0.5, beta = 2.0> (f, wg, bg)
    h = Tanh (g)
    q = MatMul (h, wq)
    y = Add (q, bq)
}
"""
#: A norm that a product and a residual read; the residual's branch has a bias.
POST_NORM = """
<ir_version: 10, opset_import: ["": 17]>
post_norm (float[1, 16, 32] x) => (float[1, 16, 32] y)
{
    n = LayerNormalization (x, g, b)
    u = MatMul (n, wu)
    p = Add (u, bu)
    t = Tanh (p)
    d = MatMul (t, wd)
    v = Add (d, bd)
    h = Add (v, n)
    y = LayerNormalization (h, g, b1)
}
"""
#: GELU as exporters write it, between two products, wide enough that scales and biases are stored as halves.
FEED_FORWARD = """
<ir_version: 10, opset_import: ["": 17]>
feed_forward (float[1, 16, 64] x) => (float[1, 16, 64] y)
{
    m = MatMul (x, w)
    h = Add (m, b)
    d = Div (h, root)
    e = Erf (d)
    f = Add (e, one)
    p = Mul (h, f)
    g = Mul (p, half)
    o = MatMul (g, v)
    s = Add (o, bo)
    y = Add (s, x)
}
"""
#: What a microcontroller runs, with paddings, zero points and scales that differ.
SENSOR = """
<ir_version: 10, opset_import: ["": 17]>
sensor (float[1, 2, 10, 10] x) => (float[1, 6] y)
{
    c0 = Conv <pads = [0, 1, 2, 1]> (x, w0, b0)
    c1 = Conv <pads = [1, 1, 1, 1]> (c0, w1, b1)
    a = Add (c0, c1)
    r = Relu (a)
    m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
    c2 = Conv (m, w2, b2)
    f = Flatten (c2)
    g = Gemm <transB = 1> (f, wg, bg)
    y = Softmax (g)
}
"""


@dataclass(frozen=True)
class Subject:
    """A model with what its compile needs.

    Parameters
    ----------
    proto : onnx.ModelProto
    data : mapping of str to ndarray
        By input, with a first axis of samples.
    options : mapping
        Of a compile.
    equivalences : callable, optional
        What the search is to choose for the canonical model; without, nothing is rotated or smoothed.
    """

    proto: onnx.ModelProto
    data: Arrays
    options: Mapping[str, Any] = field(default_factory=lambda: {"target": "cpu"})
    equivalences: Callable[[ir.Model], Equivalences] | None = None


def _built(text: str, arrays: Arrays, dtype: str = "float32") -> onnx.ModelProto:
    proto = parser.parse_model(text)
    for name, array in arrays.items():
        kept = array if array.dtype == np.int64 else array.astype(dtype)
        proto.graph.initializer.append(numpy_helper.from_array(kept, name))
    return proto


def _normal(random: np.random.Generator, *shape: int) -> npt.NDArray[Any]:
    """Return weights that keep the size of what they are multiplied with."""
    fan_in = shape[0] if len(shape) == 2 else int(np.prod(shape[1:]))
    return random.normal(0.0, fan_in**-0.5, shape)


def images(dtype: str = "float32", **options: Any) -> Subject:
    """Return a convolutional model and its samples."""
    random = np.random.default_rng(3)
    arrays = {
        "deviations": random.uniform(0.5, 2.0, (3, 1, 1)), "means": random.normal(0.0, 0.5, (3, 1, 1)),
        "w0": _normal(random, 8, 3, 3, 3), "b0": random.normal(0.0, 0.2, 8),
        "gamma": random.uniform(1.0, 3.0, 8), "beta": random.normal(1.0, 1.0, 8), "mean": random.normal(0.0, 0.3, 8),
        "variance": random.uniform(0.3, 0.8, 8), "zero": np.zeros(()), "six": np.array(3.0),
        "pads": np.array([0, 0, 0, 1, 0, 0, 2, 1]), "w1": _normal(random, 8, 8, 3, 3),
        "b1": random.normal(0.0, 0.5, 8), "divisors": random.uniform(0.5, 2.0, (8, 1, 1)), "two": np.array(2.0),
        "half": np.array(0.75), "offsets": random.normal(0.0, 1.0, 8), "start": np.array([1]), "end": np.array([9]),
        "rows": np.array([2]), "columns": np.array([3]), "w2": _normal(random, 8, 4, 3, 3),
        "w3": _normal(random, 4, 24, 3, 3), "b3": random.normal(0.0, 0.3, 4), "flat": np.array([1, 64]),
        "wg": _normal(random, 64, 8), "bg": random.normal(0.0, 0.5, 8), "wq": _normal(random, 8, 8),
        "bq": random.normal(0.0, 0.5, 8),
    }  # fmt: skip
    samples, text = random.normal(size=(SAMPLES, 1, 3, 12, 12)).astype(dtype), IMAGES
    if dtype == "float16":
        text = text.replace("float[", "float16[")
    return Subject(_built(text, arrays, dtype), {"x": samples}, {"target": "cpu", **options})


def pre_norm(inputs: bool = False) -> Subject:
    """Return a small encoder as PyTorch exports it; its streams and values are rotated, or what products read."""
    proto = onnx.load(EXPORTS / "pre_norm.script14.onnx")
    model = models.from_proto(proto)
    feeds = [runtime.synthetic_feeds(model, seed, open_axis=2) for seed in range(SAMPLES)]
    data = {name: np.stack([each[name] for each in feeds]) for name in feeds[0]}

    def folded(canonical: ir.Model) -> Equivalences:
        return Equivalences(Rotations(folded=spread_evenly(rotatable(canonical.graph).places, 3)))

    def in_front(canonical: ir.Model) -> Equivalences:
        nodes = [node for node in canonical.graph if structure.is_linear(node) and not obstacle(node)]
        width = [int(structure.input_of(node, 0).shape[-1]) for node in nodes]  # type: ignore[index, arg-type]
        return Equivalences(Rotations(inputs=tuple(
            InputRotation(structure.node_name(node), Orthogonal.spreading(4, 5))
            for node, each in zip(nodes, width, strict=True) if each % 4 == 0 and each > 4)))  # fmt: skip

    return Subject(proto, data, {"target": "cpu"}, in_front if inputs else folded)


def post_norm(how: How, *, shifts: bool = False) -> Subject:
    """Return a block whose channels are divided by factors, shifted, or set aside."""
    random = np.random.default_rng(7)
    arrays = {name: _normal(random, 32, 32) for name in ("wu", "wd")}
    arrays |= {name: random.normal(0.0, 0.3, 32) for name in ("bu", "bd", "b1")}
    arrays |= {"g": random.uniform(0.5, 1.0, 32), "b": random.uniform(-3.0, 3.0, 32)}

    def chosen(canonical: ir.Model) -> Equivalences:
        if how is How.ASIDE:
            return Equivalences(smoothing={"n": ChannelFactors(how, channels=(3, 17), low=-1.0, high=1.0)})
        factors = factors_of(canonical, "n", how)
        shift = tuple(map(float, arrays["b"])) if shifts else ()
        return Equivalences(smoothing={"n": ChannelFactors(how, factors, shift=shift)})

    return Subject(_built(POST_NORM, arrays), {"x": random.normal(size=(SAMPLES, 1, 16, 32))},
                   {"target": "cpu"}, chosen)  # fmt: skip


def factors_of(canonical: ir.Model, name: str, how: How) -> tuple[float, ...]:
    """Return factors that the group of a value takes, as powers of two by eighths."""
    every = {structure.node_name(node) for node in canonical.graph}
    axes = {structure.name_of(value): (value, axis) for value, axis in linear_readings(canonical.graph, every)}
    group = scale_group(*axes[name], recognise(canonical.graph), how)
    assert isinstance(group, ScaleGroup), group
    log2 = np.concatenate([[0.0], np.random.default_rng(1).integers(-8, 9, group.factors) / 4.0])
    return tuple(map(float, log2[np.abs(group.classes)] * np.sign(group.classes)))


def feed_forward(split: bool = False, **options: Any) -> Subject:
    """Return a feed-forward block, two of whose channels reach far; they are split, if that is asked for."""
    random = np.random.default_rng(11)
    arrays = {"w": _normal(random, 64, 160), "b": random.normal(0.0, 0.1, 160), "v": _normal(random, 160, 64)}
    arrays |= {"root": np.array(2.0**0.5), "one": np.array(1.0), "half": np.array(0.5), "bo": random.normal(size=64)}
    arrays["b"][[5, 101]] += [20.0, 12.0]

    def chosen(canonical: ir.Model) -> Equivalences:
        [name] = [structure.name_of(one.result) for one in recognise(canonical.graph).activations]
        # The factor ½ is in the weights behind it: what the activation makes is twice as large.
        copies = ChannelFactors(How.SPLIT, (2.0, 2.0, 1.0), channels=(5, 5, 101), high=16.0)
        return Equivalences(smoothing={name: copies})

    return Subject(_built(FEED_FORWARD, arrays), {"x": random.normal(size=(SAMPLES, 1, 16, 64))},
                   {"target": "cpu", **options}, chosen if split else None)  # fmt: skip


def sensor() -> Subject:
    """Return a small classifier for a microcontroller."""
    random = np.random.default_rng(13)
    arrays = {
        "w0": _normal(random, 6, 2, 3, 3), "b0": random.normal(1.0, 1.0, 6), "w1": _normal(random, 6, 6, 3, 3),
        "b1": random.normal(0.0, 0.5, 6), "w2": _normal(random, 6, 6, 3, 3), "b2": random.normal(0.0, 0.5, 6),
        "wg": 3.0 * _normal(random, 6, 54), "bg": random.normal(size=6),
    }  # fmt: skip
    samples = random.normal(0.5, 1.0, size=(SAMPLES, 1, 2, 10, 10))
    return Subject(_built(SENSOR, arrays), {"x": samples}, {"target": "cortex-m4"})


#: By the names that bugs know them by.
SUBJECTS: Mapping[str, Callable[[], Subject]] = {
    "images": images,
    "images in four bits": lambda: images(weights="4"),
    "images in float16": lambda: images("float16"),
    "images for cuda": lambda: images(target="cuda"),
    "encoder": pre_norm,
    "encoder, rotated at run time": lambda: pre_norm(inputs=True),
    "post-norm": lambda: post_norm(How.RESTORE),
    "post-norm, shifted": lambda: post_norm(How.RESTORE, shifts=True),
    "post-norm, branched": lambda: post_norm(How.BRANCH),
    "post-norm, set aside": lambda: post_norm(How.ASIDE),
    "feed-forward": feed_forward,
    "feed-forward, split": lambda: feed_forward(split=True),
    "feed-forward in four bits": lambda: feed_forward(weights="4"),
    "feed-forward for cuda": lambda: feed_forward(target="cuda"),
    "feed-forward for cuda in four bits": lambda: feed_forward(target="cuda", weights="4"),
    "sensor": sensor,
}
