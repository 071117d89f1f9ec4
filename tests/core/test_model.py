import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.core.errors import ModelError

LINEAR = "(float[2,128] x) => (float[2,64] y) { y = Gemm (x, w, b) }"


@pytest.fixture
def linear(model_of: Callable[..., ir.Model], random: np.random.Generator) -> ir.Model:
    w = random.standard_normal((128, 64)).astype(np.float32)
    return model_of(LINEAR, w=w, b=np.arange(64, dtype=np.float32))


@pytest.fixture
def externally(tmp_path: Path) -> Callable[[ir.Model, str], Path]:
    """Save a model with all its weights beside it."""

    def externally(model: ir.Model, folder: str) -> Path:
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "model.onnx"
        ir.save(model, path, external_data="model.data", size_threshold_bytes=0)
        return path

    return externally


def weights(model: ir.Model) -> dict[str | None, bytes]:
    return {value.name: value.const_value.tobytes() for value in models.initializers(model) if value.const_value}


def test_a_real_model_loads(root: Path) -> None:
    model = models.load(root / "models" / "resnet8.onnx")
    assert models.opset(model) == 17
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert models.initializer_bytes(model) > 300_000


def test_save_and_load_inline(linear: ir.Model, tmp_path: Path) -> None:
    models.save(linear, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    again = models.load(tmp_path / "model.onnx")
    assert weights(again) == weights(linear)
    assert models.content_hash(again) == models.content_hash(linear)


def test_weights_beyond_the_limit_go_beside_the_model(
    linear: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, digest = weights(linear), models.content_hash(linear)
    monkeypatch.setattr(models, "INLINE_LIMIT", models.initializer_bytes(linear) - 1)
    models.save(linear, tmp_path / "model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert (tmp_path / "model.onnx").stat().st_size < 1000
    again = models.load(tmp_path / "model.onnx")
    assert weights(again) == before
    assert models.content_hash(again) == digest


def test_the_limit_itself_is_inline(linear: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "INLINE_LIMIT", models.initializer_bytes(linear))
    models.save(linear, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_folder_with_external_data_can_be_moved(
    linear: ir.Model, externally: Callable[[ir.Model, str], Path], tmp_path: Path
) -> None:
    path = externally(linear, "first")
    shutil.move(path.parent, tmp_path / "second")
    assert weights(models.load(tmp_path / "second" / "model.onnx")) == weights(linear)


def test_external_weights_run(linear: ir.Model, externally: Callable[[ir.Model, str], Path]) -> None:
    feeds = runtime.synthetic_feeds(linear, 0)
    loaded = models.load(externally(linear, "a"))
    assert isinstance(loaded.graph.initializers["w"].const_value, ir.ExternalTensor), "large weights are not read early"
    expected = runtime.Session(linear).run(feeds)["y"]
    np.testing.assert_array_equal(runtime.Session(loaded).run(feeds)["y"], expected)


def test_external_weights_run_while_somebody_looks_at_them(
    linear: ir.Model, externally: Callable[[ir.Model, str], Path]
) -> None:
    loaded, feeds = models.load(externally(linear, "a")), runtime.synthetic_feeds(linear, 0)
    seen = loaded.graph.initializers["w"].const_value.numpy()
    found = runtime.Session(loaded, optimize=False).run(feeds)["y"]
    np.testing.assert_array_equal(found, runtime.Session(linear, optimize=False).run(feeds)["y"])
    np.testing.assert_array_equal(seen, linear.graph.initializers["w"].const_value.numpy())


def test_what_nobody_looks_at_is_not_mapped(linear: ir.Model, externally: Callable[[ir.Model, str], Path]) -> None:
    tensor = models.load(externally(linear, "a")).graph.initializers["w"].const_value
    seen = tensor.numpy()
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("nothing tells what is mapped here")
    assert "a/model.data" in maps.read_text()
    del seen
    assert "a/model.data" not in maps.read_text()


def test_the_bytes_of_a_file_are_counted_without_reading_its_weights(
    linear: ir.Model, externally: Callable[[ir.Model, str], Path], tmp_path: Path
) -> None:
    loaded = models.load(externally(linear, "a"))
    assert isinstance(loaded.graph.initializers["w"].const_value, ir.ExternalTensor)
    models.save(loaded, tmp_path / "inline.onnx")
    assert models.file_bytes(loaded) == (tmp_path / "inline.onnx").stat().st_size == len(models.serialize(loaded))


def test_content_hash_does_not_depend_on_the_storage(
    linear: ir.Model, externally: Callable[[ir.Model, str], Path]
) -> None:
    digest = models.content_hash(linear)
    assert models.content_hash(models.load(externally(linear, "a"))) == digest
    assert len(digest) == 64


def test_content_hash_leaves_the_model_alone(linear: ir.Model) -> None:
    before = models.serialize(linear)
    assert models.content_hash(linear) == models.content_hash(linear)
    assert models.serialize(linear) == before


def flip_one_bit(model: ir.Model) -> None:
    value = model.graph.initializers["w"]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array.view(np.uint32)[5, 7] ^= 1
    value.const_value = ir.tensor(array, name="w")


def rename_an_input(model: ir.Model) -> None:
    model.graph.inputs[0].name = "z"


def change_an_attribute(model: ir.Model) -> None:
    model.graph[0].attributes["beta"] = ir.AttrFloat32("beta", 0.5)


def reshape_a_weight(model: ir.Model) -> None:
    value = model.graph.initializers["b"]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy().reshape(1, 64), name="b")


def retype_a_weight(model: ir.Model) -> None:
    value = model.graph.initializers["b"]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy().view(np.int32), name="b")


@pytest.mark.parametrize(
    "edit", [flip_one_bit, rename_an_input, change_an_attribute, reshape_a_weight, retype_a_weight]
)
def test_content_hash_sees_every_change(edit: Callable[[ir.Model], None], linear: ir.Model) -> None:
    before = models.content_hash(linear)
    edit(linear)
    assert models.content_hash(linear) != before


def test_content_hash_sees_swapped_weights(model_of: Callable[..., ir.Model]) -> None:
    a, b = np.ones(3, np.float32), np.zeros(3, np.float32)
    text = "(float[3] x) => (float[3] z) { y = Mul (x, a) z = Add (y, b) }"
    digests = {models.content_hash(model_of(text, a=a, b=b)), models.content_hash(model_of(text, a=b, b=a))}
    assert len(digests) == 2


def test_weights_inside_a_subgraph_count(model_of: Callable[..., ir.Model]) -> None:
    text = """(bool c, float[2] x) => (float[2] y) {
        y = If (c) <then_branch = t () => (float[2] a) <float[2] w = {1, 2}> { a = Add (x, w) },
                    else_branch = e () => (float[2] b) <float[2] v = {3, 4}> { b = Add (x, v) }>
    }"""
    model = model_of(text)
    assert models.initializer_bytes(model) == 16
    before = models.content_hash(model)
    for value in models.initializers(model):
        if value.name == "v":
            value.const_value = ir.tensor(np.float32([3, 5]), name="v")
    assert models.content_hash(model) != before


def test_serializing_twice_gives_the_same_bytes(root: Path) -> None:
    path = root / "models" / "resnet8.onnx"
    assert models.serialize(models.load(path)) == models.serialize(models.load(path))


def test_unsorted_nodes_are_sorted(proto_of: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    proto = proto_of("(float[3] x) => (float[3] z) { z = Neg (y) y = Relu (x) }")
    onnx.save(proto, tmp_path / "model.onnx")
    model = models.load(tmp_path / "model.onnx")
    assert [node.op_type for node in model.graph] == ["Relu", "Neg"]


def test_the_long_name_of_the_default_domain_counts(proto_of: Callable[..., onnx.ModelProto]) -> None:
    proto = proto_of("(float[3] x) => (float[3] y) { y = Relu (x) }")
    proto.opset_import[0].domain = "ai.onnx"
    assert models.opset(models.from_proto(proto)) == 17


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"/absent\.onnx: no such file; "):
        models.load(tmp_path / "absent.onnx")


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is a folder; name the \.onnx file inside it"):
        models.load(tmp_path)


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ModelError, match=r"/model\.onnx: is empty; "):
        models.load(tmp_path / "model.onnx")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(kept: float, root: Path, tmp_path: Path) -> None:
    content = (root / "models" / "resnet8.onnx").read_bytes()
    size = int(len(content) * kept)
    (tmp_path / "model.onnx").write_bytes(content[:size])
    with pytest.raises(ModelError, match=rf"/model\.onnx: is not an ONNX model, or is cut off \({size} bytes\); "):
        models.load(tmp_path / "model.onnx")


@pytest.mark.parametrize("text", ["Not a model at all.\n", "<!DOCTYPE html><html></html>", "version https://git-lfs"])
def test_a_text_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text(text)
    with pytest.raises(ModelError, match=r"/model\.onnx: (is not an ONNX model|holds no graph)"):
        models.load(tmp_path / "model.onnx")


def test_every_truncation_of_a_small_model_is_one_line(
    proto_of: Callable[..., onnx.ModelProto], tmp_path: Path
) -> None:
    content = proto_of(LINEAR.replace("128", "3").replace("64", "2"), w=np.eye(3, 2), b=np.zeros(2)).SerializeToString()
    path = tmp_path / "model.onnx"
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(ModelError) as caught:
            models.load(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_an_axis_of_minus_one_is_open(proto_of: Callable[..., onnx.ModelProto]) -> None:
    proto = proto_of("(float[2,3] x) => (float[2,3] y) { y = Neg (x) }")
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = -1
    model = models.from_proto(proto)
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        assert value.shape.is_unknown_dim(0) and value.shape[1] == 3


def test_weights_of_a_model_of_ir_version_3_are_constants(proto_of: Callable[..., onnx.ModelProto]) -> None:
    proto = proto_of("(float[2,3] x, float[3,2] w) => (float[2,2] y) { y = MatMul (x, w) }", w=np.eye(3, 2))
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.eye(3, 2, dtype=np.float32), "w"))
    newer = models.from_proto(proto)
    proto.ir_version = 3
    for model in (models.from_proto(proto), models.take(ir.from_proto(proto))):
        assert [value.name for value in model.graph.inputs] == ["x"]
        assert model.graph.initializers["w"].const_value is not None and model.ir_version == 4
    assert [value.name for value in newer.graph.inputs] == ["x", "w"], "a default that a caller may replace"
