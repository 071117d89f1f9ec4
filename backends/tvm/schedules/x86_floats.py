"""Expressions in float32 by vectors: their functions as polynomials, their inputs as whatever is stored.

Errors against exact functions, over all finite inputs (tests hold them): exp 3e-7 relative between -87 and 88 (below it
gives 1.2e-38, above 1.6e38), erf 1e-6 absolute, tanh 5e-7 absolute. Products and sums are fused where written so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompile.backends.integer.expressions import Expression
from qcompile.backends.tvm.native import builder
from qcompile.backends.tvm.schedules.vectors import all_lanes, load, places

#: exp(r) = 1 + r + r² · Σ c r^i on |r| <= ln 2 / 2, highest first (Cephes' expf), and ln 2 in two parts.
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
LN2 = (0.693359375, -2.12194440e-4)
LOWEST, HIGHEST = -87.0, 88.0
#: A float beside which whole numbers of up to 22 bits, and nothing less, can be told.
WHOLE = 1.5 * 2.0**23
#: The lowest and the highest code, by what they are stored as.
CODES = {"int8": (-128, 127), "uint8": (0, 255)}
#: Beyond this erf is 1 within 8e-7.
ERF_END = 3.5
#: erf(x) / x = Σ c u^i with u = 2 x² / ERF_END² - 1.
ERF_DEGREE = 12


def _erf_coefficients() -> tuple[float, ...]:
    """Return the Chebyshev interpolation of erf(x) / x in u, as powers of u, highest first."""
    from math import erf, pi, sqrt

    count = 4001
    u = np.cos(np.linspace(0.0, np.pi, count))
    x = np.sqrt((u + 1.0) / 2.0) * ERF_END
    quotient = [erf(value) / value if value > 1e-6 else 2.0 / sqrt(pi) for value in x]
    fitted = np.polynomial.chebyshev.chebfit(u, quotient, ERF_DEGREE)
    return tuple(float(np.float32(c)) for c in np.polynomial.chebyshev.cheb2poly(fitted)[::-1])


ERF = _erf_coefficients()


@dataclass(frozen=True)
class Stored:
    """How one input of an expression, or a result, is stored.

    Parameters
    ----------
    dtype : str
        ``float32``, ``int64``, or of codes: ``uint8`` where these are stored above the program's, else ``int8``.
    steps : tuple of int
        Elements from one to the next along each axis of the loops; 0 where it stays.
    scale : float
    zero_point : int
        Of stored codes.
    """

    dtype: str
    steps: tuple[int, ...]
    scale: float = 1.0
    zero_point: int = 0


class Vectors:
    """Emits float32 arithmetic on so many lanes.

    Parameters
    ----------
    lanes : int
    """

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self.kind = "float32" if lanes == 1 else f"float32x{lanes}"
        self.whole = "int32" if lanes == 1 else f"int32x{lanes}"

    def number(self, value: float, dtype: str = "float32") -> Any:
        """Return a constant in all lanes."""
        if self.lanes > 1:
            return all_lanes(value, dtype, self.lanes)  # type: ignore[arg-type]
        ir = builder()
        return ir.float32(value) if dtype == "float32" else ir.int32(value)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """Return a · b + c, rounded once."""
        return builder().call_llvm_pure_intrin(self.kind, "llvm.fma", a, b, c)

    def polynomial(self, coefficients: Sequence[float], x: Any) -> Any:
        """Return Σ c x^i, highest first."""
        found = self.number(coefficients[0])
        for coefficient in coefficients[1:]:
            found = self.fma(found, x, self.number(coefficient))
        return builder().bind(found)

    def exp(self, x: Any, highest: float = HIGHEST, lowest: float = LOWEST) -> Any:
        """Return e to the x, of which nothing is above `highest`, and what is below `lowest` counts as that.

        Beside a number that leaves no bits behind the point, the sum's last bits are the nearest whole number: as a
        float once that number is taken away again, and as what the exponent grows by once they are shifted there.
        """
        ir = builder()
        bounded = x if highest <= 0.0 else ir.min(x, self.number(highest))
        x = ir.bind(ir.max(bounded, self.number(lowest)))
        beside = ir.bind(self.fma(x, self.number(float(np.log2(np.e))), self.number(WHOLE)))
        n = ir.bind(beside - self.number(WHOLE))
        r = ir.bind(self.fma(n, self.number(-LN2[1]), self.fma(n, self.number(-LN2[0]), x)))
        p = ir.bind(self.fma(self.polynomial(EXP, r), r * r, r + self.number(1.0)))
        power = ir.reinterpret(self.whole, beside) << self.number(23, "int32")
        return ir.bind(ir.reinterpret(self.kind, ir.reinterpret(self.whole, p) + power))

    def erf(self, x: Any) -> Any:
        """Return the error function."""
        ir = builder()
        x = ir.bind(ir.max(ir.min(x, self.number(ERF_END)), self.number(-ERF_END)))
        u = ir.bind(self.fma(x * x, self.number(2.0 / ERF_END**2), self.number(-1.0)))
        return ir.bind(x * self.polynomial(ERF, u))

    def tanh(self, x: Any) -> Any:
        """Return 1 - 2 / (e^2x + 1)."""
        one = self.number(1.0)
        return one - self.number(2.0) / (self.exp(x + x) + one)

    def choice(self, condition: Any) -> Any:
        """Return 1 where a condition holds, and 0 elsewhere."""
        return builder().Select(condition, self.number(1.0), self.number(0.0))

    def evaluate(self, expression: Expression, leaf: Callable[[int], Any]) -> Any:
        """Emit an expression; what stands in it several times is computed once."""
        known: dict[Expression, Any] = {}
        ir = builder()

        def value(tree: Expression) -> Any:
            if tree not in known:
                kind, *operands = tree
                if kind == "leaf":
                    made = leaf(operands[0])
                elif kind == "number":
                    made = self.number(operands[0])
                else:
                    made = self.primitives[kind](*map(value, operands))
                known[tree] = made if kind == "number" else ir.bind(made)
            return known[tree]

        return value(expression)

    @property
    def primitives(self) -> Mapping[str, Callable[..., Any]]:
        """What each primitive of `expressions.py` is."""
        ir = builder()
        return {
            "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b,
            "max": ir.max, "min": ir.min, "abs": lambda a: ir.max(a, self.number(0.0) - a), "sqrt": ir.sqrt,
            "exp": self.exp, "erf": self.erf, "tanh": self.tanh, "equal": lambda a, b: self.choice(a.equal(b)),
            "less": lambda a, b: self.choice(a < b),
            "where": lambda c, a, b: ir.Select(c.equal(self.number(0.0)), b, a),
        }  # fmt: skip

    def read(self, buffer: Any, stored: Stored, at: Any) -> Any:
        """Return neighbours along the last axis, as floats."""
        ir = builder()
        step = stored.steps[-1]
        if step == 0 or self.lanes == 1:
            value = self._real(buffer[at], stored, 1)
            return value if self.lanes == 1 else ir.broadcast(value, self.lanes)
        index = places(at, self.lanes) if step == 1 else ir.ramp(at, step, self.lanes)
        return self._real(buffer[index], stored, self.lanes)

    def _real(self, value: Any, stored: Stored, lanes: int) -> Any:
        ir, own = builder(), Vectors(lanes)
        if stored.dtype == "float32":
            return value
        if stored.dtype not in CODES:
            return ir.cast(value, own.kind)
        above = ir.cast(value, own.whole) - own.number(stored.zero_point, "int32")
        return ir.cast(above, own.kind) * own.number(stored.scale)

    def write(self, buffer: Any, stored: Stored, at: Any, value: Any, count: int) -> None:
        """Store the first `count` lanes along the last axis: as floats, or rounded to codes."""
        ir = builder()
        if stored.dtype in CODES:
            value = self.codes(value, stored)
        if stored.steps[-1] != 1 or count < self.lanes:
            kept = ir.alloc_buffer((self.lanes,), stored.dtype, scope="local")
            ir.buffer_store(kept, value, [places(0, self.lanes)])
            _scatter(buffer, kept, at, stored.steps[-1], count)
            return
        ir.buffer_store(buffer, value, [places(at, self.lanes)])

    def codes(self, value: Any, stored: Stored) -> Any:
        """Return values rounded to codes."""
        ir = builder()
        low, high = (float(bound - stored.zero_point) for bound in CODES[stored.dtype])
        scaled = value * self.number(float(np.float32(1.0) / np.float32(stored.scale)))
        # Bounds on floats, in front: what is beyond int32, or no number, becomes a code all the same.
        bounded = ir.max(ir.min(scaled, self.number(high)), self.number(low))
        nearest = ir.call_llvm_pure_intrin(self.whole, "llvm.lrint", bounded)
        rounded = nearest + self.number(stored.zero_point, "int32")
        return ir.cast(rounded, stored.dtype if self.lanes == 1 else f"{stored.dtype}x{self.lanes}")

    def summed(self, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
        """Return all lanes as one number, neighbours' halves by halves."""
        ir, lanes = builder(), self.lanes
        while lanes > 1:
            value, half = ir.bind(value), lanes // 2
            low, high = (ir.Shuffle([value], list(range(start, start + half))) for start in (0, half))
            value, lanes = combine(low, high), half
        return value


def _scatter(buffer: Any, kept: Any, at: Any, step: int, count: int) -> None:
    ir = builder()
    if step != 1:
        for lane in range(count):
            ir.buffer_store(buffer, kept[lane], [at + lane * step])
        return
    done = 0
    while done < count:
        piece = 1 << ((count - done).bit_length() - 1)
        ir.buffer_store(buffer, load(kept, done, piece), [places(at + done, piece)])
        done += piece
