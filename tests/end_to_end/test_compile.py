"""The compiler's whole way on the model of the repository, from the command line to the artifact and back."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest
from end_to_end.outcomes import KILLED

SCHEMAS = Path(__file__).parents[2] / "docs/schemas"
UNSETTLED = {"measurements.json", "distributions.json", "report.html"}


def settled(folder: Path) -> dict[str, str]:
    """Return the checksums of everything that must be the same for the same inputs."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in UNSETTLED
    }


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ResNet-8, compiled as the README says."""
    models = Path(__file__).parents[2] / "models"
    output = tmp_path_factory.mktemp("artifact") / "resnet8"
    words = ["--data", models / "resnet8_calib.npz", "--eval", models / "resnet8_eval.npz", "-o", output]
    command = [sys.executable, "-m", "qcompile", models / "resnet8.onnx", "--target", "cpu", *words, "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return output


def test_int8_agrees_with_float_on_every_evaluation_image(artifact, resnet8):
    model, _, evaluation = resnet8
    with np.load(evaluation) as archive:
        images, labels = archive["x"], archive["labels"]
    run = [
        onnxruntime.InferenceSession(p, providers=["CPUExecutionProvider"]) for p in (model, artifact / "model.onnx")
    ]
    found = np.array([[session.run(None, {"x": image})[0].argmax() for session in run] for image in images])
    assert (found[:, 0] == found[:, 1]).sum() == len(images) == 20
    report = json.loads((artifact / "report.json").read_text())
    assert report["fidelity"]["outputs"]["probabilities"]["top1"] == 1.0
    assert report["fidelity"]["accuracy"] == {
        "labelled": 20,
        "float_correct": int((found[:, 0] == labels).sum()),
        "artifact_correct": int((found[:, 1] == labels).sum()),
    }


def test_what_is_integer_is_an_integer_kernel(artifact):
    operators = json.loads((artifact / "report.json").read_text())["operators"]
    kernels = {(op["op_type"], op["kernel"]) for op in operators if op["op_type"] in ("Conv", "Add", "Gemm")}
    # The last Add and the Gemm serve ten classes with 640 weights, and the first Conv reads three channels.
    assert kernels == {("Conv", "QLinearConv"), ("Conv", None), ("Add", "QLinearAdd"), ("Add", None), ("Gemm", None)}
    assert [op["name"] for op in operators if op["op_type"] == "Conv" and op["kernel"] is None] == ["conv2d"]
    assert all(op["reason"] for op in operators if op["precision"] == "float")


def test_size(artifact):
    size = json.loads((artifact / "report.json").read_text())["size"]
    assert size["artifact_bytes"] == (artifact / "model.onnx").stat().st_size == sum(size["by_cause"].values())
    weights = sum(
        int(np.prod(tensor.dims)) for tensor in onnx.load(artifact / "model.onnx").graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    )  # fmt: skip
    assert weights <= size["by_cause"]["weights in int8"] < weights * 1.02
    assert size["ratio"] < 0.35


def interface(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    return [*model.graph.input, *model.graph.output]


def test_the_artifact_passes_the_full_checker_and_keeps_the_interface(artifact, resnet8):
    found, given = onnx.load(artifact / "model.onnx"), onnx.load(resnet8[0])
    onnx.checker.check_model(found, full_check=True)
    for one, other in zip(interface(found), interface(given), strict=True):
        assert one.name == other.name
        assert one.type.tensor_type.elem_type == other.type.tensor_type.elem_type


@pytest.mark.parametrize("name", ["report", "plan", "distributions", "measurements", "manifest"])
def test_json_fits_its_schema(artifact, name):
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads((artifact / f"{name}.json").read_text()), schema)


def test_the_manifest_lists_every_settled_file(artifact):
    listed = json.loads((artifact / "manifest.json").read_text())["files"]
    assert {name: entry["sha256"] for name, entry in listed.items()} == {
        name: checksum for name, checksum in settled(artifact).items() if name != "manifest.json"
    }


def test_same_inputs_same_bytes(artifact, resnet8, tmp_path):
    """Another working directory, another home, another number of threads, other names of the data."""
    model, calibration, evaluation = resnet8
    for name, path in {"c.npz": calibration, "e.npz": evaluation, "resnet8.onnx": model}.items():
        (tmp_path / name).symlink_to(path)
    words = "resnet8.onnx --target cpu --data c.npz --eval e.npz -o other/place --threads 1 --quiet"
    environment = os.environ | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "123"}
    subprocess.run([sys.executable, "-m", "qcompile", *words.split()], cwd=tmp_path, env=environment, check=True)
    assert settled(tmp_path / "other/place") == settled(artifact)


@pytest.mark.parametrize("count", range(1, 9))
def test_killed_at_any_stage_and_run_again(small, count):
    """SIGKILL before the count-th result is kept; then the same command with the same cache, and one without any."""
    output = small.folder / "out"
    words = [small.model, "--target", "cpu", "--data", small.data, "--quiet"]
    command = [sys.executable, "-c", KILLED, str(count), *words, "--cache", small.folder / "cache", "-o", output]
    assert subprocess.run(command, capture_output=True).returncode == -9
    assert not output.exists()
    again = [sys.executable, "-c", KILLED, "0", *words, "--cache", small.folder / "cache", "-o", output]
    assert subprocess.run(again, capture_output=True).returncode == 0
    fresh = [sys.executable, "-m", "qcompile", *words, "-o", small.folder / "fresh"]
    assert subprocess.run(fresh, capture_output=True).returncode == 0
    assert settled(output) == settled(small.folder / "fresh")


def test_a_second_compile_finds_every_stage_in_the_cache(small):
    """In another process with other hash seeds, other names of the data, and another number of threads."""
    entries = []
    for seed in ("1", "2"):
        words = [small.model, "--target", "cpu", "--data", small.data, "--cache", small.folder / "cache", "--quiet"]
        command = [sys.executable, "-m", "qcompile", *words, "--threads", seed, "-o", small.folder / seed]
        subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": seed}, check=True)
        entries.append({path: path.stat().st_mtime_ns for path in (small.folder / "cache").rglob("*")})
    assert entries[0] == entries[1]
    assert settled(small.folder / "1") == settled(small.folder / "2")


def test_a_cache_that_takes_nothing_costs_the_resume_and_not_the_compile(qcompile, small, monkeypatch):
    import tempfile

    def full(*words, **options):
        raise OSError(28, "No space left on device")

    (small.folder / "cache").mkdir()
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    words = [small.model, "--target", "cpu", "--data", small.data, "--cache", small.folder / "cache"]
    done = qcompile(*words, "-o", small.folder / "out")
    assert done.code == 0, done.err
    assert "The cache takes no entries" in " ".join(done.out.split())


def test_another_option_does_not_find_the_old_entries(qcompile, small):
    words = [small.model, "--target", "cpu", "--data", small.data, "--cache", small.folder / "cache"]
    assert qcompile(*words, "-o", small.folder / "first", "--activations", "8").code == 0
    assert qcompile(*words, "-o", small.folder / "second", "--activations", "none").code == 0
    first, second = (json.loads((small.folder / name / "plan.json").read_text()) for name in ("first", "second"))
    assert first["tensors"] != second["tensors"]


def test_asked_for_float_activations_without_data_the_first_line_says_so(qcompile, resnet8, tmp_path):
    done = qcompile(resnet8[0], "--target", "cpu", "--activations", "none", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    first = done.out.splitlines()[0]
    assert first.startswith("warning: No calibration data: weights are stored as integers")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["precision"] == {"integer": 0, "weight_only": 9, "float": 15}
    assert report["size"]["ratio"] < 0.35
    executed = onnx.load(tmp_path / "out/model.onnx").graph.node
    assert not [node for node in executed if node.op_type in ("QuantizeLinear", "DequantizeLinear")]


def test_nothing_quantized_is_exact(qcompile, small):
    words = ["--weights", "none", "--activations", "none", "--json", "-o", small.folder / "out"]
    done = qcompile(small.model, "--target", "cpu", "--data", small.data, *words)
    output = json.loads(done.out)
    assert output["report"]["fidelity"]["outputs"]["y"]["exact"]
    assert output["report"]["precision"]["float"] == len(output["report"]["operators"])


def test_json_is_all_that_is_printed(qcompile, small):
    done = qcompile(small.model, "--target", "cpu", "--data", small.data, "--json", "-o", small.folder / "out")
    assert done.code == 0 and done.err == ""
    content = json.loads(done.out)
    assert content["report"] == json.loads((small.folder / "out/report.json").read_text())
    assert content["measurements"] == json.loads((small.folder / "out/measurements.json").read_text())


def test_the_python_interface_is_the_same_thing(small, tmp_path):
    import qcompile

    result = qcompile.compile(small.proto, qcompile.Options("cpu", data=str(small.data), output=tmp_path / "api"))
    assert result.output == tmp_path / "api"
    assert result.plan.to_json() == (tmp_path / "api/plan.json").read_text()
    with pytest.raises(qcompile.QcompileError):
        qcompile.compile(small.proto, qcompile.Options("cpu", data="absent.npz", output=tmp_path / "other"))


def test_dynamic_axes_and_fixed_ones(qcompile, small):
    for value in (*small.proto.graph.input, *small.proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    words = [small.model, "--target", "cpu", "--data", small.data, "-o"]
    assert qcompile(*words, small.folder / "open").code == 0
    assert qcompile(*words, small.folder / "fixed", "--shape", "x=1x3x8x8").code == 0
    dims = [
        onnx.load(small.folder / name / "model.onnx").graph.input[0].type.tensor_type.shape.dim[0]
        for name in ("open", "fixed")
    ]
    assert (dims[0].dim_param, dims[1].dim_value) == ("N", 1)


def test_targets_and_inspect(qcompile, resnet8):
    assert "cpu" in qcompile("targets").out
    assert json.loads(qcompile("targets", "--json").out)[0]["here"] is True
    content = json.loads(qcompile("inspect", resnet8[0], "--json").out)
    assert content["nodes"] == 32 and content["nodes_after_canonicalize"] == 24
    assert {"precision": "integer", "op_type": "Conv", "count": 9, "reason": ""} in content["operators"]
    assert "QLinear" not in qcompile("inspect", resnet8[0]).out
    assert content["patterns"] == [] and content["not_recognised"] == []
    kinds = [(stream["kind"], stream["width"], stream["sums"]) for stream in content["streams"]]
    assert kinds == [("CNN residual", 16, 1), ("sum of branches", 32, 1), ("sum of branches", 64, 1)]


def test_inspect_shows_what_is_recognised(qcompile, root):
    model = root / "tests" / "passes" / "exports" / "llama.dynamo20.onnx"
    content = json.loads(qcompile("inspect", model, "--json").out)
    assert content["patterns"] == [
        {"pattern": "rms norm", "detail": "over 16, decomposed", "count": 3},
        {"pattern": "silu", "detail": "", "count": 1},
        {"pattern": "rope", "detail": "halves", "count": 2},
        {"pattern": "attention", "detail": "4 heads on 2 of 4, RoPE", "count": 1},
    ]
    assert content["streams"] == [
        {
            "kind": "pre-norm",
            "width": 16,
            "segments": 1,
            "sums": 2,
            "writers": 4,
            "readers": 3,
            "norms": 3,
            "obstacles": [],
        }
    ]
    text = qcompile("inspect", model).out
    assert "4 heads on 2 of 4, RoPE" in text and "pre-norm" in text


def test_inspect_draws_streams(qcompile, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("inspect", root / "tests" / "passes" / "exports" / "llama.dynamo20.onnx", "--streams")
    content = json.loads(qcompile(*words, "--json").out)
    [stream] = content["stream_members"]
    [segment] = stream["segments"]
    roles = [member["role"] for member in segment["members"]]
    counts = {name: roles.count(name) for name in ("writer", "sum", "reader")}
    assert counts == {"writer": 4, "sum": 2, "reader": 3} and segment["obstacles"] == []
    assert roles[0] == "writer" and roles[-1] == "reader", "in the order of the graph"
    assert content["picture"] == "llama.dynamo20-streams.svg"
    drawn = ElementTree.parse(tmp_path / content["picture"]).getroot()
    tags = [element.tag.split("}")[1] for element in drawn]
    assert tags.count("circle") == 2 and tags.count("polygon") == 7
    told = [element.text for element in drawn.iter() if element.tag.endswith("text")]
    assert "pre-norm, 16 channels" in told
    text = qcompile(*words).out
    assert "llama.dynamo20-streams.svg" in text and segment["members"][0]["name"] in text


def test_streams_that_are_none_are_drawn_with_the_reason(qcompile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    head = """<ir_version: 10, opset_import: ["": 17]> g (float[2,8] x) => (float[2,8] y)
    <float[8,8] w = {ONES}>""".replace("ONES", ",".join("1" * 64))
    for name, body, word in (
        ("summed", "{ h = MatMul(x, w) t = Exp(h) k = MatMul(t, w) s = Add(k, h) y = MatMul(s, w) }", "Exp reads it"),
        ("plain", "{ h = MatMul(x, w) t = Exp(h) y = MatMul(t, w) }", "no residual streams"),
    ):
        onnx.save(onnx.parser.parse_model(head + body), tmp_path / f"{name}.onnx")
        assert word in qcompile("inspect", tmp_path / f"{name}.onnx", "--streams").out
        assert word in (tmp_path / f"{name}-streams.svg").read_text(encoding="utf-8")


def test_inspect_says_what_looks_like_attention_but_is_none(qcompile, tmp_path):
    text = """<ir_version: 10, opset_import: ["": 17]>
    g (float[2,3,4] q, float[2,3,4] k, float[2,3,4] v) => (float[2,3,4] y) {
        s = Einsum <equation = "bid,bjd->bij"> (q, k) p = Softmax (s) y = MatMul (p, v)
    }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "einsum.onnx")
    [missed] = json.loads(qcompile("inspect", tmp_path / "einsum.onnx", "--json").out)["not_recognised"]
    assert "Einsum" in missed["reason"]
    assert "Einsum" in qcompile("inspect", tmp_path / "einsum.onnx").out


def test_progress_is_for_terminals_and_for_what_takes_long(monkeypatch):
    import io

    from rich.console import Console

    from qcompile import terminal

    def shown(patience: float, is_terminal: bool) -> str:
        monkeypatch.setattr(terminal, "PATIENCE", patience)
        console = Console(file=io.StringIO(), force_terminal=is_terminal, width=80)
        assert list(terminal.ProgressBars(console).track(range(3), 3, "calibrating")) == [0, 1, 2]
        return console.file.getvalue()

    assert "calibrating" in shown(0.0, True)
    assert "calibrating" not in shown(60.0, True)
    assert shown(0.0, False) == ""


def test_data_must_have_the_shape_that_was_fixed(qcompile, small):
    for value in (*small.proto.graph.input, *small.proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    words = [small.model, "--target", "cpu", "--shape", "x=2x3x8x8", "-o", small.folder / "out"]
    assert qcompile(*words).code == 0
    refused = qcompile(*words, "--data", small.data)
    assert refused.code == 4 and "x float32[2,3,8,8]" in refused.err


def test_initializers_that_are_inputs_too_need_no_data(qcompile, small):
    """As IR version 3 had it for every weight: a caller may replace them, so they stay in float, which is said."""
    for tensor in small.proto.graph.initializer:
        value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        small.proto.graph.input.append(value)
    assert qcompile(small.model, "--target", "cpu", "-o", small.folder / "out").code == 0
    done = qcompile(small.model, "--target", "cpu", "--data", small.data, "-o", small.folder / "out")
    assert "warning: No operator was quantized to integers" in done.out


def test_a_value_that_is_an_output_twice(qcompile, small):
    small.proto.graph.output.insert(0, onnx.helper.make_tensor_value_info("relu", 1, [1, 4, 8, 8]))
    small.proto.graph.output.append(onnx.helper.make_tensor_value_info("relu", 1, [1, 4, 8, 8]))
    done = qcompile(small.model, "--target", "cpu", "--data", small.data, "-o", small.folder / "out")
    assert done.code == 0, done.err


def test_batch_normalization_in_training_mode_is_left_alone(qcompile, small):
    graph = small.proto.graph
    node = onnx.helper.make_node(
        "BatchNormalization", ["conv", "b", "b", "b", "v"], ["norm", "m2", "v2"], name="bn", training_mode=1
    )
    graph.node.insert(1, node)
    graph.node[2].input[0] = "norm"
    graph.initializer.append(onnx.numpy_helper.from_array(np.ones(4, np.float32), "v"))
    words = ["--weights", "none", "--activations", "none", "--json", "-o", small.folder / "out"]
    done = qcompile(small.model, "--target", "cpu", "--data", small.data, *words)
    assert done.code == 0, done.err
    assert any("training mode" in refusal["reason"] for refusal in json.loads(done.out)["report"]["refusals"])


def test_open_axes_of_minus_one_are_not_taken_for_equally_long(qcompile, small):
    """As Paddle declares them: an Expand from one to the other is no no-op."""
    text = """<ir_version: 10, opset_import: ["": 21]>
        g (float[3, 2] a, float[3, 2] b) => (float[3, 2] y) { s = Shape (a) e = Expand (b, s) y = Neg (e) }"""
    proto = onnx.parser.parse_model(text)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = -1
    data = small.feed(a=np.ones((4, 3, 2), np.float32), b=np.ones((4, 1, 2), np.float32))
    done = qcompile(small.save(proto), "--target", "cpu", "--data", data, "--json", "-o", small.folder / "out")
    assert done.code == 0, done.err
    assert json.loads(done.out)["report"]["fidelity"]["outputs"]["y"]["exact"]


@pytest.mark.parametrize(
    ("body", "node", "word"),
    [
        ("m = MatMul (x, w) y = Exp (m)", "MatMul", "does not go to one Add"),
        (
            "m = MatMul (x, w) s = SequenceConstruct (m, m) t = SequenceErase (s) y = ConcatFromSequence <axis=0> (t)",
            "model",
            "sequences",
        ),
    ],
)
def test_a_bias_that_nothing_can_correct_is_reported(qcompile, small, body, node, word):
    header = '<ir_version: 10, opset_import: ["": 21]> g (float[1, 4, 128] x) => (float[N, 4, 64] y)'
    proto = onnx.parser.parse_model(f"{header} {{ {body} }}")
    random = np.random.default_rng(5)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(random.normal(size=(128, 64)).astype(np.float32), "w"))
    data = small.feed(x=random.normal(size=(8, 1, 4, 128)).astype(np.float32))
    done = qcompile(small.save(proto), "--target", "cpu", "--data", data, "--json", "-o", small.folder / "out")
    assert done.code == 0, done.err
    refusals = json.loads(done.out)["report"]["refusals"]
    assert [r for r in refusals if r["stage"] == "CorrectBias" and node in r["node"] and word in r["reason"]]


def test_inspect_shows_what_outliers_cost(qcompile, resnet8):
    model, calibration, _ = resnet8
    rows = json.loads(qcompile("inspect", model, "--data", calibration, "--json").out)["outliers"]
    assert {row["op_type"] for row in rows} == {"Conv"} and len(rows) == 7, "two pairs of Convs share their input"
    gains = [row["per_channel"] - row["per_tensor"] for row in rows]
    assert gains == sorted(gains, reverse=True) and gains[0] > 3 and all(row["ratio"] >= 1 for row in rows)
    assert "outliers cost" in qcompile("inspect", model, "--data", calibration).out
    assert json.loads(qcompile("inspect", model, "--json").out)["outliers"] == []
