"""Run a bundle's artifacts where it lies, side by side; needs Python and NumPy, and onnxruntime for ONNX models.

    python3 runner.py [--threads N] [--seconds S] [--only 0,2] [--profile]

Each artifact has a process of its own, so that one that is killed takes no other along. They run in turns, the same
input in each round, so that what else the device does falls on all alike. A line of JSON is printed for each once it is
loaded, and another at the end; with --profile it says of ONNX models what each kernel took. When standard input ends,
whoever asked for this is gone: everything stops.

This file is a part of every bundle and knows nothing of qcompile; Python 3.8 is enough.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
#: Rounds at least and at most.
FEWEST, MOST = 5, 200
#: Runs of each sample whose kernels are timed, and samples of other shapes than those before them.
PROFILED, SHAPES = 30, 8
#: Seconds in which an artifact runs without a pause while the energy is counted: counters go on each millisecond.
DRAWN = 1.0
#: Where Linux has counters of microjoules: RAPL's, and those of sensors.
ENERGY = ("powercap/*/energy_uj", "hwmon/hwmon*/energy*_input")
Feeds = Mapping[str, Any]


def load(artifact: Mapping[str, Any], threads: int) -> Callable[[Feeds], dict[str, Any]]:
    """Return what runs one sample."""
    folder = HERE / artifact["folder"]
    if artifact["kind"] == "library":
        spec = importlib.util.spec_from_file_location("session", folder / "session.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["session"] = module
        spec.loader.exec_module(module)
        session = module.InferenceSession(folder, threads)
    else:
        session = onnx_session(artifact, threads)
    names = [port.name for port in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(None, dict(feeds))))


def onnx_session(artifact: Mapping[str, Any], threads: int, scratch: str = "") -> Any:
    """Return a session of an ONNX model, which times its kernels into a folder where there is one."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if scratch:
        options.enable_profiling, options.profile_file_prefix = True, f"{scratch}/profile"
        options.optimized_model_filepath = f"{scratch}/graph.onnx"
        beside = "session.optimized_model_external_initializers"
        options.add_session_config_entry(f"{beside}_file_name", "weights")
        options.add_session_config_entry(f"{beside}_min_size_in_bytes", "1024")
    path, providers = str(HERE / artifact["folder"] / artifact["entry"]), ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(path, options, providers=providers)


def samples_of(file: Path) -> list[dict[str, Any]]:
    """Read arrays by sample."""
    found: list[dict[str, Any]] = []
    with np.load(file, allow_pickle=False) as archive:
        for key in archive.files:
            index, _, name = key.partition("/")
            while len(found) <= int(index):
                found.append({})
            found[int(index)][name] = archive[key]
    return found


def fidelity(run: Callable[[Feeds], dict[str, Any]], bundle: Path, labels: Sequence[int | None]) -> dict[str, Any]:
    """Hold the outputs to the float model's: signal and noise of each, and the part of the labelled that are right."""
    sums: dict[str, list[float]] = {}
    right = labelled = 0
    for feeds, expected, label in zip(samples_of(bundle / "inputs.npz"), samples_of(bundle / "expected.npz"), labels):
        found = run(feeds)
        for name, y in expected.items():
            one, other = y.astype(np.float64).ravel(), found[name].astype(np.float64).ravel()
            entry = sums.setdefault(name, [0.0, 0.0])
            entry[0] += float(one @ one)
            entry[1] += float(np.sum((one - other) ** 2))
        scores = [name for name, y in expected.items() if y.ndim >= 2 and y.shape[-1] == y.size > 1]
        if label is not None and scores:
            labelled += 1
            right += int(found[scores[0]].argmax()) == label
    return {"outputs": sums, "accuracy": right / labelled if labelled else None}


def inputs_of(artifact: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Read an artifact's inputs: its own, where it has any."""
    own = HERE / artifact["folder"] / "inputs.npz"
    return samples_of(own if own.exists() else HERE / "inputs.npz")


def alike(samples: Sequence[Feeds]) -> list[int]:
    """Return for each sample which one is the first of its shapes."""
    shapes = [sorted((name, array.shape) for name, array in feeds.items()) for feeds in samples]
    return [shapes.index(one) for one in shapes]


def profile(artifact: Mapping[str, Any], threads: int) -> None:
    """Print what each kernel of an ONNX model took, the graph that the runtime made of it, and on what that was."""
    import onnxruntime

    inputs = inputs_of(artifact)
    chosen = sorted(set(alike(inputs)))[:SHAPES]
    with tempfile.TemporaryDirectory(dir=HERE) as scratch:
        session = onnx_session(artifact, threads, scratch)
        for _ in range(PROFILED):
            for index in chosen:
                session.run(None, dict(inputs[index]))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        graph = (Path(scratch) / "graph.onnx").read_bytes()
    keys = ("op_name", "node_index", "input_type_shape", "output_type_shape")
    kept = [
        {"name": event["name"], "dur": event["dur"], "args": {key: event["args"][key] for key in keys}}
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    ]
    packed = zlib.compress(json.dumps({"events": kept, "graph": base64.b64encode(graph).decode()}).encode())
    about = {"runtime": f"onnxruntime {onnxruntime.__version__}", "processor": processor(), "samples": chosen}
    print(json.dumps({"profile": {**about, "content": base64.b64encode(packed).decode()}}), flush=True)


def processor() -> str:
    """Return the processor's name, as far as the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def memory(kind: str) -> int | None:
    """Return the bytes that this process has, now (VmRSS) or at the peak since then (VmHWM), where the system tells."""
    process = Path("/proc/self")
    try:
        if kind == "VmRSS":
            (process / "clear_refs").write_text("5")  # the peak begins anew
        [line] = [line for line in (process / "status").read_text().splitlines() if line.startswith(kind)]
    except (OSError, ValueError):
        return None
    return 1024 * int(line.split()[1])


def energy(system: Path) -> dict[str, int]:
    """Return the microjoules that each counter of the device has reached; none where it has none, or hides them."""
    found = {}
    for file in (file for pattern in ENERGY for file in sorted(system.glob(pattern))):
        if file.parent.name.count(":") > 1:  # a part of a processor that counts as a whole already
            continue
        with contextlib.suppress(OSError, ValueError):
            found[str(file)] = int(file.read_text())
    return found


def drawn(run: Callable[[Feeds], Any], inputs: Sequence[Feeds], system: Path) -> float | None:
    """Return the millijoules of one run: what the whole device draws while nothing but this runs, over the runs."""
    before, began, count = energy(system), time.perf_counter(), 0
    if not before:
        return None
    while time.perf_counter() - began < DRAWN:
        run(inputs[count % len(inputs)])
        count += 1
    after = energy(system)
    # A counter that began anew in between is left out.
    spent = [after[key] - before[key] for key in before if after.get(key, 0) > before[key]]
    return 1e-3 * sum(spent) / count if spent else None


def child(artifact: Mapping[str, Any], labels: Sequence[int | None], threads: int, system: Path) -> None:
    """Load an artifact, then do what standard input says: time the sample of a number, or count the energy of runs."""
    inputs = inputs_of(artifact)
    if artifact["kind"] != "library" or "needs" in artifact:
        import onnxruntime  # noqa: F401  what the library itself takes is no artifact's
    before, began = memory("VmRSS"), time.perf_counter()
    run = load(artifact, threads)
    run(inputs[0])
    took, peak = 1e3 * (time.perf_counter() - began), memory("VmHWM")
    added = None if before is None or peak is None else peak - before
    seen = {} if "form" in artifact else fidelity(run, HERE, labels)
    print(json.dumps({"load_ms": took, "peak_bytes": added, **seen}), flush=True)
    for line in sys.stdin:
        if line.strip() == "energy":
            print(json.dumps(drawn(run, inputs, system)), flush=True)
            continue
        feeds = inputs[int(line) % len(inputs)]
        run(feeds)  # the caches are those of a network that runs again and again, not of its neighbours
        began = time.perf_counter()
        run(feeds)
        print(1e3 * (time.perf_counter() - began), flush=True)


class Child:
    """An artifact in a process of its own, there to be timed or to tell what its kernels take."""

    def __init__(self, index: int, threads: int, *more: str) -> None:
        words = [sys.executable, __file__, "--child", str(index), "--threads", str(threads), *more]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        self.times: list[float] = []
        self.failure = ""
        answer = self._answer()
        self.seen = json.loads(answer) if answer else {}

    def _answer(self) -> str:
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        if not line:
            said = self.process.stderr.read().strip().splitlines()
            code = self.process.wait()
            self.failure = (
                said[-1] if said else f"it was ended by signal {-code}" if code < 0 else f"it left with {code}"
            )
        return line

    def time(self, sample: int) -> None:
        """Run one sample."""
        if answer := self._asked(str(sample)):
            self.times.append(float(answer))

    def draw(self) -> None:
        """Run for a while, and count the energy."""
        if answer := self._asked("energy"):
            self.seen["energy_mj"] = json.loads(answer)

    def _asked(self, line: str) -> str:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
        return self._answer()


def tell(index: int, one: Child) -> None:
    """Print what is known of an artifact so far."""
    print(json.dumps({"artifact": index, "times_ms": one.times, "failure": one.failure, **one.seen}), flush=True)


def watch(children: Sequence[Child]) -> None:
    """End everything once standard input ends."""
    sys.stdin.buffer.read()
    for one in children:
        one.process.kill()
    os._exit(1)


def take_turns(children: Sequence[Child], samples: int, seconds: float) -> None:
    """Time artifacts in turns, round by round, for so many seconds each."""
    began, count = time.perf_counter(), len(children)
    for round_ in range(MOST):
        if round_ >= FEWEST and time.perf_counter() - began > seconds * count:
            break
        turn = [one for one in children if not one.failure]
        for one in turn[round_ % max(1, len(turn)) :] + turn[: round_ % max(1, len(turn))]:
            one.time(round_ % samples)


def main() -> None:
    """Run all of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--only", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--system", type=Path, default=Path("/sys/class"), help="where the counters of energy are")
    words = parser.parse_args()
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    bundle = json.loads((HERE / "bundle.json").read_text(encoding="utf-8"))
    if words.child is not None:
        if words.profile:
            profile(bundle["artifacts"][words.child], words.threads)
            return
        child(bundle["artifacts"][words.child], bundle["labels"], words.threads, words.system)
        return
    children: dict[int, Child] = {}
    alive: list[Child] = []
    threading.Thread(target=watch, args=(alive,), daemon=True).start()
    for index, artifact in enumerate(bundle["artifacts"]):
        if artifact["kind"] != "package" and (words.only is None or index in words.only):
            children[index] = Child(index, words.threads, "--system", str(words.system))
            alive.append(children[index])
            tell(index, children[index])
    take_turns(alive, len(bundle["labels"]), words.seconds)
    for one in children.values():
        if energy(words.system) and not one.failure:
            one.draw()
    for index, one in children.items():
        if words.profile and not one.failure and bundle["artifacts"][index]["kind"] == "onnx":
            alive.append(Child(index, words.threads, "--profile"))
            one.seen.update(alive[-1].seen or {"unprofiled": alive[-1].failure})
        tell(index, one)
    for one in alive:
        one.process.kill()
    os._exit(0)


if __name__ == "__main__":
    main()
