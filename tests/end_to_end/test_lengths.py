"""A library for several lengths of a sequence, by the command line: padded where a mask is proven to keep that out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from qcompile.backends.cpu.session import InferenceSession, absent
from qcompile.core import model as models
from qcompile.core.errors import UsageError
from qcompile.core.lengths import Lengths
from qcompile.options import parse_shape

pytest.importorskip("tvm")

ROOT = Path(__file__).parents[2]
WIDTH, WORDS = 32, 50
#: One attention behind an embedding; what is pooled counts only what the mask leaves.
ENCODER = """
<ir_version: 10, opset_import: ["": 21]>
encoder (int64[1,T] ids, int64[1,T] mask) => (float[1,T,32] hidden, float[1,32] pooled, int64[1,T] seen)
<float bias = {FAR}> {
  [words] x = Gather (words, ids)
  [q] queries = MatMul (x, wq)
  [k] keys = MatMul (x, wk)
  [v] values = MatMul (x, wv)
  turned = Transpose <perm = [0, 2, 1]> (keys)
  [scores] scores = MatMul (queries, turned)
  masks = Cast <to = 1> (mask)
  one = Constant <value_float = 1.0> ()
  two = Constant <value_ints = [1]> ()
  inverse = Sub (one, masks)
  far = Mul (inverse, bias)
  wide = Unsqueeze (far, two)
  masked = Add (scores, wide)
  chosen = Softmax <axis = -1> (masked)
  [context] context = MatMul (chosen, values)
  sum = Add (x, context)
  hidden = LayerNormalization (sum, gain)
  last = Constant <value_ints = [-1]> ()
  counting = Unsqueeze (masks, last)
  counted = Mul (hidden, counting)
  total = ReduceSum <keepdims = 0> (counted, two)
  count = ReduceSum <keepdims = 1> (masks, two)
  pooled = Div (total, count)
  seen = Identity (mask)
}
"""
#: One convolution along an axis that nobody masks.
LINE = """
<ir_version: 10, opset_import: ["": 21]>
line (float[1,8,T] x) => (float[1,16,T] y) {
  [conv] made = Conv <kernel_shape = [3], pads = [1, 1]> (x, w)
  y = Relu (made)
}
"""


def saved(path, text, **weights):
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def encoder(path, far=-10000.0):
    random = np.random.default_rng(3)
    normal = {name: random.normal(size=(WIDTH, WIDTH)).astype(np.float32) / 6 for name in ("wq", "wk", "wv")}
    words = random.normal(size=(WORDS, WIDTH)).astype(np.float32)
    text = ENCODER.replace("FAR", str(far))
    return saved(path, text, words=words, gain=np.ones(WIDTH, np.float32), **normal)


def sentences(folder, sizes, seed=0):
    folder.mkdir()
    random = np.random.default_rng(seed)
    for index, size in enumerate(sizes):
        ids = random.integers(0, WORDS, (1, size))
        np.savez(folder / f"{index:03}.npz", ids=ids, mask=np.ones((1, size), np.int64))
    return folder


@pytest.fixture(autouse=True)
def processor():
    """Skip where the processor lacks the instructions."""
    if absent(["avx512_vnni"]):
        pytest.skip("the processor has no AVX512-VNNI")


ASKED = ("--target", "cpu:tvm", "--observer", "minmax", "--rotation", "none", "--smoothing", "none")
BOTH = ("--shape", "ids=1x8,16", "--shape", "mask=1x8,16")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """An encoder compiled for two lengths, once."""
    from qcompile import Options, compile

    folder = tmp_path_factory.mktemp("lengths")
    data, evaluation = (sentences(folder / name, range(4, 17), seed) for seed, name in enumerate(("calib", "eval")))
    shape = dict(map(parse_shape, BOTH[1::2]))
    options = Options("cpu:tvm", data=data, eval=evaluation, output=folder / "out", shape=shape, observer="minmax",
                      rotation="none", smoothing="none")  # fmt: skip
    return compile(encoder(folder / "encoder.onnx"), options), evaluation


def test_the_report_tells_lengths_padding_and_the_fidelity_of_each(compiled):
    result, _ = compiled
    report = json.loads((result.output / "report.json").read_text())
    jsonschema.validate(report, json.loads((ROOT / "docs/schemas/report.schema.json").read_text()))
    told = report["lengths"]
    assert told["sizes"] == [8, 16]
    assert told["padding"] == {"mask": "mask", "outputs": {"hidden": [1], "pooled": [], "seen": [1]}}
    assert {size: part["samples"] for size, part in told["fidelity"].items()} == {"8": 5, "16": 8}
    ratios = [out["sqnr"] for part in told["fidelity"].values() for out in part["outputs"].values() if not out["exact"]]
    assert len(ratios) == 4 and min(ratios) > 20
    assert report["options"]["shape"] == {"ids": [1, [8, 16]], "mask": [1, [8, 16]]}


def test_a_library_of_one_length_gives_the_same_bits(compiled, tmp_path):
    from qcompile.backends.base import find_target
    from qcompile.backends.cpu import backend, library
    from qcompile.backends.integer.fix_length import at_length
    from qcompile.backends.integer.lower import lower

    result, evaluation = compiled
    target, _ = find_target("cpu:tvm")
    reference, several = models.load(result.output / "reference.onnx"), InferenceSession(result.output)
    for size in (8, 16):
        (tmp_path / str(size)).mkdir()
        program = lower(at_length(reference, {"ids": (1, size), "mask": (1, size)}), target.floats)
        network = library.network_of(program, backend.PROCESSORS["avx512-vnni"])
        backend.write(network, "encoder", tmp_path / str(size))
        feeds = dict(np.load(evaluation / f"{size - 4:03}.npz"))
        for one, other in zip(InferenceSession(tmp_path / str(size)).run(None, feeds), several.run(None, feeds),
                              strict=True):  # fmt: skip
            np.testing.assert_array_equal(one, other)


def test_what_stands_behind_the_end_moves_nothing(compiled):
    result, evaluation = compiled
    session = InferenceSession(result.output)
    feeds = dict(np.load(evaluation / "002.npz"))
    found = session.run(None, feeds)
    assert [array.shape for array in found] == [(1, 6, WIDTH), (1, WIDTH), (1, 6)]
    assert found[2].dtype == np.int64 and found[2].all(), "integers leave as such, in memory of their size"
    for size in (8, 16):
        ids = np.random.default_rng(size).integers(0, WORDS, (1, size))
        ids[:, :6] = feeds["ids"]
        longer = session.run(None, {"ids": ids, "mask": (np.arange(size) < 6).astype(np.int64)[None]})
        np.testing.assert_array_equal(longer[0][:, :6], found[0])
        np.testing.assert_allclose(longer[1], found[1], rtol=0, atol=1e-6)


def test_a_mask_that_keeps_nothing_out_is_no_reason_to_pad(qcompile, tmp_path):
    # A bias of -1 leaves padded positions more than a third of what they had.
    model = encoder(tmp_path / "weak.onnx", far=-1.0)
    data, odd = sentences(tmp_path / "calib", range(4, 17)), sentences(tmp_path / "odd", [8, 9])
    exact = sentences(tmp_path / "exact", [8, 16])
    done = qcompile(model, *ASKED, *BOTH, "--data", data, "--eval", exact, "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["report"]["lengths"]["padding"] is None
    with pytest.raises(ValueError, match="inputs have length 9: the network has 8, 16, and there is no mask"):
        InferenceSession(tmp_path / "out").run(None, dict(np.load(odd / "001.npz")))
    done = qcompile(model, *ASKED, *BOTH, "--data", data, "--eval", odd, "-o", tmp_path / "other")
    assert done.code == 4 and "sample 1: has length 9, --shape has 8, 16, and no mask keeps out" in done.err, done.err
    assert not (tmp_path / "other").exists()


def test_without_a_mask_inputs_have_one_of_the_lengths(qcompile, tmp_path):
    random = np.random.default_rng(0)
    model = saved(tmp_path / "line.onnx", LINE, w=random.normal(size=(16, 8, 3)).astype(np.float32))
    for folder, sizes in (("calib", (8, 11, 40)), ("exact", (8, 16)), ("odd", (16, 11))):
        (tmp_path / folder).mkdir()
        for index, size in enumerate(sizes):
            np.savez(tmp_path / folder / f"{index}.npz", x=random.normal(size=(1, 8, size)).astype(np.float32))
    words = (model, *ASKED, "--shape", "x=1x8x8,16", "--data", tmp_path / "calib", "-o", tmp_path / "out", "--eval")
    done = qcompile(*words, tmp_path / "odd")
    assert done.code == 4 and "odd: sample 1: has length 11, --shape has 8, 16" in done.err, done.err
    done = qcompile(*words, tmp_path / "exact", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["report"]["lengths"]["padding"] is None
    session = InferenceSession(tmp_path / "out")
    assert [session.run(None, {"x": np.ones((1, 8, size), np.float32)})[0].shape[2] for size in (8, 16)] == [8, 16]


@pytest.mark.parametrize("bits", ["4", "mixed"])
def test_bits_are_chosen_by_what_weights_take_at_any_length(qcompile, tmp_path, bits):
    model, data = encoder(tmp_path / "encoder.onnx"), sentences(tmp_path / "calib", range(4, 17))
    words = ("--weights", bits, *(("--max-size", "4x") if bits == "mixed" else ()))
    done = qcompile(model, *ASKED, *BOTH, *words, "--data", data, "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert InferenceSession(tmp_path / "out").run(["pooled"], dict(np.load(data / "000.npz")))[0].shape == (1, WIDTH)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--target", "cpu", *BOTH), "lengths 8, 16: means nothing for cpu, whose models take inputs of any length"),
        (("--target", "cortex-m4", *BOTH), "lengths 8, 16: has no package of cortex-m4, which is for one shape"),
        (("--target", "cpu:tvm", "--shape", "ids=1x8,16", "--shape", "mask=1x8"), "the model takes mask int64[1,8]"),
        (("--target", "cpu:tvm", "--shape", "ids=1x8,16"), "leaves input 'mask' with an open axis"),
        (("--target", "cpu:tvm", "--shape", "ids=1x8,16", "--shape", "mask=1x4,16"), "give every axis with several"),
        (("--target", "cpu:tvm", "--shape", "ids=1x16,8", "--shape", "mask=1x16,8"), "give up to 64 that rise"),
        (("--target", "cpu:tvm", "--shape", "ids=1x8,"), "--shape ids=1x8,: is not NAME=1x128"),
    ],
)
def test_lengths_that_cannot_be_are_refused_in_one_line(qcompile, tmp_path, words, said):
    model, data = encoder(tmp_path / "encoder.onnx"), sentences(tmp_path / "calib", [8, 16])
    done = qcompile(model, *words, "--data", data, "-o", tmp_path / "out")
    assert done.code in (2, 4) and said in done.err and done.err.count("\n") == 1, done.err
    assert not (tmp_path / "out").exists()


def test_lengths_know_what_holds_a_sample():
    lengths = Lengths.of({"x": (1, (8, 16), 3)})
    assert lengths is not None and lengths.at(16) == {"x": (1, 16, 3)} and lengths.axes("x") == (1,)
    assert [lengths.holding(count) for count in (7, 8, 16, 17)] == [None, 8, 16, None]
    from qcompile.core.lengths import Padding

    padded = replace(lengths, padding=Padding("x"))
    assert [padded.holding(count) for count in (7, 8, 16, 17)] == [8, 8, 16, None]
    assert Lengths.of({"x": (1, 8)}) is None
    with pytest.raises(UsageError):
        Lengths.of({"x": (1, tuple(range(1, 66)))})


def test_without_data_the_longest_length_is_what_is_run(qcompile, tmp_path):
    random = np.random.default_rng(0)
    text = LINE.replace("y = Relu (made)", "normed = BatchNormalization (made, g, b, m, v)\n  y = Relu (normed)")
    ones = {name: np.ones(16, np.float32) for name in "gv"} | {name: np.zeros(16, np.float32) for name in "bm"}
    model = saved(tmp_path / "line.onnx", text, w=random.normal(size=(16, 8, 3)).astype(np.float32) / 5, **ones)
    done = qcompile(model, *ASKED, "--shape", "x=1x8x8,16", "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert list(json.loads(done.out)["report"]["lengths"]["fidelity"]) == ["16"]


def test_stages_give_what_one_command_does(qcompile, compiled, tmp_path):
    result, evaluation = compiled
    folder = evaluation.parent
    model, data = folder / "encoder.onnx", folder / "calib"
    done = qcompile("calibrate", model, *ASKED, *BOTH, "--data", data, "-o", tmp_path / "c.npz", costs=None)
    assert done.code == 0, done.err
    done = qcompile("plan", model, "--calibration", tmp_path / "c.npz", "-o", tmp_path / "plan.json", costs=None)
    assert done.code == 0, done.err
    words = ("--plan", tmp_path / "plan.json", "--data", data, "--eval", evaluation, "-o", tmp_path / "out")
    done = qcompile("apply", model, *words, costs=None)
    assert done.code == 0, done.err
    assert (tmp_path / "out/libencoder.so").read_bytes() == (result.output / "libencoder.so").read_bytes()
