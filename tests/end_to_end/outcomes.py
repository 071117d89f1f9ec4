"""What compiles leave behind, as end-to-end tests look at it."""

from __future__ import annotations

import json
from pathlib import Path


def settled(folder: Path) -> dict[str, bytes]:
    """Return all that must be the same bytes for the same inputs."""
    unsettled = ("measurements.json", "distributions.json", "report.html")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in unsettled}


def stages_agree(qcompile, model: Path, data: Path, folder: Path, *more: str, **costs) -> dict:
    """Compile at once and stage by stage, hold that both leave the same bytes, and return the plan."""
    words = ("--target", "cpu", "--data", data, *more)
    assert qcompile(model, *words, "-o", folder / "whole", "--quiet", **costs).code == 0
    calibration, plan, output = folder / "calibration.npz", folder / "plan.json", folder / "staged"
    for command in (
        ("calibrate", model, *words, "-o", calibration),
        ("plan", model, "--target", "cpu", "--calibration", calibration, "-o", plan),
        ("apply", model, "--plan", plan, "--data", data, "-o", output),
    ):
        assert qcompile(*command, "--quiet", **costs).code == 0
    assert plan.read_bytes() == (folder / "whole/plan.json").read_bytes()
    assert settled(output) == settled(folder / "whole")
    return json.loads(plan.read_text())


def report(done) -> dict:
    assert done.code == 0, done
    return json.loads(done.out)["report"]


def sqnr(content: dict) -> float:
    return content["fidelity"]["outputs"]["y"]["sqnr"]


#: Compiles with the words behind the first, and dies before so many results are kept; 0 is never.
KILLED = """
import os, signal, sys
from qcompile import artifact, cache, cli
count = int(sys.argv.pop(1))
calls = 0

def dying(function):
    def wrapper(*args, **kwargs):
        global calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapper

cache.Cache.put = dying(cache.Cache.put)
artifact.write = dying(artifact.write)
artifact._publish = dying(artifact._publish)
cli.main()
"""
