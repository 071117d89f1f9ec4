"""calibrate → plan → apply: the same bytes as one compile, plans that were edited, and files that are none."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest

ROOT = Path(__file__).parents[2]
UNSETTLED = {"measurements.json", "distributions.json", "report.html"}


def settled(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in UNSETTLED
    }


@pytest.fixture
def staged(qcompile, tmp_path):
    """Run the three stages, each of which must succeed, and return the folder that the last one wrote."""

    def run(model: Path, calibrating: tuple, applying: tuple, planning: tuple = ()) -> Path:
        calibration, plan, output = tmp_path / "calibration.npz", tmp_path / "plan.json", tmp_path / "staged"
        for words in (
            ("calibrate", model, *calibrating, "-o", calibration),
            ("plan", model, "--calibration", calibration, *planning, "-o", plan),
            ("apply", model, "--plan", plan, *applying, "-o", output),
        ):
            done = qcompile(*words, "--quiet")
            assert done.code == 0 and done.out == "", done
        return output

    return run


def test_the_stages_write_what_one_compile_writes(qcompile, resnet8, staged, tmp_path):
    model, calibration, evaluation = resnet8
    words = ("--target", "cpu", "--data", calibration, "--eval", evaluation)
    assert qcompile(model, *words, "-o", tmp_path / "whole", "--quiet").code == 0
    output = staged(model, words, words, ("--target", "cpu"))
    assert settled(output) == settled(tmp_path / "whole")
    assert (tmp_path / "plan.json").read_bytes() == (tmp_path / "whole/plan.json").read_bytes()
    assert {path.name for path in output.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


@pytest.mark.parametrize(
    "deciding",
    [
        (),
        ("--observer", "mse"),
        ("--activations", "none"),
        ("--weights", "none"),
        ("--shape", "x=1x3x8x8"),
    ],
)
def test_what_decides_travels_in_the_files(qcompile, small, staged, tmp_path, deciding):
    for value in (*small.proto.graph.input, *small.proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    words = ("--target", "cpu", "--data", small.data)
    assert qcompile(small.model, *words, *deciding, "-o", tmp_path / "whole").code == 0
    assert settled(staged(small.model, (*words, *deciding), ("--data", small.data))) == settled(tmp_path / "whole")


def test_a_recipe_serves_every_stage(qcompile, small, staged, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'target = "cpu"\ndata = "data.npz"\nobserver = "percentile"\nseed = 4\n[min_fidelity]\nsqnr = 3\n'
        "[[override]]\nop_type = 'Gemm'\nweights = 'int8'\n"
    )
    assert small.data.exists()
    given = ("--recipe", recipe)
    assert qcompile(small.model, *given, "-o", tmp_path / "whole").code == 0
    assert settled(staged(small.model, given, given, given)) == settled(tmp_path / "whole")


def test_without_data_the_stages_quantize_weights_as_a_compile_does(qcompile, small, staged, tmp_path):
    assert qcompile(small.model, "--target", "cpu", "-o", tmp_path / "whole").code == 0
    assert settled(staged(small.model, ("--target", "cpu"), ())) == settled(tmp_path / "whole")
    told = qcompile("calibrate", small.model, "--target", "cpu", "-o", tmp_path / "calibration.npz")
    assert told.out.startswith("warning: No calibration data: weights are stored as integers")


def test_without_data_the_stages_guess_as_a_compile_does(qcompile, resnet8, staged, tmp_path):
    assert qcompile(resnet8[0], "--target", "cpu", "-o", tmp_path / "whole").code == 0
    assert settled(staged(resnet8[0], ("--target", "cpu"), ())) == settled(tmp_path / "whole")
    told = qcompile("calibrate", resnet8[0], "--target", "cpu", "-o", tmp_path / "calibration.npz")
    assert "GUESSED" in told.out.split(".")[0]


def test_a_quantized_model_goes_through_the_stages(qcompile, small, staged, tmp_path):
    words = ("--target", "cpu", "--data", small.data)
    assert qcompile(small.model, *words, "-o", tmp_path / "first").code == 0
    model = tmp_path / "first/model.onnx"
    assert qcompile(model, *words, "-o", tmp_path / "whole").code == 0
    assert settled(staged(model, words, words)) == settled(tmp_path / "whole")


# What is written and printed.


def test_calibrating_is_the_same_bytes_in_another_process(small, tmp_path):
    for name, threads in (("a", "1"), ("b", "2")):
        words = [small.model, "--target", "cpu", "--data", small.data, "--threads", threads, "-o", tmp_path / name]
        subprocess.run([sys.executable, "-m", "qcompile", "calibrate", *words, "-q"], check=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_calibration_file_is_plain_numbers_and_fits_its_schema(measured, small):
    schema = json.loads((ROOT / "docs/schemas/calibration.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    with np.load(measured, allow_pickle=False) as archive:
        header = json.loads(str(archive["header"]))
        jsonschema.validate(header, schema)
        assert list(header["choice"]["observers"]) == archive["names"].tolist()
        assert archive["samples"] == 6  # of eight, a fifth is held out
        assert int(archive["bins"][:, 2].sum()) == archive["counts"].size


def test_json_and_tables(qcompile, small, measured):
    told = qcompile("calibrate", small.model, "--target", "cpu", "--data", small.data, "-o", measured, "--json")
    content = json.loads(told.out)
    assert content["samples"] == 6 and sum(content["observers"].values()) == content["tensors"] == 2
    plan = small.folder / "plan.json"
    told = qcompile("plan", small.model, "--calibration", measured, "-o", plan, "--json")
    assert json.loads(told.out)["plan"] == json.loads(plan.read_text())
    shown = qcompile("plan", small.model, "--calibration", measured, "-o", plan).out
    assert "QLinear" not in shown and "its 20 weights are too few" in " ".join(shown.split())
    told = qcompile("apply", small.model, "--plan", plan, "--data", small.data, "-o", small.folder / "o", "--json")
    assert json.loads(told.out)["report"] == json.loads((small.folder / "o/report.json").read_text())


def test_a_cache_serves_the_stages(qcompile, small, staged, tmp_path):
    words = ("--target", "cpu", "--data", small.data, "--cache", tmp_path / "cache")
    assert qcompile(small.model, *words, "-o", tmp_path / "whole").code == 0
    entries = {path for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert settled(staged(small.model, words, words)) == settled(tmp_path / "whole")
    added = {path for path in (tmp_path / "cache").rglob("*") if path.is_file()} - entries
    # Canonical model, statistics and observers are those of the compile; a plan read back is another key.
    assert len(added) < len(entries)


# Plans that were edited.


@pytest.fixture
def measured(qcompile, small) -> Path:
    path = small.folder / "calibration.npz"
    assert qcompile("calibrate", small.model, "--target", "cpu", "--data", small.data, "-o", path, "-q").code == 0
    return path


@pytest.fixture
def planned(qcompile, small, measured) -> Path:
    path = small.folder / "plan.json"
    assert qcompile("plan", small.model, "--calibration", measured, "-o", path, "-q").code == 0
    return path


def edited(path: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def applied(qcompile, small, planned):
    """Edit the plan of the small model, apply it, and return the report and the plan that was written."""

    def run(edit: Callable[[dict[str, Any]], None], *words: object) -> tuple[dict[str, Any], dict[str, Any]]:
        edited(planned, edit)
        output = small.folder / "out"
        done = qcompile("apply", small.model, "--plan", planned, "-o", output, "--json", *words)
        assert done.code == 0, done.err
        return json.loads(done.out)["report"], json.loads((output / "plan.json").read_text())

    return run


def conv_of(plan: dict[str, Any]) -> str:
    return next(name for name, op in plan["ops"].items() if op["op_type"] == "Conv")


def test_an_edited_scale_is_the_one_in_the_artifact(applied, small):
    def wider(plan):
        plan["tensors"]["x"]["scale"] = [0.1]

    _, plan = applied(wider, "--data", small.data)
    assert plan["tensors"]["x"]["scale"] == [float(np.float32(0.1))]
    stored = {t.name: t for t in onnx.load(small.folder / "out/model.onnx").graph.initializer}
    assert onnx.numpy_helper.to_array(stored["x_scale"]) == np.float32(0.1)


def test_an_operator_edited_to_float_is_in_float_and_what_follows_is_drawn(applied, small):
    def to_float(plan):
        plan["ops"][conv_of(plan)]["precision"] = "float"

    report, plan = applied(to_float, "--data", small.data)
    fates = {op["op_type"]: (op["precision"], op["kernel"], op["reason"]) for op in report["operators"]}
    assert fates["Conv"] == ("float", None, "as the plan asks")
    assert fates["Relu"][:2] == ("float", None)
    assert "x" not in plan["tensors"] and "w" not in plan["tensors"]
    graph = onnx.load(small.folder / "out/model.onnx").graph
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    assert all(read & set(node.output) for node in graph.node), "no node is left that nobody reads"


def test_an_edited_plan_applied_again_is_the_same(qcompile, applied, small):
    def to_float(plan):
        plan["ops"][conv_of(plan)]["precision"] = "float"

    applied(to_float, "--data", small.data)
    words = ("--plan", small.folder / "out/plan.json", "--data", small.data, "-o", small.folder / "again")
    assert qcompile("apply", small.model, *words).code == 0
    assert settled(small.folder / "again") == settled(small.folder / "out")


def test_weights_alone_may_be_asked_for_in_a_plan(applied, small):
    def weights_only(plan):
        plan["ops"][conv_of(plan)] |= {"precision": "weight_only", "reason": "mine"}

    report, _ = applied(weights_only, "--data", small.data)
    assert [op["reason"] for op in report["operators"] if op["op_type"] == "Conv"] == ["mine"]
    stored = {t.name: t.data_type for t in onnx.load(small.folder / "out/model.onnx").graph.initializer}
    assert stored["w_quantized"] == onnx.TensorProto.INT8


def test_without_data_no_bias_is_corrected_and_the_first_line_says_so(qcompile, small, planned):
    done = qcompile("apply", small.model, "--plan", planned, "-o", small.folder / "out")
    assert done.code == 0, done.err
    assert done.out.startswith("warning: No data: biases are not corrected.")
    report = json.loads((small.folder / "out/report.json").read_text())
    assert report["precision"]["integer"] > 0
    refusals = [r["reason"] for r in report["refusals"] if r["stage"] == "CorrectBias"]
    assert len(refusals) == 1 and refusals[0].startswith("no biases are corrected")
    evaluated = qcompile("apply", small.model, "--plan", planned, "--eval", small.data, "-o", small.folder / "out")
    assert "random" not in evaluated.out and "No data: biases are not corrected." in evaluated.out


def _rename(plan, table, old, new):
    plan[table] = {new if name == old else name: entry for name, entry in plan[table].items()}


def _gemm(plan):
    return next(op for op in plan["ops"].values() if op["op_type"] == "Gemm")


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    *keys, last, value = path

    def edit(plan: dict[str, Any]) -> None:
        for key in keys:
            plan = plan[key if key != "CONV" else conv_of({"ops": plan})]
        plan[last if last != "CONV" else conv_of({"ops": plan})] = value

    return edit


def _without(table: str, name: str) -> Callable[[dict[str, Any]], None]:
    return lambda plan: plan[table].pop(name if name != "CONV" else conv_of(plan))


@pytest.mark.parametrize(
    ("edit", "facts"),
    [
        (lambda plan: _rename(plan, "tensors", "x", "xx"), ["tensor 'xx'", "does not have", "did you mean 'x'?"]),
        (lambda plan: _rename(plan, "ops", conv_of(plan), "no such thing"), ["operator 'no such thing'"]),
        (_without("ops", "CONV"), ["does not say what becomes of operator"]),
        (_without("tensors", "x"), ["no scale for tensor 'x'"]),
        (_without("tensors", "w"), ["no scale for tensor 'w'"]),
        (_without("tensors", "relu"), ["no scale for tensor 'relu'"]),
        (_set("ops", "CONV", "op_type", "Gemm"), ["as Gemm, the model as Conv"]),
        (_set("ops", "CONV", "output", "y"), ["'y'", "not its result"]),
        (_set("ops", "CONV", "output", "gone"), ["tensor 'gone'", "does not have"]),
        (_set("ops", "CONV", "output", None), ["is not a quantization plan"]),
        (_set("tensors", "w", "scale", [0.1] * 3), ["is not a quantization plan"]),
        (lambda plan: plan["tensors"]["w"].update(scale=[0.1] * 3, zero_point=[0] * 3), ["3 scales for 4 channels"]),
        (_set("tensors", "w", "axis", 7), ["no axis 7"]),
        (lambda plan: plan["tensors"]["x"].update(axis=1), ["an activation has one scale"]),
        (_set("tensors", "x", "dtype", "int16"), ["'x' is int16", "takes uint8"]),
        (_set("tensors", "x", "role", "weight"), ["'x' is weight in it", "reads it as activation"]),
        (_set("tensors", "x", "scale", [1e-60]), ["is not a quantization plan"]),
        (_set("tensors", "x", "scale", [1e60]), ["is not a quantization plan"]),
        (lambda plan: _gemm(plan).update(precision="integer"), ["no scale for tensor 'g'"]),
        (lambda plan: _gemm(plan).update(precision="half"), ["is not a quantization plan"]),
        (lambda plan: plan["ops"][_named(plan, "Relu")].update(precision="float"), ["absorbs it"]),
        (lambda plan: plan["ops"][_named(plan, "Flatten")].update(precision="weight_only"), ["no constant weights"]),
        (_set("options", "observer", "best"), ["plan.json: observer", "no choice 'best'"]),
        (_set("options", "colour", "red"), ["plan.json", "no key 'colour'"]),
        (_set("options", 3), ["is not a quantization plan"]),
        (_set("schema_version", 99), ["schema version 99"]),
    ],
)
def test_a_plan_that_cannot_be(qcompile, small, planned, edit, facts):
    edited(planned, edit)
    refused(qcompile, small, facts, "apply", small.model, "--plan", planned, "--data", small.data)


def _named(plan, op_type):
    return next(name for name, op in plan["ops"].items() if op["op_type"] == op_type)


def refused(qcompile, small, facts, *words: object) -> None:
    """Hold a failure to what every failure must be, with nothing written."""
    before = {path: path.stat().st_mtime_ns for path in small.folder.rglob("*")}
    done = qcompile(*words, "-o", small.folder / "out")
    assert done.code == 2, done
    line = done.err.strip()
    assert line.startswith("error: ") and "\n" not in line and "; " in line, done.err
    for fact in facts:
        assert fact in line, line
    assert done.out == ""
    assert {path: path.stat().st_mtime_ns for path in small.folder.rglob("*")} == before


def test_integers_that_no_kernel_computes(qcompile, small, planned):
    small.proto.graph.node.append(onnx.helper.make_node("Softmax", ["y"], ["z"], name="soft"))
    small.proto.graph.output[0].name = "z"
    model = small.model

    def add(plan):
        plan["ops"]["soft"] = {"op_type": "Softmax", "precision": "integer", "reason": "", "output": ""}

    refused(qcompile, small, ["cpu has no integer Softmax"], "apply", model, "--plan", edited(planned, add))


def test_scales_for_a_model_that_is_quantized_already(qcompile, small, planned):
    words = ("--target", "cpu", "--data", small.data)
    assert qcompile(small.model, *words, "-o", small.folder / "first").code == 0
    model = small.folder / "first/model.onnx"
    calibration, plan = small.folder / "c2.npz", small.folder / "p2.json"
    assert qcompile("calibrate", model, *words, "-o", calibration).code == 0
    assert qcompile("plan", model, "--calibration", calibration, "-o", plan).code == 0
    entry = json.loads(planned.read_text())["tensors"]["x"]
    edited(plan, lambda content: content["tensors"].update(x=entry))
    refused(qcompile, small, ["quantized already"], "apply", model, "--plan", plan)


# Files that are none, or of something else.


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_a_calibration_that_is_cut_off(qcompile, small, measured, kept):
    content = measured.read_bytes()
    measured.write_bytes(content[: int(len(content) * kept)])
    refused(qcompile, small, ["calibration.npz", "cut off"], "plan", small.model, "--calibration", measured)


def test_a_calibration_with_a_flipped_bit(qcompile, small, measured):
    content = bytearray(measured.read_bytes())
    content[content.index(b"counts.npy") + 200] ^= 1
    measured.write_bytes(content)
    refused(qcompile, small, ["calibration.npz"], "plan", small.model, "--calibration", measured)


def rewritten(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    with np.load(path) as archive:
        arrays = dict(archive)
    header = json.loads(str(arrays["header"]))
    edit(header)
    np.savez(path, **arrays | {"header": np.array(json.dumps(header))})


@pytest.mark.parametrize(
    ("edit", "facts"),
    [
        (lambda header: header.update(schema_version=99), ["schema version 99"]),
        (lambda header: header["choice"]["observers"].pop("x"), ["not of the same tensors"]),
        (lambda header: header["choice"]["observers"].update(x="guess"), ["is not a calibration"]),
        (lambda header: header.pop("options"), ["is not a calibration"]),
        (lambda header: header["options"].update(observer=3), ["calibration.npz: observer"]),
    ],
)
def test_a_calibration_from_elsewhere(qcompile, small, measured, edit, facts):
    rewritten(measured, edit)
    refused(qcompile, small, ["calibration.npz", *facts], "plan", small.model, "--calibration", measured)


def test_data_or_pickles_are_no_calibration(qcompile, small):
    refused(qcompile, small, ["is not a calibration"], "plan", small.model, "--calibration", small.data)
    np.savez(small.folder / "pickle.npz", header=np.array({"a": 1}, dtype=object))
    path = small.folder / "pickle.npz"
    refused(qcompile, small, ["is not a calibration"], "plan", small.model, "--calibration", path)
    absent = small.folder / "absent"
    refused(qcompile, small, ["No such file"], "plan", small.model, "--calibration", absent)
    refused(qcompile, small, ["No such file"], "apply", small.model, "--plan", absent)
    refused(qcompile, small, ["is not a quantization plan"], "apply", small.model, "--plan", path)


def test_a_calibration_of_another_model(qcompile, small, measured):
    weights = onnx.numpy_helper.to_array(small.proto.graph.initializer[0]) * np.float32(2)
    small.proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "w"))
    facts = ["was measured on another model", "calibrate this model"]
    refused(qcompile, small, facts, "plan", small.model, "--calibration", measured)


def test_options_that_contradict_the_earlier_stage(qcompile, small, measured, planned):
    other = small.folder / "other.toml"
    other.write_text('observer = "mse"\n')
    words = ("--recipe", other)
    refused(qcompile, small, ["'observer'"], "plan", small.model, "--calibration", measured, *words)
    refused(qcompile, small, ["'observer'"], "apply", small.model, "--plan", planned, *words)
    refused(qcompile, small, ["'target'"], "plan", small.model, "--calibration", measured, "--target", "x")
    other.write_text("[[override]]\nmatch = '*'\nkeep_float = true\n")
    refused(qcompile, small, ["'overrides'"], "apply", small.model, "--plan", planned, *words)


def test_other_overrides_can_be_tried_on_one_calibration(qcompile, small, measured):
    recipe, plan = small.folder / "r.toml", small.folder / "plan.json"
    recipe.write_text("[[override]]\nop_type = 'Conv'\nkeep_float = true\n")
    words = ("plan", small.model, "--calibration", measured, "--recipe", recipe)
    assert qcompile(*words, "-o", plan).code == 0
    assert json.loads(plan.read_text())["ops"][_named(json.loads(plan.read_text()), "Conv")]["precision"] == "float"
    recipe.write_text("[[override]]\nop_type = 'Gemm'\nweights = 'int8'\n")
    refused(qcompile, small, ["no measurement of tensor", "calibrate again"], *words)


# Places that are not free.


def test_nothing_but_its_own_is_overwritten(qcompile, small, measured, planned):
    notes = small.folder / "notes.txt"
    notes.write_text("mine")
    calibrate = ("calibrate", small.model, "--target", "cpu", "--data", small.data)
    plan = ("plan", small.model, "--calibration", measured)
    for words in (calibrate, plan):
        for place, fact in {notes: "is not what would be written", small.folder: "is no file"}.items():
            done = qcompile(*words, "-o", place)
            assert done.code == 2 and fact in done.err and done.err.count("\n") == 1, done
    assert notes.read_text() == "mine"
    for words, other in ((calibrate, planned), (plan, measured)):
        content = other.read_bytes()
        assert qcompile(*words, "-o", other).code == 2 and other.read_bytes() == content
    for words, own in ((calibrate, measured), (plan, planned)):
        assert qcompile(*words, "-o", own).code == 0


def test_a_link_is_no_place(qcompile, small, measured):
    link = small.folder / "link.npz"
    link.symlink_to(measured)
    done = qcompile("calibrate", small.model, "--target", "cpu", "--data", small.data, "-o", link)
    assert done.code == 2 and "is no file" in done.err


def test_an_artifact_keeps_the_plan_that_its_manifest_lists(qcompile, small, measured):
    output = small.folder / "artifact"
    assert qcompile(small.model, "--target", "cpu", "--data", small.data, "-o", output).code == 0
    done = qcompile("plan", small.model, "--calibration", measured, "-o", output / "plan.json")
    assert done.code == 2 and "manifest" in done.err


def test_a_file_that_cannot_be_written(qcompile, small, measured):
    (small.folder / "file").write_text("")
    done = qcompile("plan", small.model, "--calibration", measured, "-o", small.folder / "file/plan.json")
    assert done.code == 2 and "cannot be written" in done.err and done.err.count("\n") == 1


def test_a_disk_that_is_full_leaves_the_old_file(qcompile, small, planned, measured, monkeypatch):
    import os

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    content, before = planned.read_bytes(), sorted(small.folder.iterdir())
    monkeypatch.setattr(os, "fsync", full)
    done = qcompile("plan", small.model, "--calibration", measured, "-o", planned)
    assert done.code == 2 and "No space left on device" in done.err
    assert planned.read_bytes() == content and sorted(small.folder.iterdir()) == before


@pytest.mark.parametrize(("command", "word"), [("plan", "--calibration"), ("apply", "--plan")])
def test_what_a_stage_needs(qcompile, small, command, word):
    done = qcompile(command, small.model)
    assert done.code == 2 and word in done.err and f"'qcompile {command} --help'" in done.err
