"""What is recognised is held against its definition in NumPy, on the values that the model itself computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.patterns import Activation, Attention, Norm, NormKind, Operand, Patterns, Rope, recognise
from qcompile.passes.structure import constant, name_of

Array = np.ndarray[Any, np.dtype[Any]]

#: max|Δ| between float32 arithmetic in two orders, on values of about 1.
CLOSE = 2e-5


class Values:
    """Every value of a model on one random sample."""

    def __init__(self, model: ir.Model) -> None:
        feeds = runtime.synthetic_feeds(model, 5)
        names = [name_of(value) for node in model.graph for value in node.outputs]
        outputs = runtime.Session(runtime.with_outputs(model, names), optimize=False).run(feeds)
        self.arrays: Mapping[str, Array] = {**feeds, **outputs}

    def __getitem__(self, value: ir.Value) -> Array:
        array = constant(value)
        return self.arrays[name_of(value)] if array is None else array


def normalized(norm: Norm, x: Array, values: Values) -> Array:
    mean = x.mean(norm.axes, keepdims=True) if norm.kind is NormKind.LAYER else 0.0
    y = (x - mean) / np.sqrt(((x - mean) ** 2).mean(norm.axes, keepdims=True) + norm.epsilon)
    y = y if norm.gamma is None else y * values[norm.gamma]
    return y if norm.beta is None else y + values[norm.beta]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "silu": lambda x: x * sigmoid(x),
    "hard_swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
}


def turned(rope: Rope, x: Array, values: Values) -> Array:
    cos, sin = values[rope.cos], values[rope.sin]
    half = x.shape[-1] // 2
    first, second = (x[..., ::2], x[..., 1::2]) if rope.interleaved else (x[..., :half], x[..., half:])
    if cos.shape[-1] == x.shape[-1]:
        cos, sin = (part[..., ::2] if rope.interleaved else part[..., :half] for part in (cos, sin))
    parts = first * cos - second * sin, second * cos + first * sin
    return np.stack(parts, -1).reshape(x.shape) if rope.interleaved else np.concatenate(parts, -1)


def heads_of(operand: Operand, values: Values) -> Array:
    """Pick `[heads, tokens, head_dim]` out of the projection's result, of one sample, by the channels alone."""
    assert operand.projection is not None and operand.channels is not None
    rows = np.moveaxis(values[operand.projection.result], operand.projection.axis, -1)
    x = rows.reshape(-1, operand.projection.width)[:, operand.channels].swapaxes(0, 1)
    if operand.norm is not None:
        x = normalized(operand.norm, x, values)
    return x if operand.rope is None else turned(operand.rope, x, values)


def attended(attention: Attention, values: Values) -> Array:
    """Return `[tokens, heads · head_dim of V]`."""
    query, key, value = (heads_of(part, values) for part in (attention.query, attention.key, attention.value))
    scores = attention.scale * query @ key.swapaxes(-1, -2)
    for mask in attention.masks:
        scores = scores + values[mask].reshape(values[mask].shape[-3:])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ value
    return mixed.swapaxes(0, 1).reshape(mixed.shape[1], -1)


def same(actual: Array, expected: Array) -> None:
    np.testing.assert_allclose(actual, expected, rtol=CLOSE, atol=CLOSE)
    assert len(np.unique(actual)) > 3, "a value of few numbers proves little"


def check(model: ir.Model) -> Patterns:
    """Recognise, and hold every pattern against its definition."""
    before = models.serialize(model)
    patterns = recognise(model.graph)
    assert models.serialize(model) == before, "a query changes nothing"
    values = Values(model)
    for norm in patterns.norms:
        same(values[norm.result], normalized(norm, values[norm.source], values))
    for activation in patterns.activations:
        same(values[activation.result], activation.factor * FUNCTIONS[activation.kind](values[activation.source]))
    for rope in patterns.ropes:
        same(values[rope.result], turned(rope, values[rope.source], values))
    for attention in patterns.attentions:
        if attention.output is not None and attention.output_channels is not None:
            reader, axis = attention.output.node.inputs[0], attention.output.axis
            assert reader is not None
            actual = np.moveaxis(values[reader], axis, -1).reshape(-1, len(attention.output_channels))
            same(actual, attended(attention, values)[:, attention.output_channels])
    return patterns


@pytest.fixture
def checked() -> Callable[[ir.Model], Patterns]:
    """Canonicalize a model, recognise, and hold every pattern against its definition."""

    def checked(model: ir.Model) -> Patterns:
        Canonicalize(21)(model)
        return check(model)

    return checked


@pytest.fixture
def recognised(model_of: Callable[..., ir.Model], checked: Callable[[ir.Model], Patterns]) -> Callable[..., Patterns]:
    """Do the same to ONNX text."""
    return lambda text, opset=17, **weights: checked(model_of(text, opset, **weights))


@pytest.fixture
def activation(recognised: Callable[..., Patterns]) -> Callable[..., list[Activation]]:
    """Return the activations that are recognised in nodes that make y from x `[2, 8]`."""

    def activation(nodes: str, opset: int = 17, outputs: str = "", **weights: Any) -> list[Activation]:
        weights = {name: np.asarray(array, np.float32) for name, array in weights.items()}
        return list(
            recognised(f"(float[2,8] x) => (float[2,8] y{outputs}) {{ {nodes} }}", opset, **weights).activations
        )

    return activation
