"""Expressions over floats, element by element: what float operations read their inputs through.

An expression is nested tuples: ``("leaf", i)``, ``("number", x)``, or a primitive's name and its operands. All of it is
in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Expression = tuple[Any, ...]


def leaf(index: int) -> Expression:
    """Return what one input has at the element's place."""
    return ("leaf", index)


def number(value: float) -> Expression:
    """Return a constant."""
    return ("number", float(np.float32(value)))


def _erf(x: FloatArray) -> FloatArray:
    """Return the error function, which NumPy does not have."""
    flat = np.asarray(x, np.float64).reshape(-1).tolist()
    return np.array([math.erf(value) for value in flat], np.float32).reshape(np.shape(x))


#: What each primitive computes. Comparisons give 1 and 0; ``where`` takes its second operand where the first is not 0.
PRIMITIVES: Mapping[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "exp": np.exp,
    "erf": _erf,
    "tanh": np.tanh,
    "equal": lambda a, b: (a == b).astype(np.float32),
    "less": lambda a, b: (a < b).astype(np.float32),
    "where": lambda which, a, b: np.where(which != 0.0, a, b),
}


def evaluate(expression: Expression, leaves: Sequence[FloatArray]) -> FloatArray:
    """Return an expression's values for arrays that broadcast, in float32."""
    kind, *operands = expression
    if kind == "leaf":
        return leaves[operands[0]]
    if kind == "number":
        return np.asarray(np.float32(operands[0]))
    with np.errstate(all="ignore"):
        result = PRIMITIVES[kind](*(evaluate(operand, leaves) for operand in operands))
    return np.asarray(result, np.float32)


def shifted(expression: Expression, by: int) -> Expression:
    """Return an expression whose leaves are counted from another one on."""
    kind, *operands = expression
    if kind == "leaf":
        return leaf(operands[0] + by)
    return expression if kind == "number" else (kind, *(shifted(operand, by) for operand in operands))


def inverse(expression: Expression) -> Expression | None:
    """Return what multiplies where an expression divides, of a number whose inverse is one: a division takes longer."""
    kind, *operands = expression
    found = 1.0 / operands[0] if kind == "number" and operands[0] else 0.0
    smallest, largest = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    return number(found) if smallest <= abs(found) <= largest else None


def _sigmoid(x: Expression) -> Expression:
    return ("div", number(1.0), ("add", number(1.0), ("exp", ("sub", number(0.0), x))))


def _gelu(x: Expression, attributes: Mapping[str, Any]) -> Expression:
    half = ("mul", x, number(0.5))
    if attributes.get("approximate", "none") == "tanh":
        cubed = ("mul", ("mul", x, x), ("mul", x, number(0.044715)))
        inner = ("tanh", ("mul", number(np.sqrt(2.0 / np.pi)), ("add", x, cubed)))
    else:
        inner = ("erf", ("mul", x, number(np.sqrt(0.5))))
    return ("mul", half, ("add", number(1.0), inner))


def _hard_sigmoid(x: Expression, alpha: float, beta: float) -> Expression:
    line = ("add", ("mul", x, number(alpha)), number(beta))
    return ("max", number(0.0), ("min", number(1.0), line))


def _leaky(x: Expression, alpha: float) -> Expression:
    return ("where", ("less", x, number(0.0)), ("mul", x, number(alpha)), x)


#: Functions of one value, by ONNX operator: from an expression and the node's attributes.
FUNCTIONS: Mapping[str, Callable[[Expression, Mapping[str, Any]], Expression]] = {
    "Abs": lambda x, _: ("abs", x),
    "Erf": lambda x, _: ("erf", x),
    "Exp": lambda x, _: ("exp", x),
    "Gelu": _gelu,
    "HardSigmoid": lambda x, a: _hard_sigmoid(x, a.get("alpha", 0.2), a.get("beta", 0.5)),
    "HardSwish": lambda x, _: ("mul", x, _hard_sigmoid(x, 1.0 / 6.0, 0.5)),
    "LeakyRelu": lambda x, a: _leaky(x, a.get("alpha", 0.01)),
    "Neg": lambda x, _: ("sub", number(0.0), x),
    "Not": lambda x, _: ("sub", number(1.0), x),
    "Reciprocal": lambda x, _: ("div", number(1.0), x),
    "Relu": lambda x, _: ("max", x, number(0.0)),
    "Sigmoid": lambda x, _: _sigmoid(x),
    "Sqrt": lambda x, _: ("sqrt", x),
    "Tanh": lambda x, _: ("tanh", x),
}
#: Of two values.
PAIRS: Mapping[str, str] = {
    "Add": "add", "Div": "div", "Equal": "equal", "Less": "less", "Max": "max", "Min": "min", "Mul": "mul",
    "Sub": "sub",
}  # fmt: skip
