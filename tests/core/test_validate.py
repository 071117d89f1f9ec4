import re
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qcompile.core import model as models
from qcompile.core import validate
from qcompile.core.errors import ModelError

Proto = Callable[..., onnx.ModelProto]
Model = Callable[..., ir.Model]

RELU = "(float[3] x) => (float[3] y) { y = Relu (x) }"
LINEAR = "(float[1,2] x) => (float[1,2] y) { y = MatMul (x, w) }"


def refused(proto: onnx.ModelProto, fact: str) -> None:
    with pytest.raises(ModelError, match=r"^model: ") as caught:
        models.from_proto(proto)
    assert re.search(fact, caught.value.fact), caught.value.fact
    assert caught.value.remedy and "\n" not in str(caught.value)


def test_no_graph() -> None:
    refused(onnx.ModelProto(ir_version=10), "holds no graph")
    refused(onnx.ModelProto(ir_version=10, graph=onnx.GraphProto(name="g")), "holds no graph")


def test_no_opset(proto_of: Proto) -> None:
    proto = proto_of(RELU)
    del proto.opset_import[:]
    refused(proto, "^imports no opset$")


def test_only_a_foreign_opset(proto_of: Proto) -> None:
    proto = proto_of(RELU)
    proto.opset_import[0].domain = "com.microsoft"
    refused(proto, "^is no valid opset 0 model ")


@pytest.mark.parametrize("opset", [1, 6])
def test_an_old_opset(opset: int, proto_of: Proto) -> None:
    refused(proto_of(RELU, opset), f"^has opset {opset}, older than 7$")


def test_an_opset_of_the_future(proto_of: Proto) -> None:
    newest = onnx.defs.onnx_opset_version()
    refused(proto_of(RELU, 99), rf"^has opset 99; the newest that the installed onnx .* knows is {newest}$")


@pytest.mark.parametrize("opset", [7, 9, 13, 21])
def test_opsets_between_are_accepted(opset: int, model_of: Model) -> None:
    assert models.opset(model_of(RELU, opset)) == opset


def test_a_mislabelled_opset(proto_of: Proto) -> None:
    text = "(float[1,3] x) => (float[3] y) { y = Squeeze (x, axes) }"
    models.from_proto(proto_of(text, 13, axes=np.int64([0])))
    refused(proto_of(text, 9, axes=np.int64([0])), r"^is no valid opset 9 model \(.*(Squeeze|inputs)")


def test_an_unknown_operator_names_the_node(proto_of: Proto) -> None:
    proto = proto_of("(float[3] x) => (float[3] y) { y = Frobnicate (x) }")
    refused(proto, "^a node of type Frobnicate is no ONNX operator$")
    proto.graph.node[0].name = "odd"
    refused(proto, r"^node 'odd' \(Frobnicate\) is no ONNX operator$")


def test_an_unknown_operator_inside_a_subgraph(proto_of: Proto) -> None:
    text = """(bool c, float[2] x) => (float[2] y) {
        y = If (c) <then_branch = t () => (float[2] a) { a = Frobnicate (x) },
                    else_branch = e () => (float[2] b) { b = Neg (x) }>
    }"""
    refused(proto_of(text), "Frobnicate")


@pytest.mark.parametrize("op_type", ["QLinearConv", "MatMulInteger", "ConvInteger", "DynamicQuantizeLinear"])
def test_the_qoperator_format(op_type: str, proto_of: Proto) -> None:
    proto = proto_of("(float[3] x) => (float[3] y) { y = Relu (x) }")
    proto.graph.node[0].op_type = op_type
    proto.graph.node[0].name = "n0"
    refused(proto, rf"^node 'n0' \({op_type}\) is in QOperator format")


def test_the_qoperator_format_of_the_contrib_domain(proto_of: Proto) -> None:
    proto = proto_of(RELU)
    proto.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    proto.graph.node[0].op_type, proto.graph.node[0].domain = "QGemm", "com.microsoft"
    refused(proto, "QGemm.* is in QOperator format")


def test_a_qdq_model_is_accepted(model_of: Model) -> None:
    text = """(float[3] x) => (float[3] y) {
        q = QuantizeLinear (x, s, z)
        d = DequantizeLinear (q, s, z)
        y = Relu (d)
    }"""
    model = model_of(text, 21, s=np.float32(0.5), z=np.uint8(3))
    assert [node.op_type for node in model.graph] == ["QuantizeLinear", "DequantizeLinear", "Relu"]


def test_a_cycle(proto_of: Proto) -> None:
    refused(proto_of("(float[3] x) => (float[3] z) { y = Add (x, z) z = Relu (y) }"), "^the graph has a cycle$")


def test_a_value_that_nobody_writes(proto_of: Proto) -> None:
    refused(proto_of("(float[3] x) => (float[3] y) { y = Add (x, ghost) }"), "ghost")


def test_a_type_error(proto_of: Proto) -> None:
    text = "(float[3] x, int64[3] i) => (float[3] y) { y = Add (x, i) }"
    refused(proto_of(text), "is no valid opset 17 model")


def test_shapes_that_do_not_fit(proto_of: Proto) -> None:
    refused(proto_of(LINEAR, w=np.ones((3, 2), np.float32)), "is no valid opset 17 model")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_a_nan_weight_is_named_with_its_place(dtype: type, proto_of: Proto) -> None:
    w = np.ones((2, 2), dtype)
    w[1, 0] = np.nan
    kind = onnx.TensorProto.DataType.Name(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))).lower()
    refused(proto_of(LINEAR.replace("float", kind), w=w), r"^tensor 'w' holds nan at index \(1, 0\)$")


def test_a_nan_is_refused_wherever_it_is_read(proto_of: Proto) -> None:
    text = "(float[2] x) => (float[2] y) { y = Add (x, w) }"
    refused(proto_of(text, w=np.float32([0, np.nan])), r"^tensor 'w' holds nan at index \(1,\)$")


@pytest.mark.parametrize("infinity", [np.inf, -np.inf])
def test_an_infinite_weight_is_named(infinity: float, proto_of: Proto) -> None:
    w = np.float32([[1, infinity], [1, 1]])
    refused(proto_of(LINEAR, w=w), rf"^tensor 'w' holds {infinity} at index \(0, 1\)$")


def test_the_nan_is_named_before_the_infinity(proto_of: Proto) -> None:
    w = np.float32([[np.inf, 1], [1, np.nan]])
    refused(proto_of(LINEAR, w=w), r"^tensor 'w' holds nan at index \(1, 1\)$")


def test_infinities_that_cancel_in_a_sum_are_seen(proto_of: Proto) -> None:
    refused(proto_of(LINEAR, w=np.float32([[np.inf, -np.inf], [1, 1]])), r"^tensor 'w' holds inf at index \(0, 0\)$")


def test_an_infinity_in_a_mask_that_is_added_is_accepted(model_of: Model) -> None:
    mask = np.float32([0, -np.inf])
    model = model_of("(float[2] x) => (float[2] y) { m = Add (x, mask) y = Softmax (m) }", mask=mask)
    assert len(model.graph) == 2


def test_large_finite_weights_whose_sum_overflows_are_accepted(model_of: Model) -> None:
    w = np.full((2, 2), np.finfo(np.float64).max)
    assert model_of(LINEAR.replace("float", "double"), w=w).graph.num_nodes() == 1


def test_an_infinite_constant_node(proto_of: Proto) -> None:
    text = "(float[1,2] x) => (float[1,1] y) { w = Constant <value = float[2,1] {1, 1}> () y = MatMul (x, w) }"
    proto = proto_of(text)
    proto.graph.node[0].attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(np.float32([[np.nan], [1]])))
    refused(proto, r"^tensor 'w' holds nan at index \(0, 0\)$")


def test_a_nan_inside_a_subgraph(proto_of: Proto) -> None:
    text = """(bool c, float[2] x) => (float[2] y) {
        y = If (c) <then_branch = t () => (float[2] a) <float[2] w = {1, 2}> { a = Add (x, w) },
                    else_branch = e () => (float[2] b) { b = Neg (x) }>
    }"""
    proto = proto_of(text)
    branch = proto.graph.node[0].attribute[0].g
    branch.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.float32([1, np.nan]), "w"))
    refused(proto, r"^tensor 'w' holds nan at index \(1,\)$")


def external(folder: Path, proto_of: Proto, location: str, **entries: str) -> Path:
    """Write a MatMul whose weights (16 bytes) are said to stand at `location`."""
    proto = proto_of(LINEAR, w=np.ones((2, 2), np.float32))
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with 16 bytes of weights inside and 16 outside of it."""
    inside = tmp_path / "inside"
    inside.mkdir()
    for path in (inside / "w.data", tmp_path / "outside.data"):
        path.write_bytes(np.full((2, 2), 7, np.float32).tobytes())
    return inside


def refused_file(path: Path, fact: str) -> None:
    with pytest.raises(ModelError, match="^" + re.escape(f"{path}: ")) as caught:
        models.load(path)
    assert re.search(fact, caught.value.fact), caught.value.fact


@pytest.mark.parametrize("location", ["w.data", "./w.data", "../inside/w.data"])
def test_external_data_inside_the_folder(location: str, folder: Path, proto_of: Proto) -> None:
    path = external(folder, proto_of, location.removeprefix("../inside/"), length="16")
    weight = models.load(path).graph.initializers["w"].const_value
    assert weight is not None and weight.numpy().tolist() == [[7, 7], [7, 7]]


def test_external_data_in_a_folder_below(folder: Path, proto_of: Proto) -> None:
    (folder / "weights").mkdir()
    (folder / "w.data").rename(folder / "weights" / "w.data")
    models.load(external(folder, proto_of, "weights/w.data"))


def test_a_model_in_the_working_directory(folder: Path, proto_of: Proto, monkeypatch: pytest.MonkeyPatch) -> None:
    external(folder, proto_of, "w.data")
    monkeypatch.chdir(folder)
    weight = models.load(Path("model.onnx")).graph.initializers["w"].const_value
    assert weight is not None and weight.numpy()[0, 0] == 7


def test_missing_external_data(folder: Path, proto_of: Proto) -> None:
    refused_file(
        external(folder, proto_of, "absent.data"), "^external data file 'absent.data' of tensor 'w' is missing"
    )


@pytest.mark.parametrize("location", ["../outside.data", "x/../../outside.data", ""])
def test_external_data_outside(location: str, folder: Path, proto_of: Proto) -> None:
    path = external(folder, proto_of, location, length="16")
    refused_file(path, rf"^external data of tensor 'w' lie outside the model's folder \('{re.escape(location)}'\)$")


@pytest.mark.parametrize("name", ["inside/w.data", "outside.data"])
def test_an_absolute_location_is_outside(name: str, folder: Path, proto_of: Proto) -> None:
    path = external(folder, proto_of, str(folder.parent / name), length="16")
    refused_file(path, "^external data of tensor 'w' lie outside the model's folder")


def test_a_link_that_leads_out(folder: Path, proto_of: Proto) -> None:
    (folder / "link.data").symlink_to(folder.parent / "outside.data")
    path = external(folder, proto_of, "link.data", length="16")
    refused_file(path, "^external data of tensor 'w' lie outside the model's folder")


def test_a_linked_folder_that_leads_out(folder: Path, proto_of: Proto) -> None:
    (folder / "up").symlink_to(folder.parent)
    refused_file(external(folder, proto_of, "up/outside.data"), "lie outside the model's folder")


def test_external_data_inside_a_subgraph_are_checked_too(folder: Path, proto_of: Proto) -> None:
    text = """(bool c, float[2] x) => (float[2] y) {
        y = If (c) <then_branch = t () => (float[2] a) <float[2] w = {1, 2}> { a = Add (x, w) },
                    else_branch = e () => (float[2] b) { b = Neg (x) }>
    }"""
    proto = proto_of(text)
    tensor = proto.graph.node[0].attribute[0].g.initializer[0]
    tensor.ClearField("float_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../outside.data")
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    refused_file(path, "^external data of tensor 'w' lie outside the model's folder")


@pytest.mark.parametrize(
    "entries",
    [
        {"length": "20"},
        {"offset": "4", "length": "16"},
        {"offset": "17"},
        {"offset": "-4", "length": "16"},
        {"offset": "zero"},
    ],
)
def test_external_data_that_are_too_short(entries: dict[str, str], folder: Path, proto_of: Proto) -> None:
    path = external(folder, proto_of, "w.data", **entries)
    refused_file(path, "^external data file 'w.data' is too short for tensor 'w'$")


@pytest.mark.parametrize("entries", [{}, {"offset": "8"}, {"length": "8"}, {"offset": "8", "length": "8"}])
def test_external_data_shorter_than_the_tensor(entries: dict[str, str], folder: Path, proto_of: Proto) -> None:
    if not entries:
        (folder / "w.data").write_bytes(bytes(12))
    path = external(folder, proto_of, "w.data", **entries)
    refused_file(path, "^external data file 'w.data' is too short for tensor 'w'$")


def test_packed_external_data_take_half_a_byte_an_element(folder: Path, proto_of: Proto) -> None:
    text = "(float[3] x, int64 i) => (float[3] y, int4[31] z) { y = Relu (x) z = Identity (w) }"
    proto = proto_of(text, 21)
    tensor = proto.graph.initializer.add(name="w", data_type=onnx.TensorProto.INT4, dims=[31])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.data")
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    models.load(path)
    (folder / "w.data").write_bytes(bytes(15))
    refused_file(path, "^external data file 'w.data' is too short for tensor 'w'$")


def test_external_data_of_a_model_in_memory(folder: Path, proto_of: Proto) -> None:
    proto = onnx.load(external(folder, proto_of, "w.data"), load_external_data=False)
    refused(proto, "^tensor 'w' is external, but the model has no folder$")


def test_nodes_with_the_same_name_are_told_apart(proto_of: Proto) -> None:
    proto = proto_of("(float[2] x) => (float[2] y) { a = Neg (x) b = Abs (a) c = Exp (b) y = Neg (c) }")
    for node, name in zip(proto.graph.node, ("n", "n", "n_1", ""), strict=True):
        node.name = name
    assert [node.name for node in models.from_proto(proto).graph] == ["n", "n_2", "n_1", ""]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("(string[2] x) => (string[2] y) { y = Identity (x) }", "input 'x': holds strings; "),
        ("(bfloat16[2] x) => (float[2] y) { y = Cast <to = 1> (x) }", "input 'x': is BFLOAT16, which NumPy does not"),
        ("(float[2] x) => (bfloat16[2] y) { y = Cast <to = 16> (x) }", "output 'y': is BFLOAT16, which NumPy does not"),
        ("(int4[2] x) => (float[2] y) { y = Cast <to = 1> (x) }", "input 'x': is INT4, which NumPy does not have; "),
        ("(seq(float[2]) x) => (float[2] y) { y = SequenceAt (x, i) }", "input 'x': is no tensor but sequence; "),
        (
            "(optional(float[2]) x) => (float[2] y) { y = OptionalGetElement (x) }",
            "input 'x': is no tensor but optional",
        ),
    ],
)
def test_inputs_and_outputs_that_no_data_can_hold(text: str, line: str, model_of: Model) -> None:
    with pytest.raises(ModelError) as caught:
        validate.check_interface(model_of(text, 21, **({"i": np.int64(0)} if "i)" in text else {})))
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize("output", ["seq(float[2])", "optional(float[2])"])
def test_outputs_that_can_be_taken_apart_are_accepted(output: str, model_of: Model) -> None:
    op = "SequenceConstruct" if output.startswith("seq") else "Optional"
    validate.check_interface(model_of(f"(float[2] x) => ({output} y) {{ y = {op} (x) }}"))


def test_attributes_that_are_no_text_are_refused(folder: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> m (float[1,1,4] x, float[1,1,1] w) => (float[1,1,4] y)
        { y = Conv <auto_pad = "SAME_UPPER"> (x, w) }"""
    path = folder / "m.onnx"
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString().replace(b"SAME_UPPER", b"SAME\xffUPPER"))
    with pytest.raises(ModelError, match="attribute 'auto_pad' of a node of type Conv is no text in UTF-8"):
        models.load(path)


def test_tensors_without_a_type_are_refused(folder: Path) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> m (float[1] x) => (float[1] y) <float[1] w = {1}> { y = Add (x, w) }'
    )
    proto.graph.initializer[0].data_type = 0
    onnx.save(proto, folder / "m.onnx")
    with pytest.raises(ModelError):
        models.load(folder / "m.onnx")


@pytest.mark.parametrize("where", ["op_type", "name", "input", "graph", "initializer", "attribute"])
def test_names_that_are_no_text_are_refused(folder: Path, where: str) -> None:
    """Protobuf takes them, and gives bytes where text is meant."""
    text = '<ir_version: 10, opset_import: ["" : 21]> m (float[4] x) => (float[4] y) { y = Softmax <axis = 0> (x) }'
    proto = onnx.parser.parse_model(text)
    node = proto.graph.node[0]
    if where == "op_type":
        node.op_type = "MARK_a"
    elif where == "name":
        node.name = "MARK_a"
    elif where == "input":
        node.input[0] = "MARK_a"
    elif where == "graph":
        proto.graph.name = "MARK_a"
    elif where == "attribute":
        node.attribute[0].name = "MARK_a"
    else:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1, np.float32), "MARK_a"))
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString().replace(b"MARK_a", b"MAR\xff_a"))
    with pytest.raises(ModelError, match="no text in UTF-8"):
        models.load(path)


@pytest.mark.parametrize(
    ("kind", "field"),
    [("FLOAT", "uint64_data"), ("FLOAT", "double_data"), ("INT64", "int32_data"), ("FLOAT16", "float_data"),
     ("UINT8", "int64_data")],
)  # fmt: skip
@pytest.mark.parametrize("inner", [False, True])
def test_numbers_in_a_field_of_another_type_are_refused(kind: str, field: str, inner: bool, proto_of: Proto) -> None:
    """The checker looks at the fields of tensors that have elements; this one has none, by its shape."""
    proto = proto_of("(float[1] x) => (float[1] y) { y = Identity (x) }")
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.DataType.Value(kind), dims=[0])
    getattr(tensor, field).append(1)
    if inner:
        proto.graph.node.append(onnx.helper.make_node("Constant", [], ["w"], value=tensor))
    else:
        proto.graph.initializer.append(tensor)
    with pytest.raises(ModelError, match=f"tensor 'w' is {kind}, and has {field}; export or download it again"):
        models.from_proto(proto)


@pytest.mark.parametrize("where", ["input", "output"])
def test_a_value_without_an_element_type_is_refused(where: str, model_of: Model) -> None:
    model = model_of("(float[2] x) => (float[2] y) { y = Exp (x) }")
    value = model.graph.inputs[0] if where == "input" else model.graph.outputs[0]
    value.type = ir.TensorType(ir.DataType.UNDEFINED)
    name = "x" if where == "input" else "y"
    with pytest.raises(ModelError, match=f"{where} '{name}': has no element type; export or download the model again"):
        validate.check_interface(model)
