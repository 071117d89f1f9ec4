"""What has no place in a library runs on ONNX Runtime between libraries, where that is allowed; the report says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from qcompile.backends.cpu.session import absent
from qcompile.core import model as models
from qcompile.core import runtime

pytest.importorskip("tvm")

ROOT = Path(__file__).parents[2]
#: CumSum has no form in a library; what is around it has.
MODEL = """
<ir_version: 10, opset_import: ["": 21]>
between (float[1,64] x) => (float[1,8] y) <int64 axis = {1}> {
  [first] a = MatMul (x, w1)
  b = Relu (a)
  [running] c = CumSum (b, axis)
  [second] d = MatMul (c, w2)
  e = Relu (d)
  [last] y = MatMul (e, w3)
}
"""
ASKED = ("--target", "cpu:tvm", "--observer", "minmax", "--rotation", "none", "--smoothing", "none")


@pytest.fixture(autouse=True)
def processor():
    """Skip where the processor lacks the instructions."""
    if absent(["avx512_vnni"]):
        pytest.skip("the processor has no AVX512-VNNI")


def saved(folder, text=MODEL):
    random = np.random.default_rng(1)
    model = onnx.parser.parse_model(text)
    shapes = {"w1": (64, 32), "w2": (32, 32), "w3": (32, 8)}
    arrays = {name: random.normal(size=shape).astype(np.float32) / 4 for name, shape in shapes.items()}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    onnx.checker.check_model(model)
    onnx.save(model, folder / "model.onnx")
    np.savez(folder / "calib.npz", x=random.normal(size=(24, 1, 64)).astype(np.float32))
    return folder / "model.onnx", folder / "calib.npz"


def test_without_leave_the_refusal_says_how_to_give_it(qcompile, tmp_path):
    model, data = saved(tmp_path)
    done = qcompile(model, *ASKED, "--data", data, "-o", tmp_path / "out")
    assert done.code == 7 and "CumSum 'running': has no kernel in float" in done.err, done.err
    assert "--allow-ort-segments" in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture
def compiled(qcompile, tmp_path):
    model, data = saved(tmp_path)
    done = qcompile(model, *ASKED, "--allow-ort-segments", "--data", data, "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)["report"], tmp_path / "out", model, data


def test_libraries_stand_around_what_forced_a_segment(compiled):
    report, output, _, data = compiled
    jsonschema.validate(report, json.loads((ROOT / "docs/schemas/report.schema.json").read_text()))
    segments = report["segments"]
    assert [part["runs_on"] for part in segments] == ["library", "onnxruntime", "library"]
    assert segments[1]["forced_by"] == [
        {"node": "running", "reason": "has no kernel, neither in integers nor in float"}
    ]
    assert segments[1]["work"] == 16 * 32 and abs(sum(part["share"] for part in segments) - 1) < 1e-3
    assert "CumSum" not in str(report["warnings"]) and "What forced that: running." in report["warnings"][0]
    assert {op["name"]: op["kernel"] for op in report["operators"]}["first"] == "avx512-vnni"
    assert report["fidelity"]["outputs"]["y"]["sqnr"] > 20
    # It gives what the quantized model does, but for codes that ONNX Runtime's floats round otherwise.
    sys.modules.pop("session", None)
    reference = runtime.Session(models.load(output / "reference.onnx"), optimize=False)
    from qcompile.backends.cpu.backend import opened

    session = opened(output)
    for x in np.load(data)["x"][:8]:
        (found,) = session.run(None, {"x": x})
        expected = reference.run({"x": x})["y"]
        assert found.dtype == np.float32
        assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


def test_the_folder_runs_without_qcompile_and_says_where_onnxruntime_is_missing(compiled):
    _, output, _, data = compiled
    sample = np.load(data)["x"][0]
    script = (
        "import sys, numpy; sys.path.insert(0, '.'); from session import InferenceSession\n"
        "x = numpy.frombuffer(sys.stdin.buffer.read(), numpy.float32).reshape(1, 64)\n"
        "sys.stdout.buffer.write(InferenceSession('.', 2).run(['y'], {'x': x})[0].tobytes())\n"
        "assert not [part for part in sys.modules if part.split('.')[0] in ('qcompile', 'tvm')]\n"
    )
    from qcompile.backends.cpu.backend import opened

    done = subprocess.run([sys.executable, "-c", script], input=sample.tobytes(), cwd=output, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == opened(output).run(None, {"x": sample})[0].tobytes()
    script = script.replace("import sys, numpy;", "import sys, numpy; sys.modules['onnxruntime'] = None;")
    done = subprocess.run([sys.executable, "-c", script], input=sample.tobytes(), cwd=output, capture_output=True)
    assert b"OSError: .: segment1.onnx needs onnxruntime, which is not installed" in done.stderr, done.stderr


def test_inputs_are_held_to_their_shapes(compiled):
    from qcompile.backends.cpu.backend import opened

    session = opened(compiled[1])
    with pytest.raises(ValueError, match="input 'x' is missing"):
        session.run(None, {})
    with pytest.raises(ValueError, match=r"input 'x' has shape \(2, 64\), not \(1, 64\)"):
        session.run(None, {"x": np.zeros((2, 64), np.float32)})


def test_compare_bundle_and_check_take_it(qcompile, compiled, tmp_path):
    _, output, model, data = compiled
    done = qcompile("compare", output, "--model", model, "--data", data, "--samples", 4, "--json")
    assert done.code == 0, done.err + done.out
    row = next(row for row in json.loads(done.out)["rows"] if row["target"] == "cpu:tvm")
    assert not row["failed"] and row["sqnr"]["y"] > 20 and row["latency"]["median"] > 0
    done = qcompile("bundle", output, "--model", model, "--data", data, "--samples", 2, "-o", tmp_path / "a.qbundle")
    assert done.code == 0, done.err
    done = qcompile("compare", tmp_path / "a.qbundle", "--json")
    assert done.code == 0 and not any(row["failed"] for row in json.loads(done.out)["rows"]), done.err
    assert qcompile("check", output, "--against", output).code == 0
    assert qcompile("explain", output, "--layer", "running").code == 0


def test_the_same_bytes_twice(qcompile, compiled, tmp_path):
    _, output, model, data = compiled
    done = qcompile(model, *ASKED, "--allow-ort-segments", "--data", data, "-o", tmp_path / "again", "--quiet")
    assert done.code == 0 and "Runs from Python alone, with onnxruntime: 1 of 3 segments" in done.err
    hashes = [json.loads((each / "manifest.json").read_text())["files"] for each in (output, tmp_path / "again")]
    assert hashes[0] == hashes[1] and any(name.startswith("segment0/") for name in hashes[0])


def test_what_a_library_covers_is_one(qcompile, tmp_path):
    model, data = saved(tmp_path, MODEL.replace("CumSum (b, axis)", "Sigmoid (b)").replace("<int64 axis = {1}>", ""))
    for name, words in (("plain", ()), ("allowed", ("--allow-ort-segments",))):
        done = qcompile(model, *ASKED, *words, "--data", data, "-o", tmp_path / name, "--json")
        assert done.code == 0 and json.loads(done.out)["report"]["segments"] is None, done.err
    assert (tmp_path / "plain/libbetween.so").read_bytes() == (tmp_path / "allowed/libbetween.so").read_bytes()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--target", "cpu"), 2, "--allow-ort-segments: means nothing for cpu"),
        (("--target", "cortex-m4"), 2, "--allow-ort-segments: means nothing for cortex-m4"),
        (("--target", "cpu:tvm", "--shape", "x=1x64,128"), 2, "--allow-ort-segments: is for one shape"),
    ],
)
def test_where_it_means_nothing_it_is_refused(qcompile, tmp_path, words, code, said):
    model, data = saved(tmp_path)
    done = qcompile(model, *words, "--allow-ort-segments", "--data", data, "-o", tmp_path / "out")
    assert done.code == code and said in done.err, done.err


def test_a_model_of_nothing_but_that_is_refused(qcompile, tmp_path):
    text = (
        '<ir_version: 10, opset_import: ["": 21]>'
        "g (float[1,8] x) => (float[1,8] y) <int64 a = {1}> { y = CumSum (x, a) }"
    )
    onnx.save(onnx.parser.parse_model(text), tmp_path / "g.onnx")
    np.savez(tmp_path / "c.npz", x=np.random.default_rng(0).normal(size=(8, 1, 8)).astype(np.float32))
    done = qcompile(
        tmp_path / "g.onnx", *ASKED, "--allow-ort-segments", "--data", tmp_path / "c.npz", "-o", tmp_path / "o"
    )
    assert done.code == 7 and "has no part that can be a library; choose --target cpu" in done.err


#: What may stand between segments: a value that both read, one of a body, a number that is no float, two outputs.
AROUND = {
    "residual": (
        """ [first] a = MatMul (x, w1)
  b = Relu (a)
  [running] c = CumSum (b, axis)
  [sum] s = Add (b, c)
  [second] d = MatMul (s, w2)
  e = Relu (d)
  [last] y = MatMul (e, w3) """,
        ["library", "onnxruntime", "library"],
        ["running"],
    ),
    "body": (
        """ [first] a = MatMul (x, w1)
  b = Relu (a)
  one = Constant <value_ints = [0, 1]> ()
  most = ReduceMax <keepdims = 0> (b, one)
  zero = Constant <value_float = 0.5> ()
  [test] t = Greater (most, zero)
  flat = Squeeze (t)
  [branch] c = If (flat) <
    then_branch = yes () => (float[1,32] then) { then = CumSum (b, axis) },
    else_branch = no () => (float[1,32] other) { other = Neg (b) }
  >
  [second] d = MatMul (c, w2)
  e = Relu (d)
  [last] y = MatMul (e, w3) """,
        ["library", "onnxruntime", "library"],
        ["branch"],
    ),
    "numbers": (
        """ [first] a = MatMul (x, w1)
  b = Relu (a)
  [second] d = MatMul (b, w2)
  half = Constant <value_float = 0.5> ()
  [less] t = Less (d, half)
  [many] n = Not (t)
  [running] c = CumSum (d, axis)
  [either] e = Where (n, c, d)
  [last] y = MatMul (e, w3) """,
        ["library", "onnxruntime", "library"],
        ["running"],
    ),
    "first": (
        """ [running] c = CumSum (x, axis)
  [first] a = MatMul (c, w1)
  b = Relu (a)
  [second] d = MatMul (b, w2)
  e = Relu (d)
  [last] y = MatMul (e, w3) """,
        ["onnxruntime", "library"],
        ["running"],
    ),
}


@pytest.mark.parametrize("name", list(AROUND))
def test_whatever_passes_from_one_segment_to_another(qcompile, tmp_path, name):
    body, runs_on, forced = AROUND[name]
    model, data = saved(tmp_path, MODEL[: MODEL.index("{\n")] + "{\n" + body + "\n}")
    done = qcompile(model, *ASKED, "--allow-ort-segments", "--data", data, "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)["report"]
    assert [part["runs_on"] for part in report["segments"]] == runs_on, report["segments"]
    assert {one["node"] for part in report["segments"] for one in part["forced_by"]} >= set(forced)
    from qcompile.backends.cpu.backend import opened

    session, reference = (
        opened(tmp_path / "out"),
        runtime.Session(models.load(tmp_path / "out/reference.onnx"), optimize=False),
    )
    for x in np.load(data)["x"][:8]:
        expected = reference.run({"x": x})["y"]
        assert np.linalg.norm(session.run(None, {"x": x})[0] - expected) < 0.03 * np.linalg.norm(expected)
