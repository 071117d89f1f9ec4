"""Trials: run a model with some of its tensors quantized, one alone or all together, and measure the outputs' error."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.calib.data import Sample
from qcompile.calib.observers import Histogram, Observer, value_range
from qcompile.calib.output_error import OutputError, in_blocks
from qcompile.calib.sections import Section, is_language, live_values, section
from qcompile.calib.work import Cost
from qcompile.calib.workers import Travelling, Workers
from qcompile.core import numerics, runtime
from qcompile.core.contract import Track

#: Names in the graphs that are run: a tensor before and behind its quantization, and what that is.
_FLOAT, _REAL = "qcompile.trial/float/", "qcompile.trial/real/"
_SCALE, _ZERO_POINT = "qcompile.trial/scale/", "qcompile.trial/zero_point/"

#: By how much a repeat's scales are widened at most: a few steps at the largest codes, a tenth of a decibel in noise.
#: They are never narrowed, which would clip what minmax keeps.
SPREAD = 0.02

#: Scale and zero point of a tensor, each of shape (). A scale of 0 stands for the range of each run's own values.
Parameters = tuple[npt.NDArray[np.float32], numerics.IntArray]
#: What each observer makes of a tensor.
Quantizations = Mapping[Observer, Parameters]


def quantizations(
    histogram: Histogram, observers: Iterable[Observer], dtype: str, dynamic: bool = False, symmetric: bool = False
) -> dict[Observer, Parameters]:
    """Return scale and zero point by each observer; those of a dynamic one only where the tensor may have it."""
    histogram = histogram.mirrored() if symmetric else histogram
    found: dict[Observer, Parameters] = {}
    for observer in observers:
        if dynamic and observer is Observer.DYNAMIC:
            found[observer] = np.zeros((), np.float32), np.zeros((), dtype)
            continue
        low, high = value_range(histogram, observer, dtype)
        scale, zero_point = numerics.affine_scale(np.array(low), np.array(high), dtype)
        if symmetric:
            scale, zero_point = numerics.symmetric_scale(np.array(high), dtype), np.zeros((), np.int64)
        found[observer] = np.asarray(scale, np.float32), np.asarray(zero_point, dtype)
    return found


def distinct(candidates: Quantizations) -> dict[Observer, list[Observer]]:
    """Group the observers that propose the same: each first one with all that agree with it."""
    groups: dict[tuple[float, int], list[Observer]] = {}
    for observer, (scale, zero_point) in candidates.items():
        groups.setdefault((float(scale), int(zero_point)), []).append(observer)
    return {group[0]: group for group in groups.values()}


@dataclass(frozen=True)
class Part:
    """Samples to try tensors on, what each observer makes of the tensors, and how often each sample runs."""

    candidates: Mapping[str, Quantizations]
    samples: Sequence[Sample]
    repeats: int


@dataclass(frozen=True)
class _Scheme:
    """How values are quantized: codes' type, nodes that read them, and which may have each run's own range."""

    dtype: str
    readers: Mapping[str, frozenset[str]]
    dynamic: frozenset[str]

    def quantized(self, model: ir.Model, names: Collection[str]) -> tuple[ir.Model, dict[str, int]]:
        """Return the model with these tensors quantized, and the number of nodes in front of each's QuantizeLinear."""
        copy = model.clone()
        values = ir.convenience.create_value_mapping(copy.graph)
        quantize = {
            name: _quantize_here(
                copy.graph, values[name], name, self.dtype, self.readers.get(name), name in self.dynamic
            )
            for name in names
        }
        copy.graph.sort()
        positions = {node: index for index, node in enumerate(copy.graph)}
        return copy, {name: positions[node] for name, node in quantize.items()}


@dataclass(frozen=True)
class Trials:
    """The runs that quantizations of a model's tensors can be tried in.

    Parameters
    ----------
    model : onnx_ir.Model
        Topologically sorted, every value's element type known.
    rounded : onnx_ir.Model
        The same with its weights rounded: what quantized tensors meet in the end.
    names : sequence of str
        The values that `together` quantizes.
    dtype : str
        Integer type of the codes.
    readers : mapping of str to collection of str
        By value name, the nodes that read its codes; all of them where the value is not listed.
    sample : Sample
        The work is reckoned by this one.
    dynamic : collection of str
        The values whose range may be that of each run's own values.
    symmetric : bool
        Codes are around zero.
    """

    model: ir.Model
    rounded: ir.Model
    names: Sequence[str]
    dtype: str
    readers: Mapping[str, Collection[str]]
    sample: Sample
    dynamic: Collection[str] = ()
    symmetric: bool = False

    @cached_property
    def _cost(self) -> Cost:
        return Cost.of(self.model, self.sample)

    @property
    def work(self) -> int:
        """Multiply-accumulates of one run of the model."""
        return self._cost.total

    @property
    def sample_bytes(self) -> int:
        """Bytes that are held of one sample: its outputs, and what lives between two nodes."""
        return self._cost.peak_bytes

    def work_alone(self, candidates: Mapping[str, Quantizations]) -> int:
        """Return the multiply-accumulates that `alone` takes per sample."""
        before = np.concatenate([[0], np.cumsum(self._cost.work)])
        cuts = _cuts(self.model.graph)
        trials = {name: len(distinct(found)) for name, found in candidates.items()}
        return sum(
            int(before[cuts[name]] + count * (before[-1] - before[cuts[name]])) for name, count in trials.items()
        )

    def together(
        self,
        samples: Sequence[Sample],
        choices: Mapping[str, Mapping[str, Parameters]],
        repeats: int,
        track: Track[tuple[str, OutputError]],
        threads: int,
        expected: Sequence[runtime.Outputs] | None = None,
    ) -> dict[str, OutputError]:
        """Quantize all tensors and weights, by one choice of parameters after another; return the outputs' error.

        Parameters
        ----------
        samples : sequence of Sample
        choices : mapping of str to mapping of str to Parameters
            By the name of the choice and the value's name.
        repeats : int
            How often each sample runs, after the first time with every scale wider by up to `SPREAD`. The noise of one
            run is mostly the chance of its roundings, above all where few numbers come out.
        track : callable
            Shows progress.
        threads : int
        expected : sequence of Outputs, optional
            What `expected` returned for these samples, where somebody has it.
        """
        outputs = self.expected(samples) if expected is None else expected
        session = runtime.Session(self._scheme.quantized(self.rounded, self.names)[0], integer_kernels=False)
        run = partial(_together, session, samples, outputs, repeats, is_language(self.model))
        with ThreadPoolExecutor(threads) as pool:
            errors = pool.map(run, choices.values())
            return dict(track(zip(choices, errors, strict=True), len(choices), "comparing observers"))

    def alone(
        self,
        parts: Sequence[Part],
        track: Track[tuple[str, list[dict[Observer, OutputError]]]],
        workers: Workers,
    ) -> list[dict[str, dict[Observer, OutputError]]]:
        """Quantize one tensor at a time; return, for each part of the samples, the error by tensor and observer.

        The part of the graph before the tensor runs once per sample, the part behind it once per sample, distinct
        quantization and repeat. Every part of the samples has candidates of its own, for the same tensors.
        """
        names = list(parts[0].candidates)
        outputs = [self.expected(part.samples) for part in parts]
        given = Travelling(self.model), self._scheme, parts, outputs
        found = workers.for_model(self.model).each(_each_alone, given, dict.fromkeys(names), track, "choosing ranges")
        return [{name: found[name][index] for name in names} for index in range(len(parts))]

    def weights(self, samples: Sequence[Sample]) -> OutputError:
        """Return the outputs' error with the weights rounded and no tensor quantized."""
        error, session = OutputError(), runtime.Session(self.rounded)
        for feeds, expected in zip(samples, self.expected(samples), strict=True):
            error.add(expected, session.run(feeds))
        return error

    def expected(self, samples: Sequence[Sample]) -> list[runtime.Outputs]:
        """Return what the samples come to in float."""
        session = runtime.Session(self.model)
        return [session.run(feeds) for feeds in samples]

    @property
    def _scheme(self) -> _Scheme:
        readers = {name: frozenset(nodes) for name, nodes in self.readers.items()}
        return _Scheme(self.dtype, readers, frozenset(self.dynamic))


def _each_alone(
    model: Travelling,
    scheme: _Scheme,
    parts: Sequence[Part],
    outputs: Sequence[Sequence[runtime.Outputs]],
    names: Iterable[str],
) -> dict[str, list[dict[Observer, OutputError]]]:
    return {name: _alone(model.model, scheme, parts, outputs, name) for name in names}


def _alone(
    model: ir.Model,
    scheme: _Scheme,
    parts: Sequence[Part],
    outputs: Sequence[Sequence[runtime.Outputs]],
    name: str,
) -> list[dict[Observer, OutputError]]:
    quantized, cuts = scheme.quantized(model, [name])
    before, behind = _split(quantized, cuts[name])
    found = []
    for part, references in zip(parts, outputs, strict=True):
        groups = distinct(part.candidates[name])
        errors = {observer: OutputError() for observer in groups}
        inputs = {observer: _repeats({name: part.candidates[name][observer]}, part.repeats) for observer in groups}
        for feeds, expected in zip(part.samples, references, strict=True):
            if behind is None:
                break
            state = feeds if before is None else {**feeds, **before.run(feeds)}
            for observer, error in errors.items():
                error.add(expected, *(behind.run({**state, **given}) for given in inputs[observer]))
        found.append({observer: errors[first] for first, group in groups.items() for observer in group})
    return found


def _together(
    session: runtime.Session,
    samples: Sequence[Sample],
    outputs: Sequence[runtime.Outputs],
    repeats: int,
    by_position: bool,
    parameters: Mapping[str, Parameters],
) -> OutputError:
    error = OutputError()
    inputs = _repeats(parameters, repeats)
    for feeds, expected in zip(samples, outputs, strict=True):
        found = [expected, *(session.run({**feeds, **given}) for given in inputs)]
        for block in zip(*map(in_blocks, found), strict=True) if by_position else (found,):
            error.add(*block)
    return error


def _repeats(parameters: Mapping[str, Parameters], count: int) -> list[dict[str, npt.NDArray[Any]]]:
    return [_inputs(_widened(parameters, repeat)) for repeat in range(count)]


def _widened(parameters: Mapping[str, Parameters], repeat: int) -> Mapping[str, Parameters]:
    """Return the parameters of a repeat: the first has them as they are."""
    if repeat == 0:
        return parameters
    factors = np.random.default_rng(repeat).uniform(1.0, 1.0 + SPREAD, len(parameters))
    return {name: (np.asarray(scale * factor, np.float32), zero_point)
            for factor, (name, (scale, zero_point)) in zip(factors, parameters.items(), strict=True)}  # fmt: skip


def _inputs(parameters: Mapping[str, Parameters]) -> dict[str, npt.NDArray[Any]]:
    """Return the scales and zero points as what the quantized graph takes them for, its inputs."""
    scales = {_SCALE + name: scale for name, (scale, _) in parameters.items()}
    return scales | {_ZERO_POINT + name: zero_point for name, (_, zero_point) in parameters.items()}


def _split(model: ir.Model, cut: int) -> tuple[Section | None, Section | None]:
    """Return the nodes in front of position `cut` and those from there on, None where the outputs need none of them."""
    graph, nodes = model.graph, list(model.graph)
    live = live_values(graph, cut)
    made = {value.name for node in nodes[:cut] for value in node.outputs}
    produced = [name for name in live if name in made]
    before = section(model, live_values(graph, 0, cut), produced) if produced else None
    later = {value for node in nodes[cut:] for value in node.outputs}
    outputs = [str(value.name) for value in graph.outputs if value in later]
    return before, section(model, live, outputs) if outputs else None


def _cuts(graph: ir.Graph) -> dict[str, int]:
    """Return for each value how many nodes of the sorted graph stand before it."""
    cuts = {str(value.name): 0 for value in graph.inputs}
    for index, node in enumerate(graph):
        cuts |= {str(value.name): index + 1 for value in node.outputs}
    return cuts


def _quantize_here(
    graph: ir.Graph, value: ir.Value, name: str, dtype: str, readers: Collection[str] | None, dynamic: bool
) -> ir.Node:
    """Put Q → DQ behind a value, for some or all of its readers, and return the first node of these.

    The parameters are graph inputs.
    """
    scale = ir.val(_SCALE + name, ir.DataType.FLOAT, ())
    zero_point = ir.val(_ZERO_POINT + name, ir.DataType.from_numpy(np.dtype(dtype)), ())
    graph.inputs.extend([scale, zero_point])
    uses = [(node, index) for node, index in value.uses() if readers is None or node.name in readers]
    first = _or_own_range(graph, value, scale, zero_point) if dynamic else None
    if first is not None:
        scale, zero_point = (node.outputs[0] for node in first[1:])
    quantize = ir.node("QuantizeLinear", [value, scale, zero_point])
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero_point])
    graph.extend([quantize, dequantize])
    real = dequantize.outputs[0]
    real.name, real.type, real.shape = _REAL + name, value.type, value.shape
    for node, index in uses:
        node.replace_input_with(index, real)
    if readers is None and value.is_graph_output() and value.producer() is not None:
        # What the model's caller gets keeps its name.
        graph.outputs[list(graph.outputs).index(value)] = real
        real.name, value.name = value.name, _FLOAT + name
    return quantize if first is None else first[0]


def _or_own_range(graph: ir.Graph, value: ir.Value, scale: ir.Value, zero_point: ir.Value) -> tuple[ir.Node, ...]:
    """Add nodes that take scale and zero point of the value at hand where the scale that is given is 0.

    Returns
    -------
    tuple of onnx_ir.Node
        The first of them, and those that give the scale and the zero point.
    """
    own = ir.node("DynamicQuantizeLinear", [value], num_outputs=3)
    given = ir.node("Cast", [scale], {"to": ir.DataType.BOOL})
    scales = ir.node("Where", [given.outputs[0], scale, own.outputs[1]])
    zero_points = ir.node("Where", [given.outputs[0], zero_point, own.outputs[2]])
    graph.extend([own, given, scales, zero_points])
    return own, scales, zero_points
