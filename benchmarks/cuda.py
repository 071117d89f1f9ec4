"""Time and check the kernels of `cuda:tvm` on a CUDA device, beside PyTorch's.

    python benchmarks/cuda.py prepare FOLDER     anywhere: compiles (--help tells what else it takes along)
    python benchmarks/cuda.py check FOLDER       on a device: 200 random programs bit by bit, and networks' fidelity
    python benchmarks/cuda.py measure FOLDER     on a device, with PyTorch: the figures below

A device's machine needs NumPy, the driver and, to measure, PyTorch: FOLDER has all else, this file's neighbours
included, as FOLDER/cuda.py. Of its folders gemm, resnet50 and lite0 some may be left behind. What is compared runs in
turns, in one process, by the device's clock; figures are medians.
ResNet-50's shapes have random weights; EfficientNet-Lite0 is an artifact of the command line, and so are transformers:

    qcompile minilm.onnx --target cuda:tvm --shape input_ids=1x128 --shape attention_mask=1x128 --data D -o build/minilm
    qcompile smollm2.onnx --target cuda:tvm --shape input_ids=1x128 --weights 4 --activations none -o build/smollm2
    python benchmarks/cuda.py prepare FOLDER --network minilm build/minilm minilm.onnx EVAL --network smollm2 ...

The int8 product stands beside cuBLAS's and beside what `mma.sync` gives at most, of registers alone (cuda_ceiling.py).
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import json
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
#: What goes along.
TAKEN = ("cuda.py", "cuda_rivals.py", "cuda_ceiling.py", "cuda_networks.py")
CASES, ROUNDS = 200, 15
#: int8 product, W4A16, and samples of a run.
PRODUCT, GEMV, BATCHES = (4096, 4096, 4096), (4096, 4096), (1, 32)
#: Matrices that W4A16 goes through in turns, so that none is in a cache.
MATRICES = 32
Run = Callable[[int], float]


def prepare(folder: Path, architectures: list[str], artifact: Path | None, networks: Sequence[Sequence[str]]) -> None:
    """Compile everything that a device is to run."""
    import cuda_ceiling
    import cuda_networks
    import cuda_shapes
    from random_programs import random_codes, random_program

    from qcompile.backends.cuda import backend, compiler
    from qcompile.backends.cuda.network import network_of
    from qcompile.backends.integer.interpret import interpret
    from qcompile.backends.integer.lower import lower
    from qcompile.core import model as models

    compiler.ARCHITECTURES = tuple(architectures) or compiler.ARCHITECTURES
    folder.mkdir(parents=True, exist_ok=True)
    for name in TAKEN:
        shutil.copy(HERE / name, folder / name)
    shutil.copy(HERE.parent / "backends/cuda/driver.py", folder / "driver.py")

    def write(program: Any, place: str) -> Path:
        output = folder / place
        output.mkdir(parents=True, exist_ok=True)
        network = network_of(program)
        backend.write(network, "net", compiler.compile_all(network.source()), output)
        return output

    for seed in range(CASES):
        program = random_program(seed, wide=False)
        drawn = [random_codes(program, sample)["x"] for sample in range(1 + seed % 3)]
        made = [interpret(program, {"x": codes})["y"] for codes in drawn]
        output = write(program, f"cases/{seed}")
        np.savez_compressed(output / "codes.npz", x=np.concatenate(drawn), y=np.concatenate(made))
    write(cuda_shapes.product(*PRODUCT), "gemm")
    (folder / "ceiling.fatbin").write_bytes(compiler.compile_all(cuda_ceiling.source()))
    for name, compiled, model, data in networks:
        cuda_networks.prepare(folder / "networks" / name, Path(compiled), Path(model), data)
    programs = {"resnet50": cuda_shapes.resnet50()}
    write(programs["resnet50"], "resnet50")
    if artifact:
        shutil.copytree(artifact, folder / "lite0", ignore=shutil.ignore_patterns("report*", "*.onnx", "dist*"))
        programs["lite0"] = lower(models.load(artifact / "reference.onnx"))
    layers = {name: {"layers": cuda_shapes.layers_of(program), "shape": program.inputs[0].shape}
                for name, program in programs.items()}  # fmt: skip
    gemv, checked = prepare_gemv(folder)
    (folder / "plan.json").write_text(json.dumps({"networks": layers, "gemv": gemv, "checked": checked}))


def prepare_gemv(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile W4A16 and return how it is launched, whole and with 64 outputs, whose results are written too."""
    from qcompile.backends.cuda import compiler, four_bits

    random, kernel = np.random.default_rng(0), four_bits.Gemv(*GEMV)
    x, codes = random.normal(size=GEMV[1]).astype(np.float16), random.integers(0, 16, (64, GEMV[1])).astype(np.uint8)
    scales = random.uniform(0.001, 0.03, (64, GEMV[1] // four_bits.BLOCK)).astype(np.float16)
    sums, bounds = four_bits.exact(x, codes, scales)
    np.savez(folder / "gemv.npz", x=x, codes=four_bits.pack(codes), scales=scales, sums=sums, bounds=bounds,
             table=four_bits.Gemv(64, GEMV[1]).table)  # fmt: skip
    (folder / "gemv.fatbin").write_bytes(compiler.compile_all(kernel.source("gemv")))
    gemv, checked = (
        {"grid": one.grid, "threads": one.threads, "numbers": one.numbers, "nbytes": one.nbytes}
        for one in (kernel, four_bits.Gemv(64, GEMV[1]))
    )
    return gemv, checked


def session_of(folder: Path, batch: int) -> Any:
    """Return a session of an artifact, by the loader that lies in it."""
    sys.path.insert(0, str(folder))
    try:
        sys.modules.pop("session", None)
        return importlib.import_module("session").InferenceSession(folder, batch)
    finally:
        sys.path.pop(0)


def check(folder: Path) -> int:
    """Run all cases and networks, and return how many are wrong."""
    wrong = 0
    for case in sorted((folder / "cases").iterdir(), key=lambda case: int(case.name)):
        codes = np.load(case / "codes.npz")
        session = session_of(case, 1 + int(case.name) % 3)
        found = session.run_codes([codes["x"]])[0]
        session.close()
        if not np.array_equal(found, codes["y"]):
            wrong += 1
            print(f"case {case.name}: {np.count_nonzero(found != codes['y'])} of {found.size} codes differ")
    print(f"{CASES - wrong} of {CASES} random programs are the interpreter's, bit by bit")
    networks = importlib.import_module("cuda_networks")
    for each in networks.listed(folder):
        session = session_of(each, 1)
        wrong += networks.check(each, session)
        session.close()
    return wrong


def check_gemv(folder: Path) -> float:
    """Return how far W4A16 is from float64 at most, as a part of what it may be off, of 64 rows."""
    plan, content = json.loads((folder / "plan.json").read_text())["checked"], np.load(folder / "gemv.npz")
    driver, function, stream = gemv_of(folder)
    places = [driver.upload(content[name].tobytes()) for name in ("x", "codes", "scales", "table")]
    places.append(driver.upload(bytes(128)))
    pinned = driver.made("cuMemAllocHost_v2", 128)
    driver.launch(function, plan["grid"], plan["threads"], places, plan["numbers"], stream)
    driver.call("cuMemcpyDtoHAsync_v2", pinned, places[-1], 128, stream)
    driver.call("cuStreamSynchronize", stream)
    found = np.frombuffer(ctypes.string_at(pinned, 128), np.float16).astype(np.float64)
    most = float((np.abs(found - content["sums"]) / content["bounds"]).max())
    print(f"W4A16 is off by {most:.2f} of what sums in float32 may be")
    return most


def gemv_of(folder: Path) -> tuple[Any, Any, Any]:
    """Return the driver, the kernel of W4A16 and a stream."""
    driver = importlib.import_module("driver").Driver()
    module = driver.made("cuModuleLoadData", (folder / "gemv.fatbin").read_bytes())
    return driver, driver.function(module, "gemv"), driver.made("cuStreamCreate", 1)


def interleaved(runs: dict[str, Run], each: int) -> dict[str, float]:
    """Return the median milliseconds of what takes turns, `each` runs a turn, after one turn that does not count."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS + 1):
        for name, run in runs.items():
            taken = run(each)
            found[name] += [taken] if turn else []
    return {name: statistics.median(times) for name, times in found.items()}


def gemv_run(folder: Path, plan: dict[str, Any]) -> Run:
    """Return W4A16 over `MATRICES` in turns: milliseconds of one of them."""
    (driver, function, stream), (outputs, depth) = gemv_of(folder), GEMV
    random = np.random.default_rng(0)

    def placed(array: Any) -> int:
        return int(driver.upload(array.tobytes()))

    x, made = placed(random.normal(size=depth).astype(np.float16)), placed(np.zeros(outputs, np.float16))
    table = placed(np.tile(np.array([1.0, 0.0], np.float32), (outputs, 1)))
    matrices = [(placed(random.integers(0, 256, outputs * depth // 2).astype(np.uint8)),
                 placed(random.uniform(0.001, 0.03, outputs * depth // 32).astype(np.float16)))
                for _ in range(MATRICES)]  # fmt: skip
    driver.call("cuStreamBeginCapture_v2", stream, 1)
    for codes, scales in matrices:
        driver.launch(function, plan["grid"], plan["threads"], [x, codes, scales, table, made], plan["numbers"], stream)
    graph = driver.captured(stream)
    return lambda each: float(driver.timed(graph, stream, each) / MATRICES)


def on_device(session: Any, floats: bool) -> Run:
    """Return what times runs of a session whose inputs and outputs stay on the device."""
    return lambda each: float(session.time(1, each, floats=floats, copied=False)[0])


def beside(rivals: Any, run: Any) -> Run:
    """Return what times runs of PyTorch."""
    return lambda each: float(rivals.milliseconds(run, each))


def measure(folder: Path) -> dict[str, Any]:
    """Return and print the figures."""
    rivals = importlib.import_module("cuda_rivals")
    plan = json.loads((folder / "plan.json").read_text())
    driver = gemv_of(folder)[0]
    found: dict[str, Any] = {"device": driver.name, "architecture": driver.capability}
    if (folder / "gemm").is_dir():
        session, theirs = session_of(folder / "gemm", 1), rivals.product(*PRODUCT)
        ceiling = importlib.import_module("cuda_ceiling")
        blocks, most = ceiling.ready(driver, folder / "ceiling.fatbin")
        runs = {"ours": on_device(session, False), "torch._int_mm": beside(rivals, theirs), "mma.sync": most}
        times = interleaved(runs, 20)
        tops = 2 * float(np.prod(PRODUCT, dtype=np.float64)) / times["ours"] / 1e9
        highest = ceiling.tera_operations(blocks, times["mma.sync"])
        found["int8 product"] = times | {"tops": tops, "share": times["torch._int_mm"] / times["ours"],
                                         "ceiling": highest, "share of ceiling": tops / highest}  # fmt: skip
        session.close()
    nbytes = 1 << 30
    moved = beside(rivals, rivals.copy(nbytes))
    times = interleaved({"w4a16": gemv_run(folder, plan["gemv"]), "copy": moved}, 5)
    roofline, rate = nbytes / times["copy"] * 1e-6, plan["gemv"]["nbytes"] / times["w4a16"] * 1e-6
    found["w4a16"] = times | {"gb_per_s": rate, "roofline": roofline, "share": rate / roofline}
    for name, content in plan["networks"].items():
        for batch in BATCHES if (folder / name).is_dir() else ():
            network = session_of(folder / name, batch)
            theirs = rivals.network(content["layers"], content["shape"], batch)
            times = interleaved({"ours": on_device(network, True), "torch fp16": beside(rivals, theirs)}, 20)
            found[f"{name}, batch {batch}"] = times | {"times as fast": times["torch fp16"] / times["ours"]}
            network.close()
    networks = importlib.import_module("cuda_networks")
    for each in networks.listed(folder):
        session = session_of(each, 1)
        found[each.name] = networks.measure(session, on_device)
        session.close()
    print(json.dumps(found, indent=1))
    return found


def obstacle(folder: Path, timed: bool) -> str:
    """Return in one line why nothing can be checked, or timed, here; nothing where it can."""
    if not all((folder / name).is_file() for name in ("plan.json", "driver.py")):
        return f"{folder}: was not made by 'prepare'; python benchmarks/cuda.py prepare FOLDER, where qcompile is"
    if timed and importlib.util.find_spec("torch") is None:
        return "torch: is not installed, which figures stand beside; pip install torch, or 'check' without it"
    try:
        importlib.import_module("driver").Driver()
    except OSError as error:
        return str(error)
    if timed and not importlib.import_module("torch").cuda.is_available():
        return "torch: finds no device, or is a build for processors alone; pip install torch with CUDA"
    return ""


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", "check", "measure"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--architecture", action="append", default=[], help="compile for this one alone: 80, 90a")
    parser.add_argument("--lite0", type=Path, metavar="ARTIFACT", help="EfficientNet-Lite0, compiled for cuda:tvm")
    words: dict[str, Any] = {
        "nargs": 4,
        "action": "append",
        "default": [],
        "metavar": ("NAME", "ARTIFACT", "MODEL", "DATA"),
    }
    parser.add_argument("--network", **words, help="a network compiled for cuda:tvm, its float model and samples")
    given = parser.parse_args()
    if given.what == "prepare":
        sys.path.insert(0, str(HERE.parent / "tests"))
        prepare(given.folder, given.architecture, given.lite0, given.network)
        return
    sys.path.insert(0, str(given.folder))
    if said := obstacle(given.folder, given.what == "measure"):
        sys.exit(said)
    if given.what == "check":
        sys.exit(check(given.folder) > 0 or check_gemv(given.folder) > 1.0)
    else:
        (given.folder / "figures.json").write_text(json.dumps(measure(given.folder), indent=1) + "\n")


if __name__ == "__main__":
    main()
