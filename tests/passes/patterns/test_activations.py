from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qcompile.passes.patterns import Activation, ActivationKind, Patterns

Find = Callable[..., list[Activation]]
ROOT, HALF, TANH, CUBE = math.sqrt(2), 0.5, math.sqrt(2 / math.pi), 0.044715

ERF = "d = Div (x, root) e = Erf (d) a = Add (e, one) "
TANH_OF = "c = Pow (x, three) k = Mul (cube, c) s = Add (x, k) u = Mul (s, scale) t = Tanh (u) a = Add (one, t) "


@pytest.mark.parametrize(
    "nodes",
    [
        ERF + "p = Mul (x, a) y = Mul (p, half)",
        ERF + "h = Mul (x, half) y = Mul (a, h)",
        ERF + "h = Mul (a, half) y = Mul (h, x)",
        ERF + "h = Div (x, two) y = Mul (h, a)",
        ERF + "p = Mul (a, x) y = Div (p, two)",
        "d = Mul (inverse, x) e = Erf (d) h = Mul (e, half) a = Add (half, h) y = Mul (a, x)",
    ],
)
def test_gelu(nodes: str, activation: Find) -> None:
    numbers = {"root": ROOT, "one": 1, "half": HALF, "two": 2, "inverse": 1 / ROOT}
    [found] = activation(nodes, **{name: number for name, number in numbers.items() if name in nodes})
    assert found.kind is ActivationKind.GELU and found.source.name == "x" and found.result.name == "y"
    assert len(found.nodes) == nodes.count("=") and not found.shared


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_numbers_may_have_any_shape_of_one_element(shape: tuple[int, ...], activation: Find) -> None:
    numbers = {"root": np.full(shape, ROOT), "one": np.ones(shape), "half": np.full(shape, HALF)}
    assert len(activation(ERF + "p = Mul (x, a) y = Mul (p, half)", **numbers)) == 1


@pytest.mark.parametrize(
    "nodes",
    [
        TANH_OF + "p = Mul (x, a) y = Mul (p, half)",
        TANH_OF.replace("c = Pow (x, three)", "q = Mul (x, x) c = Mul (q, x)") + "h = Mul (half, x) y = Mul (h, a)",
        # √(2/π) x (1 + 0.044715 x²)
        "q = Mul (x, x) k = Mul (q, cube) o = Add (k, one) w = Mul (x, scale) u = Mul (w, o) t = Tanh (u) "
        "a = Add (t, one) h = Mul (a, half) y = Mul (x, h)",
    ],
)
def test_gelu_by_tanh(nodes: str, activation: Find) -> None:
    numbers = {"three": 3, "cube": CUBE, "scale": TANH, "one": 1, "half": HALF}
    [found] = activation(nodes, **{name: number for name, number in numbers.items() if name in nodes})
    assert found.kind is ActivationKind.GELU_TANH and not found.shared


@pytest.mark.parametrize(
    ("nodes", "kind", "numbers"),
    [
        ("s = Sigmoid (x) y = Mul (s, x)", "silu", {}),
        ("k = Mul (x, c) s = Sigmoid (k) y = Mul (x, s)", "quick_gelu", {"c": 1.702}),
        ("s = HardSigmoid <alpha = 0.16666667, beta = 0.5> (x) y = Mul (s, x)", "hard_swish", {}),
        (
            "a = Add (x, three) r = Clip (a, low, six) p = Mul (x, r) y = Div (p, six)",
            "hard_swish",
            {"three": 3, "low": 0, "six": 6},
        ),
        (
            "a = Add (x, three) r = Clip (a, low, six) p = Div (r, six) y = Mul (x, p)",
            "hard_swish",
            {"three": 3, "low": 0, "six": 6},
        ),
        ("l = Softplus (x) t = Tanh (l) y = Mul (x, t)", "mish", {}),
    ],
)
def test_gates(nodes: str, kind: str, numbers: dict[str, float], activation: Find) -> None:
    [found] = activation(nodes, **numbers)
    assert found.kind == kind and found.source.name == "x" and found.result.name == "y"


def test_the_source_may_be_a_sum(activation: Find) -> None:
    bias = np.linspace(-1, 1, 8)
    [found] = activation("b = Add (x, v) s = Sigmoid (b) y = Mul (b, s)", v=bias)
    assert found.source.name == "b" and len(found.nodes) == 2


def test_fused_operators(activation: Find) -> None:
    kinds = [
        activation(f"y = {op} (x)", opset=20)[0].kind
        for op in ("Gelu", 'Gelu <approximate = "tanh">', "HardSwish", "Mish")
    ]
    assert [str(kind) for kind in kinds] == ["gelu", "gelu_tanh", "hard_swish", "mish"]


@pytest.mark.parametrize(
    ("nodes", "numbers"),
    [
        (ERF + "p = Mul (x, a) y = Mul (p, half)", {"root": 1.5, "one": 1, "half": HALF}),
        (ERF + "p = Mul (x, a) y = Mul (p, half)", {"root": ROOT, "one": 2, "half": HALF}),
        (ERF + "y = Mul (a, half)", {"root": ROOT, "one": 1, "half": HALF}),
        (ERF + "n = Neg (x) p = Mul (n, a) y = Mul (p, half)", {"root": ROOT, "one": 1, "half": HALF}),
        (
            TANH_OF + "p = Mul (x, a) y = Mul (p, half)",
            {"three": 3, "cube": 0.05, "scale": TANH, "one": 1, "half": HALF},
        ),
        (
            TANH_OF + "p = Mul (x, a) y = Mul (p, half)",
            {"three": 2, "cube": CUBE, "scale": TANH, "one": 1, "half": HALF},
        ),
        ("k = Mul (x, c) s = Sigmoid (k) y = Mul (x, s)", {"c": 1.7}),
        ("k = Mul (x, c) s = Sigmoid (k) y = Mul (x, s)", {"c": np.linspace(1, 2, 8)}),
        ("n = Neg (x) s = Sigmoid (x) y = Mul (n, s)", {}),
        ("s = Sigmoid (x) y = Mul (s, s)", {}),
        ("s = HardSigmoid <alpha = 0.2, beta = 0.5> (x) y = Mul (s, x)", {}),
        (
            "a = Add (x, three) r = Clip (a, low, six) p = Mul (x, r) y = Div (p, six)",
            {"three": 3, "low": -1, "six": 6},
        ),
        ("s = Softplus (x) n = Neg (x) t = Tanh (s) y = Mul (n, t)", {}),
        ("t = Tanh (x) y = Mul (x, t)", {}),
    ],
)
def test_near_misses_are_none(nodes: str, numbers: dict[str, float], activation: Find) -> None:
    assert activation(nodes, **numbers) == []


def test_a_gate_of_another_tensor_is_none(recognised: Callable[..., Patterns]) -> None:
    text = "(float[2,8] x, float[2,8] u) => (float[2,8] y) { s = Sigmoid (x) y = Mul (s, u) }"
    assert recognised(text).activations == ()


def test_a_gate_may_be_read_elsewhere(activation: Find) -> None:
    [found] = activation("s = Sigmoid (x) y = Mul (x, s) z = Exp (s)", outputs=", float[2,8] z")
    assert found.shared
    [found] = activation("s = Sigmoid (x) y = Mul (x, s)", outputs=", float[2,8] s")
    assert found.shared


@pytest.mark.parametrize(
    ("nodes", "kind", "factor", "numbers"),
    [
        (ERF + "y = Mul (x, a)", "gelu", 2, {"root": ROOT, "one": 1}),
        (ERF + "p = Mul (x, a) y = MatMul (p, w)", "gelu", 2, {"root": ROOT, "one": 1, "w": np.ones((8, 8))}),
        (ERF + "p = Mul (x, a) y = Mul (p, v)", "gelu", 2, {"root": ROOT, "one": 1, "v": np.linspace(1, 2, 8)}),
        (ERF + "p = Mul (x, a) y = Div (half, p)", "gelu", 2, {"root": ROOT, "one": 1, "half": HALF}),
        (ERF + "p = Mul (x, a) y = Mul (p, six)", "gelu", 2, {"root": ROOT, "one": 1, "six": 0.6}),
        (
            "a = Add (x, three) r = Clip (a, low, six) y = Mul (x, r)",
            "hard_swish",
            6,
            {"three": 3, "low": 0, "six": 6},
        ),
    ],
)
def test_a_missing_factor_is_told(
    nodes: str, kind: str, factor: float, numbers: dict[str, Any], activation: Find
) -> None:
    [found] = activation(nodes, **numbers)
    assert found.kind == kind and found.factor == pytest.approx(factor)
    assert found.result.producer().inputs[0].name == "x"


def test_the_factor_is_folded_by_canonicalize(activation: Find) -> None:
    nodes = ERF + "p = Mul (x, a) h = Mul (p, half) y = MatMul (h, w)"
    [found] = activation(nodes, root=ROOT, one=1, half=HALF, w=np.eye(8) + 1)
    assert found.factor == pytest.approx(2) and found.result.uses()[0].node.op_type == "MatMul"


def test_a_result_in_the_middle_ends_the_product(activation: Find) -> None:
    nodes = ERF + "p = Mul (x, a) y = Mul (p, half)"
    [found] = activation(nodes, outputs=", float[2,8] p", root=ROOT, one=1, half=HALF)
    assert found.result.name == "p" and found.factor == pytest.approx(2) and not found.shared
