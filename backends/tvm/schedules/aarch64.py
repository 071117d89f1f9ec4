"""What the aarch64 kernels are made of: NEON's registers, its instructions for products, and its exact rounding.

Codes are stored as the program has them, from -128 to 127: `sdot` multiplies signed codes by signed weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from qcompile.backends.tvm.native import Machine, builder
from qcompile.backends.tvm.schedules.vectors import Array, Processor, Rounding, all_lanes, load

#: Codes in a register, and those that `tbl` looks up in four of them.
REGISTER, TABLE = 16, 64
NEON = "llvm.aarch64.neon"
#: LLVM's names of what multiplies four codes at once, and matrices of two rows of eight.
DOT, MATRIX = "sdot", "smmla"


@dataclass(frozen=True)
class Aarch64(Processor):
    """A kind of aarch64 processor."""

    architecture: ClassVar[str] = "aarch64"
    offset: ClassVar[int] = 0
    codes: ClassVar[str] = "int8"

    @property
    def together(self) -> int:
        """Codes that go through an operation one by one, at once: a register of them."""
        return REGISTER

    @property
    def line(self) -> int:
        """Codes that are looked up at once."""
        return REGISTER

    def dot(self, sums: Any, codes: Any, weights: Any, saturates: bool) -> Any:
        """Return `sums` and in each lane four products of codes and weights.

        Without the instruction, products have 16 bits, which hold -128 · -128, and are added up in 32.
        """
        del saturates
        ir = builder()
        if self.instruction:
            return ir.call_llvm_pure_intrin("int32x4", f"{NEON}.sdot.v4i32.v16i8", sums, weights, codes)
        pairs = []
        for half in (0, 8):
            parts = [ir.Shuffle([each], list(range(half, half + 8))) for each in (codes, weights)]
            products = ir.call_llvm_pure_intrin("int16x8", f"{NEON}.smull.v8i16", *parts)
            pairs.append(ir.call_llvm_pure_intrin("int32x4", f"{NEON}.saddlp.v4i32.v8i16", products))
        return sums + ir.call_llvm_pure_intrin("int32x4", f"{NEON}.addp.v4i32", *pairs)

    def scaled(self, sums: Any, scaling: Any, rounding: Rounding) -> Any:
        """Return what sums are as codes of 32 bits, before they are clipped.

        `sqdmulh` is floor(acc · multiplier / 2^31), and never saturates since a multiplier is above -2^31. A shift of
        33 or more adds a half that is a multiple of 2^31, so that no bit below decides: `srshl` does the rest, and
        rounds as the program does, ties up, without a carry that could be lost.
        """
        ir = builder()
        multiplier, places = scaling("multiplier", None), scaling("shift", None)
        zero_point = all_lanes(rounding.zero_point, "int32", 4)
        if rounding.high_word:
            upper = ir.call_llvm_pure_intrin("int32x4", f"{NEON}.sqdmulh.v4i32", sums, multiplier)
            return ir.call_llvm_pure_intrin("int32x4", f"{NEON}.srshl.v4i32", upper, places) + zero_point
        halves = []
        for half in ([0, 1], [2, 3]):
            wide = [ir.cast(ir.Shuffle([each], half), "int64x2") for each in (sums, multiplier, places)]
            shifted = ir.call_llvm_pure_intrin("int64x2", f"{NEON}.srshl.v2i64", wide[0] * wide[1], wide[2])
            halves.append(ir.call_llvm_pure_intrin("int32x2", f"{NEON}.sqxtn.v2i32", shifted))
        whole = ir.Shuffle(halves, list(range(4)))
        return ir.call_llvm_pure_intrin("int32x4", f"{NEON}.sqadd.v4i32", whole, zero_point)

    def scaling_rows(self, multiplier: Array, shift: Array, high_word: bool) -> tuple[Array, Array]:
        """Return multipliers, and places to the left behind what `scaled` has of products."""
        return multiplier, (31 if high_word else 0) - shift

    def joined(self, four: Sequence[Any], low: int, high: int) -> Any:
        """Return four vectors of 32 bits as one of codes from low to high, in order."""
        ir = builder()
        words = [ir.call_llvm_pure_intrin("int16x4", f"{NEON}.sqxtn.v4i16", each) for each in four]
        pairs = [ir.Shuffle(words[at : at + 2], list(range(8))) for at in (0, 2)]
        codes = [ir.call_llvm_pure_intrin("int8x8", f"{NEON}.sqxtn.v8i8", each) for each in pairs]
        whole = ir.Shuffle(codes, list(range(REGISTER)))
        if high < self.high:
            whole = ir.min(whole, all_lanes(high, "int8", REGISTER))
        return ir.max(whole, all_lanes(low, "int8", REGISTER)) if low > self.low else whole

    def looked_up(self, codes: Any, size: int, table: Any) -> Any:
        """Return table[code] for 16 codes: each four registers answer for the codes that they have, zero for others."""
        del size
        ir, kind = builder(), f"int8x{REGISTER}"
        places, found = ir.reinterpret(kind, codes), None
        for first in range(0, 256, TABLE):
            lines = [ir.reinterpret(kind, load(table, first + at, REGISTER)) for at in range(0, TABLE, REGISTER)]
            # Below 64 as bytes without a sign only where a code is among these.
            here = places ^ all_lanes(first - 256 * (first > 127), "int8", REGISTER)
            part = ir.call_llvm_pure_intrin(kind, f"{NEON}.tbl4.v16i8", *lines, here)
            found = part if found is None else found | part
        return ir.reinterpret(f"uint8x{REGISTER}", found)


def _processor(name: str, features: Sequence[str], flags: Sequence[str], emulated: str, instruction: str) -> Aarch64:
    # Loads of two pixels that lie side by side would become one of four registers in a row, and others move for those.
    options = ("-disable-interleaved-load-combine:bool=1",)
    machine = Machine("generic", ("+neon", *features), "aarch64-unknown-linux-gnu", options)
    return Aarch64(name, machine, ("asimd", *flags), 4, 32, instruction, emulated=emulated)


def _on_android(processor: Aarch64) -> Aarch64:
    """Return a processor as Android has it: a register is the system's, and pages may be of 16 KB."""
    machine = replace(processor.machine, triple="aarch64-unknown-linux-android")
    return replace(processor, name=f"{processor.name}-android", machine=machine, linked=("-z", "max-page-size=16384"))


SDOT = _processor("sdot", ("+dotprod",), ("asimddp",), "cortex-a76", DOT)
I8MM = _processor("i8mm", ("+dotprod", "+i8mm"), ("asimddp", "i8mm"), "max", MATRIX)
PLAIN = _processor("neon", (), (), "cortex-a53", "")
ANDROID = _on_android(SDOT)
PROCESSORS = {processor.name: processor for processor in (SDOT, I8MM, PLAIN, ANDROID)}
