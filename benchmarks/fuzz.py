"""Compile files that were damaged and models that were drawn at random; write what came of it to docs/fuzzing.md.

    python benchmarks/fuzz.py [--damaged 20000] [--drawn 2000] [--jobs 1] [--seed 0] [--cache DIR] [--keep DIR]
                              [--results FILE]

Each compile runs in a process that has done others before it, as a service would. Wanted is an artifact, or one line
and an exit code. Anything else is a finding, and is kept in --keep: a traceback, an internal error, more than one line,
a process that dies, 30 seconds of a processor without an end, five minutes by the clock, or 2 GB of memory.

Damaged files are those of the repository, and with --cache those of the catalogue of less than 1 MB: a few bytes
flipped, lost, doubled, put in or taken from elsewhere, most of them outside the numbers of large tensors, which would
only become other numbers. They are compiled with everything in float and with everything in integers, in turns. Drawn
models are those of the tests' generator, with samples for their inputs.

How each case ended is a line of --results; those that stand there are not run again, so that a run that was cut off
goes on. They are of the code of their time: what changes it wants another file.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/fuzzing.md"
SECONDS, WAITED, BYTES = 30.0, 300.0, 2 * 1024**3
#: Compiles after which a process is replaced by a fresh one.
TURNS = 500
#: Tensors of so many bytes are mostly left alone, and files of so many are not taken.
LARGE, MOST = 256, 1_000_000
MODES: Sequence[Sequence[str]] = (
    ("--weights", "none", "--activations", "none"), ("--costs", "none"),
)  # fmt: skip
HEAD = """# Damaged files and random models

Written by `python benchmarks/fuzz.py`; do not edit. Each case is a whole compile for `cpu`, of everything in float or
of everything in integers in turns, in a process that did others before. A finding is a traceback, an internal error,
more than one line on the standard error output, a process that dies, {seconds:.0f} seconds of a processor without an
end, or {giga:.0f} GB of memory. What was found before: [reliability.md](reliability.md).

| cases | artifacts | refused, by exit code | findings | slowest, s | most memory, MB |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Case:
    """A compile: what to call it, and the words of its command line."""

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Ended:
    """How a case ended: its exit code, what it said, how long it took, and what the process had in memory at most."""

    code: int
    said: str
    seconds: float
    peak: int

    @property
    def finding(self) -> str | None:
        """What is wrong with that, if anything is."""
        lines = [line for line in self.said.splitlines() if line.strip()]
        if "Traceback" in self.said or "internal error" in self.said:
            return lines[-1]
        if self.code and (len(lines) != 1 or not lines[0].startswith("error: ")):
            return f"exit code {self.code}, and {len(lines)} lines"
        return f"{self.peak / 1e6:.0f} MB" if self.peak > BYTES else None


def large_tensors(content: bytes) -> list[tuple[int, int]]:
    """Return where a file's large tensors lie, as first and last byte."""
    spans = []
    for tensor in onnx.load_from_string(content).graph.initializer:
        raw = tensor.raw_data
        at = content.find(raw) if len(raw) >= LARGE else -1
        if at >= 0:
            spans.append((at, at + len(raw)))
    return spans


def damaged(content: bytes, spans: Sequence[tuple[int, int]], others: Sequence[bytes], chance: random.Random) -> bytes:
    """Return a file with a few changes, each of one of six kinds."""
    made = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        at = chance.randrange(len(made) + 1)
        inside = next((end for start, end in spans if start <= at < end), None)
        if inside is not None and chance.random() < 0.95:
            at = min(inside + chance.randrange(64), len(made))
        many = chance.choice((1, 1, 2, 4, 16, 200))
        kind = chance.randrange(6)
        if kind == 0 and at < len(made):
            made[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            made[at : at + many] = chance.randbytes(min(many, len(made) - at))
        elif kind == 2:
            del made[at : at + many]
        elif kind == 3:
            made[at:at] = made[at : at + many]
        elif kind == 4:
            made[at:at] = chance.choice((b"\xff" * 9 + b"\x01", b"\x00" * many, chance.randbytes(many)))
        else:
            other = chance.choice(others)
            start = chance.randrange(len(other))
            made[at : at + many] = other[start : start + many]
    return bytes(made) if chance.random() < 0.98 else bytes(made[: chance.randrange(len(made) + 1)])


def damaged_cases(count: int, seed: int, files: Sequence[Path], folder: Path) -> Iterator[Case]:
    """Yield compiles of damaged files; each depends on the seed and its own number alone."""
    contents = [path.read_bytes() for path in files]
    spans = [large_tensors(content) for content in contents]
    for index in range(count):
        chance = random.Random(f"{seed}/{index}")
        which = chance.randrange(len(contents))
        path = folder / f"damaged-{seed}-{index}.onnx"
        path.write_bytes(damaged(contents[which], spans[which], contents, chance))
        yield Case(path.stem, (str(path), *MODES[index % len(MODES)]))


def drawn_cases(count: int, seed: int, folder: Path) -> Iterator[Case]:
    """Yield compiles of models that hypothesis draws, with data."""
    sys.path.insert(0, str(ROOT / "tests"))
    import hypothesis
    import random_graphs

    protos: list[onnx.ModelProto] = []
    settings = hypothesis.settings(
        max_examples=count, database=None, deadline=None, phases=(hypothesis.Phase.generate,),
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip

    @hypothesis.seed(seed)
    @settings
    @hypothesis.given(random_graphs.models())
    def keep(proto: onnx.ModelProto) -> None:
        protos.append(proto)

    keep()
    for index, proto in enumerate(protos[:count]):
        path, data = folder / f"drawn-{seed}-{index}.onnx", folder / f"drawn-{seed}-{index}.npz"
        onnx.save(proto, path)
        generator = np.random.default_rng((seed, index))
        arrays: dict[str, Any] = {value.name: _samples(value, generator) for value in proto.graph.input}
        np.savez(data, **arrays)
        yield Case(path.stem, (str(path), "--data", str(data), *MODES[index % len(MODES)]))


def _samples(value: onnx.ValueInfoProto, generator: np.random.Generator, count: int = 4) -> np.ndarray[Any, Any]:
    kind = value.type.tensor_type
    shape = [count, *(dim.dim_value or 2 for dim in kind.shape.dim)]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    return (generator.normal(size=shape) > 0 if dtype == np.bool_ else generator.normal(size=shape)).astype(dtype)


def serve(pipe: multiprocessing.connection.Connection) -> None:
    """Compile what comes through a pipe, one after the other."""
    from qcompile import cli, driver  # noqa: F401

    pipe.send("ready")
    while words := pipe.recv():
        with tempfile.TemporaryDirectory() as folder:
            sys.argv = ["qcompile", *words, "--target", "cpu", "--quiet", "--threads", "1", "-o", f"{folder}/out"]
            said, code = io.StringIO(), 0
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                try:
                    cli.main()
                except SystemExit as stop:
                    code = int(stop.code or 0)
            pipe.send((code, said.getvalue()))


class Server:
    """A process that compiles, and is replaced when it dies, hangs, grows or has done enough."""

    def __init__(self) -> None:
        self._process: Any = None
        self._done = 0

    def run(self, case: Case) -> Ended:
        """Run one case; what is no end of its own has an exit code below zero."""
        if self._process is None or self._done >= TURNS:
            self.stop()
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
            self._pipe.recv()  # what loading takes is no case's
            self._done = 0
        self._done += 1
        pid, begun, peak = self._process.pid, time.perf_counter(), 0
        before = _busy(pid)
        self._pipe.send(case.words)
        while not self._pipe.poll(0.05):
            peak = max(peak, _resident(pid))
            seconds = _busy(pid) - before
            endless = seconds > SECONDS or time.perf_counter() - begun > WAITED
            if endless or peak > BYTES or not self._process.is_alive():
                return self._broken(endless, seconds, peak)
        try:
            code, said = self._pipe.recv()
        except EOFError:
            return self._broken(False, 0.0, peak)
        return Ended(code, said, _busy(pid) - before, max(peak, _resident(pid)))

    def _broken(self, endless: bool, seconds: float, peak: int) -> Ended:
        self._process.join(0.0 if endless or peak > BYTES else 5.0)
        code = self._process.exitcode
        what = f"died ({code})" if code is not None else f"{seconds:.0f} s without an end" if peak <= BYTES else "grew"
        self.stop()
        return Ended(-1, f"Traceback: the process {what}", seconds, peak)

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def _busy(pid: int) -> float:
    """Return the seconds of a processor that a process took, in all of its threads."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def _resident(pid: int) -> int:
    try:
        found = re.search(r"VmRSS:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


class Results:
    """How cases ended, a line of a file for each.

    Parameters
    ----------
    path : Path, optional
        Lines that stand there already are taken for what they say.
    """

    def __init__(self, path: Path | None) -> None:
        self._path, self._lock = path, threading.Lock()
        self.ended: dict[str, Ended] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path and path.exists() else ():
            fields = json.loads(line)
            name = fields.pop("name")
            self.ended[name] = Ended(**fields)

    def add(self, name: str, ended: Ended) -> None:
        """Keep how a case ended."""
        with self._lock:
            self.ended[name] = ended
            if self._path:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"name": name} | asdict(ended)) + "\n")
            if ended.finding:
                print(f"{name}: {ended.finding}", flush=True)
            if len(self.ended) % 100 == 0:
                print(f"{len(self.ended)} cases", flush=True)


def run_all(cases: Iterator[Case], jobs: int, keep: Path | None, results: Results) -> list[Ended]:
    """Run cases that the results do not have, in so many processes; return how each case ended, the others too."""
    names: list[str] = []
    lock = threading.Lock()

    def following() -> Case | None:
        with lock:
            for case in cases:
                names.append(case.name)
                if case.name not in results.ended:
                    return case
                _remove(case)
        return None

    def work() -> None:
        server = Server()
        while case := following():
            ended = server.run(case)
            results.add(case.name, ended)
            _remove(case, keep if ended.finding else None)
        server.stop()

    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(work) for _ in range(jobs)]:
            future.result()
    return [results.ended[name] for name in names]


def _remove(case: Case, keep: Path | None = None) -> None:
    """Take away the files of a case, or put them into a folder."""
    for path in {Path(word) for word in case.words if word.endswith((".onnx", ".npz"))}:
        if keep:
            (keep / path.name).write_bytes(path.read_bytes())
        path.unlink()


def row(what: str, ended: Sequence[Ended]) -> str:
    """Return a line of the table."""
    counts = Counter(str(one.code) for one in ended)
    refused = ", ".join(f"{code}: {count:,}" for code, count in sorted(counts.items()) if code not in ("0", "-1"))
    cells = [
        f"{len(ended):,} {what}",
        f"{counts['0']:,}",
        refused,
        str(sum(one.finding is not None for one in ended)),
        f"{max((one.seconds for one in ended), default=0.0):.1f}",
        f"{max((one.peak for one in ended), default=0) / 1e6:.0f}",
    ]
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    """Run what was asked for and write the page."""
    parser = argparse.ArgumentParser(description="Compile damaged files and random models; write docs/fuzzing.md.")
    parser.add_argument("--damaged", type=int, default=20_000)
    parser.add_argument("--drawn", type=int, default=2_000)
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="folder of the fetched models")
    parser.add_argument("--keep", type=Path, help="folder for what was found")
    parser.add_argument("--results", type=Path, help="file of how each case ended; a run goes on from there")
    options = parser.parse_args()
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
    files = sorted(ROOT.glob("models/*.onnx")) + sorted(ROOT.glob("tests/**/*.onnx"))
    files += sorted(options.cache.glob("*/model.onnx")) if options.cache else []
    files = [path for path in files if path.stat().st_size < MOST]
    rows, results = [], Results(options.results)
    with tempfile.TemporaryDirectory() as folder:
        cases = {
            f"damaged files, of {len(files)}": damaged_cases(options.damaged, options.seed, files, Path(folder)),
            "random models": drawn_cases(options.drawn, options.seed, Path(folder)),
        }
        for what, some in cases.items():
            rows.append(row(what, run_all(some, options.jobs, options.keep, results)))
            print(rows[-1], end="", flush=True)
    PAGE.write_text(HEAD.format(seconds=SECONDS, giga=BYTES / 1024**3) + "".join(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
