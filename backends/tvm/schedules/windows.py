"""Windows over each channel for itself: their shape, and pools, a vector of channels at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile.backends.tvm.emit import Function
from qcompile.backends.tvm.native import builder, function
from qcompile.backends.tvm.schedules.linear import Scaling
from qcompile.backends.tvm.schedules.vectors import (
    OUTPUTS,
    ROWS,
    SPAN,
    Processor,
    Rounding,
    all_lanes,
    blocks,
    load,
    span_of,
    store,
    within,
)

#: Columns whose sums are held at once.
COLUMNS = 4


@dataclass(frozen=True)
class Windows:
    """The shape of a kernel. Steps are bytes.

    Parameters
    ----------
    rows, columns, channels : int
        Of the output.
    taps : tuple of (int, int)
        Rows and columns of the window, and from one to the next.
    row_step, column_step : int
        From what one output row, or column, sees to what the next one does.
    output_row, output_column : int
        From one output row, or column, to the next.
    rounding : Rounding
        Of a maximum, `low` and `high` only.
    looked_up : bool
        Whether codes go through a table at the end; of depthwise convolutions.
    saturates : bool
        See `Processor.saturates`; of depthwise convolutions.
    shared : str
        The loop that threads share: `vectors.ROWS`, `vectors.OUTPUTS`, or none.
    """

    rows: int
    columns: int
    channels: int
    taps: tuple[tuple[int, int], ...]
    row_step: int
    column_step: int
    output_row: int
    output_column: int
    rounding: Rounding
    looked_up: bool = False
    saturates: bool = False
    shared: str = ""

    @property
    def offsets(self) -> list[int]:
        """Where each tap is."""
        (rows, row), (columns, column) = self.taps
        return [i * row + j * column for i in range(rows) for j in range(columns)]


def _kernel(name: str, shape: Windows, lanes: int, arguments: dict[str, str], pixels: Any) -> Function:
    """Return a function that goes over vectors of channels, rows and blocks of columns."""

    def body(buffers: Any) -> None:
        rows, outputs = (span_of(buffers, shape.shared == loop) for loop in (ROWS, OUTPUTS))

        def vector(v: Any, left: int) -> None:
            def row(y: Any, rows: int) -> None:
                del rows
                blocks(shape.columns, COLUMNS, lambda x, columns: pixels(buffers, v, y, x, columns, left))

            blocks(shape.rows, 1, row, rows)

        full, left = divmod(shape.channels, lanes)
        blocks(full, 1, lambda v, _: vector(v, lanes), outputs)
        if left:
            within(outputs, full, lambda: vector(full, left))

    return function(name, arguments, body, SPAN if shape.shared else ())


def average_kernel(name: str, shape: Windows, processor: Processor) -> Function:
    """Return an average pool. Arguments: input, channels (one vector's), output."""
    lanes = processor.lanes

    def pixels(buffers: Any, v: Any, y: Any, x: Any, columns: int, left: int) -> None:
        ir = builder()
        scaling = Scaling(processor, buffers["channels"], lanes)
        sums = ir.alloc_buffer((columns * lanes,), "int32", scope="local")
        places = [ir.ramp(j * lanes, 1, lanes) for j in range(columns)]
        for place in places:
            ir.buffer_store(sums, scaling.bias(0), [place])
        (rows, row), (width, column) = shape.taps
        with ir.grid(rows, width) as (i, k):
            for j, place in enumerate(places):
                at = y * shape.row_step + (x + j) * shape.column_step + v * lanes + i * row + k * column
                codes = ir.cast(load(buffers["input"], at, lanes), f"int32x{lanes}")
                ir.buffer_store(sums, sums[place] + codes, [place])
        for j, place in enumerate(places):
            codes = processor.requantize(sums[place], scaling.of(0), shape.rounding)
            store(buffers["output"], _place(shape, y, x + j, v * lanes), codes, lanes, left)

    kinds = {"input": processor.codes, "channels": "int32", "output": processor.codes}
    return _kernel(name, shape, lanes, kinds, pixels)


def maximum_kernel(name: str, shape: Windows, processor: Processor) -> Function:
    """Return a maximum pool. Arguments: input, output."""
    lanes = processor.together

    def pixels(buffers: Any, v: Any, y: Any, x: Any, columns: int, left: int) -> None:
        ir = builder()
        for j in range(columns):
            most = all_lanes(shape.rounding.low, processor.codes, lanes)
            for offset in shape.offsets:
                at = y * shape.row_step + (x + j) * shape.column_step + v * lanes + offset
                most = ir.bind(ir.max(most, load(buffers["input"], at, lanes)))
            codes = ir.min(most, all_lanes(shape.rounding.high, processor.codes, lanes))
            store(buffers["output"], _place(shape, y, x + j, v * lanes), codes, lanes, left)

    return _kernel(name, shape, lanes, dict.fromkeys(("input", "output"), processor.codes), pixels)


def _place(shape: Windows, y: Any, x: Any, channel: Any) -> Any:
    return y * shape.output_row + x * shape.output_column + channel
