"""Steps that move data or look at it in another shape."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from onnx import helper

from random_graphs.builder import Builder, Dims, Tensor
from random_graphs.compute import activation


def residual(b: Builder) -> None:
    """Read a value through two Transposes, as networks with channels last do."""
    x = b.operand(4)
    if x is None:
        return
    there, back = (0, 2, 3, 1), (0, 3, 1, 2)
    dims = tuple(x.dims[index] for index in there)
    turned = b.add("Transpose", [x.name], dims, perm=there)
    moved = b.add("Relu", [turned.name], dims)
    if b.pick(True, False):
        moved = b.add("Add", [moved.name, turned.name], dims)
    if not isinstance(dims[-1], str) and b.pick(True, False):
        moved = b.add("Mul", [moved.name, b.positive(dims[-1])], dims)
    b.add("Transpose", [moved.name], x.dims, perm=back)


def mirror(b: Builder) -> None:
    """Combine a value with what a Transpose of two equally long axes makes of it."""
    x = b.operand(2, 3, 4)
    pairs = [(i, j) for j in range(x.rank) for i in range(j) if x.dims[i] == x.dims[j]] if x is not None else []
    if x is None or not pairs:
        return
    i, j = b.pick(*pairs)
    order = list(range(x.rank))
    order[i], order[j] = j, i
    turned = b.add("Transpose", [x.name], x.dims, perm=order)
    sides = b.pick([x.name, turned.name], [turned.name, x.name])
    y = b.add(b.pick("Add", "Sub", "Max"), sides, x.dims)
    if b.pick(True, False):
        b.add("Transpose", [y.name], x.dims, perm=order)


def pad(b: Builder) -> None:
    x = b.operand(4)
    if x is None or min(x.shape[2:]) < 2 or max(x.shape) > 10:
        return
    amounts = [[0, 0, b.integer(0, 1), b.integer(0, 1)] for _ in range(2)]
    dims = tuple(
        dim if isinstance(dim, str) or not (more := amounts[0][i] + amounts[1][i]) else dim + more
        for i, dim in enumerate(x.dims)
    )
    if any(isinstance(dim, str) and amounts[0][i] + amounts[1][i] for i, dim in enumerate(x.dims)):
        return
    mode = b.pick("constant", "constant", "reflect", "edge")
    extra = [b.constant(np.asarray(b.pick(0.0, 1.0), b.dtype))] if mode == "constant" and b.pick(True, False) else []
    y = b.add("Pad", [x.name, b.ints(*amounts[0], *amounts[1]), *extra], dims, mode=mode)
    if b.pick(True, False) and not isinstance(y.dims[1], str) and min(y.shape[2:]) >= 3:
        lengths = [length - 2 for length in y.shape[2:]]
        b.add("Conv", [y.name, b.weights(2, y.shape[1], 3, 3, scale=0.5)], (y.dims[0], 2, *lengths))


def transpose(b: Builder) -> None:
    x = b.operand(2, 3, 4)
    if x is not None:
        order = tuple(b.draw(st.permutations(range(x.rank))))
        y = b.add("Transpose", [x.name], tuple(x.dims[index] for index in order), perm=order)
        if b.pick(True, False):
            activation(b)
        if b.pick(True, False):
            back = tuple(int(index) for index in np.argsort(order))
            b.add("Transpose", [y.name], x.dims, perm=back)


def reshape(b: Builder) -> None:
    x = b.operand()
    if x is None or x.rank == 0 or any(isinstance(dim, str) for dim in x.dims[1:]):
        return
    rest = x.shape[1:]
    dims: Dims = (x.dims[0], *b.pick(rest, (int(np.prod(rest)),), (*rest, 1), (1, *rest), rest[::-1]))
    if len(dims) > 5:
        return
    style = b.pick("chain", "constant", "copy", "shape")
    if style == "shape" and dims == x.dims:
        wanted = b.raw("Shape", [x.name])
    elif style == "chain":
        wanted = _chain(b, x, dims)
    else:
        first = 0 if style == "copy" else -1 if isinstance(dims[0], str) else x.shape[0]
        wanted = b.ints(first, *(int(dim) for dim in dims[1:]))
    b.add("Reshape", [x.name, wanted], dims)


def _chain(b: Builder, x: Tensor, dims: Dims) -> str:
    """Compute a shape as torch's exporter does: Shape, Gather, Unsqueeze, Concat."""
    shape = b.raw("Shape", [x.name])
    length = b.raw("Gather", [shape, b.constant(np.asarray(0, np.int64))], axis=0)
    if b.pick(True, False):
        length = b.raw("Mul", [length, b.constant(np.asarray(1, np.int64))])
    first = b.raw("Unsqueeze", [length, b.ints(0)])
    rest = b.ints(*(int(dim) for dim in dims[1:])) if len(dims) > 1 else None
    return b.raw("Concat", [first, *([rest] if rest else [])], axis=0)


def view(b: Builder) -> None:
    x = b.operand(1, 2, 3, 4)
    if x is None:
        return
    kind = b.pick("Flatten", "Squeeze", "Unsqueeze", "Unsqueeze")
    ones = [index for index, dim in enumerate(x.dims) if dim == 1]
    if kind == "Flatten" and x.rank >= 2 and not any(isinstance(dim, str) for dim in x.dims[1:]):
        b.add("Flatten", [x.name], (x.dims[0], int(np.prod(x.shape[1:]))), axis=1)
    elif kind == "Squeeze" and ones and x.rank > 1:
        gone = b.pick(*ones)
        b.add("Squeeze", [x.name, b.ints(b.pick(gone, gone - x.rank))], (*x.dims[:gone], *x.dims[gone + 1 :]))
    elif kind == "Unsqueeze" and x.rank < 5:
        new = b.integer(0, x.rank)
        b.add("Unsqueeze", [x.name, b.ints(new)], (*x.dims[:new], 1, *x.dims[new:]))


def concat(b: Builder) -> None:
    x = b.operand(2, 3, 4)
    others = [value for value in b.values if x is not None and value.dims == x.dims]
    axes = [index for index, dim in enumerate(x.dims) if isinstance(dim, int)] if x is not None else []
    if x is None or not axes or max(x.shape) > 12:
        return
    axis, parts = b.pick(*axes), [x, *others[: b.integer(0, 2)]]
    dims = list(x.dims)
    dims[axis] = x.shape[axis] * len(parts)
    b.add("Concat", [part.name for part in parts], tuple(dims), axis=b.pick(axis, axis - x.rank))


def split(b: Builder) -> None:
    x = b.operand(2, 3, 4)
    axes = [i for i, dim in enumerate(x.dims) if isinstance(dim, int) and dim % 2 == 0] if x is not None else []
    if x is None or not axes:
        return
    axis = b.pick(*axes)
    dims = list(x.dims)
    dims[axis] = x.shape[axis] // 2
    halves = [Tensor(b.name(), tuple(dims)) for _ in range(2)]
    sizes = b.ints(dims[axis], dims[axis])  # type: ignore[arg-type]
    b.nodes.append(helper.make_node("Split", [x.name, sizes], [half.name for half in halves], axis=axis))
    b.values.extend(halves)


def cut(b: Builder) -> None:
    x = b.operand(2, 3, 4)
    if x is None:
        return
    for _ in range(b.integer(1, 2)):
        axis = b.integer(0, x.rank - 1)
        start = 0 if isinstance(x.dims[axis], str) else b.integer(0, min(1, x.shape[axis] - 1))
        dims = list(x.dims)
        if start:
            dims[axis] = x.shape[axis] - start
        bounds = [b.ints(start), b.ints(b.pick(2**31 - 1, 2**63 - 1)), b.ints(axis)]
        x = b.add("Slice", [x.name, *bounds, *([b.ints(1)] if b.pick(True, False) else [])], tuple(dims))


def expand(b: Builder) -> None:
    x = b.operand(2, 3, 4)
    if x is None or max(x.shape) > 12:
        return
    grown = tuple(3 if dim == 1 and b.pick(True, False) else dim for dim in x.dims)
    if any(isinstance(dim, str) for dim in x.dims):
        lengths = [1 if isinstance(dim, str) else dim for dim in grown]
        b.add("Expand", [x.name, b.ints(*(int(length) for length in lengths))], grown)
    elif grown == x.dims:
        b.add("Expand", [x.name, b.raw("Shape", [x.name])], grown)
    else:
        b.add("Expand", [x.name, b.ints(*(int(dim) for dim in grown))], grown)
