"""A transformer becomes kernels for CUDA devices, by the command line, whole; they run here, thread by thread."""

from __future__ import annotations

import json
from pathlib import Path

import cuda_networks
import jsonschema
import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from qcompile.backends.cuda import compiler
from qcompile.backends.cuda.backend import CudaBackend
from qcompile.backends.cuda.blocks import with_halves
from qcompile.backends.cuda.network import network_of
from qcompile.backends.cuda.session import InferenceSession
from qcompile.backends.integer import float_operations as ops
from qcompile.backends.integer.lower import lower
from qcompile.core import model as models

pytest.importorskip("tvm")

ROOT = Path(__file__).parents[2]
WIDTH, WORDS, LENGTH = 64, 50, 12
ENCODER = """
<ir_version: 10, opset_import: ["": 21]>
encoder (int64[1,12] ids, int64[1,12] mask) => (float[1,12,64] hidden, float[1,64] pooled) {
  [words] x = Gather (words, ids)
  [q] queries = MatMul (x, wq)
  [k] keys = MatMul (x, wk)
  [v] values = MatMul (x, wv)
  split = Constant <value_ints = [1, 12, 4, 16]> ()
  whole = Constant <value_ints = [1, 12, 64]> ()
  q4 = Reshape (queries, split)
  k4 = Reshape (keys, split)
  v4 = Reshape (values, split)
  qh = Transpose <perm = [0, 2, 1, 3]> (q4)
  kh = Transpose <perm = [0, 2, 3, 1]> (k4)
  vh = Transpose <perm = [0, 2, 1, 3]> (v4)
  [scores] scores = MatMul (qh, kh)
  four = Constant <value_float = 4.0> ()
  scaled = Div (scores, four)
  masks = Cast <to = 1> (mask)
  one = Constant <value_float = 1.0> ()
  far = Constant <value_float = -10000.0> ()
  inverse = Sub (one, masks)
  away = Mul (inverse, far)
  axes = Constant <value_ints = [1, 2]> ()
  wide = Unsqueeze (away, axes)
  masked = Add (scaled, wide)
  chosen = Softmax <axis = -1> (masked)
  [context] heads = MatMul (chosen, vh)
  side = Transpose <perm = [0, 2, 1, 3]> (heads)
  context = Reshape (side, whole)
  sum = Add (x, context)
  normal = LayerNormalization (sum, gain)
  [up] up = MatMul (normal, wu)
  active = Gelu (up)
  [down] down = MatMul (active, wd)
  more = Add (normal, down)
  hidden = LayerNormalization (more, gain)
  two = Constant <value_ints = [1]> ()
  last = Constant <value_ints = [-1]> ()
  counting = Unsqueeze (masks, last)
  counted = Mul (hidden, counting)
  total = ReduceSum <keepdims = 0> (counted, two)
  count = ReduceSum <keepdims = 1> (masks, two)
  pooled = Div (total, count)
}
"""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Return a model and samples of it."""
    folder, random = tmp_path_factory.mktemp("encoder"), np.random.default_rng(3)
    shapes = {"wq": (WIDTH, WIDTH), "wk": (WIDTH, WIDTH), "wv": (WIDTH, WIDTH), "wu": (WIDTH, 96), "wd": (96, WIDTH)}
    weights = {name: random.normal(size=shape).astype(np.float32) / 8 for name, shape in shapes.items()}
    weights |= {"words": random.normal(size=(WORDS, WIDTH)).astype(np.float32), "gain": np.ones(WIDTH, np.float32)}
    model = onnx.parser.parse_model(ENCODER)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    onnx.save(model, folder / "encoder.onnx")
    ids, mask = random.integers(0, WORDS, (12, 1, LENGTH)), np.ones((12, 1, LENGTH), np.int64)
    mask[::3, :, 8:] = 0
    np.savez(folder / "data.npz", ids=ids, mask=mask)
    return folder / "encoder.onnx", folder / "data.npz"


@pytest.fixture
def compiled(qcompile, encoder, tmp_path, monkeypatch):
    """Return what compiles the model with options, for one architecture, and opens its folder on an emulated device."""
    if not compiler.available():
        pytest.skip("neither NVRTC nor nvFatbin")
    monkeypatch.setattr(compiler, "ARCHITECTURES", ("86",))
    opened = []

    def compiles(*options):
        from emulated_cuda import emulate

        output = tmp_path / "out"
        done = qcompile(encoder[0], "--target", "cuda:tvm", *options, "--eval", encoder[1], "-o", output, "--json")
        assert done.code == 0, done.err
        report = json.loads(done.out)["report"]
        jsonschema.validate(report, json.loads((ROOT / "docs/schemas/report.schema.json").read_text()))
        (target,) = [each for each in CudaBackend().targets() if each.name == "cuda:tvm"]
        program = with_halves(lower(models.load(output / "reference.onnx"), target.floats))
        monkeypatch.setenv("QCOMPILE_LIBCUDA", str(emulate.library(network_of(program), tmp_path)))
        opened.append(InferenceSession(output))
        return report, program, output, opened[-1]

    yield compiles
    for session in opened:
        session.close()


def near(report):
    return min(measures["sqnr"] for measures in report["fidelity"]["outputs"].values())


def test_a_transformer_is_as_near_on_a_device_as_verified(compiled, encoder, tmp_path, capfd, qcompile):
    report, program, output, session = compiled("--data", encoder[1])
    kinds = {type(part) for part in program.operations}
    assert {ops.MatMul, ops.FloatSoftmax, ops.Normalize, ops.Gather, ops.Reduce, ops.Pointwise} <= kinds
    assert near(report) > 20 and report["placement"]["on_host"] == []
    # As it is taken to a device, with samples and what a compile verified.
    model, data = encoder
    cuda_networks.prepare(tmp_path / "taken", output, model, str(data))
    assert not list((tmp_path / "taken").glob("*.onnx")) and cuda_networks.check(tmp_path / "taken", session) == 0
    said = capfd.readouterr().out.splitlines()
    assert len(said) == 2 and said[0].startswith("taken, 'hidden': ")
    done = qcompile("run", output, "--data", data, "--samples", "4", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["sqnr_of_host"] is None or json.loads(done.out)["sqnr_of_host"] > 20


def test_weights_of_four_bits_beside_floats_are_as_near_on_a_device_as_verified(compiled, encoder, tmp_path):
    report, program, output, session = compiled("--weights", "4", "--activations", "none")
    layers = [part for part in program.operations if isinstance(part, ops.HalfDense)]
    assert len(layers) == 5 and all((part.bits, part.block) == (4, 16) for part in layers)
    assert near(report) > 10
    samples = np.load(encoder[1])
    host = CudaBackend().open(output, ())
    for at in range(2):
        feeds = {name: samples[name][at] for name in samples.files}
        found = dict(zip(("hidden", "pooled"), session.run(None, feeds), strict=True))
        for name, expected in host(feeds).items():
            # Halves have eleven bits: nothing is rounded to codes behind which errors would grow.
            assert cuda_networks.sqnr(expected, found[name]) > 50.0
