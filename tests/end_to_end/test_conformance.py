"""onnx's backend tests keep their meaning, or are refused in one line; docs/ops.md says what came of each operator."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

#: The default run takes every twentieth case.
STRIDE = 20
ROOT = Path(__file__).parents[2]


@cache
def conformance() -> ModuleType:
    """The script that writes docs/ops.md, which is not a part of the package."""
    specification = importlib.util.spec_from_file_location("conformance", ROOT / "benchmarks/conformance.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    __import__("sys").modules[specification.name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def hold(case: Any, outcomes: dict[str, Any]) -> None:
    """A case is exact without quantization, and refused as what it is, never as a pass that broke it."""
    for mode, found in outcomes.items():
        assert found.result in ("equal", "refused") if mode == "none" else ("integer", "float", "refused"), case.name
        assert found.exit_code in (0, 3, 4), f"{case.name}: {found.reason}"
        assert (found.exit_code == 0) == (found.result != "refused") and "\n" not in found.reason


@pytest.mark.parametrize("offset", range(4))
def test_a_sample_of_node_cases(offset: int, tmp_path: Path) -> None:
    script = conformance()
    for case in script.node_cases()[offset * STRIDE // 4 :: STRIDE]:
        hold(case, {mode: script.outcome(case, mode, tmp_path / case.name / mode) for mode in script.MODES})


def test_the_page_has_every_operator_and_counts_its_cases(root: Path) -> None:
    script = conformance()
    cases = script.node_cases()
    page = (root / "docs/ops.md").read_text(encoding="utf-8")
    assert f"All {len(cases):,} node cases of the backend tests of\nonnx {onnx.__version__} " in page
    table = page.split("## By operator")[1].split("## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    counts = {row[0]: int(row[2]) for row in rows[1:]}
    names = [f"{case.domain}.{case.op_type}".lstrip(".") for case in cases]
    assert counts == {name: names.count(name) for name in names}
    for row in rows[1:]:
        equal, refused, *codes = (int(cell or 0) for cell in row[3:8])
        assert equal + refused == sum(codes) == counts[row[0]]


@pytest.mark.slow
def test_all_node_cases_and_the_page(root: Path) -> None:
    script = conformance()
    outcomes = script.node_outcomes(jobs=2)
    for case, none, codes in outcomes:
        hold(case, {"none": none, "W8A8": codes})
    assert sum(none.result == "equal" for _, none, _ in outcomes) >= 500
    page = (root / "docs/ops.md").read_text(encoding="utf-8")
    assert page.startswith(script.node_page(outcomes)), "python benchmarks/conformance.py writes it anew"


def light(name: str, root: Path) -> None:
    """Hold the reports of a light network to what a network must be, and to its row in the page."""
    script = conformance()
    none, shipped = script.light_report(name, "none"), script.light_report(name, "W8A8")
    filled = script.light_report(name, "W8A8", random_weights=True)
    for measures in none["fidelity"]["outputs"].values():
        assert measures["exact"] or measures["relative_error"] <= 1e-5
    assert none["precision"]["integer"] == 0
    for report in (shipped, filled):
        assert report["precision"]["integer"] > 0
        assert all(measures["exact"] or measures["sqnr"] > 10.0 for measures in report["fidelity"]["outputs"].values())
    row = script.light_row(name, none, shipped, filled)
    page = (root / "docs/ops.md").read_text(encoding="utf-8")
    [committed] = [line for line in page.splitlines() if line.startswith(f"| {name} |")]
    # How many decibels depends on the processor's kernels; what was planned does not.
    assert [row.split("|")[place] for place in (1, 2, 4, 6)] == [committed.split("|")[place] for place in (1, 2, 4, 6)]


def test_a_light_network(root: Path) -> None:
    light("squeezenet", root)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({"bvlc_alexnet", "densenet121", "inception_v1", "inception_v2", "resnet50",
                                         "shufflenet", "vgg19", "zfnet512"}))  # fmt: skip
def test_the_other_light_networks(name: str, root: Path) -> None:
    light(name, root)


def test_these_are_the_light_networks() -> None:
    assert len(conformance().light_names()) == 9


def test_a_light_network_from_the_command_line(qcompile: Any, tmp_path: Path) -> None:
    script = conformance()
    data = np.random.default_rng(3).random((4, 1, 3, 224, 224), np.float32)
    np.savez(tmp_path / "data.npz", **{"gpu_0/data_0": data})
    model = script.LIGHT / "light_shufflenet.onnx"
    done = qcompile(
        model, "--target", "cpu", "--data", tmp_path / "data.npz", "--observer", "mse", "-o", tmp_path / "out"
    )
    assert done.code == 0, done
    onnx.checker.check_model(str(tmp_path / "out/model.onnx"), full_check=True)
