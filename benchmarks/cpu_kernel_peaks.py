"""What a processor's products of codes reach at most: independent sums in registers, in a loop of nothing else."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from qcompile.backends.cpu.session import tiles_allowed
from qcompile.backends.tvm import native
from qcompile.backends.tvm.schedules.vectors import FOUR, all_lanes, load
from qcompile.backends.tvm.schedules.x86 import LINE, PROCESSORS

#: Iterations of a timed loop, how often it is timed, and sums that are independent.
TURNS, ROUNDS, SUMS = 200_000, 20, 16
TILES = 4


def peak(kind: str) -> float:
    """Return GOPS, two for each product, of `vnni` or `amx`."""
    processor = PROCESSORS["amx" if kind == "amx" else "avx512-vnni"]
    body, products = (tiles, TILES * 16 * 16 * 64) if kind == "amx" else (registers, SUMS * 16 * FOUR)
    made = native.compile_object({"peak": native.function("peak", ARGUMENTS, body)}, processor.machine)
    with tempfile.TemporaryDirectory() as folder:
        made.write(Path(folder) / "peak.o")
        subprocess.run(["ld", "-shared", "peak.o", "-o", "peak.so"], cwd=folder, check=True)
        function = ctypes.CDLL(f"{folder}/peak.so").peak
        if kind == "amx" and not tiles_allowed():
            raise OSError("the system keeps the tiles of AMX to itself")
        data = np.zeros(1 << 14, np.uint8)
        sizes = data[:LINE]
        sizes[0], sizes[48:56] = 1, 16
        sizes[16:32].view("<u2")[:] = LINE
        found = []
        for _ in range(ROUNDS):
            start = time.thread_time()
            function(ctypes.c_void_p(data.ctypes.data), ctypes.c_void_p(data.ctypes.data + 4096))
            found.append(time.thread_time() - start)
    return 2e-9 * products * TURNS / min(found)


ARGUMENTS = {"data": "uint8", "sums": "int32"}


def registers(buffers: Any) -> None:
    """Emit vpdpbusd on sums that stay in registers."""
    ir, processor = native.builder(), PROCESSORS["avx512-vnni"]
    lanes = processor.lanes
    sums = ir.alloc_buffer((SUMS * lanes,), "int32", scope="local")
    places = [ir.ramp(index * lanes, 1, lanes) for index in range(SUMS)]
    for place in places:
        ir.buffer_store(sums, all_lanes(0, "int32", lanes), [place])
    codes = ir.bind(load(buffers["data"], 0, LINE))
    weights = ir.bind(ir.reinterpret(f"int8x{LINE}", load(buffers["data"], LINE, LINE)))
    with ir.serial(0, TURNS):
        for place in places:
            ir.buffer_store(sums, processor.dot(sums[place], codes, weights, False), [place])
    for place in places:
        ir.buffer_store(buffers["sums"], sums[place], [place])


def tiles(buffers: Any) -> None:
    """Emit tdpbusd on four tiles of sums."""
    from qcompile.backends.tvm.schedules.x86_amx import tile

    ir = native.builder()
    tile("ldtilecfg", ir.address_of(buffers["data"][0]))
    for number in range(2 * TILES):
        tile("tilezero", number)
    with ir.serial(0, TURNS):
        for number in range(TILES):
            tile("tdpbusd", number, TILES + number % 2, TILES + 2 + number // 2)
    for number in range(TILES):
        tile("tilestored64", number, ir.address_of(buffers["sums"][0]), ir.int64(LINE))
    tile("tilerelease")
