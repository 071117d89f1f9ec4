"""Compile one model in two fresh environments and tell whether the bytes are the same.

    python benchmarks/reproducible.py [TARGET ...]

Each has a virtual environment of its own, a home, a working directory and a number of threads; the repository is
installed in both. What a manifest lists must be equal, and so must the manifests. Exit code 1 where something differs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODEL, DATA, EVALUATION = (ROOT / "models" / f"resnet8{end}" for end in (".onnx", "_calib.npz", "_eval.npz"))
TARGETS = ("cpu", "qnn", "coreml", "aarch64-android:ort", "cpu:tvm-avx2", "aarch64-linux")
#: What a folder holds that tells of the machine.
SEEN = ("measurements.json", "report.html")


def compiled(place: Path, threads: int, targets: list[str]) -> dict[str, bytes]:
    """Return the files of all artifacts, made in an environment of its own."""
    home, work = place / "home", place / "work" / ("deeper" * threads)
    for folder in (home, work):
        folder.mkdir(parents=True)
    subprocess.run([sys.executable, "-m", "venv", str(place / "environment")], check=True)
    python, where = (
        str(place / "environment/bin/python"),
        {"HOME": str(home), "TMPDIR": str(home), "PATH": os.environ["PATH"]},
    )
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-compile", f"{ROOT}[cpu,tvm]"], check=True)
    found = {}
    for target in targets:
        output = work / target.replace(":", "-")
        words = [str(MODEL), "--target", target, "--data", str(DATA), "--eval", str(EVALUATION), "-o", str(output)]
        words = [python, "-m", "qcompile", *words, "--threads", str(threads), "--quiet"]
        subprocess.run(words, check=True, cwd=work, env=where | {"OMP_NUM_THREADS": str(threads)})
        for file in sorted(output.rglob("*")):
            if file.is_file() and file.name not in SEEN:
                found[f"{target}/{file.relative_to(output).as_posix()}"] = file.read_bytes()
    return found


def main() -> None:
    """Compile twice and compare."""
    parser = argparse.ArgumentParser(description="Compile one model in two fresh environments.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"by default {', '.join(TARGETS)}")
    targets = parser.parse_args().targets or list(TARGETS)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory(prefix="another-") as two:
        first, second = (compiled(Path(place), threads, targets) for place, threads in ((one, 1), (two, 3)))
    differ = sorted(name for name in {*first, *second} if first.get(name) != second.get(name))
    for name in differ:
        print(f"differs: {name}")
    print(f"{len(first) - len(differ)} of {len(first)} files are the same, of {', '.join(targets)}")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
