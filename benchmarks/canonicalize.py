"""Canonicalize every model of the catalogue beside onnxslim and onnxsim; write the counts to docs/canonicalize.md.

    python benchmarks/canonicalize.py [NAME ...] [--cache DIR]

Needs the extra `benchmarks`, and `models` for what is not in the cache yet. Each tool runs in a process of its own, on
the file as it was exported. Nodes are counted with those of subgraphs and with Constant nodes; the error is the largest
max|Δ| / max|y| over outputs and all evaluation samples, without the runtime's own rewrites.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

import onnx
from catalog import NOT_MODELS, ROOT, fetch

from qcompile.calib.data import Sample, input_specs, open_data
from qcompile.core import model as models
from qcompile.core import numerics, runtime

PAGE = ROOT / "docs/canonicalize.md"
TOOLS = {
    "qcompile": "from pathlib import Path; from qcompile.core import model as m;"
    " from qcompile.passes.canonicalize import Canonicalize;"
    " x = m.load(Path(a)); Canonicalize(21)(x); m.save(x, Path(b))",
    "onnxslim": "import onnx, onnxslim; onnx.save(onnxslim.slim(onnx.load(a)), b)",
    "onnxsim": "import onnx, onnxsim; onnx.save(onnxsim.simplify(onnx.load(a))[0], b)",
}
HEAD = """# Canonical graphs

Written by `python benchmarks/canonicalize.py`; do not edit. Nodes of the graph as exported and as each tool leaves it,
subgraphs and Constant nodes included; in brackets the largest max|Δ| / max|y| over all evaluation samples against the
model as exported, run node by node. qcompile also raises the opset to 21. {versions}.

| model | evaluation samples | as exported | qcompile | onnxslim | onnxsim | qcompile takes, s |
|---|---|---|---|---|---|---|
"""


def count(graph: onnx.GraphProto) -> int:
    """Count the nodes of a graph and of its subgraphs."""
    inner = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return len(graph.node) + sum(count(subgraph) for subgraph in inner)


def rewrite(tool: str, source: Path, target: Path) -> str | None:
    """Run a tool in its own process; return why it failed, or None."""
    words = [sys.executable, "-c", f"import sys; a, b = sys.argv[1:]; {TOOLS[tool]}", str(source), str(target)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["failed"])[-1]


def error_of(reference: Sequence[runtime.Outputs], samples: Sequence[Sample], path: Path) -> float:
    """Return the largest max|Δ| / max|y| over outputs and samples."""
    session = runtime.Session(path, optimize=False)
    pairs = ((expected, session.run(sample)) for expected, sample in zip(reference, samples, strict=True))
    return max(numerics.relative_error(expected[name], found[name]) for expected, found in pairs for name in expected)


def row(name: str, paths: Sequence[Path]) -> str:
    """Measure one model and return its row of the table."""
    source, _, evaluation = paths
    specs = input_specs(models.load(source))
    samples = list(open_data(str(evaluation), specs))
    original = runtime.Session(source, optimize=False)
    reference = [original.run(sample) for sample in samples]
    exported = count(onnx.load(source, load_external_data=False).graph)
    cells, seconds = [name, str(len(samples)), str(exported)], 0.0
    for tool in TOOLS:
        with tempfile.TemporaryDirectory() as folder:
            path, start = Path(folder) / "model.onnx", time.perf_counter()
            failure = rewrite(tool, source, path)
            seconds = seconds or time.perf_counter() - start
            if failure is not None:
                cells.append(f"failed: {failure[:60]}")
                continue
            nodes = count(onnx.load(path, load_external_data=False).graph)
            cells.append(f"{nodes} ({error_of(reference, samples, path):.1g})")
    return f"| {' | '.join([*cells, f'{seconds:.1f}'])} |"


def versions() -> str:
    """Return the versions of the peers.

    Raises
    ------
    SystemExit
        If one is not installed.
    """
    try:
        return ", ".join(f"{tool} {importlib.metadata.version(tool)}" for tool in ("onnxslim", "onnxsim"))
    except importlib.metadata.PackageNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed; pip install '.[cpu,models,benchmarks]'") from error


def main() -> None:
    """Measure what was asked for, all by default, and write the page."""
    catalog = tomllib.loads((ROOT / "models/catalog.toml").read_text(encoding="utf-8"))
    known = [name for name in catalog if name not in NOT_MODELS]
    parser = argparse.ArgumentParser(description="Count nodes beside onnxslim and onnxsim; write docs/canonicalize.md.")
    parser.add_argument("names", nargs="*", choices=[*known, []], metavar="NAME", help=f"one of {', '.join(known)}")
    parser.add_argument("--cache", type=Path, help="folder of the fetched models")
    options = parser.parse_args()
    head = HEAD.format(versions=f"Peers: {versions()}")
    rows = []
    for name in options.names or known:
        rows.append(row(name, fetch(name, options.cache)))
        print(rows[-1], flush=True)
    PAGE.write_text(head + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
