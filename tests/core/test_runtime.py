import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.core.errors import ModelError, TargetError

Model = Callable[..., ir.Model]
CHAIN = "(float[3] x) => (float[3] z) { y = Relu (x) t = Neg (y) z = Exp (t) }"


@pytest.mark.parametrize("optimize", [True, False])
def test_a_session_runs(optimize: bool, model_of: Model) -> None:
    session = runtime.Session(model_of(CHAIN), optimize=optimize)
    assert session.output_names == ("z",)
    outputs = session.run({"x": np.float32([-1, 0, 1])})
    np.testing.assert_allclose(outputs["z"], np.exp(np.float32([0, 0, -1])), rtol=1e-6)


def test_a_session_runs_a_file(model_of: Model, tmp_path: Path) -> None:
    models.save(model_of(CHAIN), tmp_path / "model.onnx")
    assert runtime.Session(tmp_path / "model.onnx").run({"x": np.zeros(3, np.float32)})["z"].tolist() == [1, 1, 1]


def test_a_model_too_large_for_its_bytes_runs_from_a_file(model_of: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("(float[1,2] x) => (float[1,2] y) { y = MatMul (x, w) }", w=np.float32([[1, 2], [3, 4]]))
    monkeypatch.setattr(models, "INLINE_LIMIT", 0)
    monkeypatch.setattr(models, "serialize", None)
    assert runtime.Session(model).run({"x": np.ones((1, 2), np.float32)})["y"].tolist() == [[4, 6]]


def test_a_file_that_onnx_runtime_does_not_load_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"/model\.onnx: onnxruntime .* does not load it \(.*\); "):
        runtime.Session(tmp_path / "model.onnx")


def test_with_outputs_adds_values_once(model_of: Model) -> None:
    model = model_of(CHAIN)
    before = models.serialize(model)
    shown = runtime.with_outputs(model, ["y", "z", "t"])
    assert [value.name for value in shown.graph.outputs] == ["z", "y", "t"]
    assert models.serialize(model) == before, "the model itself stays as it is"


def test_with_outputs_leaves_inputs_and_weights_out(model_of: Model) -> None:
    model = model_of("(float[3] x) => (float[3] y) { y = Add (x, w) }", w=np.ones(3, np.float32))
    assert [value.name for value in runtime.with_outputs(model, ["x", "w"]).graph.outputs] == ["y"]


def test_optimized_nodes_are_those_after_the_optimizer(model_of: Model, tmp_path: Path) -> None:
    text = "(float[1,3] x) => (float[1,2] y) { p = MatMul (x, w) y = Add (p, b) }"
    model = model_of(text, w=np.ones((3, 2), np.float32), b=np.ones(2, np.float32))
    models.save(model, tmp_path / "model.onnx")
    assert [node.op_type for node in runtime.optimized_nodes(tmp_path / "model.onnx")] == ["Gemm"]


def test_synthetic_feeds_fit_the_inputs(model_of: Model) -> None:
    text = "(float[N,3] x, int64[4] i, bool[2] b, float16 s) => (float[N,3] y) { y = Relu (x) }"
    model = model_of(text)
    feeds = runtime.synthetic_feeds(model, 1)
    kinds = {name: (array.dtype, array.shape) for name, array in feeds.items()}
    assert kinds == {
        "x": (np.float32, (1, 3)), "i": (np.int64, (4,)), "b": (np.bool_, (2,)), "s": (np.float16, ()),
    }  # fmt: skip
    assert set(feeds["i"]) <= {0, 1}
    again, other = runtime.synthetic_feeds(model, 1), runtime.synthetic_feeds(model, 2)
    np.testing.assert_array_equal(feeds["x"], again["x"])
    assert not np.array_equal(feeds["x"], other["x"])


@pytest.mark.parametrize(
    ("inputs", "shapes"),
    [
        ("float[N,3,H,W] x, int64[N,L,L,L] i", {"x": (1, 3, 64, 64), "i": (1, 1, 1, 1)}),
        ("float16[N,C,48,W] x, float[N,T] t", {"x": (1, 64, 48, 64), "t": (1, 1)}),
        ("float[N,2,P,8] k, float[N,2,P,8] v", {"k": (1, 2, 1, 8), "v": (1, 2, 1, 8)}),  # of attention, not images
    ],
)
def test_an_image_of_open_height_and_width_is_large_enough_to_be_halved(
    inputs: str, shapes: dict[str, tuple[int, ...]], model_of: Model
) -> None:
    model = model_of(f"({inputs}) => (int64[A] y) {{ y = Shape ({next(iter(shapes))}) }}")
    assert {name: array.shape for name, array in runtime.synthetic_feeds(model, 1).items()} == shapes
    longer = runtime.synthetic_feeds(model, 1, open_axis=80)
    assert {length for array in longer.values() for length in array.shape} <= {1, 2, 3, 8, 48, 80}


#: What may read a weight that is large enough to be handed to the runtime beside the bytes.
BESIDE = {
    "read": "(float[1,64] x) => (float[1,64] y) { y = MatMul (x, w) }",
    "unused": "(float[1,64] x) => (float[1,64] y) { y = Neg (x) }",
    "read by what nothing reads": "(float[1,64] x) => (float[1,64] y) { y = Neg (x) z = MatMul (x, w) }",
    "read twice": "(float[1,64] x) => (float[1,64] y) { z = MatMul (x, w) y = MatMul (z, w) }",
    "an output too": "(float[1,64] x) => (float[1,64] y, float[64,64] w) { y = MatMul (x, w) }",
    "an input with a default": "(float[1,64] x, float[64,64] w) => (float[1,64] y) { y = MatMul (x, w) }",
    "read within an If": """(float[1,64] x) => (float[1,64] y) {
        s = ReduceSum <keepdims = 0> (x) c = Cast <to = 9> (s)
        y = If (c) <then_branch = a () => (float[1,64] t) { t = MatMul (x, w) },
                    else_branch = b () => (float[1,64] e) { e = Neg (x) }> }""",
}


@pytest.mark.parametrize("text", BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_weights_beside_the_bytes_stay_as_they_are(
    text: str, kind: type, proto_of: Callable[..., onnx.ModelProto]
) -> None:
    weight = np.random.default_rng(0).normal(size=(64, 64)).astype(kind)
    proto = proto_of(text.replace("float[", "float16[") if kind is np.float16 else text, 21, w=weight)
    feeds = {"x": np.linspace(-1, 2, 64, dtype=kind)[np.newaxis]}
    plain = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found = runtime.Session(ir.from_proto(proto)).run(feeds)
    for name, array in zip(found, plain.run(None, feeds), strict=True):
        np.testing.assert_array_equal(found[name], array)


def test_exactly_one_distribution_of_onnx_runtime_is_installed_here() -> None:
    assert len(runtime.distributions()) == 1
    assert isinstance(runtime.load_onnxruntime(), ModuleType)


def test_two_distributions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "distributions", lambda: {"onnxruntime": "1.31.0", "onnxruntime-gpu": "1.31.0"})
    with pytest.raises(TargetError, match=r"^onnxruntime: .* are both installed and overwrite one another; uninstall"):
        runtime.load_onnxruntime()


def test_a_missing_onnx_runtime_is_a_target_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(TargetError, match=r"^onnxruntime: is not installed; pip install 'qcompile\[cpu\]'"):
        runtime.load_onnxruntime()


def test_the_newest_versions_load_and_the_next_do_not() -> None:
    opset, ir_version, name = runtime.newest_versions()
    text = '<ir_version: {}, opset_import: ["": {}]> g (float[1] x) => (float[1] y) {{ y = Neg (x) }}'
    runtime.Session(ir.from_proto(onnx.parser.parse_model(text.format(ir_version, opset))))
    for beyond in ((ir_version, opset + 1), (ir_version + 1, opset)):
        with pytest.raises(ModelError, match=f"{name} does not load it"):
            runtime.Session(ir.from_proto(onnx.parser.parse_model(text.format(*beyond))))


@pytest.mark.parametrize(
    ("text", "weights", "fact"),
    [
        ("(int16[2] x) => (int16[2] y) { [m] y = Max (x, x) }", {}, "implementation for Max(13) node with name 'm')"),
        ("(float[2] x) => (float[N] y) { [r] y = Reshape (x, s) }", {"s": np.int64([3])}, "(Reshape 'r': "),
        ('(float[1,2,2] x) => (float[1,2,N] y) { y, h, c = LSTM <hidden_size = 1, layout = 1> (x, w, r) }',
         {"w": np.ones((1, 4, 2), np.float32), "r": np.ones((1, 4, 1), np.float32)}, "(Batchwise recurrent operations"),
    ],
)  # fmt: skip
def test_what_the_runtime_says_is_told_without_its_codes_and_source_files(
    text: str, weights: dict[str, np.ndarray], fact: str, proto_of: Callable[..., onnx.ModelProto]
) -> None:
    model = ir.from_proto(proto_of(text, **weights))
    with pytest.raises(ModelError) as caught:
        runtime.Session(model, optimize=False).run(runtime.synthetic_feeds(model, 0))
    message = str(caught.value)
    assert fact in message and "ONNXRuntimeError" not in message and "onnxruntime_src" not in message


def test_the_runtime_sends_nothing_and_leaves_no_file(tmp_path: Path) -> None:
    """Official builds keep a file for their telemetry in the temporary folder; a process of its own shows it."""
    text = (
        "import onnx.parser, onnx_ir as ir; from qcompile.core.runtime import Session; "
        "Session(ir.from_proto(onnx.parser.parse_model('''<ir_version: 10, opset_import: [\"\": 17]> "
        "g (float[1] x) => (float[1] y) { y = Neg (x) }''')))"
    )
    given = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", text], env=given | {"TMPDIR": str(tmp_path)}, check=True)
    assert not list(tmp_path.iterdir())
