"""What a model must fulfil before it is compiled; each failure is one line that names the place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import google.protobuf.message
import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qcompile.core.errors import ModelError, first_line

OLDEST_OPSET = 7

#: Where a tensor may have its numbers, but for raw_data, which all types may have.
NUMBERS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")

NO_TEXT = "has a name that is no text in UTF-8"

#: Operators of the QOperator format: they compute on codes, so there is no float model to start from.
QOPERATORS = frozenset({
    "ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul",
    "QGemm", "QLinearAdd", "QLinearAveragePool", "QLinearConcat", "QLinearGlobalAveragePool", "QLinearLeakyRelu",
    "QLinearMul", "QLinearReduceMean", "QLinearSigmoid", "QLinearSoftmax", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention", "QEmbedLayerNormalization",
})  # fmt: skip

#: In these a non-finite parameter spoils every output. Elsewhere infinities have a meaning (a mask that is added).
WEIGHTED_OPS = frozenset({
    "BatchNormalization", "Conv", "ConvTranspose", "Gemm", "GRU", "Gather", "InstanceNormalization",
    "LayerNormalization", "LSTM", "MatMul", "Mul", "PRelu", "RNN",
})  # fmt: skip


def check_proto(proto: onnx.ModelProto, folder: Path | None, place: object) -> None:
    """Refuse what must not even be turned into a graph: no graph, an opset out of range, unsafe external data."""
    _check_text(proto, place)
    if not proto.HasField("graph") or not (proto.graph.node or proto.graph.output):
        raise ModelError(place, "holds no graph", "export the model again")
    versions = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    newest = onnx.defs.onnx_opset_version()
    if not proto.opset_import:
        raise ModelError(place, "imports no opset", "export the model again")
    if min(versions, default=newest) < OLDEST_OPSET:
        fact = f"has opset {min(versions)}, older than {OLDEST_OPSET}"
        raise ModelError(place, fact, f"export it again with an opset from {OLDEST_OPSET} to {newest}")
    if max(versions, default=newest) > newest:
        fact = f"has opset {max(versions)}; the newest that the installed onnx {onnx.__version__} knows is {newest}"
        raise ModelError(place, fact, "export it with an older opset, or upgrade onnx")
    for tensor in onnx.external_data_helper._get_all_tensors(proto):
        _check_field(tensor, place)
        if onnx.external_data_helper.uses_external_data(tensor):
            _check_external(tensor, folder, place)


def _check_text(message: google.protobuf.message.Message, place: object) -> None:
    """Refuse names that are no UTF-8: protobuf reads them all the same, as bytes in place of text."""
    if isinstance(message, onnx.TensorProto):  # its numbers would be copied to be looked at
        found = [message.name, *(text for entry in message.external_data for text in (entry.key, entry.value))]
        if any(isinstance(text, bytes) for text in found):
            raise ModelError(place, NO_TEXT, "export or download it again")
        return
    for field, value in message.ListFields():
        for one in value if field.is_repeated else (value,):
            if field.type == field.TYPE_STRING and isinstance(one, bytes):
                raise ModelError(place, NO_TEXT, "export or download it again")
            if field.type == field.TYPE_MESSAGE:
                _check_text(one, place)


def _check_field(tensor: onnx.TensorProto, place: object) -> None:
    """Refuse numbers in a field that is not their type's: the checker lets them through where a tensor is empty."""
    try:
        field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    except KeyError:
        return  # a type that does not exist, which the checker names
    if wrong := next((name for name in NUMBERS if name != field and len(getattr(tensor, name))), None):
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        raise ModelError(place, f"tensor '{tensor.name}' is {kind}, and has {wrong}", "export or download it again")


def _check_external(tensor: onnx.TensorProto, folder: Path | None, place: object) -> None:
    if folder is None:
        raise ModelError(place, f"tensor '{tensor.name}' is external, but the model has no folder", "pass its path")
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    file = folder / location
    # resolve() follows links: a link inside the folder must not lead out of it either.
    if not location or Path(location).is_absolute() or not file.resolve().is_relative_to(folder.resolve()):
        fact = f"external data of tensor '{tensor.name}' lie outside the model's folder ('{location}')"
        raise ModelError(place, fact, "move the data file beside the model and save it again")
    if not file.is_file():
        fact = f"external data file '{location}' of tensor '{tensor.name}' is missing"
        raise ModelError(place, fact, "put the file beside the model")
    try:
        needed = -(-math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth // 8)
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", needed))
    except (TypeError, ValueError):
        offset = length = needed = -1
    if offset < 0 or length < needed or offset + length > file.stat().st_size:
        fact = f"external data file '{location}' is too short for tensor '{tensor.name}'"
        raise ModelError(place, fact, "export or download it again")


def check_model(model: ir.Model, place: object) -> None:
    """Sort the graph, make node names unique, and refuse what is no valid, float or QDQ, ONNX model.

    Raises
    ------
    ModelError
        For a cycle, an operator that does not exist, the QOperator format, an inconsistent graph, a non-finite weight.
    """
    _sort(model, place)
    _check_operators(model, place)
    _check_graph(model, place)
    _tell_nodes_apart(model)
    for value, tensor in _float_tensors(model):
        _check_finite(value, tensor, place)


def _sort(model: ir.Model, place: object) -> None:
    try:
        common_passes.TopologicalSortPass()(model)
    except ValueError as error:
        raise ModelError(place, "the graph has a cycle", "export it again: ONNX graphs are acyclic") from error


def _tell_nodes_apart(model: ir.Model) -> None:
    """Rename all but the first node of a name in each graph: ONNX allows several, ONNX Runtime does not."""
    for graph in model.graphs():
        taken = {node.name for node in graph}
        seen: set[str] = set()
        for node in graph:
            name, count = node.name or "", 1
            if name in seen:
                while f"{name}_{count}" in taken:
                    count += 1
                node.name = f"{name}_{count}"
                taken.add(node.name)
            if name:
                seen.add(name)


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _check_operators(model: ir.Model, place: object) -> None:
    for node in _nodes(model):
        label = f"node '{node.name}' ({node.op_type})" if node.name else f"a node of type {node.op_type}"
        if node.op_type in QOPERATORS:
            fact = f"{label} is in QOperator format, already lowered to integer kernels"
            raise ModelError(place, fact, "start from the float model, or from the QDQ format")
        if node.domain in ("", "ai.onnx") and not onnx.defs.has(node.op_type, node.domain.removeprefix("ai.onnx")):
            raise ModelError(place, f"{label} is no ONNX operator", "export it with standard operators")
        for attribute in node.attributes.values():
            if attribute.type is ir.AttributeType.STRING and not isinstance(attribute.value, str):
                fact = f"attribute '{attribute.name}' of {label} is no text in UTF-8"
                raise ModelError(place, fact, "export or download it again")


def _check_graph(model: ir.Model, place: object) -> None:
    if any(value.shape is None for value in model.graph.outputs):
        # The checker wants every output's rank, runtimes do not.
        common_passes.ShapeInferencePass(strict_mode=False)(model)
    for value in model.graph.outputs:
        if value.shape is None and (value.type is None or isinstance(value.type, ir.TensorType)):
            fact = f"output '{value.name}' has no declared shape, and none can be inferred"
            raise ModelError(place, fact, "declare its rank, with open axes where they vary")
    try:
        common_passes.CheckerPass(full_check=True)(model)
    except (
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
        ValueError,
        TypeError,
        RuntimeError,
    ) as error:
        version = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))
        fact = f"is no valid opset {version} model ({first_line(error)})"
        raise ModelError(place, fact, "export it again; is its opset labelled rightly?") from error


def check_interface(model: ir.Model) -> None:
    """Refuse inputs that data cannot hold and outputs that cannot be compared: NumPy's numbers can.

    Raises
    ------
    ModelError
        Naming the input or output.
    """
    for value in model.graph.inputs:
        place = f"input '{value.name}'"
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            fact = f"is no tensor but {value.type.__class__.__name__.removesuffix('Type').lower()}"
            raise ModelError(place, fact, "cut the model so that its inputs are tensors")
        if value.dtype is ir.DataType.STRING:
            raise ModelError(place, "holds strings", "cut the model behind its tokenizer")
        _check_typed(value, place)
        if not _in_numpy(value):
            raise ModelError(place, f"is {value.dtype}, which NumPy does not have", "feed float32 through a Cast")
    for value in model.graph.outputs:
        _check_typed(value, f"output '{value.name}'")
        if not _in_numpy(value):
            fact = f"is {value.dtype}, which NumPy does not have"
            raise ModelError(f"output '{value.name}'", fact, "put a Cast to float32 behind it")


def _check_typed(value: ir.Value, place: str) -> None:
    if value.dtype is ir.DataType.UNDEFINED:
        raise ModelError(place, "has no element type", "export or download the model again")


def _in_numpy(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.numpy().type.__module__ == "numpy"


def _float_tensors(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype.is_floating_point():
                yield value, value.const_value
    for node in _nodes(model):
        attribute = node.attributes.get("value")
        if node.op_type == "Constant" and attribute is not None and attribute.type is ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if tensor.dtype.is_floating_point():
                yield node.outputs[0], tensor


def _check_finite(value: ir.Value, tensor: ir.TensorProtocol, place: object) -> None:
    try:
        bad = _first_non_finite(tensor)
    except (OSError, ValueError) as error:
        fact = f"tensor '{value.name}' cannot be read ({first_line(error)})"
        raise ModelError(place, fact, "export or download it again") from error
    if bad is None:
        return
    index, number = bad
    if np.isnan(number) or _op_types(value.consumers()) & WEIGHTED_OPS:
        fact = f"tensor '{value.name}' holds {number} at index {index}"
        raise ModelError(place, fact, "repair or retrain the weights")


def _op_types(nodes: Iterable[ir.Node]) -> frozenset[str]:
    return frozenset(node.op_type for node in nodes)


def _first_non_finite(tensor: ir.TensorProtocol) -> tuple[tuple[int, ...], float] | None:
    array = tensor.numpy()
    if array.dtype.itemsize == 1 or array.dtype == ml_dtypes.bfloat16:
        array = array.astype(np.float32)
    # The sum of finite numbers may overflow, but that of a NaN or an infinity is never finite: a cheap first look.
    with np.errstate(over="ignore", invalid="ignore"):
        if array.size == 0 or np.isfinite(array.sum(dtype=np.float64)):
            return None
    places = np.argwhere(~np.isfinite(array))
    nan = np.argwhere(np.isnan(array))
    if not len(places):
        return None
    index = tuple(int(i) for i in (nan if len(nan) else places)[0])
    return index, float(array[index])
