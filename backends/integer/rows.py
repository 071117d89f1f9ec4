"""Rows: which rows of its inputs an operation needs for some rows of its output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from qcompile.backends.integer.operations import (
    Add,
    AveragePool,
    Conv,
    Dense,
    Lookup,
    MaxPool,
    Mul,
    Rescale,
    Resize,
    Window,
)
from qcompile.backends.integer.program import Operation, Strips, Tensor

Tensors = Mapping[str, Tensor]
Span = tuple[int, int]

#: Computed from the top to the bottom by kernels that can be asked for some rows.
BY_ROWS = (Conv, AveragePool, MaxPool, Resize, Dense)
#: Computed element by element, in the order in which they are stored.
BY_ELEMENTS = (Add, Mul, Lookup, Rescale)


def span(operation: Operation, index: int, rows: Span, tensors: Tensors) -> Span:
    """Return the rows of an input that some rows of the output need; what is padding is not among them.

    Parameters
    ----------
    operation : Operation
    index : int
        Which of its inputs.
    rows : tuple of int
        First row and the one behind the last, of the output.
    tensors : mapping of str to Tensor
    """
    source, output = tensors[operation.inputs[index]], tensors[operation.output]
    first, last = rows
    if first >= last:
        return 0, 0
    if isinstance(operation, Conv | AveragePool | MaxPool):
        window = operation.window
        start = first * window.strides[0] - window.pads[0]
        stop = (last - 1) * window.strides[0] - window.pads[0] + (window.size[0] - 1) * window.dilations[0] + 1
        return min(max(start, 0), source.rows), max(min(stop, source.rows), 0)
    if isinstance(operation, Resize):
        return operation.rows[first], operation.rows[last - 1] + 1
    if isinstance(operation, Dense) or (isinstance(operation, BY_ELEMENTS) and source.shape == output.shape):
        return rows
    return 0, source.rows


def padded(window: Window, rows: Span, height: int) -> Window:
    """Return a window that goes over the rows that `span` returned as it goes over them within the whole map.

    Parameters
    ----------
    window : Window
    rows : tuple of int
        Of the output.
    height : int
        Rows of the whole input.
    """
    start = rows[0] * window.strides[0] - window.pads[0]
    stop = (rows[1] - 1) * window.strides[0] - window.pads[0] + (window.size[0] - 1) * window.dilations[0] + 1
    top, bottom = max(min(-start, stop - start), 0), max(min(stop - height, stop - start), 0)
    return replace(window, pads=(top, window.pads[1], bottom, window.pads[3]))


def gap(operation: Operation, index: int, tensors: Tensors) -> int:
    """Return how many bytes an input has to begin above the output at least, where the two may overlap.

    While output row y is computed, rows 0 to y of the output may be written and what rows from y on read must be whole;
    element by element, an element may be written once it was read. An output's own size says: no overlap.
    """
    source, output = tensors[operation.inputs[index]], tensors[operation.output]
    if isinstance(operation, BY_ELEMENTS) and source.shape == output.shape:
        return max(output.nbytes - source.nbytes, 0)
    if isinstance(operation, Strips):
        return _gap_of_strips(operation, operation.inputs[index], tensors)
    if not isinstance(operation, BY_ROWS):
        return output.nbytes
    needed = [
        (y + 1) * output.row_bytes - span(operation, index, (y, y + 1), tensors)[0] * source.row_bytes
        for y in range(output.rows)
    ]
    return min(max(*needed, 0), output.nbytes)


def _gap_of_strips(strips: Strips, name: str, tensors: Tensors) -> int:
    """Return the same for strips: while one runs its rows may be written, and what it and later ones read is whole."""
    source, output = tensors[name], tensors[strips.output]
    needed, lowest = 0, source.rows
    for steps in reversed(strips.strips):
        for step in steps:
            operation = strips.operations[step.operation]
            for index, read in enumerate(operation.inputs):
                if read == name:
                    lowest = min(lowest, span(operation, index, (step.first, step.last), tensors)[0])
        written = max(step.last for step in steps if strips.operations[step.operation].output == strips.output)
        needed = max(needed, written * output.row_bytes - lowest * source.row_bytes)
    return min(needed, output.nbytes)


def macs_per_row(operation: Operation, tensors: Tensors) -> int:
    """Return the multiply-accumulates that one row of the output takes."""
    output = tensors[operation.output]
    if isinstance(operation, Conv | Dense):
        return output.size // output.rows * int(np.prod(operation.weights.shape[1:]))
    return 0


def macs(operation: Operation, tensors: Tensors) -> int:
    """Return the multiply-accumulates that an operation takes."""
    return macs_per_row(operation, tensors) * tensors[operation.output].rows
