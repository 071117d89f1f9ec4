"""What `mma.sync` gives at most on a device: products of codes that never leave registers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Of a block; products of 16 x 8 x 32 codes that a warp has in a round, all of sums of their own; and rounds.
WARPS, TILES, ROUNDS = 8, 32, 1 << 13
KERNEL = """
extern "C" __global__ void __launch_bounds__(256, 1) ceiling(int *output, const Numbers<1> rounds)
{
    TensorCores<128, 256, 2, 4> tile = {};
    uint32_t left[4][4], right[8][2];
    for (int at = 0; at < 16; at++) {
        left[at / 4][at % 4] = right[at / 2][at % 2] = threadIdx.x * 2654435761u + at;
    }
    for (int round = 0; round < rounds.bits[0]; round++) {
#pragma unroll
        for (int m = 0; m < 4; m++) {
#pragma unroll
            for (int n = 0; n < 8; n++) {
                multiply_tile(tile.sums[m][n], left[m], right[n]);
            }
        }
    }
    int sum = 0;
    tile.give([&](int row, int column, int each) { sum += each * (row + column); });
    output[blockIdx.x * 256 + threadIdx.x] = sum;
}
"""


def source() -> str:
    """Return its CUDA C++."""
    from qcompile.backends.cuda.network import prelude

    return prelude() + KERNEL


def tera_operations(blocks: int, milliseconds: float) -> float:
    """Return 10^12 additions and multiplications of codes a second."""
    return 2.0 * blocks * WARPS * TILES * ROUNDS * 16 * 8 * 32 / milliseconds / 1e9


def ready(driver: Any, file: Path) -> tuple[int, Callable[[int], float]]:
    """Return how many blocks it has, one for each multiprocessor, and what times them: milliseconds of each run."""
    module = driver.made("cuModuleLoadData", file.read_bytes())
    function, stream = driver.function(module, "ceiling"), driver.made("cuStreamCreate", 1)
    blocks = driver.attribute(importlib.import_module("driver").MULTIPROCESSORS)
    output = driver.allocate(blocks * 256 * 4)
    driver.call("cuStreamBeginCapture_v2", stream, 1)
    driver.launch(function, (blocks, 1, 1), 256, [output], [ROUNDS], stream)
    graph = driver.captured(stream)
    return blocks, lambda each: float(driver.timed(graph, stream, each))
