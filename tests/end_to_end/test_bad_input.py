"""Bad input of every kind ends in one line, the right exit code, no traceback and nothing half-written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

Edit = Callable[[onnx.ModelProto], None]


@pytest.fixture
def fails(qcompile, small):
    """Compile, and hold the failure to what every failure must be."""

    def check(code: int, *facts: str, model: object = None, data: object = None, more: tuple = ()) -> None:
        output = small.folder / "out"
        before = sorted(small.folder.rglob("*"))
        model = small.model if model is None else model
        data = small.data if data is None else data
        before = sorted(small.folder.rglob("*"))
        done = qcompile(model, "--target", "cpu", "--data", data, "-o", output, *more)
        assert done.code == code, done
        line = done.err.strip()
        assert line.startswith("error: ") and "\n" not in line, done.err
        assert "; " in line and "Traceback" not in line
        for fact in facts:
            assert fact in line
        assert done.out == ""
        assert sorted(small.folder.rglob("*")) == before

    return check


# The model.


def test_missing_file(fails, small):
    fails(3, "absent.onnx", "no such file", model=small.folder / "absent.onnx")


def test_empty_file(fails, small):
    path = small.folder / "empty.onnx"
    path.touch()
    fails(3, "empty.onnx", "is empty", model=path)


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
def test_truncated_file(fails, small, kept):
    content = small.model.read_bytes()
    path = small.folder / "cut.onnx"
    path.write_bytes(content[: int(len(content) * kept)])
    fails(3, "cut.onnx", model=path)


def test_text_file(fails, small):
    path = small.folder / "text.onnx"
    path.write_text("this is not a model\n" * 20)
    fails(3, "text.onnx", "is not an ONNX model", model=path)


def external(small) -> Path:
    return small.save(
        small.proto, save_as_external_data=True, location="weights.bin", size_threshold=0, convert_attribute=False
    )


def test_missing_external_data(fails, small):
    path = external(small)
    (small.folder / "weights.bin").unlink()
    fails(3, "weights.bin", "'w'", "missing", model=path)


@pytest.mark.parametrize("location", ["../weights.bin", "sub/../../weights.bin", "{folder}/weights.bin"])
def test_external_data_outside_of_the_folder(fails, small, location):
    path = external(small)
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location.format(folder=small.folder)
    inside = small.folder / "model"
    inside.mkdir()
    path = inside / "small.onnx"
    path.write_bytes(proto.SerializeToString())
    fails(3, "outside the model's folder", "'w'", model=path)


def test_external_data_behind_a_link_out_of_the_folder(fails, small):
    path = external(small)
    inside = small.folder / "model"
    inside.mkdir()
    shutil.copy(path, inside)
    (inside / "weights.bin").symlink_to(small.folder / "weights.bin")
    fails(3, "outside the model's folder", model=inside / path.name)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(fails, small, number):
    weights = onnx.numpy_helper.to_array(small.proto.graph.initializer[0]).copy()
    weights[1, 2, 0, 1] = number
    small.proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "w"))
    fails(3, "tensor 'w'", str(number), "(1, 2, 0, 1)")


def _unknown_operator(proto):
    proto.graph.node[1].op_type = "Frobnicate"


def _cycle(proto):
    proto.graph.node[0].input[0] = "relu"


def _old(proto):
    proto.opset_import[0].version = 6


def _new(proto):
    proto.opset_import[0].version = 99


def _mislabelled(proto):
    proto.opset_import[0].version = 9
    proto.graph.node[3].CopyFrom(onnx.helper.make_node("Squeeze", ["pooled", "axes"], ["flat"], name="squeeze"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2, 3]), "axes"))


def _qoperator(proto):
    proto.graph.node[1].CopyFrom(onnx.helper.make_node("DynamicQuantizeLinear", ["conv"], ["relu", "s", "z"]))


@pytest.mark.parametrize(
    ("edit", "facts"),
    [
        (_unknown_operator, ["Frobnicate", "is no ONNX operator"]),
        (_cycle, ["cycle"]),
        (_old, ["opset 6"]),
        (_new, ["opset 99"]),
        (_mislabelled, ["no valid opset 9 model", "Squeeze"]),
        (_qoperator, ["DynamicQuantizeLinear", "QOperator", "QDQ"]),
    ],
)
def test_models_that_are_none(fails, small, edit: Edit, facts):
    edit(small.proto)
    fails(3, *facts)


def test_a_qdq_model_is_accepted(qcompile, small, tmp_path):
    assert qcompile(small.model, "--target", "cpu", "--data", small.data, "-o", tmp_path / "first").code == 0
    again = qcompile(tmp_path / "first/model.onnx", "--target", "cpu", "--data", small.data, "-o", tmp_path / "second")
    assert again.code == 0, again.err
    ops = [node.op_type for node in onnx.load(tmp_path / "second/model.onnx").graph.node]
    assert ops == [node.op_type for node in onnx.load(tmp_path / "first/model.onnx").graph.node]
    assert "QLinearConv" in again.out


# The data.


def test_missing_data(fails, small):
    fails(4, "absent.npz", "no such file", data=small.folder / "absent.npz")


def test_wrong_input_name(fails, small):
    fails(4, "sample 0", "no input 'image'", "x float32[1,3,8,8]", data=small.feed(image=small.samples))


def test_missing_input(fails, small):
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (float[1] x, float[1] u) => (float[1] y) { y = Add (x, u) }'
    )
    fails(4, "input 'u' is missing", model=small.save(proto), data=small.feed(x=np.zeros((2, 1), np.float32)))


@pytest.mark.parametrize("shape", [(8, 3, 8, 8), (8, 1, 3, 8, 9), (8, 2, 3, 8, 8)])
def test_wrong_shape(fails, small, shape):
    fails(4, "shape", "x float32[1,3,8,8]", data=small.feed(x=np.zeros(shape, np.float32)))


def test_wrong_dtype(fails, small):
    fails(4, "is float64", "takes float32", data=small.feed(x=small.samples.astype(np.float64)))


@pytest.mark.parametrize(("number", "fact"), [(np.nan, "holds NaN"), (np.inf, "a number that is not finite")])
def test_data_that_are_not_finite(fails, small, number, fact):
    small.samples[5, 0, 1, 2, 3] = number
    fails(4, "sample 5", "'x'", fact)


def test_empty_data(fails, small):
    fails(4, "holds no sample", data=small.feed(x=small.samples[:0]))


def test_empty_folder(fails, small):
    folder = small.folder / "samples"
    folder.mkdir()
    fails(4, "holds no .npz", data=folder)


def test_one_sample_serves_for_both_and_the_report_says_so(qcompile, small):
    done = qcompile(small.model, "--target", "cpu", "--data", small.feed(x=small.samples[:1]), "-o", small.folder / "o")
    assert done.code == 0
    assert done.out.startswith("warning: A single sample serves for calibration and evaluation")


# The output folder.


def test_output_folder_with_something_else_in_it(fails, small):
    output = small.folder / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    fails(2, "notes.txt", "did not write")
    assert (output / "notes.txt").read_text() == "mine"


def test_output_that_is_a_file(fails, small):
    (small.folder / "out").write_text("mine")
    fails(2, "is no folder")


def test_an_earlier_artifact_is_replaced(qcompile, small):
    output = small.folder / "out"
    assert qcompile(small.model, "--target", "cpu", "--data", small.data, "-o", output).code == 0
    assert qcompile(small.model, "--target", "cpu", "--weights", "none", "-o", output).code == 0
    assert '"weights": "none"' in (output / "manifest.json").read_text()
    assert sorted(p.name for p in small.folder.iterdir() if p.name.startswith(".")) == []


def test_output_folder_that_cannot_be_made(fails, small):
    (small.folder / "file").write_text("")
    fails(2, "cannot be written", more=("-o", small.folder / "file/out"))


FULL_DISK = """
mount -t tmpfs -o size=16k tmpfs "$1"
shift
"$@"
code=$?
ls -A "$FULL" >"$LISTING"
exit $code
"""


def test_full_disk(small):
    """A tmpfs of 16 KB in a mount namespace of its own: full as soon as the report is written."""
    full = small.folder / "full"
    full.mkdir()
    listing = small.folder / "listing"
    if subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("this system lets no user make a mount namespace")
    words = [sys.executable, "-m", "qcompile", small.model, "--target", "cpu", "--data", small.data, "-o", full / "out"]
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", FULL_DISK, "sh", full, *words],
        capture_output=True,
        text=True,
        env=os.environ | {"FULL": str(full), "LISTING": str(listing)},
    )
    assert done.returncode == 2, done
    line = done.stderr.strip()
    assert "\n" not in line and "No space left on device" in line and str(full / "out") in line
    assert listing.read_text() == ""


# The options.


@pytest.mark.parametrize(
    ("words", "code", "fact"),
    [
        (("--target", "toaster"), 7, "there is no such target"),
        (("--shape", "x=0x3"), 2, "is not NAME=1x128"),
        (("--shape", "z=1x3"), 2, "no such input"),
        (("--shape", "x=1x3x9x9"), 2, "does not fit"),
        (("--min-fidelity", "beauty=3"), 2, "no measure 'beauty'"),
        (("--min-fidelity", "sqnr=much"), 2, "MEASURE=NUMBER"),
        (("--min-fidelity", "sqnr=300"), 5, "below the bound of 300"),
        (("--threads", "0"), 2, "not a number of threads"),
        (("--workers", "two"), 2, "neither a number of processes nor tcp://"),
    ],
)
def test_options(fails, words, code, fact):
    fails(code, fact, more=words)


@pytest.mark.parametrize(
    "words", [(), ("--target",), ("--target", "cpu", "--weights", "3"), ("--target", "cpu", "--frobnicate")]
)
def test_a_command_line_that_cannot_be_parsed(qcompile, small, words):
    done = qcompile(small.model, *words)
    assert done.code == 2
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and "--help" in done.err


def test_the_python_interface_checks_its_options_too():
    from qcompile import Options, QcompileError

    with pytest.raises(QcompileError, match="--weights: there is no choice '3'; use one of auto, 8, 4, mixed, none"):
        Options("cpu", weights="3")


def test_a_model_in_training_mode_is_not_blamed_on_a_pass(fails, small, proto_of):
    text = "(float[1,64] x) => (float[1,64] y) { y = Dropout (x, ratio, training) }"
    model = small.save(proto_of(text, 21, ratio=np.float32(0.5), training=np.bool_(True)))
    data = small.feed(x=np.full((4, 1, 64), 0.5, np.float32))
    fails(3, "output 'y' differs each time", "draws random numbers", model=model, data=data)
