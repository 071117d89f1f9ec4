"""What is known of values that are computed from shapes: numbers, and axes that are copied from inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from qcompile.passes import structure
from qcompile.passes.canonicalize.editing import tensor_of
from qcompile.passes.canonicalize.trace_axes import Axes, Element, trace

INTEGERS = frozenset({ir.DataType.INT32, ir.DataType.INT64})
#: Longer vectors are data rather than shapes.
LONGEST = 64
#: Their second input is the shape of their result.
RESHAPING = frozenset({"Reshape", "Expand"})


@dataclass(frozen=True)
class Content:
    """Elements of an integer vector, or of a number (`scalar`)."""

    elements: tuple[Element, ...]
    scalar: bool = False

    @property
    def numbers(self) -> tuple[int, ...] | None:
        """Return the elements if all of them are numbers, else None."""
        numbers = tuple(element for element in self.elements if isinstance(element, int))
        return numbers if len(numbers) == len(self.elements) else None


@dataclass(frozen=True)
class Known:
    """What is known of a graph's values: the numbers of some, the axes of most."""

    numbers: dict[ir.Value, Content] = field(default_factory=dict)
    axes: dict[ir.Value, Axes] = field(default_factory=dict)

    def content_of(self, value: ir.Value | None) -> Content | None:
        """Return what is known of a value's elements, constants included."""
        if value is None:
            return None
        tensor = structure.constant_tensor(value)
        if tensor is None:
            return self.numbers.get(value)
        if tensor.dtype not in INTEGERS or len(tensor.shape) > 1 or tensor.size > LONGEST:
            return None
        return Content(tuple(tensor_of(value) or ()), scalar=len(tensor.shape) == 0)

    def axes_of(self, value: ir.Value | None) -> Axes | None:
        """Return the lengths of a value's axes, or None if its rank is not known."""
        if value is None or value in self.axes:
            return None if value is None else self.axes[value]
        return declared_axes(value)


def declared_axes(value: ir.Value) -> Axes | None:
    """Return the lengths of the axes as the model declares or inference found them, or None if the rank is open."""
    if value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


def study(graph: ir.Graph) -> Known:
    """Evaluate a sorted graph's shape arithmetic, and follow its open axes, as far as that goes."""
    known = Known()
    for node in graph:
        if not node.outputs:
            continue
        wanted = known.content_of(node.inputs[1]) if node.op_type in RESHAPING and len(node.inputs) > 1 else None
        axes = trace(node, known.axes_of, None if wanted is None else wanted.elements)
        if axes is not None:
            known.axes[node.outputs[0]] = axes
        if structure.is_standard(node, *RULES):
            content = RULES[node.op_type](node, known)
            if content is not None and len(content.elements) <= LONGEST:
                known.numbers[node.outputs[0]] = content
    return known


def _shape(node: ir.Node, known: Known) -> Content | None:
    axes = known.axes_of(node.inputs[0])
    if axes is None:
        return None
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(axes))
    return Content(axes[slice(start, end)])


def _size(node: ir.Node, known: Known) -> Content | None:
    total = 1
    for axis in known.axes_of(node.inputs[0]) or (None,):
        if not isinstance(axis, int):
            return None
        total *= axis
    return Content((total,), scalar=True)


def _gather(node: ir.Node, known: Known) -> Content | None:
    source, index = known.content_of(node.inputs[0]), known.content_of(node.inputs[1])
    if source is None or source.scalar or index is None or index.numbers is None:
        return None
    length = len(source.elements)
    if not all(-length <= number < length for number in index.numbers):
        return None
    return Content(tuple(source.elements[number] for number in index.numbers), index.scalar)


def _slice(node: ir.Node, known: Known) -> Content | None:
    source = known.content_of(node.inputs[0])
    bounds = [known.content_of(value) for value in node.inputs[1:]]
    if source is None or any(bound is None or bound.numbers is None for bound in bounds):
        return None
    start, end, *others = (bound.numbers or () for bound in bounds if bound is not None)
    step = others[1] if len(others) > 1 else (1,)
    if len(start) != 1 or len(end) != 1 or step[0] <= 0:
        return None
    return Content(source.elements[start[0] : end[0] : step[0]])


def _view(node: ir.Node, known: Known) -> Content | None:
    source, result = known.content_of(node.inputs[0]), known.axes_of(node.outputs[0])
    if source is None or result is None or len(result) > 1:
        return None
    return Content(source.elements, scalar=not result)


def _concat(node: ir.Node, known: Known) -> Content | None:
    parts = [known.content_of(value) for value in node.inputs]
    if any(part is None or part.scalar for part in parts):
        # What one part holds is not known, but its length may be, and -1 can stand for one element.
        axes = [known.axes_of(value) for value in node.inputs]
        if not all(axis is not None and len(axis) == 1 and isinstance(axis[0], int) for axis in axes):
            return None
        parts = [part or Content((None,) * axis[0]) for part, axis in zip(parts, axes, strict=True)]  # type: ignore
    return Content(tuple(element for part in parts if part is not None for element in part.elements))


def _same(node: ir.Node, known: Known) -> Content | None:
    return known.content_of(node.inputs[0])


def _cast(node: ir.Node, known: Known) -> Content | None:
    source = known.content_of(node.inputs[0])
    if source is None or node.attributes.get_int("to", 0) not in {int(dtype) for dtype in INTEGERS}:
        return None
    # No axis is so long that int32 could not count it; computed numbers may be.
    fits = all(not isinstance(element, int) or abs(element) < 2**31 for element in source.elements)
    return source if fits else None


def _arithmetic(compute: Callable[[int, int], int], neutral: int | None) -> Callable[[ir.Node, Known], Content | None]:
    def evaluate(node: ir.Node, known: Known) -> Content | None:
        a, b = known.content_of(node.inputs[0]), known.content_of(node.inputs[1])
        if a is None or b is None:
            return None
        length = max(len(a.elements), len(b.elements))
        if len(a.elements) not in (1, length) or len(b.elements) not in (1, length):
            return None
        left, right = (c.elements * (length if len(c.elements) == 1 else 1) for c in (a, b))
        return Content(tuple(map(element, left, right)), a.scalar and b.scalar)

    def element(left: Element, right: Element) -> Element:
        if isinstance(left, int) and isinstance(right, int):
            number = None if compute is _quotient and right == 0 else compute(left, right)
            # int32 and int64 wrap around at their ends, Python's integers do not; no shape comes near either.
            return number if number is not None and abs(number) < 2**31 else None
        return left if right == neutral and neutral is not None else None

    return evaluate


def _equal(node: ir.Node, known: Known) -> Content | None:
    a, b = known.content_of(node.inputs[0]), known.content_of(node.inputs[1])
    if a is None or b is None or len(a.elements) != len(b.elements):
        return None
    return Content(tuple(map(_same_length, a.elements, b.elements)), a.scalar and b.scalar)


def _same_length(left: Element, right: Element) -> Element:
    if left is None or right is None:
        return None
    if isinstance(left, int) == isinstance(right, int):
        # Two names may well stand for one length.
        return int(left == right) if left == right or isinstance(left, int) else None
    number = left if isinstance(left, int) else right
    return 0 if isinstance(number, int) and number < 0 else None


def _where(node: ir.Node, known: Known) -> Content | None:
    condition, *sides = (known.content_of(value) for value in node.inputs)
    if condition is None or condition.numbers is None or sides[0] is None or sides[1] is None:
        return None
    if not len(condition.elements) == len(sides[0].elements) == len(sides[1].elements):
        return None
    choices = zip(condition.numbers, sides[0].elements, sides[1].elements, strict=True)
    return Content(tuple(left if chosen else right for chosen, left, right in choices), condition.scalar)


def _quotient(left: int, right: int) -> int:
    # Division of integers rounds toward zero in ONNX, not down as in Python.
    return left // right if (left < 0) == (right < 0) else -(-left // right)


RULES: dict[str, Callable[[ir.Node, Any], Content | None]] = {
    "Shape": _shape,
    "Size": _size,
    "Gather": _gather,
    "Slice": _slice,
    "Unsqueeze": _view,
    "Squeeze": _view,
    "Reshape": _view,
    "Concat": _concat,
    "Equal": _equal,
    "Where": _where,
    "Identity": _same,
    "Cast": _cast,
    "Add": _arithmetic(lambda left, right: left + right, 0),
    "Sub": _arithmetic(lambda left, right: left - right, 0),
    "Mul": _arithmetic(lambda left, right: left * right, 1),
    "Div": _arithmetic(_quotient, 1),
}
