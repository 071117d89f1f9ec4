"""Loading and saving models: opset, external data and content hash. What is refused here never reaches a pass."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google.protobuf.message
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from qcompile.core import validate
from qcompile.core.errors import ModelError, QcompileError, first_line
from qcompile.core.mapped import map_weights

#: Weights beyond this go beside the model as external data: protobuf ends at 2 GiB, and loaders slow down long before.
INLINE_LIMIT = 1 << 30
#: Bytes from which on a runtime is given a weight as it is in memory.
LARGE = 1 << 12
#: Tensors with more elements than this stay on disk until they are read; onnx's checker is handed the smaller ones.
LAZY_ELEMENTS = 4096
#: The first IR version in which an initializer need not be an input of the graph.
FIRST_WITH_CONSTANTS = 4


def load(path: Path) -> ir.Model:
    """Read an ONNX file into the IR and refuse what cannot be compiled. Weights stay on disk until they are read.

    Parameters
    ----------
    path : Path
        An ``.onnx`` file; external data beside it or below its folder.

    Returns
    -------
    onnx_ir.Model
        Topologically sorted.

    Raises
    ------
    ModelError
        With the place, the fact and the remedy.
    """
    return _checked(_parse(path), path.parent, path)


def take(source: str | Path | onnx.ModelProto | ir.Model) -> ir.Model:
    """Take a model in any form that a caller may have it in, with the checks of `load`."""
    if isinstance(source, ir.Model):
        model = source.clone()  # sorting must not touch the caller's
        map_weights(model)
        _close_weights(model)
        validate.check_model(model, "model")
        return model
    return from_proto(source) if isinstance(source, onnx.ModelProto) else load(Path(source))


def from_proto(proto: onnx.ModelProto, place: object = "model") -> ir.Model:
    """Take a model that is in memory, with the checks of `load`."""
    return _checked(proto, None, place)


def _checked(proto: onnx.ModelProto, folder: Path | None, place: object) -> ir.Model:
    validate.check_proto(proto, folder, place)
    try:
        if folder is not None:
            _read_small(proto, folder)
        _open_negative_axes(proto)
        model = ir.from_proto(proto)
        if folder is not None:
            ir.external_data.set_base_dir(model.graph, folder)
            map_weights(model)
        if "ai.onnx" in model.opset_imports:  # the long name of the default domain, which nodes have the short one of
            model.opset_imports[""] = model.opset_imports.pop("ai.onnx")
        _close_weights(model)
    except QcompileError:
        raise
    except Exception as error:
        raise ModelError(place, f"cannot be read as a graph ({first_line(error)})", "export it again") from error
    validate.check_model(model, place)
    return model


def _read_small(proto: onnx.ModelProto, folder: Path) -> None:
    """Read external tensors that are small, or inside nodes: onnx's C++ would look for them in its working folder."""
    lazy = {tensor.name for tensor in proto.graph.initializer if math.prod(tensor.dims) > LAZY_ELEMENTS}
    for tensor in onnx.external_data_helper._get_all_tensors(proto):
        if tensor.name not in lazy and onnx.external_data_helper.uses_external_data(tensor):
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(folder))


def _open_negative_axes(proto: onnx.ModelProto) -> None:
    """Make axes open that are declared as -1: Paddle's exporter writes them so, and runtimes read them so."""
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_value") and dim.dim_value < 0:
                dim.Clear()  # no name either: two axes of one name would be taken for equally long


def _close_weights(model: ir.Model) -> None:
    """Make weights of a model of IR version 3 constants, as runtimes do: the format had every weight be an input too.

    From version 4 on, an initializer that is also an input is one by intent, a default that a caller may replace.
    """
    if model.ir_version is not None and model.ir_version < FIRST_WITH_CONSTANTS:
        common_passes.RemoveInitializersFromInputsPass()(model)
        model.ir_version = FIRST_WITH_CONSTANTS


def _parse(path: Path) -> onnx.ModelProto:
    if not path.exists():
        raise ModelError(path, "no such file", "check the path of the model")
    if path.is_dir():
        raise ModelError(path, "is a folder", "name the .onnx file inside it")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(path, f"cannot be read ({error.strerror})", "check its permissions") from error
    if not content:
        raise ModelError(path, "is empty", "export the model again")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except google.protobuf.message.DecodeError as error:
        fact = f"is not an ONNX model, or is cut off ({len(content)} bytes)"
        raise ModelError(path, fact, "export or download it again") from error
    return proto


def save(model: ir.Model, path: Path) -> None:
    """Write a model; weights beyond `INLINE_LIMIT` go to ``<name>.data`` beside it."""
    if initializer_bytes(model) > INLINE_LIMIT:
        ir.save(model, path, external_data=f"{path.name}.data")
    else:
        path.write_bytes(serialize(model))


def load_written(path: Path) -> ir.Model:
    """Read a model that this program wrote itself, without the checks of `load`."""
    model = ir.load(path)
    map_weights(model)
    return model


def serialize(model: ir.Model) -> bytes:
    """Return the model as protobuf bytes, weights included, the same bytes for the same model."""
    if any(isinstance(value.const_value, ir.ExternalTensor) for value in initializers(model)):
        model = ir.external_data.load_to_model(model.clone())
    content: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
    return content


def apart(model: ir.Model) -> tuple[bytes, dict[str, npt.NDArray[Any]]]:
    """Return a model as protobuf bytes without its large weights, and those in memory by name, as they are there.

    Protobuf would copy each twice. Weights in files stay there, by paths from the root. Weights of subgraphs and those
    of types that NumPy lacks stay with the bytes.
    """
    shell, weights = model.clone(), dict[str, npt.NDArray[Any]]()
    map_weights(shell)
    for name, value in shell.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < LARGE or isinstance(tensor, ir.ExternalTensor):
            continue
        kind = tensor.dtype.numpy()
        if value.uses() and kind.isbuiltin == 1 and kind.kind != "O":  # the runtime drops the unused, then misses them
            weights[name] = np.ascontiguousarray(tensor.numpy())
            shape = ir.Shape(tensor.shape.numpy())
            value.const_value = ir.ExternalTensor(name, 0, tensor.nbytes, tensor.dtype, shape=shape, name=name)
    content: bytes = ir.to_proto(shell).SerializeToString()
    return content, weights


def _with_places(model: ir.Model) -> onnx.ModelProto:
    if any(type(value.const_value) is ir.ExternalTensor for value in initializers(model)):
        model = model.clone()
        map_weights(model)
    return ir.to_proto(model)


def initializers(model: ir.Model) -> Iterator[ir.Value]:
    """Yield the initialized values of all graphs, subgraphs included."""
    for graph in model.graphs():
        yield from graph.initializers.values()


def file_bytes(model: ir.Model) -> int:
    """Return the bytes of a model's file, or of its weights alone where these are beyond `INLINE_LIMIT`."""
    weights = initializer_bytes(model)
    if weights >= INLINE_LIMIT:
        return weights
    # Without the bytes of weights in files, which would be read to be counted: protobuf writes a length before each.
    proto = _with_places(model)
    graph = before = proto.graph.ByteSize()
    for tensor in proto.graph.initializer:
        if onnx.external_data_helper.uses_external_data(tensor):
            within = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims).ByteSize()
            length = model.graph.initializers[tensor.name].const_value.nbytes  # type: ignore[union-attr]
            graph += _field(within + _field(length)) - _field(tensor.ByteSize())
    return proto.ByteSize() - _field(before) + _field(graph)


def _field(length: int) -> int:
    """Return the bytes of a protobuf field that holds so many: a tag and the length, seven bits a byte, before them."""
    return 1 + max(1, -(-length.bit_length() // 7)) + length


def initializer_bytes(model: ir.Model) -> int:
    """Return the bytes that the initializers of all graphs take, packed."""
    return sum(value.const_value.nbytes for value in initializers(model) if value.const_value is not None)


def held_bytes(model: ir.Model) -> int:
    """Return the bytes of those initializers that are in memory rather than in files."""
    tensors = (value.const_value for value in initializers(model))
    return sum(one.nbytes for one in tensors if one is not None and not isinstance(one, ir.ExternalTensor))


def content_hash(model: ir.Model) -> str:
    """Return a SHA-256 over structure and weights, external data included, wherever those are stored."""
    digest = hashlib.sha256()
    shell = model.clone()
    for value in initializers(shell):
        tensor = value.const_value
        assert tensor is not None
        digest.update(f"{value.name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(hashlib.sha256(tensor.tobytes()).digest())
        # The tensor itself is hashed; in the structure its name stands for it, so that the bytes are never doubled.
        value.const_value = ir.tensor([0], name=value.name)
    digest.update(serialize(shell))
    return digest.hexdigest()


def opset(model: ir.Model) -> int:
    """Return the version of the default operator set that the model imports."""
    return model.opset_imports.get("", 0)


def describe(value: ir.Value) -> str:
    """Return a value's name, type and shape, for people."""
    dims = "?" if value.shape is None else ",".join(str(dim) for dim in value.shape)
    return f"{value.name} {value.dtype.name.lower() if value.dtype else '?'}[{dims}]"
