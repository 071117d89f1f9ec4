"""Drift: how far quantization moves each linear operator's result on average, channel by channel.

Rounding errors of weights are the same in every run and those of activations are one-sided where a range is clipped:
what is left of both after averaging is a constant that a bias can take back. This is the empirical, sequential bias
correction of Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2,
with one change: positions are weighted by 1 / variance over the channels of the float result. In a transformer a few
tokens are a hundred times the others, and clipping takes most from just those; in the plain mean their error becomes
every token's. A normalization divides by that variance anyway, and convolutions gain from the weights too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.calib.data import Dataset, Sample
from qcompile.calib.output_error import OutputError
from qcompile.calib.sections import Section, at_scores, live_values, section, typed
from qcompile.calib.sensitivity import SAMPLES, spread
from qcompile.calib.work import Cost
from qcompile.calib.workers import abreast
from qcompile.core import runtime
from qcompile.core.contract import Track

#: Share of the mean variance that is added to every position's: a flat patch must not decide for all others.
FLOOR = 1e-2
#: Multiply-accumulates (`work.Cost`) that one walk through the quantized graph, node by node, may take.
WORK = 1e11
#: The same for all runs that tell whether what was made up for helps elsewhere: a single sample can be sure of nothing.
JUDGING = 1e12


def measure_drift(
    reference: ir.Model,
    quantized: ir.Model,
    operators: Sequence[str],
    data: Dataset,
    track: Track[Stage],
    threads: int = 1,
) -> dict[str, tuple[float, ...]]:
    """Measure for each operator what must be added to its result so that its mean is the float model's again.

    The operators come in topological order, and each is measured with all earlier corrections in force. The quantized
    graph is walked from operator to operator, all samples abreast, so that every node runs once per sample. What a
    later stage reads is held for every sample; the number of samples is bounded, reckoned by the first one, so that
    this fits into `sensitivity.MEMORY` and the walk takes no more than `WORK`.

    Parameters
    ----------
    reference : onnx_ir.Model
        The float model.
    quantized : onnx_ir.Model
        The same with Q/DQ nodes; its nodes have kept their names. Topologically sorted.
    operators : sequence of str
        Names of Conv, ConvTranspose, Gemm and MatMul nodes of the main graph, those that will be corrected. What a
        MatMul lacks is measured at its own result, before the Add that will make up for it.
    data : Dataset
        At most `sensitivity.SAMPLES` of it are run, spread evenly.
    track : callable
        Shows progress.
    threads : int
        Samples that run at a time; changes no result.

    Returns
    -------
    dict of str to tuple of float
        By node name, in topological order: weighted mean over samples and positions of (float result - quantized
        result), one number per output channel.
    """
    first = next(iter(data))
    quantized = typed(quantized, first)
    cost = Cost.of(quantized, first)
    stages = _stages(quantized, operators)
    samples = spread(data, cost.peak_bytes, min(SAMPLES, WORK / cost.total))
    means, weights = _expected_means(reference, stages, samples, threads)
    states: list[runtime.Outputs] = [dict(feeds) for feeds in samples]
    drift: dict[str, tuple[float, ...]] = {}
    last: tuple[Stage, npt.NDArray[np.float64]] | None = None
    for stage in track(stages, len(stages), "measuring drift"):

        def advance(pair: tuple[runtime.Outputs, Weights], stage: Stage = stage, last: Any = last) -> Sums:
            state, weight = pair
            if last is not None:
                _shift(state[last[0].result], last[1], last[0].axis)
            stage.advance(state)
            return _sums(state[stage.result], weight[stage.operator], stage.axis)

        parts = abreast(advance, zip(states, weights, strict=True), threads)
        correction = means[stage.operator] - _mean(parts)
        last = stage, correction
        drift[stage.operator] = tuple(map(float, correction))
    return drift


def losses(
    reference: ir.Model, candidates: Sequence[ir.Model], data: Dataset, track: Track[Any], threads: int = 1
) -> list[OutputError]:
    """Return how far each candidate's outputs are from the float model's, in front of a last Softmax or Sigmoid.

    What makes up for quantization fits the samples that it was measured on; whether it also helps elsewhere only others
    can tell, so `data` should be held out from that. All models run as they are defined, without a runtime's fusions,
    so that the answer does not hang on a processor's integer kernels.
    """
    cost = Cost.of(candidates[0], next(iter(data)))
    samples = spread(data, cost.peak_bytes, min(SAMPLES, JUDGING / ((1 + len(candidates)) * cost.total)))
    # One model after the other: each takes what its weights do.
    expected = list(abreast(runtime.Session(at_scores(reference), optimize=False).run, samples, threads))
    errors = []
    for model in track(candidates, len(candidates), "checking what was made up for"):
        found, error = abreast(runtime.Session(at_scores(model), optimize=False).run, samples, threads), OutputError()
        for outputs, one in zip(expected, found, strict=True):
            # By place: in front of a last Softmax that is quantized, values have other names than in float.
            error.add(outputs, dict(zip(outputs, one.values(), strict=True)))
        errors.append(error)
    return errors


#: What positions count, by operator.
Weights = dict[str, npt.NDArray[np.float64]]
#: Weighted sums by channel, and the sum of the weights.
Sums = tuple[npt.NDArray[np.float64], float]


@dataclass(frozen=True)
class Stage:
    """The nodes behind one operator, up to the next one and including it.

    Parameters
    ----------
    operator, result : str
        The node at the end and the value that it produces.
    axis : int
        Channel axis of the result.
    section : Section
    needed : frozenset of str
        What this stage's result and later stages need of all that is known behind it.
    """

    operator: str
    result: str
    axis: int
    section: Section
    needed: frozenset[str]

    def advance(self, state: runtime.Outputs) -> None:
        """Bring the values of one sample from before this stage to behind it."""
        state |= self.section.run(state)
        for name in state.keys() - self.needed:
            del state[name]


def _stages(model: ir.Model, operators: Sequence[str]) -> list[Stage]:
    """Cut the quantized graph behind each operator; what comes behind the last one is left out."""
    nodes, wanted = list(model.graph), frozenset(operators)
    ends = [index + 1 for index, node in enumerate(nodes) if node.name in wanted]
    stages = []
    for start, end in zip([0, *ends], ends, strict=False):
        node = nodes[end - 1]
        result = node.outputs[0].name
        assert node.name is not None and result is not None
        needed = {result, *live_values(model.graph, end, ends[-1])}
        produced = [v.name for inside in nodes[start:end] for v in inside.outputs if v.name in needed and v.name]
        part = section(model, live_values(model.graph, start, end), produced, optimize=False)
        axis = 1 if node.op_type in ("Conv", "ConvTranspose") else -1
        stages.append(Stage(node.name, result, axis, part, frozenset(needed)))
    return stages


def _expected_means(
    reference: ir.Model, stages: Sequence[Stage], samples: Sequence[Sample], threads: int
) -> tuple[dict[str, npt.NDArray[np.float64]], list[Weights]]:
    """Return the float results' means by operator, and for each sample the weights of its positions by operator."""
    results = {node.name: node.outputs[0].name for node in reference.graph}
    names = {stage.operator: str(results[stage.operator]) for stage in stages}
    session = runtime.Session(runtime.with_outputs(reference, list(names.values())))
    sums: dict[str, list[Sums]] = {stage.operator: [] for stage in stages}
    weights: list[Weights] = []
    # Of a sample all results are there at once: no more of them than keep two threads busy.
    for outputs in abreast(session.run, samples, min(threads, 2)):

        def weigh(stage: Stage, outputs: runtime.Outputs = outputs) -> tuple[npt.NDArray[np.float64], Sums]:
            result = outputs[names[stage.operator]]
            found = position_weights(result, stage.axis)
            return found, _sums(result, found, stage.axis)

        weights.append({})
        for stage, (found, part) in zip(stages, abreast(weigh, stages, threads), strict=True):
            weights[-1][stage.operator] = found
            sums[stage.operator].append(part)
    return {operator: _mean(parts) for operator, parts in sums.items()}, weights


def _by_channel(array: npt.NDArray[Any], axis: int) -> npt.NDArray[Any]:
    """Give an array the shape (axes before the channels, channels, axes behind them)."""
    axis %= array.ndim
    return array.reshape(int(np.prod(array.shape[:axis])), array.shape[axis], -1)


def position_weights(array: npt.NDArray[Any], axis: int) -> npt.NDArray[np.float64]:
    """Return 1 / variance over channels for each position, none more than 1 / `FLOOR` of an average position's."""
    variance = _by_channel(array, axis).var(axis=1, dtype=np.float64)
    floor = FLOOR * variance.mean() + float(np.finfo(np.float32).tiny)
    return np.asarray(1.0 / (variance + floor))


def _sums(array: npt.NDArray[Any], weights: npt.NDArray[np.float64], axis: int) -> Sums:
    """Return the weighted sum of each channel over the positions of an array, and that of the weights, in float64."""
    # einsum, not a matrix product: BLAS sums in an order that depends on its threads.
    return np.einsum("acb,ab->c", _by_channel(array, axis), weights), float(weights.sum())


def _mean(parts: Iterable[Sums]) -> npt.NDArray[np.float64]:
    """Return the weighted mean per channel over arrays, in their order."""
    total: Any = 0.0
    weight = 0.0
    for values, weights in parts:
        total, weight = total + values, weight + weights
    return np.asarray(total / weight)


def _shift(array: npt.NDArray[Any], correction: npt.NDArray[np.float64], axis: int) -> None:
    """Add to each channel of what a session returned, which is nobody else's."""
    shape = [1] * array.ndim
    shape[axis] = -1
    array += correction.astype(array.dtype).reshape(shape)
