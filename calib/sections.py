"""Sections: a graph run in parts, so that what stands before a value runs once however often the rest is tried."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompile.calib.data import Sample
from qcompile.core import runtime

#: Activations that turn scores into probabilities.
SQUASHING = frozenset({"LogSoftmax", "Sigmoid", "Softmax"})
#: Types of what picks rows of a table.
INDICES = (ir.DataType.INT32, ir.DataType.INT64)


@dataclass(frozen=True)
class Section:
    """Some nodes of a model as a model of its own.

    Parameters
    ----------
    session : Session
    inputs : tuple of str
        The values it reads.
    """

    session: runtime.Session
    inputs: tuple[str, ...]

    def run(self, values: runtime.Feeds) -> runtime.Outputs:
        """Run on those of `values` that are its inputs."""
        return self.session.run({name: values[name] for name in self.inputs})


def section(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str], optimize: bool = True) -> Section:
    """Return the nodes between two sets of values of the main graph."""
    graph = ir.convenience.extract(model.graph, inputs, outputs)
    functions = tuple(model.functions.values())
    part = ir.Model(graph, ir_version=model.ir_version, functions=functions)
    return Section(runtime.Session(part, optimize=optimize, integer_kernels=False), tuple(inputs))


def live_values(graph: ir.Graph, start: int, stop: int | None = None) -> tuple[str, ...]:
    """Return what the nodes at positions [start, stop) of a sorted graph read of what there is before them.

    These are inputs and results of earlier nodes; initializers are not listed.
    """
    nodes = list(graph)
    earlier = {*graph.inputs, *(output for node in nodes[:start] for output in node.outputs)}
    read = dict.fromkeys(value for node in nodes[start:stop] for value in _reads(node))
    return tuple(value.name for value in read if value in earlier and not value.is_initializer() and value.name)


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the values that a node and the nodes in its subgraphs read."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            inner = attribute.as_graph()
            yield from inner.outputs
            for inside in inner:
                yield from _reads(inside)


def cuttable(model: ir.Model) -> bool:
    """Tell whether a graph can be run in parts: sequences and optionals between operators cannot be fed."""
    return not any("Sequence" in node.op_type or "Optional" in node.op_type for node in model.graph)


def typed(model: ir.Model, feeds: Sample) -> ir.Model:
    """Return the model with every value's element type known: a section's inputs need theirs declared.

    Shape inference does not see through operators of other domains; a run does.
    """
    unknown = [value.name for node in model.graph for value in node.outputs if value.dtype is None and value.name]
    if not unknown:
        return model
    copy = model.clone()
    values = ir.convenience.create_value_mapping(copy.graph)
    for name, array in runtime.Session(runtime.with_outputs(model, unknown), optimize=False).run(feeds).items():
        values[name].dtype = ir.DataType.from_numpy(array.dtype)
    return copy


def at_scores(model: ir.Model) -> ir.Model:
    """Return the model with its outputs as they are best compared.

    Those behind a last Softmax or Sigmoid are moved in front of it: probabilities hide the errors of a sample that is
    sure of its class and magnify those of one that is not, and a few samples would decide for all. The logits of a
    language model become square roots of probabilities, whose squared difference is half the Kullback-Leibler
    divergence wherever that is small: of fifty thousand words all but a few do not matter, and perplexity follows from
    what these get.
    """
    copy = model.clone()
    for index, value in enumerate(copy.graph.outputs):
        node = _in_front_of_codes(value)
        if node is None:
            continue
        if node.op_type in SQUASHING and node.domain in ("", "ai.onnx") and node.inputs[0] is not None:
            value = copy.graph.outputs[index] = node.inputs[0]
        if _words(value) is not None and _words(value) in _vocabularies(copy.graph):
            copy.graph.outputs[index] = _square_roots(copy.graph, value)
    return copy


def is_language(model: ir.Model) -> bool:
    """Tell whether all that comes out are scores of the words of a vocabulary, or roots of theirs, at each position."""
    vocabularies = _vocabularies(model.graph)
    return bool(model.graph.outputs) and all(_words(value) in vocabularies for value in model.graph.outputs)


def _in_front_of_codes(value: ir.Value) -> ir.Node | None:
    """Return what makes a value, also where it leaves as codes that are dequantized."""
    node = value.producer()
    for kind in ("DequantizeLinear", "QuantizeLinear"):
        source = node.inputs[0] if node is not None and node.op_type == kind else None
        node = node if source is None else source.producer()
    return node


def _words(value: ir.Value) -> int | None:
    """Return how many scores an output has at each place of a sequence, if it has that many at each."""
    shape = value.shape
    return shape[-1] if shape is not None and len(shape) == 3 and isinstance(shape[-1], int) else None


def _vocabularies(graph: ir.Graph) -> set[int]:
    """Return how many rows the tables have that integers fed to the model pick from."""
    fed, found = {value for value in graph.inputs if value.dtype in INDICES}, set[int]()
    for node in graph:
        if node.op_type == "Gather" and node.inputs[1] in fed and node.attributes.get_int("axis", 0) == 0:
            table = node.inputs[0]
            while table is not None and (producer := table.producer()) is not None:
                table = producer.inputs[0] if producer.op_type == "DequantizeLinear" else None
            rows = None if table is None or table.shape is None or len(table.shape) != 2 else table.shape[0]
            found |= {rows} if isinstance(rows, int) else set()
    return found


def _square_roots(graph: ir.Graph, logits: ir.Value) -> ir.Value:
    """Append the square roots of what Softmax makes of logits."""
    probabilities = ir.node("Softmax", [logits], {"axis": -1})
    roots = ir.node("Sqrt", [probabilities.outputs[0]])
    for node, name in ((probabilities, "probabilities"), (roots, "roots")):
        value = node.outputs[0]
        value.name, value.type, value.shape = f"{logits.name}/{name}", logits.type, logits.shape
        graph.append(node)
    return roots.outputs[0]
