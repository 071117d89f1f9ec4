"""Time kernels of `cpu:tvm` beside ONNX Runtime's on shapes of the catalogue; write docs/cpu-kernels.md.

    python benchmarks/cpu_kernels.py [--processor NAME] [--only WORD] [--seconds S]

Each shape is an integer program of one operation, compiled as any network is, and a model of the runtime's operator for
the same. What a call takes besides is taken out: a program of `COPIES` operations with weights of their own less one
of a single operation, over the difference in operations.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cpu_kernel_peaks import peak
from cpu_kernel_rivals import rivals
from cpu_kernel_shapes import SHAPES, Shape, program

from qcompile import timing
from qcompile.backends.cpu import library
from qcompile.backends.cpu.backend import write
from qcompile.backends.cpu.network import Network
from qcompile.backends.cpu.session import InferenceSession, absent
from qcompile.backends.tvm.schedules.x86 import PROCESSORS
from qcompile.core.runtime import name

PAGE = Path(__file__).parent.parent / "docs/cpu-kernels.md"
#: Operations of the longer program, seconds for a shape, and what a timed batch of runs takes at least.
COPIES, SECONDS, BATCH = 9, 3.0, 2e-4
Run = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """What was measured of a shape: microseconds of one operation, medians and the least."""

    shape: Shape
    ours: tuple[float, float]
    theirs: tuple[float, float]
    form: str

    @property
    def ratio(self) -> float:
        """Theirs over ours, of medians."""
        return self.theirs[0] / self.ours[0]


def repeated(network: Network) -> None:
    """Fill margins in front of each operation, as a network does, and not once for all of them."""
    fills = [call for call in network.calls if call.kernel.startswith("fill")]
    others = [call for call in network.calls if call not in fills]
    network.calls[:] = [part for call in others for part in (*fills, call)]


def ours(shape: Shape, copies: int, processor: str, folder: Path) -> Run:
    """Return what runs so many operations by a library."""
    network = library.network_of(program(shape, copies), PROCESSORS[processor])
    repeated(network)
    folder.mkdir(parents=True)
    write(network, "net", folder)
    session = InferenceSession(folder)
    (port,) = session.get_inputs()
    random = np.random.default_rng(0)
    codes = [random.normal(size=port.stored).astype(np.float32) if shape.bits == 4 else
             random.integers(-128, 128, port.stored).astype(np.int8)]  # fmt: skip
    return lambda: session.run_codes(codes)


def in_turns(runs: Sequence[Run], seconds: float) -> list[list[float]]:
    """Return microseconds of a run of each, in turns, by this thread's own time."""
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    counts = []
    for run in runs:
        start = time.thread_time()
        for _ in range(3):
            run()
        counts.append(max(1, int(BATCH / max((time.thread_time() - start) / 3, 1e-6))))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for run, count, found in zip(runs, counts, times, strict=True):
            run()
            start = time.thread_time()
            for _ in range(count):
                run()
            found.append(1e6 * (time.thread_time() - start) / count)
    return times


def each(one: Sequence[float], many: Sequence[float]) -> tuple[float, float]:
    """Return what one operation takes: by medians, and by the least of all runs."""
    return tuple((by(many) - by(one)) / (COPIES - 1) for by in (statistics.median, min))  # type: ignore[return-value]


def measure(shape: Shape, processor: str, seconds: float) -> Row:
    """Measure one shape."""
    with tempfile.TemporaryDirectory() as folder:
        mine = [ours(shape, copies, processor, Path(folder) / str(copies)) for copies in (1, COPIES)]
        others = {form: [build(1), build(COPIES)] for form, build in rivals(shape).items()}
        runs = [*mine, *(run for pair in others.values() for run in pair)]
        times = in_turns(runs, seconds)
    taken = [each(*times[at : at + 2]) for at in range(0, len(times), 2)]
    form, best = min(zip(others, taken[1:], strict=True), key=lambda pair: pair[1])
    return Row(shape, taken[0], best, form)


def node() -> float:
    """Return the microseconds that the runtime takes for a node of one product."""
    tiny = Shape("", 1, 1, 1)
    (build,) = rivals(tiny).values()
    return each(*in_turns([build(1), build(COPIES)], 1.0))[0]


HEAD = """# Kernels beside ONNX Runtime's

Written by `python benchmarks/cpu_kernels.py`; do not edit. [targets/cpu-tvm.md](targets/cpu-tvm.md) has what the
kernels are, [cpu-libraries.md](cpu-libraries.md) whole networks.

One operation with its bias and requantization, from codes to codes, batch 1, one thread: an integer program of it,
compiled as any network is (`{processor}`), beside {runtime}'s `QLinearMatMul` or `QLinearConv` of the same, which has
the faster of two layouts: NCHW, and `com.microsoft`'s with channels last; `QLinearMatMul` has no bias. `int4` is from
floats to floats by weights of four bits with a scale for each 32 inputs, with activations rounded to eight bits block
by block on both sides: the runtime's `MatMulNBits` at accuracy level 4, without a bias. Microseconds are what {copies}
operations with weights of their own take, less what one takes, over {fewer}: calls, inputs and outputs fall out on both
sides, and what is left of the runtime is its kernel and what it does for each node, {node:.2f} us for one that does
nothing else.
Margins of padding are filled each time. Both run in turns; medians, and the least of all runs behind them, of the
thread's own time. Outputs of the runtime are bound beforehand.

{machine} Its measured peak is {peaks}: independent sums in registers, in a loop of nothing else. A share is of the peak
of the instruction that the kernel has.

Geometric mean of the ratios (the runtime's time over ours): **{mean:.2f}x**; the worst: {worst:.2f}x ({where}).

| shape | from | ours, us | {runtime}, us | ratio | form | GOPS | kernel | share of peak |
|---|---|---|---|---|---|---|---|---|
"""


def page(rows: Sequence[Row], processor: str, kernels: Sequence[str]) -> str:
    """Return the page."""
    peaks = {key: peak(key) for key in ("vnni", *(["amx"] if PROCESSORS[processor].tiles else []))}
    worst = min(rows, key=lambda row: row.ratio)
    mean = float(np.exp(np.mean([np.log(row.ratio) for row in rows])))
    names = {"vnni": "`vpdpbusd`", "amx": "`tdpbusd`"}
    text = HEAD.format(
        processor=processor, runtime=name(), copies=COPIES, fewer=COPIES - 1, mean=mean, worst=worst.ratio,
        machine=f"Measured on: {timing.processor()}, {timing.instructions()}.", where=worst.shape.label, node=node(),
        peaks=" and ".join(f"{gops:.0f} GOPS by {names[key]}" for key, gops in peaks.items()),
    )  # fmt: skip
    lines = []
    for row, kernel in zip(rows, kernels, strict=True):
        gops = 2e-3 * row.shape.products / row.ours[0]
        share = gops / peaks["amx" if kernel == "tiles" else "vnni"]
        (mine, least), (theirs, lowest) = row.ours, row.theirs
        cells = [row.shape.label, row.shape.source, f"{mine:.2f} ({least:.2f})", f"{theirs:.2f} ({lowest:.2f})",
                 f"{row.ratio:.2f}x", row.form, f"{gops:.0f}", kernel, f"{100 * share:.0f}%"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return text + "\n".join(lines) + "\n"


def main() -> None:
    """Measure what was asked for and write the page."""
    parser = argparse.ArgumentParser(description="Time kernels beside ONNX Runtime's; write docs/cpu-kernels.md.")
    best = next(key for key in ("amx", "avx512-vnni", "avx-vnni", "avx2") if not absent(PROCESSORS[key].flags))
    parser.add_argument("--processor", default=best, help=f"whose kernels; here {best} without it")
    parser.add_argument("--only", default="", help="shapes with this in their names; the page is not written")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for each shape; {SECONDS:g} without it")
    options = parser.parse_args()
    rows, kernels = [], []
    for shape in SHAPES:
        if options.only not in shape.label:
            continue
        row = measure(shape, options.processor, options.seconds)
        calls = library.network_of(program(shape, 1), PROCESSORS[options.processor]).calls
        rows.append(row)
        kernels.append(calls[-1].kernel.rsplit("_", 1)[0])
        gops = 2e-3 * shape.products / row.ours[0]
        print(f"{row.ratio:6.2f}x {row.ours[0]:9.2f} {row.theirs[0]:9.2f} us {gops:6.0f} GOPS {kernels[-1]:10} "
              f"{row.form:6} {shape.label}", flush=True)  # fmt: skip
    if not options.only:
        PAGE.write_text(page(rows, options.processor, kernels), encoding="utf-8")


if __name__ == "__main__":
    main()
