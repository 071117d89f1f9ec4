"""--target cuda, end to end: the artifact, its report, and that it is the same bytes each time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest

SCHEMAS = Path(__file__).parents[2] / "docs/schemas"


@pytest.fixture(scope="module")
def compiled(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    models = root / "models"
    words = (models / "resnet8.onnx", "--target", "cuda", "--data", models / "resnet8_calib.npz",
             "--eval", models / "resnet8_eval.npz", "-o", folder / "out")  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "qcompile", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nodes on the device" in done.stdout and "not measured here" in done.stdout
    return folder / "out"


def test_weights_are_codes_and_arithmetic_is_float16(compiled: Path) -> None:
    model = onnx.load(compiled / "model.onnx")
    large = {t.data_type for t in model.graph.initializer if np.prod(t.dims) > 1000}
    assert large == {onnx.TensorProto.INT8}
    assert [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)] == [1, 1]
    report = json.loads((compiled / "report.json").read_text())
    assert min(each["sqnr"] for each in report["fidelity"]["outputs"].values()) > 35
    assert report["precision"]["integer"] == 0 and report["size"]["ratio"] < 0.3


def test_the_report_tells_what_runs_where(compiled: Path) -> None:
    report = json.loads((compiled / "report.json").read_text())
    assert report["placement"]["device"] == "an NVIDIA GPU" and report["placement"]["on_device"]["Conv"] == 9
    assert report["placement"]["on_host"] == []
    measurements = json.loads((compiled / "measurements.json").read_text())
    assert measurements["latency"] is None and "on_device" not in measurements
    for name, content in (("report", report), ("measurements", measurements)):
        jsonschema.validate(content, json.loads((SCHEMAS / f"{name}.schema.json").read_text()))


def test_the_same_inputs_give_the_same_bytes_stage_by_stage(
    qcompile: Any, root: Path, compiled: Path, tmp_path: Path
) -> None:
    model, data = root / "models/resnet8.onnx", root / "models/resnet8_calib.npz"
    words = ("--target", "cuda", "--data", data, "--eval", root / "models/resnet8_eval.npz")
    assert qcompile("calibrate", model, *words, "-o", tmp_path / "c.npz", costs=None).code == 0
    assert (
        qcompile("plan", model, "--calibration", tmp_path / "c.npz", "-o", tmp_path / "plan.json", costs=None).code == 0
    )
    done = qcompile("apply", model, "--plan", tmp_path / "plan.json", "--data", data,
                    "--eval", root / "models/resnet8_eval.npz", "-o", tmp_path / "out", costs=None)  # fmt: skip
    assert done.code == 0, done.err
    for name in ("model.onnx", "plan.json", "report.json"):
        assert (tmp_path / "out" / name).read_bytes() == (compiled / name).read_bytes(), name


def test_without_data_the_first_line_says_what_ranges_are_from(qcompile: Any, root: Path, tmp_path: Path) -> None:
    done = qcompile(root / "models/resnet8.onnx", "--target", "cuda", "-o", tmp_path / "out")
    assert done.code == 0 and "by random inputs, 16 times as large" in " ".join(done.out.split())


def test_activations_of_sixteen_bits_are_refused(qcompile: Any, root: Path, tmp_path: Path) -> None:
    done = qcompile(root / "models/resnet8.onnx", "--target", "cuda", "--activations", "16", "-o", tmp_path / "out")
    assert done.code == 7 and "no kernels for them" in done.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "code", "fact"),
    [
        (("--costs", "costs.json"), 2, "--costs: has times of processors, and cuda runs on an NVIDIA GPU"),
        (("--max-sram", "64KB"), 2, "--max-sram: means nothing for cuda"),
        (("--max-latency", "0.5x"), 2, "nothing tells what integers take"),
    ],
)
def test_what_means_nothing_there_is_refused(
    qcompile: Any, root: Path, tmp_path: Path, words: tuple[str, ...], code: int, fact: str
) -> None:
    costs = root / "backends/ort/costs/avx512-vnni.json"
    given = [str(costs) if word == "costs.json" else word for word in words]
    data = ("--data", root / "models/resnet8_calib.npz")
    done = qcompile(root / "models/resnet8.onnx", "--target", "cuda", *data, *given, "-o", tmp_path / "out", costs=None)
    assert (done.code, fact in done.err) == (code, True), done.err
    assert not (tmp_path / "out").exists()


def test_kernels_of_a_device_are_not_probed(qcompile: Any, tmp_path: Path) -> None:
    done = qcompile("probe", "--target", "cuda", "-o", tmp_path / "costs.json", costs=None)
    assert done.code == 7 and "whose kernels are not measured" in done.err


def test_a_comparison_judges_it_and_does_not_time_it(qcompile: Any, root: Path, compiled: Path) -> None:
    given = ("--model", root / "models/resnet8.onnx", "--data", root / "models/resnet8_eval.npz")
    done = qcompile("compare", compiled, *given, "--json")
    assert done.code == 0, done.err
    rows = {row["target"]: row for row in json.loads(done.out)["rows"]}
    own = rows["cuda"]
    assert own["failure"] == "is for an NVIDIA GPU: judged on this processor, not timed"
    assert own["latency"] is None and rows["float"]["latency"] is not None
    expected = json.loads((compiled / "report.json").read_text())["fidelity"]["outputs"]["probabilities"]["sqnr"]
    assert own["sqnr"]["probabilities"] == pytest.approx(expected, abs=0.1)
