from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qcompile.passes.patterns import Norm, NormKind, Patterns

Find = Callable[..., list[Norm]]

G, B = np.linspace(0.5, 2, 8, dtype=np.float32), np.linspace(-1, 1, 8, dtype=np.float32)
DEVIATION = "m = ReduceMean <axes = [-1]> (x) d = Sub (x, m)"
VARIANCE = "q = Pow (d, two) v = ReduceMean <axes = [-1]> (q) e = Add (v, eps)"
MEAN_SQUARE = "q = Mul (x, x) v = ReduceMean <axes = [-1]> (q) e = Add (v, eps)"
NUMBERS = {
    "two": np.float32(2),
    "eps": np.float32(1e-5),
    "one": np.float32(1),
    "minus": np.float32(-0.5),
    "g": G,
    "b": B,
}


@pytest.fixture
def found(recognised: Callable[..., Patterns]) -> Find:
    """Return the norms in nodes that make y of x, whose last axis is 8 long."""

    def found(nodes: str, shape: str = "2,3,8", outputs: str = "", opset: int = 17, **others: Any) -> list[Norm]:
        text = f"(float[{shape}] x) => (float[{shape}] y{outputs}) {{ {nodes} }}"
        weights = {name: array for name, array in {**NUMBERS, **others}.items() if name in nodes}
        return list(recognised(text, opset, **weights).norms)

    return found


@pytest.mark.parametrize(
    "root",
    [
        "s = Sqrt (e) n = Div (d, s)",
        "s = Sqrt (e) i = Reciprocal (s) n = Mul (d, i)",
        "s = Sqrt (e) i = Div (one, s) n = Mul (i, d)",
        "i = Pow (e, minus) n = Mul (d, i)",
    ],
)
@pytest.mark.parametrize("variance", [VARIANCE, VARIANCE.replace("Pow (d, two)", "Mul (d, d)")])
def test_layer_norm(root: str, variance: str, found: Find) -> None:
    [norm] = found(f"{DEVIATION} {variance} {root} p = Mul (g, n) y = Add (p, b)")
    assert (norm.kind, norm.axes, norm.fused, norm.shared) == (NormKind.LAYER, (-1,), False, False)
    assert norm.epsilon == pytest.approx(1e-5)
    assert [v and v.name for v in (norm.source, norm.result, norm.gamma, norm.beta)] == ["x", "y", "g", "b"]
    assert len(norm.nodes) == len(set(norm.nodes)) == 6 + root.count("=") + 1


def test_the_mean_may_be_taken_off_twice(found: Find) -> None:
    nodes = f"{DEVIATION} k = ReduceMean <axes = [2]> (x) f = Sub (x, k) {VARIANCE} s = Sqrt (e) y = Div (f, s)"
    [norm] = found(nodes)
    assert norm.kind is NormKind.LAYER and norm.gamma is None


@pytest.mark.parametrize(
    "root",
    [
        "s = Sqrt (e) n = Div (x, s)",
        "s = Sqrt (e) i = Reciprocal (s) n = Mul (x, i)",
        "i = Pow (e, minus) n = Mul (i, x)",
    ],
)
def test_rms_norm(root: str, found: Find) -> None:
    [norm] = found(f"{MEAN_SQUARE} {root} y = Mul (n, g)")
    assert (norm.kind, norm.axes) == (NormKind.RMS, (-1,))
    assert norm.gamma is not None and norm.beta is None


def test_rms_norm_with_its_scale_in_the_factor(found: Find) -> None:
    [norm] = found(f"{MEAN_SQUARE} i = Pow (e, minus) f = Mul (i, g) y = Mul (x, f)")
    assert norm.kind is NormKind.RMS and norm.gamma is not None and norm.result.name == "y"


@pytest.mark.parametrize(
    "end",
    [
        "f = Mul (i, g) p = Mul (x, f) k = Mul (m, f) z = Sub (b, k) y = Add (p, z)",
        "f = Mul (g, i) p = Mul (f, x) w = Neg (m) k = Mul (w, f) z = Add (k, b) y = Add (z, p)",
    ],
)
def test_layer_norm_as_keras_writes_it(end: str, found: Find) -> None:
    [norm] = found(
        f"{DEVIATION} {VARIANCE.replace('Pow (d, two)', 'Mul (d, d)')} s = Sqrt (e) i = Reciprocal (s) {end}"
    )
    assert norm.kind is NormKind.LAYER and norm.gamma is not None and norm.beta is not None and not norm.shared


def test_keras_without_scale_and_centre(found: Find) -> None:
    end = "s = Sqrt (e) i = Reciprocal (s) p = Mul (x, i) w = Neg (m) k = Mul (w, i) y = Add (p, k)"
    [norm] = found(f"{DEVIATION} {VARIANCE} {end}")
    assert norm.kind is NormKind.LAYER and norm.gamma is None and norm.beta is None


def test_layer_norm_as_paddle_writes_it(found: Find) -> None:
    nodes = f"{DEVIATION} {VARIANCE} s = Sqrt (e) n = Div (d, s) p = Mul (n, g) y = Add (p, b)"
    [norm] = found(nodes.replace("[-1]", "[2]"), opset=11)
    assert norm.axes == (-1,)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_the_numbers_may_have_any_shape_of_one_element(shape: tuple[int, ...], found: Find) -> None:
    nodes = f"{DEVIATION} {VARIANCE} s = Sqrt (e) n = Div (d, s) p = Mul (n, g) y = Add (b, p)"
    others = {name: np.reshape(NUMBERS[name], shape) for name in ("two", "eps")}
    [norm] = found(nodes, g=G.reshape(1, 1, 8), **others)
    assert norm.epsilon == pytest.approx(1e-5) and norm.gamma is not None


def test_axes_may_be_several_or_in_the_middle(found: Find) -> None:
    end = "s = Sqrt (e) y = Div (d, s)"
    [norm] = found(f"{DEVIATION} {VARIANCE} {end}".replace("[-1]", "[1, 2]"))
    assert norm.axes == (-2, -1)
    [norm] = found(f"{DEVIATION} {VARIANCE} {end}".replace("[-1]", "[1]"))
    assert norm.axes == (-2,)


def test_fused_norms(found: Find) -> None:
    [norm] = found("y = LayerNormalization <axis = 2, epsilon = 0.01> (x, g, b)")
    assert (norm.kind, norm.axes, norm.fused, norm.epsilon) == (NormKind.LAYER, (-1,), True, pytest.approx(0.01))


@pytest.mark.parametrize(
    "nodes",
    [
        # n - 1 in the denominator; ε behind the root; the square of something else; another power
        f"{DEVIATION} q = Pow (d, two) v = ReduceMean <axes = [-1]> (q) u = Mul (v, more) e = Add (u, eps) "
        "s = Sqrt (e) y = Div (d, s)",
        f"{DEVIATION} q = Pow (d, two) v = ReduceMean <axes = [-1]> (q) t = Sqrt (v) s = Add (t, eps) y = Div (d, s)",
        f"{DEVIATION} q = Mul (d, x) v = ReduceMean <axes = [-1]> (q) a = Abs (v) e = Add (a, eps) "
        "s = Sqrt (e) y = Div (d, s)",
        f"{DEVIATION} q = Pow (d, four) v = ReduceMean <axes = [-1]> (q) e = Add (v, eps) s = Sqrt (e) y = Div (d, s)",
        # the mean over one axis is taken off, and the variance divides something else
        f"{DEVIATION} {VARIANCE} s = Sqrt (e) y = Div (x, s)",
        f"{DEVIATION} {VARIANCE} s = Sqrt (e) a = Neg (x) y = Div (a, s)",
        # the quotient upside down
        f"{DEVIATION} {VARIANCE} s = Sqrt (e) y = Div (s, d)",
        # an ε for each channel
        f"{DEVIATION} q = Pow (d, two) v = ReduceMean <axes = [-1]> (q) e = Add (v, abs) s = Sqrt (e) y = Div (d, s)",
    ],
)
def test_near_misses_are_no_norms(nodes: str, found: Find) -> None:
    assert found(nodes, more=np.float32(8 / 7), four=np.float32(4), abs=np.abs(B)) == []


def test_a_mean_over_other_axes_than_the_variance_is_outside(found: Find) -> None:
    [norm] = found(
        f"{DEVIATION} q = Pow (d, two) v = ReduceMean <axes = [1]> (q) e = Add (v, eps) s = Sqrt (e) y = Div (d, s)"
    )
    assert (norm.kind, norm.source.name, norm.axes) == (NormKind.RMS, "d", (-2,))


def test_an_axis_that_is_not_kept_is_no_norm(found: Find) -> None:
    nodes = "q = Mul (x, x) v = ReduceMean <axes = [-1], keepdims = 0> (q) e = Add (v, eps) s = Sqrt (e) y = Div (x, s)"
    assert found(nodes, shape="8,8") == []


def test_a_factor_along_another_axis_or_of_one_number_is_not_gamma(found: Find) -> None:
    head = f"{MEAN_SQUARE} s = Sqrt (e) n = Div (x, s)"
    [norm] = found(f"{head} y = Mul (n, number)", number=np.float32(3))
    assert norm.gamma is None and norm.result.name == "n"
    [norm] = found(f"{head} y = Mul (n, x)")
    assert norm.gamma is None and norm.result.name == "n"


def test_what_stands_between_may_be_read_elsewhere(found: Find) -> None:
    end = "s = Sqrt (e) n = Div (d, s) p = Mul (n, g) y = Add (p, b) z = Exp (%s)"
    [norm] = found(f"{DEVIATION} {VARIANCE} {end % 'd'}", outputs=", float[2,3,8] z")
    assert norm.shared and norm.gamma is not None
    # γ does not belong to what is read in front of it, so the norm ends there.
    [norm] = found(f"{DEVIATION} {VARIANCE} {end % 'n'}", outputs=", float[2,3,8] z")
    assert not norm.shared and norm.gamma is None and norm.result.name == "n"


def test_what_stands_between_may_be_an_output(found: Find) -> None:
    end = "s = Sqrt (e) n = Div (d, s) y = Mul (n, g)"
    [norm] = found(f"{DEVIATION} {VARIANCE} {end}", outputs=", float[2,3,8] n")
    assert norm.gamma is None and norm.result.name == "n"


def test_the_length_of_the_axis_may_be_read(found: Find) -> None:
    [norm] = found(f"{DEVIATION} {VARIANCE} s = Sqrt (e) y = Div (d, s) z = Shape (d)", outputs=", int64[3] z")
    assert not norm.shared
