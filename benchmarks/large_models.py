"""Compile one language model at several depths, with and without a bound on memory; write docs/large-models.md.

    python benchmarks/large_models.py MODEL.onnx EVAL.npz --folder DIR [--depths 3 22 60 140] [--calib CALIB.npz]

MODEL is the catalog's smollm2-135m, with its data. A model of n layers has each of its layers about n / 30 times in a
row, and each copy adds that part of what the layer adds, so that the function stays near the original's; of fewer than
30 layers, some are left out. Weights are float32, in external data. Models and figures stay in DIR: the page has all
depths that were ever measured there. With --calib compiles are with samples of that archive, without it without any:
the page has a table of each.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx

from qcompile import memory
from qcompile.core import model as models

PAGE = Path(__file__).parent.parent / "docs/large-models.md"
#: Layers of the models, and of the one that they are made of.
DEPTHS, LAYERS = (3, 22, 60, 140), 30
#: Samples to evaluate on and to calibrate with, and how many tokens each has.
EVALUATED, CALIBRATED, TOKENS = 2, 4, 16
#: Where a tensor begins in a file: at a page of memory.
PAGE_BYTES = 4096
#: Tensors of more elements than this are given noise of a thousandth, each its own.
ALIKE = 4096
#: The products by which a layer adds to the stream.
ADDING = ("output", "down")
#: Beyond this many bytes of weights, only what is bounded is measured.
UNBOUNDED = 600_000_000


TEXT = """# Large models

Written by `python benchmarks/large_models.py`; do not edit.

Models whose weights lie beside them as external data are compiled from there: protobuf ends at 2 GB, files do not.
`--max-memory 4GB` bounds what the process may have in memory meanwhile:

```
qcompile MODEL.onnx --target cpu --activations none --data calib.npz --max-memory 4GB
```

| what | without a bound | with one |
|---|---|---|
| weights of the model | mapped from its file while they are looked at | the same |
| weights that are rewritten | in memory | each in a file of a temporary folder, and mapped from there |
| models in the runtime | two at once; in trials one for each thread | as many as there is room for, one at least |
| outputs that are compared | sample by sample | in that folder, where there is no room for both models |
| latency | measured | only where there is room for two models; else measurements.json says so |

**A bound changes no byte** of the artifact. What cannot be held is refused with exit code 5 before the work, with what
would do; so is, at the end and before anything is written, a compile that took more than it was allowed.
`measurements.json` has what was taken beside what was allowed (the most resident memory of the process: VmHWM, mapped
files included). Other processes (`--workers`, compilers of some targets) are not counted.

The folder goes with the compile, a file of it with its last reader. It lies where `TMPDIR` says; it has to have room
for the model about twice over, and should not be a file system in memory.

The least that can be asked for is one model in the runtime, which packs float weights anew for its kernels, with the
QDQ model beside it whose layers are held against its own: {held} times the weights in float32, {measured} times with
data, or five times the largest one (its codes are found in float64) where that is more; {base} MB for the process, and
512 MB for samples and what is summed up over them (less for small models).

Layers are not run one by one: so a model larger than memory cannot be compiled.

## Measured

smollm2-135m with its layers repeated, no two tensors alike, in external data: `--target cpu --activations none`,
{evaluated} samples of {tokens} tokens to evaluate, each compile in a process of its own with the least bound that is
not refused. Those below 0.6 GB were compiled without a bound too, and all files that the manifest lists were the same.
Peak: ru_maxrss. Time: of the processor, user and system, on two cores of a machine that others used meanwhile. All
bytes in GB, which are 10⁹ bytes.

Without data: weights in int8, rounded to nearest.

{without}

With data, {calibrated} samples of {tokens} tokens: weights are rounded by GPTQ, which runs the model and sums up second
moments of what each operator reads.

{with_data}

The vocabulary's tables are as large at every depth. By layer, time with data was {least:.1f} to {most:.1f} s from
10 layers on.
"""
#: Of each table.
COLUMNS = """\
| layers | weights, GB | artifact | SQNR, dB | bound | peak | over weights | peak without | time, s | s/GB |
|---|---|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Deepener:
    """Writes a model with its layers repeated.

    Parameters
    ----------
    proto : onnx.ModelProto
        The original, nodes in order.
    """

    proto: onnx.ModelProto

    def write(self, depth: int, path: Path) -> None:
        """Write a model of so many layers, its weights in ``<name>.data`` beside it."""
        graph, tensors = self.proto.graph, {tensor.name: tensor for tensor in self.proto.graph.initializer}
        starts = [self._first(layer) for layer in range(LAYERS)]
        end = next(index for index, node in enumerate(graph.node) if node.name == "/norm/Constant")
        sources = [index * LAYERS // depth for index in range(depth)]
        copies = Counter(sources)
        made = onnx.ModelProto()
        made.CopyFrom(onnx.ModelProto(ir_version=self.proto.ir_version, opset_import=self.proto.opset_import))
        made.graph.name = f"{depth} layers"
        made.graph.input.extend(graph.input)
        made.graph.output.extend(graph.output)
        made.graph.node.extend(graph.node[: starts[0]])
        stream = "/embedding/Gather_output_0"
        with path.with_name(f"{path.name}.data").open("wb") as data:
            for place, layer in enumerate(sources):
                nodes = graph.node[starts[layer] : [*starts, end][layer + 1]]
                stream = self._layer(made.graph, nodes, place, layer, stream, 1.0 / copies[layer], tensors, data)
            for node in graph.node[end:]:
                made.graph.node.add().CopyFrom(node)
                inputs = [stream if name == _stream(LAYERS - 1) else name for name in node.input]
                made.graph.node[-1].input[:] = inputs
            written = {tensor.name for tensor in made.graph.initializer}
            read = {name for node in made.graph.node for name in node.input}
            for name in sorted(read & tensors.keys() - written):
                _store(made.graph, tensors[name], name, 1.0, data)
        onnx.save(made, path)

    def _first(self, layer: int) -> int:
        """Return where a layer's nodes begin."""
        name = f"/blocks.{layer}/attention_norm/Constant"
        return next(index for index, node in enumerate(self.proto.graph.node) if node.name == name)

    def _layer(
        self, graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto], place: int, layer: int, stream: str,
        part: float, tensors: dict[str, onnx.TensorProto], data: IO[bytes],
    ) -> str:  # fmt: skip
        """Append a layer that reads the stream and adds a part of what the original adds; return what it writes."""
        before = "/embedding/Gather_output_0" if layer == 0 else _stream(layer - 1)
        own = {name for node in nodes for name in node.output}
        new = {before: stream} | {name: f"{place}:{name}" for name in own}
        for node in nodes:
            for name in node.input:
                if name in tensors and name not in new and name not in ("cosine", "sine", "mask"):
                    new[name] = f"{place}:{name}"
                    adds = re.fullmatch(rf"/blocks\.{layer}/({'|'.join(ADDING)})/MatMul", node.name)
                    _store(graph, tensors[name], new[name], part if adds else 1.0, data)
            copy = graph.node.add()
            copy.CopyFrom(node)
            copy.name = f"{place}:{node.name}"
            copy.input[:] = [new.get(name, name) for name in node.input]
            copy.output[:] = [new[name] for name in node.output]
        return new[_stream(layer)]


def _stream(layer: int) -> str:
    return f"/blocks.{layer}/Add_4_output_0"


def _store(graph: onnx.GraphProto, tensor: onnx.TensorProto, name: str, factor: float, data: IO[bytes]) -> None:
    """Append a tensor to the external data, times a factor."""
    array = onnx.numpy_helper.to_array(tensor)
    if array.size > ALIKE:
        # Copies that are the same to the last bit would be stored once by a runtime that looks for them.
        noise = np.random.default_rng(len(graph.initializer)).standard_normal(array.shape, np.float32)
        array = array * (np.float32(factor) + np.float32(1e-3) * np.float32(factor) * noise)
    data.write(bytes(-data.tell() % PAGE_BYTES))
    placed = graph.initializer.add(name=name, data_type=tensor.data_type, dims=tensor.dims)
    placed.data_location = onnx.TensorProto.EXTERNAL
    for key, entry in (("location", Path(data.name).name), ("offset", data.tell()), ("length", array.nbytes)):
        placed.external_data.add(key=key, value=str(entry))
    array.tofile(data)


def measured(model: Path, folder: Path, bound: int | None, data: Path | None) -> dict[str, Any]:
    """Compile in a process of its own, and return what that took.

    Parameters
    ----------
    model : Path
    folder : Path
        With the samples.
    bound : int, optional
        Bytes.
    data : Path, optional
        Samples to calibrate with.
    """
    output = folder / "artifact"
    shutil.rmtree(output, ignore_errors=True)
    words = [model, "--target", "cpu", "--activations", "none", "--eval", folder / "eval.npz", "-o", output, "--quiet"]
    words += [] if data is None else ["--data", data]
    words += [] if bound is None else ["--max-memory", f"{bound}B"]
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-m", "qcompile", *map(str, words)]) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{model}: exit code {process.returncode}")
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    found = {
        "wall": time.perf_counter() - began,
        "seconds": used.ru_utime + used.ru_stime,
        "peak": 1024 * used.ru_maxrss,
        "bound": bound,
        "artifact": report["size"]["artifact_bytes"],
        "sqnr": report["fidelity"]["outputs"]["logits"]["sqnr"],
        "files": manifest["files"],
    }
    shutil.rmtree(output)
    return found


def sampled(source: Path, count: int, target: Path) -> None:
    """Write the first samples of an archive, cut to `TOKENS`."""
    with np.load(source) as archive:
        np.savez(target, input_ids=archive["input_ids"][:count, :, :TOKENS])


def table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table of compiles by depth."""
    rows = []
    for depth, one in sorted(figures.items(), key=lambda pair: int(pair[0])):
        held, free = one["bounded"], one.get("free")
        giga, unbounded = one["weights"] / 1e9, f"{free['peak'] / 1e9:.2f}" if free else ""
        rows.append(
            f"| {depth} | {giga:.2f} | {held['artifact'] / 1e9:.2f} | {held['sqnr']:.1f} | {held['bound'] / 1e9:.2f} | "
            f"{held['peak'] / 1e9:.2f} | {held['peak'] / one['weights']:.1f} | {unbounded} | {held['seconds']:.0f} | "
            f"{held['seconds'] / giga:.0f} |"
        )
    return COLUMNS + "\n".join(rows)


def page(folder: Path) -> str:
    """Return the page about the figures in a folder."""
    without, with_data = (table(known(folder / name)) for name in ("figures.json", "calibrated.json"))
    figures = known(folder / "calibrated.json")
    each = [one["bounded"]["seconds"] / int(depth) for depth, one in figures.items() if int(depth) >= 10] or [0.0]
    return TEXT.format(
        base=memory.BASE >> 20, held=memory.HELD, measured=memory.HELD + memory.LEFT, evaluated=EVALUATED,
        calibrated=CALIBRATED, tokens=TOKENS, without=without, with_data=with_data,
        least=min(each), most=max(each),
    )  # fmt: skip


def known(path: Path) -> dict[str, Any]:
    """Return the figures in a file, by depth."""
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return figures


def main() -> None:
    """Make the models, compile them, and write the page."""
    parser = argparse.ArgumentParser(description="Measure memory and time of a compile by the size of its model.")
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="For models and figures, outside of the repository.")
    parser.add_argument("--depths", type=int, nargs="*", default=DEPTHS)
    parser.add_argument("--calib", type=Path, help="Archive of samples to calibrate with.")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    sampled(given.data, EVALUATED, given.folder / "eval.npz")
    kept, data = given.folder / ("calibrated.json" if given.calib else "figures.json"), None
    if given.calib:
        sampled(given.calib, CALIBRATED, data := given.folder / "calib.npz")
    figures = known(kept)
    for depth in given.depths:
        path = given.folder / f"layers{depth}.onnx"
        if not path.exists():
            Deepener(onnx.load(given.model)).write(depth, path)
        loaded = models.load(path)
        one: dict[str, Any] = {"weights": models.initializer_bytes(loaded)}
        one["bounded"] = measured(path, given.folder, memory.least(loaded, data=data is not None), data)
        if one["weights"] < UNBOUNDED:
            one["free"] = measured(path, given.folder, None, data)
            if one["free"]["files"] != one["bounded"]["files"]:
                sys.exit(f"{path}: with a bound on memory other bytes were written")
        figures[str(depth)] = one
        kept.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    PAGE.write_text(page(given.folder), encoding="utf-8")


if __name__ == "__main__":
    main()
