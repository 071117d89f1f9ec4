"""Cost tables of one's own: what --costs decides, what it leaves in the artifact, and what qcompile probe writes."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from pathlib import Path

import pytest

from qcompile import timing
from qcompile.backends.base import find_target
from qcompile.core.costs import CostTable
from qcompile.options import COSTS_KEY, Options

WORDS = ("--target", "cpu")


@pytest.fixture
def qcompile(qcompile):
    """Run `qcompile` with the target's own costs, unless others are named."""
    return functools.partial(qcompile, costs=None)


@pytest.fixture
def costs(tmp_path) -> Path:
    """Write the CPU's own table, as somebody else's."""
    target, _ = find_target("cpu")
    assert target.costs is not None
    (tmp_path / "mine.json").write_text(target.costs.to_json())
    return tmp_path / "mine.json"


def dear(costs: Path) -> Path:
    """Make every integer convolution and product dear."""
    content = json.loads(costs.read_text())
    for key, rows in content["kernels"].items():
        if key.startswith(("QLinearConv", "QGemm", "MatMulIntegerToFloat")):
            content["kernels"][key] = [[*row[:-1], 1e6] for row in rows]
    (costs.parent / "dear.json").write_text(json.dumps(content))
    return costs.parent / "dear.json"


def structure(costs: Path) -> Path:
    """Keep of a table what emulation can tell."""
    content = json.loads(costs.read_text()) | {"kernels": {}, "run": 0}
    (costs.parent / "structure.json").write_text(json.dumps(content))
    return costs.parent / "structure.json"


def integers(report: dict) -> int:
    return report["precision"]["integer"]


def test_another_table_decides_otherwise(qcompile, resnet8, costs, tmp_path):
    model, data, evaluation = resnet8

    def compiled(*words: object) -> dict:
        fixed = (*WORDS, "--data", data, "--eval", evaluation, "-o", tmp_path / "out", "--json")
        done = qcompile(model, *fixed, *words)
        assert done.code == 0, done.err
        return json.loads(done.out)["report"]

    own, same, float_ = compiled(), compiled("--costs", costs), compiled("--costs", dear(costs))
    assert integers(own) == integers(same) > 0 == integers(float_)
    assert COSTS_KEY not in own["options"]
    table = CostTable.from_json(costs)
    assert same["options"][COSTS_KEY] == hashlib.sha256(table.to_json().encode()).hexdigest()
    assert json.loads((tmp_path / "out/manifest.json").read_text())["options"] == float_["options"]
    # Where nothing has a price, whatever can be in integers is.
    assert integers(compiled("--costs", structure(costs))) >= integers(own)


def test_where_a_table_lies_decides_nothing(costs, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/other.json").write_text(json.dumps(json.loads(costs.read_text())))
    digests = {Options("cpu", costs=path).decisive()[COSTS_KEY] for path in (costs, tmp_path / "sub/other.json")}
    assert len(digests) == 1 and digests != {Options("cpu", costs=dear(costs)).decisive()[COSTS_KEY]}
    assert COSTS_KEY not in Options("cpu").decisive()


@pytest.mark.parametrize("content", [None, "", "[1, 2]", '{"schema_version": 9}', '{"schema_version": 1}'])
def test_a_bad_table_is_one_clear_line(content, qcompile, small, tmp_path):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    for command in ("compile", "calibrate"):
        done = qcompile(command, small.model, *WORDS, "--data", small.data, "--costs", path, "-o", tmp_path / "out")
        assert done.code == 2 and done.out == "" and not (tmp_path / "out").exists()
        line = done.err.strip()
        assert re.fullmatch(r"error: \S*bad\.json: [^\n]*; [^\n]*qcompile probe[^\n]*", line), line


def test_a_recipe_names_a_table_beside_itself(qcompile, small, costs):
    (small.folder / "mine.json").write_text(costs.read_text())
    (small.folder / "recipe.toml").write_text('target = "cpu"\ncosts = "mine.json"\n')
    assert Options.from_recipe(small.folder / "recipe.toml").costs == small.folder / "mine.json"
    words = ("--recipe", small.folder / "recipe.toml", "--data", small.data, "-o", small.folder / "out", "--json")
    done = qcompile(small.model, *words)
    assert done.code == 0 and COSTS_KEY in json.loads(done.out)["report"]["options"], done.err


def test_every_stage_wants_the_same_table(qcompile, small, costs, tmp_path):
    measured, planned = tmp_path / "calibration.npz", tmp_path / "plan.json"
    words, mine = (*WORDS, "--data", small.data), ("--costs", costs)
    assert qcompile("calibrate", small.model, *words, *mine, "-o", measured).code == 0
    plan = ("plan", small.model, "--calibration", measured, "-o", planned)
    for others in ((), ("--costs", dear(costs))):
        done = qcompile(*plan, *others)
        assert done.code == 2 and "another cost table" in done.err and "--costs" in done.err, done.err
    assert qcompile(*plan, *mine).code == 0
    apply = ("apply", small.model, "--plan", planned, "--data", small.data)
    assert qcompile(*apply, "-o", tmp_path / "staged").code == 2
    assert qcompile(*apply, *mine, "-o", tmp_path / "staged").code == 0
    assert qcompile(small.model, *words, *mine, "-o", tmp_path / "whole").code == 0
    for name in ("model.onnx", "plan.json", "report.json", "manifest.json"):
        assert (tmp_path / "staged" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_stage_without_a_table_takes_none_later(qcompile, small, costs, tmp_path):
    words = (*WORDS, "--data", small.data)
    assert qcompile("calibrate", small.model, *words, "-o", tmp_path / "c.npz").code == 0
    done = qcompile("plan", small.model, "--calibration", tmp_path / "c.npz", "--costs", costs, "-o", tmp_path / "p")
    assert done.code == 2 and "no cost table" in done.err


# What measures one.


@pytest.fixture
def hasty(monkeypatch):
    """Measure a grid of next to nothing, next to never."""
    from qcompile.backends.ort import capabilities, grid, probe

    few = capabilities.patterns()[:3]
    monkeypatch.setattr(capabilities, "patterns", lambda: few)
    monkeypatch.setattr(grid, "convolutions", lambda: [grid.Convolution(16, 16, 8)])
    for name in ("products", "signed", "between"):
        monkeypatch.setattr(grid, name, lambda: [])
    monkeypatch.setattr(probe, "BUDGET", 0.0)
    monkeypatch.setattr(probe, "GRID_BUDGET", 0.0)


def test_probe_writes_a_table_that_a_compile_takes(qcompile, small, hasty, tmp_path):
    path = tmp_path / "costs.json"
    done = qcompile("probe", small.model, "--data", small.data, "-o", path, "--json")
    assert done.code == 0, done.err
    told, table = json.loads(done.out), CostTable.from_json(path)
    assert told["patterns"] == len(table.capabilities) == 3
    assert told["kernels"] == sum(map(len, table.entries.values())) > 0
    assert timing.processor() in table.processor and timing.instructions() in table.processor
    words = ("--data", small.data, "--costs", path, "-o", tmp_path / "out")
    assert qcompile(small.model, *WORDS, *words).code == 0
    assert qcompile("probe", "-o", path, "-q").code == 0, "its own file is replaced"


def test_probe_overwrites_nothing_else_and_wants_a_model_with_data(qcompile, small, hasty, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = qcompile("probe", "-o", tmp_path / "notes.txt")
    assert done.code == 2 and (tmp_path / "notes.txt").read_text() == "mine"
    done = qcompile("probe", "--data", small.data, "-o", tmp_path / "costs.json")
    assert done.code == 2 and "without a model" in done.err and not (tmp_path / "costs.json").exists()
    assert qcompile("probe", small.folder / "absent.onnx", "-o", tmp_path / "costs.json").code == 3
    assert qcompile("probe", "--target", "toaster", "-o", tmp_path / "costs.json").code == 7
