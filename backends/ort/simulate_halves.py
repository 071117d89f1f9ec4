"""Float16's rounding on a float32 model, by Casts: what it does to the outputs, whoever writes float16 into it."""

from __future__ import annotations

from collections.abc import Set

import onnx_ir as ir

from qcompile.backends.ort.half_values import HALF, SINGLE, slots
from qcompile.core import model as models
from qcompile.passes import structure


def simulated(model: ir.Model, nodes: Set[str]) -> ir.Model:
    """Return a copy in which all that some nodes read and make is rounded to float16, and computed in float32.

    Parameters
    ----------
    model : onnx_ir.Model
        Topologically sorted. Its outputs are not rounded themselves.
    nodes : set of str
        Names of nodes of the main graph.
    """
    copy = model.clone()
    version, rounded, made = models.opset(copy), dict[ir.Value, ir.Value](), set[ir.Value]()
    chosen = [(node, slots(node, version)) for node in copy.graph if structure.node_name(node) in nodes]
    for node, places in chosen:
        if places is None:
            continue
        readers = [(node, index) for index in places.inputs]
        readers += [use for index in places.outputs for use in node.outputs[index].uses()]
        for reader, index in readers:
            value = structure.input_of(reader, index)
            if value in made:
                continue
            if value not in rounded:
                rounded[value] = _rounded(copy.graph, value)
                made.add(rounded[value])
            reader.replace_input_with(index, rounded[value])
    copy.graph.sort()
    return copy


def _rounded(graph: ir.Graph, value: ir.Value) -> ir.Value:
    for dtype in (HALF, SINGLE):
        cast = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{value.name}_to_{dtype.name.lower()}")
        value = cast.outputs[0]
        value.name, value.dtype = cast.name, dtype
        graph.append(cast)
    return value
