from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qcompile.passes.patterns import Patterns, Rope

Find = Callable[..., list[Rope]]
ANGLES = np.outer(np.arange(3), [1.0, 0.1, 0.01]).astype(np.float32)
FULL = {"cos": np.cos(np.tile(ANGLES, 2)), "sin": np.sin(np.tile(ANGLES, 2))}
PAIRED = {"cos": np.cos(np.repeat(ANGLES, 2, 1)), "sin": np.sin(np.repeat(ANGLES, 2, 1))}
HALF = {"cos": np.cos(ANGLES), "sin": np.sin(ANGLES)}
SLICES = {name: np.int64([n]) for name, n in {"i0": 0, "i1": 1, "i2": 2, "i3": 3, "i6": 6, "last": -1}.items()}
ENDS = "p = Mul (x, cos) q = Mul (r, sin) y = Add (p, q)"
CUT = "a = Slice (x, i0, i3, last, i1) b = Slice (x, i3, i6, last, i1) "
EVERY_OTHER = "a = Slice (x, i0, i6, last, i2) b = Slice (x, i1, i6, last, i2) "
PARTS = "ac = Mul (a, cos) bs = Mul (b, sin) u = Sub (ac, bs) bc = Mul (b, cos) as = Mul (a, sin) v = Add (bc, as) "


@pytest.fixture
def found(recognised: Callable[..., Patterns]) -> Find:
    """Return the ropes in nodes that make y of x `[2, 2, 3, 6]`."""

    def found(nodes: str, tables: dict[str, np.ndarray], outputs: str = "", **others: Any) -> list[Rope]:
        text = f"(float[2,2,3,6] x) => (float[2,2,3,6] y{outputs}) {{ {nodes} }}"
        words = nodes.replace(",", " ").replace(")", " ").replace("(", " ").split()
        weights = {name: array for name, array in {**tables, **SLICES, **others}.items() if name in words}
        return list(recognised(text, 17, **weights).ropes)

    return found


@pytest.mark.parametrize(
    "nodes",
    [
        CUT + "n = Neg (b) r = Concat <axis = -1> (n, a) " + ENDS,
        CUT + "n = Neg (b) r = Concat <axis = 3> (n, a) q = Mul (sin, r) p = Mul (cos, x) y = Add (q, p)",
        "a, b = Split <axis = -1> (x) n = Neg (b) r = Concat <axis = -1> (n, a) " + ENDS,
    ],
)
def test_halves(nodes: str, found: Find) -> None:
    [rope] = found(nodes, FULL)
    assert not rope.interleaved and not rope.shared
    assert [v.name for v in (rope.source, rope.result, rope.cos, rope.sin)] == ["x", "y", "cos", "sin"]


def test_neighbours(found: Find) -> None:
    nodes = (
        EVERY_OTHER + "n = Neg (b) n1 = Unsqueeze (n, axis) a1 = Unsqueeze (a, axis) c = Concat <axis = -1> (n1, a1) "
        "r = Reshape (c, back) " + ENDS
    )
    [rope] = found(nodes, PAIRED, axis=np.int64([4]), back=np.int64([2, 2, 3, 6]))
    assert rope.interleaved


@pytest.mark.parametrize("cut", [CUT, "a, b = Split <axis = -1> (x) "])
def test_halves_turned_one_by_one(cut: str, found: Find) -> None:
    [rope] = found(cut + PARTS + "y = Concat <axis = -1> (u, v)", HALF)
    assert not rope.interleaved and rope.source.name == "x" and rope.result.name == "y"


def test_neighbours_turned_one_by_one(found: Find) -> None:
    end = "u1 = Unsqueeze (u, axis) v1 = Unsqueeze (v, axis) c = Concat <axis = -1> (u1, v1) y = Reshape (c, back)"
    [rope] = found(EVERY_OTHER + PARTS + end, HALF, axis=np.int64([4]), back=np.int64([2, 2, 3, 6]))
    assert rope.interleaved and rope.source.name == "x" and rope.result.name == "y"


@pytest.mark.parametrize(
    ("nodes", "tables"),
    [
        (CUT + "r = Concat <axis = -1> (b, a) " + ENDS, FULL),  # nothing is negated
        (CUT + "n = Neg (a) r = Concat <axis = -1> (n, b) " + ENDS, FULL),  # nothing is swapped
        (CUT + "n = Neg (b) m = Neg (a) r = Concat <axis = -1> (n, m) " + ENDS, FULL),  # both are negated
        ("a, b = Split <axis = -1> (x, uneven) n = Neg (b) r = Concat <axis = -1> (n, a) " + ENDS, FULL),
        (CUT + "n = Neg (b) r = Concat <axis = -1> (n, a) p = Mul (r, cos) q = Mul (r, sin) y = Add (p, q)", FULL),
        (CUT + PARTS.replace("Sub", "Add") + "y = Concat <axis = -1> (u, v)", HALF),
        (CUT + PARTS + "y = Concat <axis = -1> (v, u)", HALF),  # the halves change places
        (EVERY_OTHER + PARTS + "y = Concat <axis = -1> (u, v)", HALF),  # neighbours come out as halves
        (CUT + PARTS.replace("as = Mul (a, sin)", "as = Mul (b, sin)") + "y = Concat <axis = -1> (u, v)", HALF),
        (CUT + PARTS.replace("as = Mul (a, sin)", "as = Mul (a, cos)") + "y = Concat <axis = -1> (u, v)", HALF),
    ],
)
def test_near_misses_are_none(nodes: str, tables: dict[str, np.ndarray], found: Find) -> None:
    assert found(nodes, tables, uneven=np.int64([2, 4])) == []


def test_what_stands_between_may_be_read_elsewhere(found: Find) -> None:
    nodes = CUT + "n = Neg (b) r = Concat <axis = -1> (n, a) " + ENDS + " z = Exp (r)"
    [rope] = found(nodes, FULL, outputs=", float[2,2,3,6] z")
    assert rope.shared
