"""What the x86 kernels are made of: a processor's registers and its instruction for four products at once.

Codes are stored 128 above the program's, from 0 to 255: `vpdpbusd` multiplies unsigned codes by signed weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from qcompile.backends.tvm.native import Machine, builder
from qcompile.backends.tvm.schedules.vectors import Array, Processor, Rounding, all_lanes, load

#: What stored codes are above the program's.
OFFSET = 128
#: Codes in the widest register.
LINE = 64


@dataclass(frozen=True)
class X86(Processor):
    """A kind of x86 processor; those that permute pick bytes from two registers by another one's (VBMI)."""

    architecture: ClassVar[str] = "x86_64"
    offset: ClassVar[int] = OFFSET
    codes: ClassVar[str] = "uint8"

    @property
    def line(self) -> int:
        """Codes that are looked up at once: a table of 256 codes is four registers."""
        return LINE if self.permutes else 0

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

    def scaled(self, sums: Any, scaling: Any, rounding: Rounding) -> Any:
        """Return what sums are as codes of 32 bits; see `scaled`."""
        return scaled(self, sums, scaling, rounding)

    def scaling_rows(self, multiplier: Array, shift: Array, high_word: bool) -> tuple[Array, Array]:
        """Return multipliers of each vector's even lanes, then its odd ones; shifts alike, or places of all lanes."""

        def apart(array: Array) -> Array:
            return array.reshape(-1, self.lanes // 2, 2).transpose(0, 2, 1).reshape(-1)

        return apart(multiplier), shift - 32 if high_word else apart(shift)

    def joined(self, four: Sequence[Any], low: int, high: int) -> Any:
        """Return four vectors of 32 bits as one of codes; see `joined`."""
        return joined(self, four, low, high)

    def looked_up(self, codes: Any, size: int, table: Any) -> Any:
        """Return table[code] for each of `size` codes; see `looked_up`."""
        return looked_up(codes, size, table)

    def saturates(self, weights: npt.NDArray[np.int8]) -> bool:
        """Tell whether sums of two products may be beyond 16 bits, where there is no instruction for four."""
        return not self.instruction and saturates(weights)


AVX512_VNNI = X86(
    "avx512-vnni", Machine("icelake-server", ("-prefer-256-bit",)),
    ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512vbmi"), 16, 32,
    "llvm.x86.avx512.vpdpbusd", permutes=True,
)  # fmt: skip
AMX = replace(
    AVX512_VNNI, name="amx", machine=Machine("icelake-server", ("-prefer-256-bit", "+amx-tile", "+amx-int8")),
    flags=(*AVX512_VNNI.flags, "amx_tile", "amx_int8"), tiles=True,
)  # fmt: skip
AVX_VNNI = X86("avx-vnni", Machine("alderlake"), ("avx2", "fma", "avx_vnni"), 8, 16, "llvm.x86.avx512.vpdpbusd")
AVX2 = X86("avx2", Machine("haswell"), ("avx2", "fma"), 8, 16, "")
PROCESSORS = {processor.name: processor for processor in (AMX, AVX512_VNNI, AVX_VNNI, AVX2)}

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
    # Not as codes of 8 bits: LLVM 22 never ends on bounds of those of which some lanes alone are stored.
    if high < (1 << 8) - 1:
        halves = [ir.min(half, all_lanes(high, "int16", 2 * lanes)) for half in halves]
    if low > 0:
        halves = [ir.max(half, all_lanes(low, "int16", 2 * lanes)) for half in halves]
    return ir.call_llvm_pure_intrin(f"uint8x{4 * lanes}", codes, *halves)


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
