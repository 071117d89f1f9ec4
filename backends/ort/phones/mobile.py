"""ONNX Runtime's own format for phones, and what a runtime that is built for one model alone must have."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from qcompile.backends.ort import legalize
from qcompile.backends.ort.legalize.pack_weights import PackWeights
from qcompile.backends.ort.legalize.store_halves import StoreHalves
from qcompile.backends.ort.legalize.unpack_weights import UnpackWeightsAtLoad
from qcompile.backends.ort.phones.drop_absorbed import DropAbsorbed
from qcompile.core import model as models
from qcompile.core import runtime

MODEL_FILE = "model.ort"
CONFIG_FILE = "required_operators_and_types.config"
IDENTIFIER = b"ORTM"
#: What the content of a file is aligned to, counted from its end.
ALIGNMENT = 64
PROVIDER = "ort-format"
NOTE = "Not run on a phone here: fidelity is that of the same file on this machine's processor."
#: What unpacks weights when a model is loaded is left out: here the tools load it, and would store floats.
UNPACKING = (UnpackWeightsAtLoad, PackWeights, StoreHalves)
#: A Relu between a Conv and codes with a sign would keep the Conv from being an integer one.
RULES = (DropAbsorbed(), *(rule for rule in legalize.RULES if not isinstance(rule, UNPACKING)))


def write(legal: ir.Model, folder: Path) -> tuple[tuple[str, ...], list[onnx.NodeProto]]:
    """Write a model in ORT format, and the operators and types that it needs, by onnxruntime's own tools.

    Returns the names of the files, and the nodes that are in the first.

    The graph is optimized for ARM: without the blocked layouts that only x86 has, and with signed codes as they are.

    Parameters
    ----------
    legal : onnx_ir.Model
        As `backends/ort/legalize` writes it.
    folder : Path

    Raises
    ------
    TargetError
        If what the tools need is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="qcompile-") as scratch:
        models.save(legal, Path(scratch) / "model.onnx")
        runtime.write_ort_format(Path(scratch) / "model.onnx")
        content = (Path(scratch) / MODEL_FILE).read_bytes()
        needed = (Path(scratch) / f"model.{CONFIG_FILE}").read_text(encoding="utf-8")
        nodes = list(onnx.load(Path(scratch) / "model.optimized.onnx").graph.node)
    (folder / MODEL_FILE).write_bytes(in_order(content))
    lines = [line for line in needed.splitlines() if not line.startswith("#")]
    (folder / CONFIG_FILE).write_text("\n".join([f"# Needed by {MODEL_FILE}", *lines, ""]), encoding="utf-8")
    return (MODEL_FILE, CONFIG_FILE), nodes


def bytes_by_cause(legal: ir.Model, folder: Path) -> dict[str, int]:
    """Return what the file's bytes are for; the list of operators is for a build, and not for the phone."""
    constants, whole = models.initializer_bytes(legal), (folder / MODEL_FILE).stat().st_size
    return {"weights and constants": min(constants, whole), "graph, kernels and names": max(0, whole - constants)}


def in_order(content: bytes) -> bytes:
    """Return a file in ORT format with what stands in front of the model in one order, whatever wrote it.

    The runtime writes a table of its kernels' types from a hash map, whose order follows the addresses of memory: two
    runs give two files. The model stands behind it in the file, and nothing in it refers to what stands in front; so
    the table and the root can be written anew.

    Parameters
    ----------
    content : bytes
    """
    import flatbuffers

    Root = runtime.ort_format("InferenceSession")  # noqa: N806  a module, whose functions write one kind of table
    root = Root.InferenceSession.GetRootAs(bytearray(content), 0)
    model = root.Model()._tab
    begin = min(model.Pos, model.Pos - int.from_bytes(content[model.Pos : model.Pos + 4], "little", signed=True))
    builder = flatbuffers.Builder(2 * len(content))
    tail = content[begin:]
    builder.Bytes[len(builder.Bytes) - len(tail) :] = tail
    builder.head, builder.minalign = len(builder.Bytes) - len(tail), ALIGNMENT
    version = builder.CreateString(root.OrtVersion())
    types = _types(builder, root.KernelTypeStrResolver())
    Root.Start(builder)
    Root.AddOrtVersion(builder, version)
    Root.AddModel(builder, len(content) - model.Pos)
    Root.AddKernelTypeStrResolver(builder, types)
    builder.Finish(Root.End(builder), IDENTIFIER)
    return bytes(builder.Output())


def _types(builder: Any, resolver: Any) -> int:
    """Write the table of kernels' types, in the order that its entries are sorted in."""
    tables = ("ArgTypeAndIndex", "KernelTypeStrArgsEntry", "OpIdKernelTypeStrArgsEntry", "KernelTypeStrResolver")
    Place, Entry, Operator, Resolver = map(runtime.ort_format, tables)  # noqa: N806
    operators = []
    for operator in map(resolver.OpKernelTypeStrArgs, range(resolver.OpKernelTypeStrArgsLength())):
        entries = []
        for entry in map(operator.KernelTypeStrArgs, range(operator.KernelTypeStrArgsLength())):
            places = []
            for place in map(entry.Args, range(entry.ArgsLength())):
                Place.Start(builder)
                Place.AddArgType(builder, place.ArgType())
                Place.AddIndex(builder, place.Index())
                places.append(Place.End(builder))
            where, name = _vector(builder, places), builder.CreateString(entry.KernelTypeStr())
            Entry.Start(builder)
            Entry.AddKernelTypeStr(builder, name)
            Entry.AddArgs(builder, where)
            entries.append(Entry.End(builder))
        all_of, name = _vector(builder, entries), builder.CreateString(operator.OpId())
        Operator.Start(builder)
        Operator.AddOpId(builder, name)
        Operator.AddKernelTypeStrArgs(builder, all_of)
        operators.append(Operator.End(builder))
    found = _vector(builder, operators)
    Resolver.Start(builder)
    Resolver.AddOpKernelTypeStrArgs(builder, found)
    return int(Resolver.End(builder))


def _vector(builder: Any, offsets: list[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())
