"""A model becomes a package for a microcontroller, and runs there as it does here."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest

from qcompile.backends.mcu.emulate import missing

pytest.importorskip("tvm")

ROOT = Path(__file__).parents[2]
#: Executed instructions of one run, by compiler: exact, so that a slower kernel does not pass.
COUNTS = json.loads((ROOT / "tests/backends/mcu/instructions.json").read_text())
#: TFLM with CMSIS-NN's kernels on the same network.
TFLM = 29_800_000


@pytest.fixture
def package(qcompile, resnet8, tmp_path):
    """Return what compiles ResNet-8 for a target: the report, the measurements and the folder."""
    model, data, evaluation = resnet8

    def compiled(target, *words):
        output = tmp_path / target
        done = qcompile(model, "--target", target, "--data", data, "--eval", evaluation, "--observer", "minmax",
                        "-o", output, "--json", *words)  # fmt: skip
        assert done.code == 0, done.err
        content = json.loads(done.out)
        return content["report"], content["measurements"], output

    return compiled


def test_a_model_becomes_a_package(package, tmp_path):
    report, measurements, output = package("cortex-m4")
    for name, content in (("report", report), ("measurements", measurements)):
        jsonschema.validate(content, json.loads((ROOT / f"docs/schemas/{name}.schema.json").read_text()))
    assert {op["kernel"] for op in report["operators"] if op["op_type"] == "Conv"} == {"C"}
    assert report["refusals"] == [] or all(entry["stage"] != "backend" for entry in report["refusals"])
    assert measurements["latency"] is None, "the device is not here"
    footprint = json.loads((output / "footprint.json").read_text())
    assert footprint["arena_bytes"] <= 34 * 1024 and report["size"]["artifact_bytes"] == footprint["weight_bytes"]
    manifest = json.loads((output / "manifest.json").read_text())
    assert {"model.c", "model.h", "model_weights.h", "selftest.c", "reference.onnx"} <= set(manifest["files"])
    subprocess.run(
        ["gcc", "-std=c99", "-O2", "model.c", "selftest.c", "-o", str(tmp_path / "t")], cwd=output, check=True
    )
    subprocess.run([tmp_path / "t"], check=True)


def test_less_memory_means_strips(package):
    _, _, output = package("cortex-m4", "--max-sram", "30KB")
    footprint = json.loads((output / "footprint.json").read_text())
    arenas = [point["arena_bytes"] for point in footprint["trade_off"]]
    assert footprint["arena_bytes"] in arenas and arenas == sorted(arenas, reverse=True) and len(arenas) > 2
    assert footprint["arena_bytes"] <= 30 * 1024 and "steps_0" in (output / "model_weights.h").read_text()


def weight_bits(output):
    """Return the bits of each layer with weights."""
    layers = json.loads((output / "footprint.json").read_text())["layers"]
    return [layer["weight_bits"] for layer in layers if layer["weight_bits"]]


def passes(output, tmp_path):
    """Compile and run the self-test."""
    built = tmp_path / "selftest"
    command = ["gcc", "-std=c99", "-O2", "-Wall", "-Wextra", "-Werror", "model.c", "selftest.c", "-o", str(built)]
    subprocess.run(command, cwd=output, check=True)
    return subprocess.run([built], check=False).returncode == 0


def test_flash_that_is_short_gives_some_weights_four_bits(package, tmp_path):
    report, measurements, output = package("cortex-m4", "--max-flash", "64KB")
    bits = weight_bits(output)
    assert len(bits) == 10 and set(bits) == {4, 8}
    assert report["fidelity"]["outputs"]["probabilities"]["sqnr"] > 20.0 and report["allocation"]["sqnr"] > 20.0
    if (left := measurements["device"].get("flash_left")) is not None:
        assert left >= 0
    assert passes(output, tmp_path)


def test_all_weights_in_four_bits_are_half_the_flash(package, tmp_path):
    report, _, output = package("cortex-m4", "--weights", "4")
    # The first layer has 27 weights a channel: its tail would take longer than its bytes are worth.
    assert weight_bits(output) == [8] + [4] * 9 and report["size"]["artifact_bytes"] < 44_500
    assert passes(output, tmp_path)


def test_activations_of_sixteen_bits_go_through_the_whole_network(package, tmp_path):
    report, _, output = package("cortex-m4", "--activations", "16")
    header = (output / "model.h").read_text()
    assert re.search(r"int \w+_run\(const int16_t \*in, int16_t \*out\);", header)
    assert report["fidelity"]["outputs"]["probabilities"]["sqnr"] > 30.0
    assert json.loads((output / "footprint.json").read_text())["arena_bytes"] == 67_584
    assert passes(output, tmp_path)


def test_a_runtime_without_kernels_takes_no_activations_of_sixteen_bits(qcompile, resnet8, tmp_path):
    done = qcompile(resnet8[0], "--target", "cpu", "--activations", "16", "-o", tmp_path / "o")
    assert done.code == 7 and "--activations 16" in done.err and "no kernels" in done.err


@pytest.mark.parametrize(
    ("words", "code", "facts"),
    [
        (("--max-sram", "8KB"), 5, ("--max-sram: ", "do not fit", "conv2d")),
        (("--max-flash", "45KB"), 5, ("--max-flash", "bytes of flash", "conv2d_7")),
        (("--max-flash", "64KB", "--weights", "8"), 5, ("--max-flash", "bytes of flash", "conv2d_7")),
        (("--weights", "4", "--activations", "16"), 2, ("--weights 4", "--activations 16")),
        (("--board", "toaster"), 2, ("no such board", "stm32f446")),
        (("--board", "stm32f746"), 2, ("has a cortex-m7", "--target cortex-m7")),
        (("--max-sram", "0.5x"), 2, ("is not a budget", "64KB")),
        (("--activations", "none"), 7, ("in float", "quantize")),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(qcompile, resnet8, tmp_path, words, code, facts):
    model, data, _ = resnet8
    done = qcompile(
        model, "--target", "cortex-m4", "--data", data, "--observer", "minmax", "-o", tmp_path / "o", *words
    )
    assert done.code == code, done.err
    assert len(done.err.strip().splitlines()) == 1 and all(fact in done.err for fact in facts), done.err
    assert not (tmp_path / "o").exists()


def test_a_runtime_with_its_own_memory_takes_no_bounds(qcompile, resnet8, tmp_path):
    done = qcompile(resnet8[0], "--target", "cpu", "--max-sram", "64KB", "-o", tmp_path / "o")
    assert done.code == 2 and "--max-sram" in done.err and "microcontroller" in done.err


def test_run_wants_a_package(qcompile, tmp_path):
    done = qcompile("run", tmp_path)
    assert done.code == 2 and "footprint.json" in done.err


@pytest.mark.qemu
@pytest.mark.skipif(bool(missing()), reason=f"needs {missing()}")
@pytest.mark.parametrize("target", ["cortex-m4", "cortex-m7", "cortex-m55"])
def test_a_package_runs_under_emulation_in_so_many_instructions(qcompile, package, resnet8, target):
    if target == "cortex-m55" and shutil.which("clang-19") is None:
        pytest.skip("needs clang-19")
    _, measurements, output = package(target)
    done = qcompile("run", output, "--data", resnet8[2], "--samples", 2, "--json")
    assert done.code == 0, done.err
    seen = json.loads(done.out)
    assert seen["samples"] == 2 and sum(layer["macs"] for layer in seen["layers"]) == 12_501_632
    assert measurements["device"]["code_bytes"] <= 12 * 1024 or target == "cortex-m55"
    if target == "cortex-m4":
        assert seen["instructions"] < TFLM
    known = COUNTS.get(f"{measurements['device']['compiler']}, {target}")
    assert known is None or seen["instructions"] == known["resnet8"], "update instructions.json if this is meant"


@pytest.mark.qemu
@pytest.mark.skipif(bool(missing()), reason=f"needs {missing()}")
def test_a_wrong_output_is_noticed(qcompile, package):
    _, _, output = package("cortex-m4")
    weights = (output / "model_weights.h").read_text()
    # The power that a Softmax gives the highest score.
    changed = re.sub(r"(uint32_t table_\d+\[256\] = \{\n    )\d+u", r"\g<1>1u", weights)
    assert changed != weights
    (output / "model_weights.h").write_text(changed)
    done = qcompile("run", output)
    assert done.code == 6 and "not the integer program's" in done.err
