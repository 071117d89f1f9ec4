"""Measure what the installed ONNX Runtime has for weights of four and two bits; write docs/few-bits.md.

    python benchmarks/few_bits.py

Each form is a model of one operator, with the shapes that MiniLM-L6 has. Latencies are medians of interleaved runs on
one thread; memory is what a fresh process grows by when it loads the model and runs it once.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from qcompile import Options, compile
from qcompile.core import numerics, runtime
from qcompile.timing import in_turns, processor

PAGE = Path(__file__).parent.parent / "docs/few-bits.md"
TOKENS, WORDS, WIDTH = 128, 30522, 384
#: Depth and columns of products, and rows.
PRODUCTS = ((384, 384), (384, 1536), (1536, 384))
ROWS = (128, 1)
ROUNDS, SECONDS = 2000, 6.0
FLOAT, INTEGER = TensorProto.FLOAT, TensorProto.INT64
MICROSOFT = "com.microsoft"
Array = npt.NDArray[np.float32]

#: What a fresh process runs: it prints by how many bytes it grows.
GROWN = """
import sys, json, numpy as np
import onnxruntime as ort
def held():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024
options = ort.SessionOptions()
options.intra_op_num_threads = 1
tiny = sys.argv[2]
ort.InferenceSession(tiny, options, providers=["CPUExecutionProvider"]).run(None, {"ids": np.zeros((1, 128), np.int64)})
before = held()
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
session.run(None, {"ids": np.arange(128, dtype=np.int64)[None]})
print(held() - before)
"""
HEAD = """# Four bits and two: what the runtime has

Written by `python benchmarks/few_bits.py`; do not edit. onnxruntime {version} on {processor}, one thread; models of one
operator; medians of runs in turns. [allocation.md](allocation.md#what-else-the-runtime-has) says what follows.

## A table of words

{words} rows of {width} numbers, from which {tokens} tokens pick: file and memory beside float's, and what a run takes.
*Packed* is qcompile's form of four bits, which the runtime unpacks to int8 when it loads the model;
`GatherBlockQuantized` reads four bits in each run, with a float scale for each block. SQNR is of normally distributed
numbers.

| form | SQNR, dB | file | memory | latency |
|---|---|---|---|---|
{tables}

## Products

Latency beside float's of rows · matrix, for {rows}. *int8* is what qcompile makes of weights in eight bits, and of
packed ones, with activations in eight bits too. `MatMulNBits` has blocks of 16 with a float scale each; at accuracy
level 4 it rounds activations to int8, at 0 it computes in float.

| form | SQNR of weights, dB | bits a weight | {columns} |
|---|---|---|{dashes}
{products}

"""


def model_of(nodes: list[onnx.NodeProto], constants: Mapping[str, npt.NDArray[np.generic] | onnx.TensorProto],
             inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:  # fmt: skip
    """Build a model."""
    initializers = [numpy_helper.from_array(array, name) if isinstance(array, np.ndarray) else array
                    for name, array in constants.items()]  # fmt: skip
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def blockwise(weights: Array, bits: int, block: int) -> tuple[npt.NDArray[np.uint8], Array, Array]:
    """Round the last axis in blocks around a middle code; return codes, scales, and what they stand for."""
    blocks = weights.reshape(*weights.shape[:-1], -1, block)
    middle = 1 << (bits - 1)
    best: tuple[npt.NDArray[Any], ...] | None = None
    for part in np.linspace(0.4, 1.2, 33) if bits == 2 else np.linspace(0.7, 1.1, 17):
        # The most negative code reaches one step farther: a block's largest number is put there.
        largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
        scale = np.float32(part) * largest / -middle
        codes = np.clip(np.rint(blocks / np.where(scale == 0, 1, scale)), -middle, middle - 1)
        error = ((codes * scale - blocks) ** 2).sum(-1, keepdims=True)
        if best is None:
            best = codes, scale, error
        else:
            wins = error < best[2]
            best = (np.where(wins, codes, best[0]), np.where(wins, scale, best[1]), np.minimum(error, best[2]))
    assert best is not None
    real = (best[0] * best[1]).reshape(weights.shape).astype(np.float32)
    return (best[0] + middle).astype(np.uint8), best[1][..., 0].astype(np.float32), real


def packed(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Pack codes of the last axis into bytes, the first in the lowest bits."""
    each = 8 // bits
    parts = codes.reshape(*codes.shape[:-1], -1, each).astype(np.uint16) << (bits * np.arange(each, dtype=np.uint16))
    return np.asarray(np.bitwise_or.reduce(parts, axis=-1), np.uint8)


def tables(folder: Path, table: Array) -> dict[str, tuple[Path, float]]:
    """Write each form of the table; return the file and its SQNR."""
    ids = [helper.make_tensor_value_info("ids", INTEGER, [1, TOKENS])]
    rows = [helper.make_tensor_value_info("y", FLOAT, [1, TOKENS, WIDTH])]
    gather = [helper.make_node("Gather", ["table", "ids"], ["y"])]
    found = {"float": (save(folder / "float.onnx", model_of(gather, {"table": table}, ids, rows)), np.inf)}
    forms: tuple[tuple[str, Literal["8", "4"]], ...] = (("int8", "8"), ("packed, 4.25 bits", "4"))
    for name, bits in forms:
        output = folder / f"compiled{bits}"
        compile(folder / "float.onnx", Options("cpu", weights=bits, output=output))
        found[name] = output / "model.onnx", np.nan
    for block in (16, 32, 64, 128):
        codes, scales, _ = blockwise(table, 4, block)
        content = packed(
            np.bitwise_xor(codes.reshape(table.shape), np.uint8(8)), 4
        ).tobytes()  # of two's complement the highest bit differs
        data = helper.make_tensor("codes", TensorProto.INT4, table.shape, content, raw=True)
        node = helper.make_node("GatherBlockQuantized", ["codes", "ids", "scales"], ["y"], domain=MICROSOFT, bits=4,
                                block_size=block, quantize_axis=1, gather_axis=0)  # fmt: skip
        model = model_of([node], {"codes": data, "scales": scales}, ids, rows)
        form = f"`GatherBlockQuantized`, blocks of {block}, {4 + 32 / block:g} bits"
        found[form] = save(folder / f"gather{block}.onnx", model), np.nan
    return found


def save(path: Path, model: onnx.ModelProto) -> Path:
    """Write a model."""
    onnx.save(model, path)
    return path


def told_tables(folder: Path) -> list[str]:
    """Return the rows of the first table."""
    table = np.random.default_rng(0).normal(size=(WORDS, WIDTH)).astype(np.float32)
    forms = tables(folder, table)
    tiny = model_of([helper.make_node("Identity", ["ids"], ["y"])], {},
                    [helper.make_tensor_value_info("ids", INTEGER, [1, TOKENS])],
                    [helper.make_tensor_value_info("y", INTEGER, [1, TOKENS])])  # fmt: skip
    save(folder / "tiny.onnx", tiny)
    ids = np.random.default_rng(1).integers(0, WORDS, (1, TOKENS))
    sessions = {form: runtime.Session(path) for form, (path, _) in forms.items()}
    took = interleaved({form: (session, {"ids": ids}) for form, session in sessions.items()})
    rows = []
    for form, (path, _) in forms.items():
        (found,) = sessions[form].run({"ids": ids}).values()
        quality = numerics.sqnr(table[ids], found)
        memory = statistics.median(grown(path, folder / "tiny.onnx") for _ in range(3))
        whole = [memory, path.stat().st_size, took[form]]
        if form == "float":
            float_memory, float_size, float_time = whole
        shown = "" if np.isinf(quality) else f"{quality:.1f}"
        rows.append(f"| {form} | {shown} | {path.stat().st_size / float_size:.3f}x | {memory / float_memory:.2f}x, "
                    f"{memory / 1e6:.1f} MB | {took[form] / float_time:.2f}x, {took[form] * 1e3:.0f} us |")  # fmt: skip
    return rows


def grown(path: Path, tiny: Path) -> int:
    """Return by how many bytes a fresh process grows that loads and runs a model."""
    words = [sys.executable, "-c", GROWN, str(path), str(tiny)]
    return int(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))


def interleaved(forms: Mapping[str, tuple[runtime.Session, Mapping[str, npt.NDArray[np.generic]]]]) -> dict[str, float]:
    """Return the median milliseconds of a run of each, in turns."""
    (feeds, *_) = (feeds for _, feeds in forms.values())
    taken = in_turns([session.run for session, _ in forms.values()], [feeds], budget=SECONDS, most=ROUNDS)
    return {form: statistics.median(of) for form, of in zip(forms, taken, strict=True)}


def product(folder: Path, rows: int, weights: Array, samples: Path) -> dict[str, Path]:
    """Write each form of a product."""
    depth, columns = weights.shape
    inputs = [helper.make_tensor_value_info("x", FLOAT, [rows, depth])]
    outputs = [helper.make_tensor_value_info("y", FLOAT, [rows, columns])]
    name = f"{rows}-{depth}-{columns}"
    plain = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weights}, inputs, outputs)
    found = {"float": save(folder / f"{name}.onnx", plain)}
    output = folder / f"{name}-int8"
    compile(found["float"], Options("cpu", data=str(samples), output=output, costs=Path("none"), smoothing="none",
                                    rotation="none", observer="minmax"))  # fmt: skip
    found["int8"] = output / "model.onnx"
    for bits in (8, 4, 2):
        codes, scales, _ = blockwise(np.ascontiguousarray(weights.T), bits, 16)
        stored = packed(codes.reshape(columns, depth // 16, 16), bits)
        for level in (0, 4):
            node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain=MICROSOFT, K=depth, N=columns,
                                    bits=bits, block_size=16, accuracy_level=level)  # fmt: skip
            model = model_of([node], {"w": stored, "s": scales.reshape(-1)}, inputs, outputs)
            found[f"`MatMulNBits`, {bits} bits, level {level}"] = save(folder / f"{name}-{bits}-{level}.onnx", model)
    return found


def told_products(folder: Path) -> tuple[list[str], list[str]]:
    """Return the columns and the rows of the second table."""
    generator = np.random.default_rng(2)
    columns, cells = list[str](), dict[str, list[str]]()
    for rows in ROWS:
        for depth, width in PRODUCTS:
            weights = generator.normal(size=(depth, width)).astype(np.float32)
            x = generator.normal(size=(16, rows, depth)).astype(np.float32)
            samples = folder / "samples.npz"
            np.savez(samples, x=x)
            forms = product(folder, rows, weights, samples)
            sessions = {form: (runtime.Session(path), {"x": x[0]}) for form, path in forms.items()}
            took = interleaved(sessions)
            columns.append(f"{rows} · {depth} · {width}")
            for form in forms:
                cells.setdefault(form, []).append(f"{took[form] / took['float']:.2f}x")
    weights = generator.normal(size=(384, 384)).astype(np.float32)
    quality = {"float": ("", "32")}
    quality["int8"] = (f"{_eight(weights):.1f}", "8")
    for bits in (8, 4, 2):
        real = blockwise(weights, bits, 16)[2]
        for level in (0, 4):
            form = f"`MatMulNBits`, {bits} bits, level {level}"
            quality[form] = (f"{numerics.sqnr(weights, real):.1f}", f"{bits + 2:g}")
    return columns, [f"| {form} | {' | '.join(quality[form])} | {' | '.join(of)} |" for form, of in cells.items()]


def _eight(weights: Array) -> float:
    scale = np.abs(weights).max(0) / 127
    return numerics.sqnr(weights, (np.rint(weights / scale) * scale).astype(np.float32))


def main() -> None:
    """Measure, and write the page."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        words = told_tables(Path(folder))
        print("\n".join(words), flush=True)
        columns, products = told_products(Path(folder))
        print("\n".join(products), flush=True)
    head = HEAD.format(
        version=onnxruntime.__version__, processor=processor(), words=WORDS, width=WIDTH, tokens=TOKENS,
        rows=" and ".join(map(str, ROWS)) + " rows", tables="\n".join(words), columns=" | ".join(columns),
        dashes="---|" * len(columns), products="\n".join(products),
    )  # fmt: skip
    PAGE.write_text(head, encoding="utf-8")


if __name__ == "__main__":
    main()
