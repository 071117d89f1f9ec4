"""Set channels aside: those that reach far beyond the others are read in float, beside the integers.

Dettmers et al. 2022, "LLM.int8()", section 3.2, with channels that are known beforehand:
X · W = X' · W' + X[channels] · W[channels], where W' has zeros in the rows of these channels, so that X' may have
anything there: it is bounded to the range of the others. The bounds tell the quantizer that range and take no time:
saturation is what it does.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.core import scratch
from qcompile.core.contract import Refusal
from qcompile.core.plan import ChannelFactors
from qcompile.passes import structure
from qcompile.passes.canonicalize.editing import add_constant, free_name
from qcompile.passes.patterns import projection_at
from qcompile.passes.scale_groups import ScaleGroup

#: No bound.
FAR = float(np.finfo(np.float32).max)


def aside_obstacle(group: ScaleGroup) -> str:
    """Return why channels of a group's root cannot be set aside, or nothing."""
    if group.root.shape is None or len(group.root.shape) < 3:
        return "it has no axis of tokens"
    if any(reading.node.op_type != "MatMul" or reading.value is not group.root for reading in group.readings):
        return "another operator than MatMul reads it"
    if any(projection_at(reading.node) is None for reading in group.readings):
        return "the results of what reads it are not known"
    return ""


def set_aside(graph: ir.Graph, group: ScaleGroup, chosen: ChannelFactors) -> Refusal | None:
    """Read some channels of a group's root in float.

    Parameters
    ----------
    graph
        The graph, edited in place; the new nodes stand at its end.
    group
        Of `How.BRANCH`: what reads the root directly.
    chosen
        Which channels, and the bounds of the others.

    Returns
    -------
    Refusal or None
        Why nothing was done.
    """
    root, width = group.root, group.classes.size
    if reason := aside_obstacle(group):
        return Refusal(structure.name_of(root), reason)
    if not chosen.channels or not all(0 <= channel < width for channel in chosen.channels):
        return Refusal(structure.name_of(root), f"it has {width} channels, not those that are to be set aside")
    channels, bounded = np.array(chosen.channels, np.int64), root
    for op_type, end, bound in (("Min", "below", chosen.high), ("Max", "above", chosen.low)):
        bounds = np.full(width, FAR if op_type == "Min" else -FAR, np.float32)
        bounds[channels] = bound
        name = free_name(graph, f"{root.name}/{end}")
        result = ir.val(name, type=root.type, shape=root.shape)
        graph.append(
            ir.node(op_type, [bounded, add_constant(graph, f"{name}/bounds", bounds)], outputs=[result], name=name)
        )
        bounded = result
    name = free_name(graph, f"{root.name}/aside")
    places = add_constant(graph, f"{name}/channels", channels)
    shape = ir.Shape([*list(root.shape or ())[:-1], channels.size])
    picked = ir.val(name, type=root.type, shape=shape)
    graph.append(ir.node("Gather", [root, places], {"axis": -1}, outputs=[picked], name=name))
    for reading in group.readings:
        _read_beside(graph, reading.node, bounded, picked, channels)
    return None


def _read_beside(graph: ir.Graph, node: ir.Node, bounded: ir.Value, picked: ir.Value, channels: np.ndarray) -> None:
    weight, projection = structure.input_of(node, structure.WEIGHT_INPUT), projection_at(node)
    array = structure.constant(weight)
    assert array is not None and projection is not None, "groups have constants, and the obstacle was asked for"
    rest = array.copy()
    rest[channels] = 0.0
    weight.const_value = scratch.tensor(rest, weight.name)
    # Three axes: an operator that computes in float beside the integers is not to become one of them.
    beside = add_constant(graph, f"{weight.name}/aside", array[channels][None])
    result, name = projection.result, free_name(graph, f"{projection.result.name}/aside")
    uses = list(result.uses())
    product = ir.node(
        "MatMul", [picked, beside], outputs=[ir.val(name, type=result.type, shape=result.shape)], name=name
    )
    name = free_name(graph, f"{result.name}/whole")
    whole = ir.val(name, type=result.type, shape=result.shape)
    graph.extend([product, ir.node("Add", [result, product.outputs[0]], outputs=[whole], name=name)])
    for reader, index in uses:
        reader.replace_input_with(index, whole)
    if result.is_graph_output():
        graph.outputs[list(graph.outputs).index(result)] = whole
        whole.name, result.name = result.name, name
    node.replace_input_with(0, bounded)
