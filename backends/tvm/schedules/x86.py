"""What the x86 kernels are made of: a processor's registers and its instruction for four products at once.

Codes are stored 128 above the program's, from 0 to 255: `vpdpbusd` multiplies unsigned codes by signed weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.tvm.definitions import HIGH_WORD
from qcompile.backends.tvm.native import Machine, builder

#: What stored codes are above the program's.
OFFSET = 128
#: Codes in the widest register.
LINE = 64
#: Codes that one instruction multiplies and adds up.
FOUR = 4


@dataclass(frozen=True)
class Processor:
    """A kind of x86 processor.

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
        LLVM's name of the dot product, but for the bits; empty where there is none.
    permutes : bool
        Whether it picks bytes from two registers by another one's (VBMI): a table of 256 codes is four registers.
    """

    name: str
    machine: Machine
    flags: tuple[str, ...]
    lanes: int
    registers: int
    instruction: str
    permutes: bool = False

    def dot(self, sums: Any, codes: Any, weights: Any, saturates: bool) -> Any:
        """Return `sums` and in each lane four products of codes and weights.

        Without the instruction, two products are added to 16 bits, which saturate, and two such sums to 32.

        Parameters
        ----------
        sums, codes, weights : vectors
        saturates : bool
            Whether two products may be beyond 16 bits; then those of every other weight are taken apart.
        """
        ir, bits = builder(), 32 * self.lanes
        if self.instruction:
            return ir.call_llvm_pure_intrin(f"int32x{self.lanes}", f"{self.instruction}.{bits}", sums, codes, weights)
        pairs, sums_of_pairs = PAIRS[self.lanes]
        words, ones = f"int16x{2 * self.lanes}", all_lanes(1, "int16", 2 * self.lanes)
        parts = [weights]
        if saturates:
            apart = ir.reinterpret(words, weights)
            even = apart & all_lanes(255, "int16", 2 * self.lanes)
            parts = [ir.reinterpret(f"int8x{4 * self.lanes}", part) for part in (even, apart ^ even)]
        for part in parts:
            two = ir.call_llvm_pure_intrin(words, pairs, codes, part)
            sums = sums + ir.call_llvm_pure_intrin(f"int32x{self.lanes}", sums_of_pairs, two, ones)
        return sums

    def narrower(self, lanes: int) -> Processor:
        """Return the processor by shorter vectors."""
        return replace(self, lanes=lanes)


AVX512_VNNI = Processor(
    "avx512-vnni", Machine("icelake-server", ("-prefer-256-bit",)),
    ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512vbmi"), 16, 32,
    "llvm.x86.avx512.vpdpbusd", permutes=True,
)  # fmt: skip
AVX_VNNI = Processor("avx-vnni", Machine("alderlake"), ("avx2", "fma", "avx_vnni"), 8, 16, "llvm.x86.avx512.vpdpbusd")
AVX2 = Processor("avx2", Machine("haswell"), ("avx2", "fma"), 8, 16, "")
PROCESSORS = {processor.name: processor for processor in (AVX512_VNNI, AVX_VNNI, AVX2)}

#: By lanes, what adds products of codes and weights in pairs to 16 bits, and pairs of 16 bits to 32.
PAIRS = {
    4: ("llvm.x86.ssse3.pmadd.ub.sw.128", "llvm.x86.sse2.pmadd.wd"),
    8: ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
}


def saturates(weights: npt.NDArray[np.int8]) -> bool:
    """Tell whether two neighbours' products with codes up to 255 may be beyond 16 bits.

    The largest sum has 255 wherever the weight is positive, the lowest wherever it is negative.

    Parameters
    ----------
    weights : ndarray of int8
        In the order in which they are read: those of one sum of pairs are neighbours along the last axis.
    """
    pairs = weights.reshape(-1, 2).astype(np.int32)
    extremes = 255 * np.maximum(pairs, 0).sum(axis=1), 255 * np.minimum(pairs, 0).sum(axis=1)
    return bool(extremes[0].max(initial=0) >= 1 << 15 or extremes[1].min(initial=0) < -(1 << 15))


#: By lanes, what narrows two vectors of 32 bits to one of 16, and two of those to one of 8 bits without a sign.
PACKS = {
    4: ("llvm.x86.sse2.packssdw.128", "llvm.x86.sse2.packuswb.128"),
    8: ("llvm.x86.avx2.packssdw", "llvm.x86.avx2.packuswb"),
    16: ("llvm.x86.avx512.packssdw.512", "llvm.x86.avx512.packuswb.512"),
}


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
    kept = ir.alloc_buffer((lanes,), "uint8", scope="local")
    ir.buffer_store(kept, value, [ir.ramp(0, 1, lanes)])
    at = 0
    while at < count:
        piece = 1 << ((count - at).bit_length() - 1)
        ir.buffer_store(buffer, load(kept, at, piece), [places(offset + at, piece)])
        at += piece


def blocks(count: int, step: int, emit: Callable[[Any, int], None]) -> None:
    """Emit steps of a count, as a loop, and what is left: `emit` takes where a step begins and how many it has."""
    ir = builder()
    whole, rest = divmod(count, step)
    if whole == 1:
        emit(0, step)
    elif whole:
        with ir.serial(0, whole) as index:
            emit(index * step, step)
    if rest:
        emit(whole * step, rest)


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


def requantize(processor: Processor, sums: Any, scaling: Any, rounding: Rounding) -> Any:
    """Return a vector's codes, from `low` to `high`; see `scaled`."""
    return clipped(scaled(processor, sums, scaling, rounding), rounding.low, rounding.high, processor.lanes)


def scaled(processor: Processor, sums: Any, scaling: Any, rounding: Rounding) -> Any:
    """Return what sums are as codes of 32 bits, before they are clipped, as `core/numerics.py` has it.

    Products of 64 bits are of every other lane: those of even lanes and those of odd ones are computed apart.

    Parameters
    ----------
    processor : Processor
    sums : int32 in each lane
    scaling : callable
        Returns a row of the table for a vector: of its even lanes (0), of its odd ones (1), or of all (None).
    rounding : Rounding
    """
    ir = builder()
    half, lanes = processor.lanes // 2, processor.lanes
    wide = f"int64x{half}"
    word = all_lanes(32, "int64", half)
    pairs = ir.reinterpret(wide, sums)
    even = (pairs << word) >> word
    products = [value * ir.cast(scaling("multiplier", odd), wide) for odd, value in enumerate((even, pairs >> word))]
    high = all_lanes(-(1 << 32), "int64", half)
    low = all_lanes((1 << 32) - 1, "int64", half)
    if rounding.high_word:
        whole = ((products[0] >> word) & low) | (products[1] & high)
        places, one = scaling("places", None), all_lanes(1, "int32", lanes)
        # The rounding's half, and the zero point where it is added with it.
        odd = all_lanes(2 * rounding.zero_point + 1 if rounding.folded else 1, "int32", lanes)
        codes = (ir.reinterpret(f"int32x{lanes}", whole) + ((odd << places) >> one)) >> places
    else:
        one = all_lanes(1, "int64", half)
        parts = []
        for odd, product in enumerate(products):
            shift = ir.cast(scaling("shift", odd), wide)
            parts.append((product + (one << (shift - one))) >> shift)
        codes = ir.reinterpret(f"int32x{lanes}", (parts[0] & low) | (parts[1] << word))
    return codes if rounding.folded else codes + all_lanes(rounding.zero_point, "int32", lanes)


def joined(processor: Processor, four: Sequence[Any], low: int, high: int) -> Any:
    """Return four vectors of 32 bits as one of codes from low to high.

    Neighbours go in fours: those of the first vector's first 128 bits, of the second's, the third's and the fourth's,
    then those of the next 128 bits.
    """
    ir, lanes = builder(), processor.lanes
    words, codes = PACKS[lanes]
    halves = [ir.call_llvm_pure_intrin(f"int16x{2 * lanes}", words, *four[at : at + 2]) for at in (0, 2)]
    whole = ir.call_llvm_pure_intrin(f"uint8x{4 * lanes}", codes, *halves)
    if high < (1 << 8) - 1:
        whole = ir.min(whole, all_lanes(high, "uint8", 4 * lanes))
    return ir.max(whole, all_lanes(low, "uint8", 4 * lanes)) if low > 0 else whole


def looked_up(codes: Any, size: int, table: Any) -> Any:
    """Return table[code] for each of `size` codes, 64 at most: by halves of the table, which two registers are."""
    ir = builder()
    lines, kind = [load(table, at * LINE, LINE) for at in range(4)], f"uint8x{LINE}"
    wide = codes if size == LINE else ir.Shuffle([codes] * (LINE // size), list(range(LINE)))
    wide = ir.bind(wide)
    name = "llvm.x86.avx512.vpermi2var.qi.512"
    halves = [ir.call_llvm_pure_intrin(kind, name, lines[at], wide, lines[at + 1]) for at in (0, 2)]
    found = ir.Select(wide < all_lanes(OFFSET, "uint8", LINE), *halves)
    return found if size == LINE else ir.Shuffle([ir.bind(found)], list(range(size)))


def clipped(values: Any, low: int, high: int, lanes: int) -> Any:
    """Return numbers of 32 bits as stored codes from low to high."""
    ir = builder()
    bounds = all_lanes(low, "int32", lanes), all_lanes(high, "int32", lanes)
    return ir.cast(ir.max(ir.min(values, bounds[1]), bounds[0]), f"uint8x{lanes}")


#: Up to this many places behind the high word a zero point can be added in front of them: 2^30 + 511 · 2^21 is no more
#: than 32 bits hold.
FOLDED = 21


def high_word(shifts: Sequence[int]) -> bool:
    """Tell whether only the products' high words count."""
    return min(shifts) >= HIGH_WORD
