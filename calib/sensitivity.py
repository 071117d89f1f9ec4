"""Sensitivity: what quantizing one tensor alone does to the model's outputs, and which observer does the least.

The squared error of a tensor, which `Observer.MSE` minimizes, says little about the outputs: a clipped outlier may be
what a decision hangs on. Forward runs tell, and need neither labels nor gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.calib.collect import Statistics
from qcompile.calib.data import Dataset, Sample
from qcompile.calib.observers import Histogram, Observer, value_range
from qcompile.core import numerics, runtime
from qcompile.core.contract import Track

#: More samples than this move no decision that stands, and cost time in proportion.
SAMPLES = 64
#: Tensors times samples that are tried: a model of many tensors is judged on fewer samples each, but on no fewer than
#: `FEWEST`, so that the time grows with the model's size and not with its square.
TRIALS, FEWEST = 2048, 8
#: Bytes of arrays that are held over all samples; where they would be more, there are fewer samples.
MEMORY = 512 << 20

#: Inputs of the part of the graph behind a tensor: its float values and the quantization to try.
_FLOAT, _SCALE, _ZERO_POINT = "qcompile.trial/float", "qcompile.trial/scale", "qcompile.trial/zero_point"

#: Scale and zero point of a tensor, each of shape ().
_Parameters = tuple[npt.NDArray[np.float32], numerics.IntArray]


@dataclass
class OutputError:
    """Noise power over signal power, summed over a model's outputs so that each counts alike, whatever its size."""

    signal: dict[str, float] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)

    def add(self, reference: runtime.Outputs, candidate: runtime.Outputs) -> None:
        """Count one sample. Outputs that the candidate does not give are without noise."""
        for name, expected in reference.items():
            # A masked score is -inf in both; where the candidate alone is not finite, the error is infinite.
            finite = np.isfinite(expected)
            y = np.asarray(expected, np.float64)[finite]
            difference = y - np.asarray(candidate.get(name, expected), np.float64)[finite]
            self.signal[name] = self.signal.get(name, 0.0) + float(np.sum(y * y))
            self.noise[name] = self.noise.get(name, 0.0) + float(np.sum(difference * difference))

    @property
    def value(self) -> float:
        """The error: 0 without noise, infinite where a candidate drives an output that is finite to infinity or NaN."""
        total = 0.0
        for name, noise in self.noise.items():
            if noise != 0.0:
                signal = self.signal[name]
                total += noise / signal if signal > 0.0 and np.isfinite(noise) else np.inf
        return total


def choose_observers(
    model: ir.Model,
    statistics: Statistics,
    dtype: str,
    data: Dataset,
    track: Track[tuple[str, Observer]],
    threads: int,
) -> dict[str, Observer]:
    """Choose for each measured tensor the observer whose range moves the model's outputs least.

    Each tensor is quantized alone, for all its readers (and for the caller, where it is an output of the model);
    everything else stays in float. The part of the graph before the tensor runs once per sample, the part behind it
    once per sample and distinct range. Memory holds the samples, the float outputs and one sample's values per thread.

    Parameters
    ----------
    model : onnx_ir.Model
        The float model that `statistics` were collected from, topologically sorted.
    statistics : Statistics
    dtype : str
        Integer type of the codes.
    data : Dataset
        At most `SAMPLES` of it are run, spread evenly.
    track : callable
        Shows progress.
    threads : int
        Tensors that are tried at the same time; the result does not depend on it.

    Returns
    -------
    dict of str to Observer
        By value name, in the order of `statistics`. Among equals the first in the order of `Observer`.
    """
    candidates = {name: _candidates(histogram, dtype) for name, histogram in statistics.histograms.items()}
    if not candidates:
        return {}
    if not cuttable(model):
        return dict.fromkeys(candidates, Observer.MSE)
    first = next(iter(data))
    model = typed(model, first)
    reference = runtime.Session(model)
    samples = spread(data, nbytes(first) + nbytes(reference.run(first)), max(FEWEST, TRIALS // len(candidates)))
    outputs = [reference.run(feeds) for feeds in samples]
    choose = partial(_choose, model, samples, outputs)
    with ThreadPoolExecutor(threads) as pool:
        chosen = pool.map(choose, candidates, candidates.values())
        return dict(track(zip(candidates, chosen, strict=True), len(candidates), "choosing ranges"))


def _candidates(histogram: Histogram, dtype: str) -> dict[Observer, _Parameters]:
    """Return the distinct quantizations among those of all observers, each under the first that proposes it."""
    distinct: dict[tuple[float, int], Observer] = {}
    for observer in Observer:
        low, high = value_range(histogram, observer, dtype)
        scale, zero_point = numerics.affine_scale(np.array([low]), np.array([high]), dtype)
        distinct.setdefault((float(scale[0]), int(zero_point[0])), observer)
    return {observer: (np.array(scale, np.float32), np.array(zero_point, dtype))
            for (scale, zero_point), observer in distinct.items()}  # fmt: skip


def _choose(
    model: ir.Model,
    samples: Sequence[Sample],
    outputs: Sequence[runtime.Outputs],
    name: str,
    candidates: Mapping[Observer, _Parameters],
) -> Observer:
    before, behind = _split_at(model, name, next(iter(candidates.values()))[1].dtype)
    if len(candidates) == 1 or behind is None:
        return next(iter(candidates))
    errors = {observer: OutputError() for observer in candidates}
    for feeds, reference in zip(samples, outputs, strict=True):
        values = dict(feeds) if before is None else {**feeds, **before.run(feeds)}
        values[_FLOAT] = values[name]
        for observer, (scale, zero_point) in candidates.items():
            errors[observer].add(reference, behind.run({**values, _SCALE: scale, _ZERO_POINT: zero_point}))
    return min(errors, key=lambda observer: errors[observer].value)


def _split_at(model: ir.Model, name: str, dtype: np.dtype[Any]) -> tuple[Section | None, Section | None]:
    """Return the graph before a tensor (None where that is an input) and, with the tensor quantized, the one behind it.

    The latter is None where the tensor reaches no output.
    """
    copy = model.clone()
    graph, nodes = copy.graph, list(copy.graph)
    values = ir.convenience.create_value_mapping(graph)
    producer = values[name].producer()
    cut = 0 if producer is None else nodes.index(producer) + 1
    live = [key for key in live_values(graph, cut) if key != name]
    produced = [key for key in (name, *live) if values[key].producer() is not None]
    before = section(copy, live_values(graph, 0, cut), produced) if produced else None
    later = {output for node in nodes[cut:] for output in node.outputs}
    later.add(_quantize_here(graph, values[name], dtype))
    outputs = [value.name for value in graph.outputs if value in later and value.name]
    behind = section(copy, [_FLOAT, _SCALE, _ZERO_POINT, *live], outputs) if outputs else None
    return before, behind


def _quantize_here(graph: ir.Graph, value: ir.Value, dtype: np.dtype[Any]) -> ir.Value:
    """Put Q → DQ behind a value, their parameters inputs of the graph; return what its readers get instead."""
    scale = ir.val(_SCALE, ir.DataType.FLOAT, ())
    zero_point = ir.val(_ZERO_POINT, ir.DataType.from_numpy(dtype), ())
    graph.inputs.extend([scale, zero_point])
    uses = list(value.uses())
    quantize = ir.node("QuantizeLinear", [value, scale, zero_point])
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero_point])
    graph.extend([quantize, dequantize])
    real = dequantize.outputs[0]
    real.name, value.name = value.name, _FLOAT
    real.type, real.shape = value.type, value.shape
    for node, index in uses:
        node.replace_input_with(index, real)
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = real
    graph.sort()
    return real


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
    return Section(runtime.Session(part, optimize=optimize), tuple(inputs))


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


def spread(data: Dataset, sample_bytes: int, most: int = SAMPLES) -> list[Sample]:
    """Return at most `most` samples, spread evenly, so that `sample_bytes` of each are within `MEMORY` together."""
    count = len(data)
    wanted = min(count, most, SAMPLES, max(1, MEMORY // max(1, sample_bytes)))
    chosen = set(np.linspace(0, count - 1, wanted).round().astype(int).tolist())
    return [feeds for index, feeds in enumerate(data) if index in chosen]


def nbytes(values: runtime.Feeds) -> int:
    """Return the bytes of some arrays together."""
    return sum(array.nbytes for array in values.values())
