"""Less memory than maps of eight bits leave: some have four, the report says which, and what comes of it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest

from qcompile.backends.mcu.emulate import missing

pytest.importorskip("tvm")

ROOT = Path(__file__).parents[2]
#: Below this no strips of ResNet-8 fit with every map in eight bits: 22,528 bytes, and the stack.
TIGHT = ("--observer", "mse", "--max-sram", "18KB")
UNSETTLED = {"measurements.json", "distributions.json", "report.html"}


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """Return a folder where the tests of this file keep what was measured."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def compiled(qcompile, resnet8, cached, tmp_path):
    """Return what ResNet-8 became in 18 KB, and where."""
    model, data, evaluation = resnet8
    output = tmp_path / "tight"
    words = ("--data", data, "--eval", evaluation, *TIGHT, "--cache", cached, "-o", output, "--json")
    done = qcompile(model, "--target", "cortex-m4", *words)
    assert done.code == 0, done.err
    return json.loads(done.out), output


def test_some_maps_have_four_bits_and_the_report_says_which_first(compiled):
    content, output = compiled
    report, measurements = content["report"], content["measurements"]
    for name in ("report", "plan"):
        written = json.loads((output / f"{name}.json").read_text())
        jsonschema.validate(written, json.loads((ROOT / f"docs/schemas/{name}.schema.json").read_text()))
    maps, plan = report["maps"], json.loads((output / "plan.json").read_text())
    narrow = {name for name, quant in plan["tensors"].items() if quant["dtype"] == "int4"}
    assert set(maps["bits"]) <= narrow and maps == plan["maps"] and maps["bits"]
    assert report["warnings"][0].startswith("Stored in four bits to fit the memory: ")
    assert all(name in report["warnings"][0] for name in maps["bits"])
    assert maps["sqnr"] < maps["sqnr_of_eight"]
    footprint = json.loads((output / "footprint.json").read_text())
    assert footprint["arena_bytes"] <= 18 * 1024 and footprint["arena_bytes"] % 4 == 0
    if measurements["device"]["compiler"]:
        assert measurements["device"]["sram_bytes"] <= 18 * 1024
    assert {layer["bits"] for layer in footprint["layers"]} == {4, 8}
    assert report["fidelity"]["outputs"]["probabilities"]["sqnr"] > 10.0


def test_this_machine_and_the_emulated_one_compute_the_same(compiled, qcompile, resnet8, tmp_path):
    output = compiled[1]
    built = tmp_path / "t"
    flags = ["-std=c99", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["gcc", *flags, "model.c", "selftest.c", "-o", str(built)], cwd=output, check=True)
    subprocess.run([built], check=True)
    if missing():
        pytest.skip(f"needs {missing()}")
    done = qcompile("run", output, "--data", resnet8[2], "--samples", 3, "--json")
    assert done.code == 0 and json.loads(done.out)["samples"] == 3, done.err


@pytest.mark.qemu
@pytest.mark.skipif(bool(missing()) or shutil.which("clang-19") is None, reason="needs QEMU and clang-19")
def test_helium_computes_the_same(qcompile, resnet8, tmp_path):
    model, data, evaluation = resnet8
    words = ("--data", data, "--eval", evaluation, *TIGHT, "-o", tmp_path / "o", "--quiet")
    assert qcompile(model, "--target", "cortex-m55", *words).code == 0
    assert qcompile("run", tmp_path / "o", "--data", evaluation, "--samples", 2).code == 0


def test_stages_write_what_one_compile_writes(compiled, qcompile, resnet8, tmp_path):
    model, data, evaluation = resnet8
    calibration, plan, output = tmp_path / "c.npz", tmp_path / "p.json", tmp_path / "o"
    words = ("--target", "cortex-m4", "--data", data, "--eval", evaluation)
    memory = TIGHT[2:]
    for stage in (
        ("calibrate", model, *words, *TIGHT, "-o", calibration),
        ("plan", model, "--target", "cortex-m4", "--calibration", calibration, *memory, "-o", plan),
        ("apply", model, *words, "--plan", plan, *memory, "-o", output),
    ):
        done = qcompile(*stage, "--quiet")
        assert done.code == 0, done.err
    for path in compiled[1].iterdir():
        if path.name not in UNSETTLED:
            assert (output / path.name).read_bytes() == path.read_bytes(), path.name
    # Another budget is solved with what was measured, and one that needs no measurement has none to miss.
    for budget, narrow in (("15KB", True), ("40KB", False)):
        done = qcompile("plan", model, "--target", "cortex-m4", "--calibration", calibration, "--max-sram", budget,
                        "-o", plan, "--quiet")  # fmt: skip
        assert done.code == 0, done.err
        assert bool(json.loads(plan.read_text())["maps"]) is narrow


def test_a_calibration_without_these_losses_is_refused(qcompile, resnet8, tmp_path):
    model, data, _ = resnet8
    calibration = tmp_path / "c.npz"
    done = qcompile("calibrate", model, "--target", "cortex-m4", "--data", data, "--observer", "minmax", "-o",
                    calibration, "--quiet")  # fmt: skip
    assert done.code == 0, done.err
    done = qcompile("plan", model, "--target", "cortex-m4", "--calibration", calibration, "--max-sram", "18KB", "-o",
                    tmp_path / "p.json")  # fmt: skip
    assert done.code == 2 and "calibrate again, on data, with --max-sram" in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_what_does_not_fit_in_four_bits_either_says_the_least(qcompile, resnet8, tmp_path):
    model, data, _ = resnet8
    words = ("--target", "cortex-m4", "--data", data, "--observer", "minmax", "-o", tmp_path / "o")
    done = qcompile(model, *words, "--max-sram", "9KB")
    assert done.code == 5 and "nor 11264 in strips with maps in four bits" in done.err and "'conv2d_2'" in done.err
    assert len(done.err.strip().splitlines()) == 1 and not (tmp_path / "o").exists()
