"""Expressions over floats as CUDA C++: the polynomials of their functions, and what reads their inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qcompile.backends.integer.expressions import Expression
from qcompile.backends.tvm.schedules.x86_floats import ERF, ERF_END, EXP, LN2

#: What each primitive of `integer/expressions.py` is, in terms of its operands.
PRIMITIVES: Mapping[str, str] = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "max": "fmaxf({0}, {1})",
    "min": "fminf({0}, {1})", "abs": "fabsf({0})", "sqrt": "sqrtf({0})", "exp": "qc_exp({0})", "erf": "qc_erf({0})",
    "tanh": "qc_tanh({0})", "equal": "{0} == {1} ? 1.0f : 0.0f", "less": "{0} < {1} ? 1.0f : 0.0f",
    "where": "{0} != 0.0f ? {1} : {2}",
}  # fmt: skip


def literal(value: float) -> str:
    """Return a float32 as C++ has it, to the last bit."""
    single = np.float32(value)
    if not np.isfinite(single):
        return f"__uint_as_float({int(single.view(np.uint32)):#x}u)"
    return f"{float(single)!r}f"


def statements(expression: Expression, leaf: Callable[[int], str]) -> tuple[list[str], str]:
    """Return what computes an expression, and what its value is called then; what stands in it twice is computed once.

    Parameters
    ----------
    expression : tuple
    leaf : callable
        What reads an input, by its number.
    """
    known: dict[Expression, str] = {}
    lines: list[str] = []

    def value(tree: Expression) -> str:
        if tree not in known:
            kind, *operands = tree
            if kind == "number":
                known[tree] = literal(operands[0])
                return known[tree]
            written = leaf(operands[0]) if kind == "leaf" else PRIMITIVES[kind].format(*map(value, operands))
            known[tree] = f"v{len(lines)}"
            lines.append(f"const float {known[tree]} = {written};")
        return known[tree]

    found = value(expression)
    return lines, found


def series(name: str, coefficients: Sequence[float]) -> str:
    """Return a function that sums up Σ c x^i, highest first, each product and sum rounded once."""
    terms = "".join(f"    y = fmaf(y, x, {literal(c)});\n" for c in coefficients[1:])
    head = f"__device__ __forceinline__ float {name}(float x)\n{{\n    float y = {literal(coefficients[0])};\n"
    return f"{head}{terms}    return y;\n}}\n"


def polynomials() -> str:
    """Return what floats.cuh builds on."""
    numbers = {"ERF_END": ERF_END, "LN2_HIGH": -LN2[0], "LN2_LOW": -LN2[1]}
    constants = "".join(f"const float {name} = {literal(value)};\n" for name, value in numbers.items())
    return constants + series("exp_series", EXP) + series("erf_series", ERF)
