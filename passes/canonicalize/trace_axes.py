"""Which axes of results are axes of operands: names of open axes carried through the graph.

ONNX's own inference invents a new name behind every Reshape and every broadcast, so that an axis of a residual block
looks different in each layer. What is not known here keeps the axes that inference found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from qcompile.passes import structure
from qcompile.passes.canonicalize.editing import tensor_of

#: A number; the name of an open axis (ONNX: axes of one name are equally long); None where nothing is known.
Element = int | str | None
Axes = tuple[Element, ...]
Lookup = Callable[[ir.Value | None], Axes | None]

SAME = (
    "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Clip", "HardSigmoid", "HardSwish", "Elu", "Selu", "Softplus", "Softsign",
    "Exp", "Log", "Sqrt", "Neg", "Abs", "Erf", "Gelu", "Mish", "Cast", "Identity", "Reciprocal", "Floor", "Ceil", "Not",
    "Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization", "BatchNormalization", "InstanceNormalization",
    "GroupNormalization", "Dropout", "PRelu", "LpNormalization", "CumSum", "QuantizeLinear", "DequantizeLinear",
)  # fmt: skip
BROADCAST = (
    "Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Where", "Equal", "Less", "Greater", "And", "Or", "Sum", "Mean",
)  # fmt: skip
BATCHED = (
    "Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool",
)  # fmt: skip
REDUCING = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2")


def trace(node: ir.Node, axes_of: Lookup, wanted: Axes | None) -> Axes | None:
    """Return the axes of a node's first result by those of its operands, or None if that is not known here.

    `wanted` is what is known of the shape that a Reshape or an Expand is given.
    """
    if not structure.is_standard(node, *RULES):
        return None
    inferred = axes_of(node.outputs[0])
    found = RULES[node.op_type](node, axes_of, wanted)
    if found is None or (inferred is not None and len(inferred) != len(found)):
        return None
    if inferred is None:
        return found
    # A number is more than a name.
    pairs = zip(found, inferred, strict=True)
    return tuple(new if isinstance(new, int) or (new and not isinstance(old, int)) else old for new, old in pairs)


def _same(node: ir.Node, axes_of: Lookup, wanted: Axes | None) -> Axes | None:
    return axes_of(node.inputs[0])


def _broadcast(node: ir.Node, axes_of: Lookup, wanted: Axes | None) -> Axes | None:
    operands = [axes_of(value) for value in node.inputs]
    known = [axes for axes in operands if axes is not None]
    return aligned(known) if len(known) == len(operands) else None


def aligned(operands: Sequence[Axes]) -> Axes:
    """Return the axes of operands that are broadcast against one another."""
    rank = max(map(len, operands))
    columns = zip(*((1,) * (rank - len(axes)) + tuple(axes) for axes in operands), strict=True)
    return tuple(_joined([element for element in column if element != 1]) for column in columns)


def _joined(elements: Sequence[Element]) -> Element:
    """Return the length of an axis that is broadcast from lengths other than 1."""
    numbers = [element for element in elements if isinstance(element, int)]
    if numbers or not elements:
        return numbers[0] if numbers else 1
    # Either of two different names may stand for 1.
    return elements[0] if len(set(elements)) == 1 else None


def _transpose(node: ir.Node, axes_of: Lookup, wanted: Axes | None) -> Axes | None:
    axes = axes_of(node.inputs[0])
    if axes is None:
        return None
    permutation = tuple(node.attributes.get_ints("perm", ())) or tuple(range(len(axes)))[::-1]
    return tuple(axes[index] for index in permutation)


def _reshape(node: ir.Node, axes_of: Lookup, wanted: Axes | None) -> Axes | None:
    axes = axes_of(node.inputs[0])
    if wanted is None or node.attributes.get_int("allowzero", 0) != 0:
        return None
    return tuple(
        (axes[index] if axes is not None and index < len(axes) else None) if element == 0 else _unless_open(element)
        for index, element in enumerate(wanted)
    )


def _unless_open(element: Element) -> Element:
    return None if element == -1 else element


def _expand(node: ir.Node, axes_of: Lookup, wanted: Axes | None) -> Axes | None:
    axes = axes_of(node.inputs[0])
    return None if axes is None or wanted is None else aligned([axes, wanted])


def _matmul(node: ir.Node, axes_of: Lookup, wanted: Axes | None) -> Axes | None:
    a, b = axes_of(node.inputs[0]), axes_of(node.inputs[1])
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return None
    return (*aligned([a[:-2], b[:-2]]), a[-2], b[-1]) if max(len(a), len(b)) > 2 else (a[-2], b[-1])


def _gemm(node: ir.Node, axes_of: Lookup, wanted: Axes | None) -> Axes | None:
    a, b = axes_of(node.inputs[0]), axes_of(node.inputs[1])
    if a is None or b is None or len(a) != 2 or len(b) != 2:
        return None
    return a[1 if node.attributes.get_int("transA", 0) else 0], b[0 if node.attributes.get_int("transB", 0) else 1]


def _gather(node: ir.Node, axes_of: Lookup, wanted: Axes | None) -> Axes | None:
    data, indices = axes_of(node.inputs[0]), axes_of(node.inputs[1])
    if data is None or indices is None:
        return None
    axis = node.attributes.get_int("axis", 0) % len(data)
    return data[:axis] + indices + data[axis + 1 :]


def _unsqueeze(node: ir.Node, axes_of: Lookup, wanted: Axes | None) -> Axes | None:
    axes, inserted = axes_of(node.inputs[0]), tensor_of(node.inputs[1] if len(node.inputs) > 1 else None)
    if axes is None or inserted is None:
        return None
    rank, rest = len(axes) + len(inserted), iter(axes)
    places = {index % rank for index in inserted}
    return tuple(1 if index in places else next(rest) for index in range(rank))


def _squeeze(node: ir.Node, axes_of: Lookup, wanted: Axes | None) -> Axes | None:
    axes, removed = axes_of(node.inputs[0]), tensor_of(node.inputs[1] if len(node.inputs) > 1 else None)
    if axes is None or removed is None:
        return None
    places = {index % len(axes) for index in removed}
    return tuple(axis for index, axis in enumerate(axes) if index not in places)


def _concat(node: ir.Node, axes_of: Lookup, wanted: Axes | None) -> Axes | None:
    operands = [axes_of(value) for value in node.inputs]
    known = [axes for axes in operands if axes is not None]
    if len(known) != len(operands) or not known[0]:
        return None
    along = node.attributes.get_int("axis", 0) % len(known[0])
    columns = list(zip(*known, strict=True))
    numbers = [length for length in columns[along] if isinstance(length, int)]
    total = sum(numbers) if len(numbers) == len(known) else None
    # Across, all operands are equally long whatever they are called.
    named = [next((element for element in column if element is not None), None) for column in columns]
    named[along] = total
    return tuple(named)


def _slice(node: ir.Node, axes_of: Lookup, wanted: Axes | None) -> Axes | None:
    axes, sliced = axes_of(node.inputs[0]), tensor_of(node.inputs[3] if len(node.inputs) > 3 else None)
    if axes is None or sliced is None:
        return None
    places = {index % len(axes) for index in sliced}
    return tuple(None if index in places else axis for index, axis in enumerate(axes))


def _pad(node: ir.Node, axes_of: Lookup, wanted: Axes | None) -> Axes | None:
    axes, pads = axes_of(node.inputs[0]), tensor_of(node.inputs[1] if len(node.inputs) > 1 else None)
    if axes is None or pads is None or len(node.inputs) > 3 or len(pads) != 2 * len(axes):
        return None
    amounts = [pads[index] + pads[index + len(axes)] for index in range(len(axes))]
    return tuple(
        axis + more if isinstance(axis, int) else (None if more else axis)
        for axis, more in zip(axes, amounts, strict=True)
    )


def _reduce(node: ir.Node, axes_of: Lookup, wanted: Axes | None) -> Axes | None:
    axes, reduced = axes_of(node.inputs[0]), tensor_of(node.inputs[1] if len(node.inputs) > 1 else None)
    if axes is None or not reduced:
        return None
    places = {index % len(axes) for index in reduced}
    if node.attributes.get_int("keepdims", 1):
        return tuple(1 if index in places else axis for index, axis in enumerate(axes))
    return tuple(axis for index, axis in enumerate(axes) if index not in places)


def _batched(node: ir.Node, axes_of: Lookup, wanted: Axes | None) -> Axes | None:
    axes, inferred = axes_of(node.inputs[0]), axes_of(node.outputs[0])
    return None if not axes or not inferred else (axes[0], *inferred[1:])


RULES: dict[str, Callable[[ir.Node, Lookup, Axes | None], Axes | None]] = {
    **dict.fromkeys(SAME, _same),
    **dict.fromkeys(BROADCAST, _broadcast),
    **dict.fromkeys(BATCHED, _batched),
    **dict.fromkeys(REDUCING, _reduce),
    "Pad": _pad,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Expand": _expand,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Gather": _gather,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Concat": _concat,
    "Slice": _slice,
}
