"""A model in segments: what the integer program covers becomes libraries, and the rest small ONNX models, in order."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import onnx_ir as ir

from qcompile.backends.cpu.network import Network
from qcompile.backends.integer.fix_length import at_length
from qcompile.backends.integer.float_operations import FloatDense, MatMul
from qcompile.backends.integer.lower import RULES, lower, with_batch_of_one
from qcompile.backends.integer.lower_elementwise import FUNCTIONS
from qcompile.backends.integer.operations import Conv, Dense
from qcompile.backends.integer.program import Program
from qcompile.backends.integer.values import shape_of
from qcompile.core.errors import OperatorError, TargetError
from qcompile.passes import structure

Key = tuple[str, ...]
#: What stands between codes and floats, and belongs to whatever is beside it.
BETWEEN = ("QuantizeLinear", "DequantizeLinear")
#: What is worth a library of its own.
WORTH = (Conv, Dense, FloatDense, MatMul)
NO_FORM, TOO_LITTLE = (
    "has no kernel, neither in integers nor in float",
    "nothing is multiplied there that would be worth a library",
)


@dataclass(frozen=True)
class Segment:
    """A part of a model that runs in one piece.

    Parameters
    ----------
    model : onnx_ir.Model
        Its operators, with what they read of others as inputs, and what others read of them as outputs.
    operators : tuple of str
        Their names, Q/DQ left out.
    network : Network, optional
        Of a library; without it ONNX Runtime runs the model.
    forced : mapping of str to str
        By operator that has no place in a library, why.
    """

    model: ir.Model
    operators: tuple[str, ...]
    network: Network | None
    forced: Mapping[str, str] = field(default_factory=dict)


def cut(
    model: ir.Model, floats: Collection[str], kernels: Callable[[Program], Network]
) -> tuple[ir.Model, tuple[Segment, ...]]:
    """Cut a QDQ model into segments, libraries as large as they can be.

    An operator is left out of libraries once it is refused by name, until everything else is lowered.

    Parameters
    ----------
    model : onnx_ir.Model
        Left alone.
    floats : collection of str
        Operators that have kernels in float.
    kernels : callable
        Returns the network of a program, or raises.

    Returns
    -------
    onnx_ir.Model
        The model with the shapes that segments have.
    tuple of Segment
        In the order in which they run.

    Raises
    ------
    TargetError
        If nothing is left for a library, or shapes of inputs are open.
    """
    static = at_length(model, {str(value.name): shape_of(value) for value in with_batch_of_one(model).graph.inputs})
    known = {*RULES, *FUNCTIONS, *floats, *BETWEEN, "Identity", "Dropout", "BatchNormalization"}
    refused = {structure.node_name(node): NO_FORM for node in static.graph
               if not structure.is_standard(node, *known) and not _is_fixed(node)}  # fmt: skip
    programs: dict[Key, Program] = {}
    networks: dict[Key, Network] = {}
    while True:
        segments = list(_segments(_apart(static, refused), refused))
        covered = [part for part in segments if not part.forced]
        more = (
            _refused(covered, programs, lambda part: lower(part.model, floats))
            or {name: TOO_LITTLE for part in covered if not _multiplies(programs[_key(part)]) for name in _names(part)}
            or _refused(covered, networks, lambda part: kernels(programs[_key(part)]))
        )
        if not more:
            break
        refused |= more
    if not covered:
        raise TargetError(model.graph.name or "model", "has no part that can be a library", "choose --target cpu")
    return static, tuple(_told(part, networks.get(_key(part)), refused) for part in segments)


def _refused(parts: Sequence[Segment], made: dict[Key, Any], make: Callable[[Segment], Any]) -> dict[str, str]:
    """Make of segments what was not made yet, and return what is refused first, with the reason."""
    for part in parts:
        if _key(part) in made:
            continue
        try:
            made[_key(part)] = make(part)
        except OperatorError as error:
            names = _names(part)
            return {error.operator: error.fact} if error.operator in names else dict.fromkeys(names, error.fact)
        except TargetError as error:
            return dict.fromkeys(_names(part), f"{error.place} {error.fact}")
    return {}


def _names(part: Segment) -> list[str]:
    return [structure.node_name(node) for node in part.model.graph if not _is_fixed(node)]


def _key(part: Segment) -> Key:
    """Return what tells a segment from all others: its nodes, and what leaves it."""
    return (*_names(part), *(str(value.name) for value in part.model.graph.outputs))


def _told(part: Segment, network: Network | None, refused: Mapping[str, str]) -> Segment:
    """Return a segment with its network, or with what forced it to have none."""
    forced = {} if network is not None else {
        name: refused[name] for name in part.operators if refused.get(name, TOO_LITTLE) != TOO_LITTLE
    }  # fmt: skip
    return replace(part, network=network, forced=forced)


def _multiplies(program: Program) -> bool:
    return any(isinstance(part, WORTH) for part in program.operations)


def _is_fixed(node: ir.Node) -> bool:
    """Tell whether a node reads constants alone."""
    return all(value is None or _is_constant(value) for value in node.inputs) and not _captured(node)


def _is_constant(value: ir.Value) -> bool:
    if structure.constant_tensor(value) is not None:
        return True
    node = value.producer()
    return node is not None and structure.is_standard(node, "DequantizeLinear", "Constant") and _is_fixed(node)


def _captured(node: ir.Node) -> list[ir.Value]:
    """Return what the bodies of a node read of the graph around it."""
    found = dict[ir.Value, None]()
    for attribute in node.attributes.values():
        bodies = {ir.AttributeType.GRAPH: [attribute.value], ir.AttributeType.GRAPHS: attribute.value}
        for body in bodies.get(attribute.type, []):
            inner = {*body.inputs, *body.initializers.values()}
            for each in body.all_nodes():
                inner.update(each.outputs)
                found.update(dict.fromkeys(value for value in each.inputs if value is not None and value not in inner))
    return list(found)


def _read(node: ir.Node) -> list[ir.Value]:
    """Return what a node reads that is no constant."""
    return [value for value in (*node.inputs, *_captured(node)) if value is not None and not _is_constant(value)]


def _is_between(node: ir.Node) -> bool:
    return structure.is_standard(node, *BETWEEN)


def _apart(model: ir.Model, refused: Mapping[str, str]) -> ir.Model:
    """Return a copy in which what is left out has Q/DQ of its own, where these follow nothing of a library."""
    copy = model.clone()
    kinds = _kinds(copy.graph, refused)
    for node in list(copy.graph):
        if not structure.is_standard(node, "DequantizeLinear") or _is_fixed(node) or not kinds[node]:
            continue
        quantize = structure.produced_by(node.inputs[0], "QuantizeLinear")
        if quantize is None or _follows_library(structure.input_of(quantize, 0), kinds):
            continue
        readers = [reader for reader in structure.readers(node.outputs[0]) if not kinds.get(reader, True)]
        if readers:
            _double(copy.graph, quantize, node, readers)
    return copy


def _follows_library(value: ir.Value, kinds: Mapping[ir.Node, bool]) -> bool:
    node = value.producer()
    return node is not None and kinds[node]


def _double(graph: ir.Graph, quantize: ir.Node, dequantize: ir.Node, readers: list[ir.Node]) -> None:
    """Give some readers of Q/DQ a pair of their own."""
    source: ir.Value | None = quantize.inputs[0]
    behind = dequantize
    for original in (quantize, dequantize):
        result = ir.Value(name=f"{original.outputs[0].name}_apart", type=original.outputs[0].type,
                          shape=original.outputs[0].shape)  # fmt: skip
        made = ir.Node(original.domain, original.op_type, [source, *original.inputs[1:]], original.attributes.values(),
                       outputs=[result], name=f"{original.name}_apart")  # fmt: skip
        graph.insert_after(behind, made)
        behind, source = made, result
    for reader in readers:
        for place, value in enumerate(reader.inputs):
            if value is dequantize.outputs[0]:
                reader.replace_input_with(place, source)


def _kinds(graph: ir.Graph, refused: Collection[str]) -> dict[ir.Node, bool]:
    """Return of each node that is no constant whether it is a library's."""
    kinds = {node: structure.node_name(node) not in refused for node in graph if not _is_fixed(node)}
    for node in kinds:
        if _is_between(node) and kinds[node]:
            producers = [value.producer() for value in _read(node)]
            follows = [maker for maker in producers if maker is not None]
            kinds[node] = any(kinds[maker] for maker in follows) or any(_ahead(node, refused))
    return kinds


def _ahead(node: ir.Node, refused: Collection[str]) -> Iterator[bool]:
    """Yield of what reads a result, behind Q/DQ, whether it is a library's."""
    for reader in structure.readers(node.outputs[0]):
        if _is_between(reader):
            yield from _ahead(reader, refused)
        else:
            yield structure.node_name(reader) not in refused


def _segments(model: ir.Model, refused: Mapping[str, str]) -> Iterator[Segment]:
    """Yield segments in the order in which they run; those that are left out of libraries have reasons."""
    kinds = _kinds(model.graph, refused)
    levels: dict[ir.Node, int] = {}
    for node, covered in kinds.items():
        behind = [value.producer() for value in _read(node)]
        above = [levels[maker] + (kinds[maker] != covered) for maker in behind if maker is not None]
        levels[node] = max(above, default=0 if covered else 1)
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in kinds:
        for value in _read(node):
            readers.setdefault(value, []).append(node)
    for level in sorted(set(levels.values())):
        group = [node for node in kinds if levels[node] == level]
        names = tuple(structure.node_name(node) for node in group if not _is_between(node))
        forced = {} if kinds[group[0]] else {"": TOO_LITTLE}
        yield Segment(_extracted(model, group, readers), names, None, forced)


def _extracted(model: ir.Model, group: list[ir.Node], readers: Mapping[ir.Value, list[ir.Node]]) -> ir.Model:
    inside = set(group)
    inputs = dict.fromkeys(value for node in group for value in _read(node) if value.producer() not in inside)
    outputs = [
        value for node in group for value in node.outputs
        if value.is_graph_output() or any(reader not in inside for reader in readers.get(value, ()))
    ]  # fmt: skip
    graph = ir.convenience.extract(model.graph, list(inputs), outputs)
    return ir.Model(graph, ir_version=model.ir_version)
