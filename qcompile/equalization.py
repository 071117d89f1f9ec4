"""Where weights have one scale: which operators the channels' factors meet in, and what their noise comes to."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.calib.collect import ChannelSpread, collect_spread
from qcompile.calib.data import Dataset
from qcompile.calib.equalization import Operator, equalized_log2
from qcompile.calib.sections import at_scores
from qcompile.calib.smoothing import Numbers, Reader, Scheme, rounding
from qcompile.calib.weighing import weights_alone
from qcompile.core import scratch
from qcompile.job import Job
from qcompile.passes import structure
from qcompile.passes.scale_classes import FIXED, channel_axis, weight_channels
from qcompile.passes.scale_groups import ScaleGroup

#: Samples that operators' noise is followed on: a factor of two is what matters.
SAMPLES = 12
#: Noise that all but vanishes on its way counts so much of the largest gain.
LEAST = 1e-3


def equalized(
    groups: Sequence[ScaleGroup],
    spread: Mapping[str, ChannelSpread],
    integers: Collection[str],
    gains: Mapping[str, float],
    scheme: Scheme,
) -> dict[ScaleGroup, Numbers]:
    """Return the logarithms of the factors of groups that fold, by class: all that together leave least noise.

    Parameters
    ----------
    groups : sequence of ScaleGroup
    spread : mapping of str to ChannelSpread
        Of what the operators read that read or write channels of the groups, by name.
    integers : collection of str
        The linear operators in integers.
    gains : mapping of str to float
        What noise of operators comes to, by name; 1 for others.
    scheme : Scheme
    """
    offsets = np.cumsum([0, *(group.factors for group in groups)])
    read, written = dict[ir.Node, npt.NDArray[np.int64]](), dict[ir.Node, npt.NDArray[np.int64]]()
    for group, offset in zip(groups, offsets[:-1], strict=True):
        read |= {reading.node: _shifted(reading.classes, offset) for reading in group.readings}
        for fold in group.folds:
            if structure.is_linear(fold.node) and fold.index == structure.WEIGHT_INPUT and fold.exponent < 0:
                weight = structure.constant(fold.node.inputs[structure.WEIGHT_INPUT])
                assert weight is not None
                axis = structure.weight_axis(fold.node)
                rows = np.moveaxis(np.broadcast_to(fold.classes, weight.shape), axis, 0)
                written[fold.node] = _shifted(rows.reshape(len(rows), -1)[:, 0], offset)
    operators = []
    for node in dict.fromkeys([*read, *written]):
        reader = _reader(node, spread, read.get(node)) if structure.node_name(node) in integers else None
        if reader is not None:
            rows = written.get(node, np.zeros(reader.weight.shape[reader.axis], np.int64))
            operators.append(Operator(reader, rows, gains.get(structure.node_name(node), 1.0)))
    log2 = equalized_log2(operators, int(offsets[-1]), scheme)
    return {group: np.r_[0.0, log2[offset + 1 : offset + 1 + group.factors]]
            for group, offset in zip(groups, offsets[:-1], strict=True)}  # fmt: skip


def measure_gains(job: Job, model: ir.Model, integers: Collection[str], data: Dataset) -> dict[str, float]:
    """Return what noise over signal of single operators' results comes to at the features, by name.

    Measured with the weights of one operator at a time rounded by one scale, over what that does to its own results.
    Nothing is returned where the model's work is too much for it.

    Parameters
    ----------
    job : Job
    model : onnx_ir.Model
    integers : collection of str
        The linear operators in integers.
    data : Dataset
        The first `SAMPLES` of it are run.
    """
    few = Dataset(data.place, lambda: islice(iter(data), SAMPLES), data.specs)
    nodes = [node for node in model.graph if structure.is_linear(node) and structure.node_name(node) in integers]
    axes = {structure.name_of(value): axis for node in nodes
            if (axis := channel_axis(node, value := structure.input_of(node, 0))) is not None}  # fmt: skip
    spread, rounded = collect_spread(model, axes, few, job.track), model.clone()
    lost, weights = dict[str, float](), dict[str, list[str]]()
    for node in nodes:
        reader, operator = _reader(node, spread), structure.node_name(node)
        if reader is not None and reader.signal > 0.0:
            lack, name = rounding(reader.weight, None, job.target.weight_dtype), _weight_name(node)
            rounded.graph.initializers[name].const_value = scratch.tensor(reader.weight - lack, name)
            noise = np.sum(np.square(lack) * reader.spread.power[reader.channels])
            lost[operator], weights[operator] = float(noise / reader.signal), [name]
    found = weights_alone(at_features(model), rounded, weights, few, job.track, job.workers)
    # What stands behind the features does nothing to them.
    gains = {name: noise / lost[name] for name, noise in found.items() if lost[name] > 0.0 and 0.0 < noise < np.inf}
    least = LEAST * max(gains.values(), default=0.0)
    return {name: max(gain, least) for name, gain in gains.items()}


def at_features(model: ir.Model) -> ir.Model:
    """Return the model with what the last products read as outputs, where these make fewer numbers of it.

    Few numbers say next to nothing of noise: they are a matter of how the roundings of all operators happen to add up.
    """
    copy = at_scores(model)
    found = [_features(value) for value in copy.graph.outputs]
    copy.graph.outputs[:] = dict.fromkeys(found)
    return copy


def _features(value: ir.Value) -> ir.Value:
    """Return what the last product in front of an output reads where that is more channels, else the output."""
    node = value.producer()
    while node is not None and not structure.is_linear(node):
        read = [source for source in node.inputs if source is not None and structure.constant_tensor(source) is None]
        node = read[0].producer() if len(read) == 1 else None
    channels = None if node is None else weight_channels(node)
    if node is None or channels is None:
        return value
    weight, source = structure.constant_tensor(node.inputs[structure.WEIGHT_INPUT]), structure.input_of(node, 0)
    assert weight is not None
    fewer = int(weight.shape.numpy()[structure.weight_axis(node)]) <= int(channels.max())
    return source if fewer and source.producer() is not None else value


def _reader(
    node: ir.Node, spread: Mapping[str, ChannelSpread], classes: npt.NDArray[np.int64] | None = None
) -> Reader | None:
    """Return a linear operator as what reads its input; None where its channels are not known."""
    channels, name = weight_channels(node), structure.name_of(structure.input_of(node, 0))
    weight = structure.constant(node.inputs[structure.WEIGHT_INPUT])
    if channels is None or weight is None or name not in spread:
        return None
    seen = spread[name]
    classes = np.full(seen.power.size, FIXED) if classes is None else classes
    return Reader(seen, classes, weight, structure.weight_axis(node), channels)


def _weight_name(node: ir.Node) -> str:
    return structure.name_of(structure.input_of(node, structure.WEIGHT_INPUT))


def _shifted(classes: npt.NDArray[np.int64], offset: int) -> npt.NDArray[np.int64]:
    """Return a group's classes by the numbers of its factors among those of all groups."""
    return np.where(classes == FIXED, FIXED, classes + offset * np.sign(classes))
