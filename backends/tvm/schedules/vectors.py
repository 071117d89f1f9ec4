"""What kernels of vectors are made of on every processor: registers, loads and stores, blocks of loops, rounding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from qcompile.backends.tvm.definitions import HIGH_WORD
from qcompile.backends.tvm.native import Machine, builder

#: Codes that one instruction multiplies and adds up.
FOUR = 4
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Rounding:
    """How sums become codes.

    Parameters
    ----------
    high_word : bool
        Whether every shift is 33 or more.
    zero_point, low, high : int
        Of the codes as they are stored.
    folded : bool
        Whether the zero point is added with the rounding's half, in front of the shift.
    """

    high_word: bool
    zero_point: int
    low: int
    high: int
    folded: bool = False


@dataclass(frozen=True)
class Processor(ABC):
    """A kind of processor: its registers, and what its instructions make of vectors.

    Parameters
    ----------
    name : str
    machine : Machine
    flags : tuple of str
        What the system calls the instructions that it has to have.
    lanes : int
        Sums of 32 bits in one register.
    registers : int
        That hold vectors.
    instruction : str
        LLVM's name of the dot product, but for its types; empty where there is none.
    permutes : bool
        Whether a layer looks its codes up in a table before it stores them.
    tiles : bool
        Whether it multiplies whole tiles (AMX); see `x86_amx.py`.
    linked : tuple of str
        What the linker is told beside what it always is.
    emulated : str
        QEMU's name of a processor that has these instructions and, where there is one, no more.
    """

    name: str
    machine: Machine
    flags: tuple[str, ...]
    lanes: int
    registers: int
    instruction: str
    permutes: bool = False
    tiles: bool = False
    linked: tuple[str, ...] = ()
    emulated: str = ""

    #: What the system calls the architecture, what stored codes are above the program's, and their type.
    architecture: ClassVar[str]
    offset: ClassVar[int]
    codes: ClassVar[str]

    @property
    def low(self) -> int:
        """The lowest stored code."""
        return self.offset - 128

    @property
    def high(self) -> int:
        """The highest stored code."""
        return self.offset + 127

    @property
    def together(self) -> int:
        """Codes that go through an operation one by one, at once."""
        return self.lanes

    @property
    def line(self) -> int:
        """Codes that are looked up at once, 0 where only one is."""
        return 0

    @abstractmethod
    def dot(self, sums: Any, codes: Any, weights: Any, saturates: bool) -> Any:
        """Return `sums` and in each lane four products of codes and weights."""

    @abstractmethod
    def scaled(self, sums: Any, scaling: Any, rounding: Rounding) -> Any:
        """Return what sums are as codes of 32 bits, before they are clipped, as `core/numerics.py` has it.

        Parameters
        ----------
        sums : int32 in each lane
        scaling : callable
            Returns a row of the table for a vector: "multiplier", "shift" or "places"; of its even lanes (0), of its
            odd ones (1), or of all (None).
        rounding : Rounding
        """

    @abstractmethod
    def scaling_rows(self, multiplier: Array, shift: Array, high_word: bool) -> tuple[Array, Array]:
        """Return multipliers and shifts in the order and form in which `scaled` reads them."""

    @abstractmethod
    def joined(self, four: Sequence[Any], low: int, high: int) -> Any:
        """Return four vectors of 32 bits as one of codes from low to high.

        Neighbours go in fours: those of the first vector's first 128 bits, of the second's, the third's and the
        fourth's, then those of the next 128 bits.
        """

    @abstractmethod
    def looked_up(self, codes: Any, size: int, table: Any) -> Any:
        """Return table[code] for each of `size` codes, `line` at most."""

    def saturates(self, weights: npt.NDArray[np.int8]) -> bool:
        """Tell whether sums of two products may be beyond what holds them; neighbours are along the last axis."""
        del weights
        return False

    def requantize(self, sums: Any, scaling: Any, rounding: Rounding) -> Any:
        """Return a vector's codes, from `low` to `high`; see `scaled`."""
        return clipped(self.scaled(sums, scaling, rounding), rounding.low, rounding.high, self.lanes, self.codes)

    def narrower(self, lanes: int) -> Self:
        """Return the processor by shorter vectors."""
        return replace(self, lanes=lanes)


def load(buffer: Any, offset: Any, lanes: int) -> Any:
    """Return so many neighbours."""
    return buffer[places(offset, lanes)]


def places(offset: Any, lanes: int) -> Any:
    """Return the indices of so many neighbours."""
    return offset if lanes == 1 else builder().ramp(offset, 1, lanes)


def fetch(buffer: Any, offset: Any) -> None:
    """Ask for what will be read: to the second cache."""
    ir = builder()
    read, second, data = (ir.int32(number) for number in (0, 2, 1))
    ir.evaluate(ir.call_llvm_intrin("void", "llvm.prefetch.p0", ir.address_of(buffer[offset]), read, second, data))


def all_lanes(value: int, dtype: str, lanes: int) -> Any:
    """Return a vector of one number."""
    ir = builder()
    from qcompile.backends.tvm.emit import load_tvm

    return ir.broadcast(load_tvm().tirx.const(value, dtype), lanes)


def store(buffer: Any, offset: Any, value: Any, lanes: int, count: int) -> None:
    """Store the first `count` of the lanes of a vector of codes."""
    ir = builder()
    if count >= lanes:
        ir.buffer_store(buffer, value, [ir.ramp(offset, 1, lanes)])
        return
    kept = ir.alloc_buffer((lanes,), str(buffer.dtype), scope="local")
    ir.buffer_store(kept, value, [ir.ramp(0, 1, lanes)])
    at = 0
    while at < count:
        piece = 1 << ((count - at).bit_length() - 1)
        ir.buffer_store(buffer, load(kept, at, piece), [places(offset + at, piece)])
        at += piece


#: What a kernel that threads share takes last: its first iteration, and the one behind its last.
SPAN = ("first", "last")
#: The loop that is shared; channels go by vectors.
ROWS, COLUMNS, OUTPUTS = "rows", "columns", "outputs"
Span = tuple[Any, Any]


def blocks(count: int, step: int, emit: Callable[[Any, int], None], span: Span | None = None) -> None:
    """Emit steps of a count, as a loop, and what is left: `emit` takes where a step begins and how many it has.

    Of a loop that threads share, only those of the span.
    """
    ir = builder()
    whole, rest = divmod(count, step)
    if span is not None:
        with ir.serial(span[0], ir.min(span[1], whole)) as index:
            emit(index * step, step)
        if rest:
            within(span, whole, lambda: emit(whole * step, rest))
        return
    if whole == 1:
        emit(0, step)
    elif whole:
        with ir.serial(0, whole) as index:
            emit(index * step, step)
    if rest:
        emit(whole * step, rest)


def within(span: Span | None, index: int, emit: Callable[[], None]) -> None:
    """Emit what is an iteration of its own, to be done where that is in the span."""
    ir = builder()
    if span is None:
        emit()
        return
    with ir.If(span[0] <= index), ir.Then(), ir.If(index < span[1]), ir.Then():
        emit()


def span_of(buffers: Any, shared: bool) -> Span | None:
    """Return a kernel's span if it has one."""
    return (buffers[SPAN[0]], buffers[SPAN[1]]) if shared else None


def nested(extents: Sequence[tuple[int, int]], offset: Any, emit: Callable[[Any, Any], None], index: Any = 0) -> None:
    """Emit loops in one another: `emit` takes Σ step · index + offset, and the number of the iteration."""
    ir = builder()
    if not extents:
        emit(offset, index)
        return
    (extent, step), *rest = extents
    if extent == 1:
        nested(rest, offset, emit, index)
        return
    with ir.serial(0, extent) as i:
        nested(rest, offset + i * step, emit, index * extent + i)


def clipped(values: Any, low: int, high: int, lanes: int, codes: str) -> Any:
    """Return numbers of 32 bits as stored codes from low to high, of a type."""
    ir = builder()
    bounds = all_lanes(low, "int32", lanes), all_lanes(high, "int32", lanes)
    return ir.cast(ir.max(ir.min(values, bounds[1]), bounds[0]), f"{codes}x{lanes}")


#: Up to this many places behind the high word a zero point can be added in front of them: 2^30 + 511 · 2^21 is no more
#: than 32 bits hold.
FOLDED = 21


def high_word(shifts: Sequence[int]) -> bool:
    """Tell whether only the products' high words count."""
    return min(shifts) >= HIGH_WORD
