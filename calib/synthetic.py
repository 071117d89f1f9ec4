"""Synthetic: ranges of activations without data, from what BatchNormalization remembers of the training data.

A BatchNormalization's result has mean β and standard deviation |γ| in each channel, whatever came in (Nagel et al.
2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2). These moments are
propagated by running the model: noise goes in, each normalized result is brought back to the moments that it is known
to have, and what stands between two of them is computed by the model itself, with all that is correlated in it. That
takes no formula per operator, and sums of branches, gates and pools come out as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.calib.collect import Statistics
from qcompile.calib.data import Sample
from qcompile.calib.moments import Moments
from qcompile.calib.observers import Histogram
from qcompile.calib.sections import Section, live_values, section, typed
from qcompile.core import numerics, runtime
from qcompile.core.errors import ModelError

#: Samples of noise: enough for a variance over them where a sample has one number per channel, fewer of large inputs.
SAMPLES, FEWEST = 32, 4
NUMBERS = 1 << 22
#: Length of an axis that the model leaves open.
OPEN = 64
#: The noise is the same in every compile.
SEED = 0
#: Largest max|Δ| / max|y| by which a value of the canonical model may differ from the one whose moments are known.
SAME = 1e-3
#: Linear operators that may stand between known moments and a value: each makes less true what noise tells.
FAR = 2

_LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
#: Operators behind which a value's moments follow from those in front.
_KEEPS = frozenset({
    "Abs", "Add", "AveragePool", "BatchNormalization", "Celu", "Clip", "Concat", "DepthToSpace", "Div", "Dropout",
    "Elu", "Erf", "Exp", "Expand", "Flatten", "Gather", "Gelu", "GlobalAveragePool", "GlobalMaxPool", "HardSigmoid",
    "HardSwish", "Identity", "LeakyRelu", "Max", "MaxPool", "Min", "Mish", "Mul", "Neg", "PRelu", "Pad", "ReduceMax",
    "ReduceMean", "Relu", "Reshape", "Resize", "Selu", "Sigmoid", "Slice", "Softplus", "Softsign", "SpaceToDepth",
    "Split", "Squeeze", "Sub", "Tanh", "Tile", "Transpose", "Unsqueeze", "Upsample",
})  # fmt: skip


def carried_over(
    known: Mapping[str, Moments], model: ir.Model, canonical: ir.Model, feeds: Sample
) -> dict[str, Moments]:
    """Return the moments of those values that the canonical model still has, by trying one sample.

    A rewrite may drop a value, or keep its name for one that is scaled or laid out in another way.
    """
    present = ir.convenience.create_value_mapping(canonical.graph)
    produced = {value.name for node in model.graph for value in node.outputs}
    computed = {name for name, value in present.items() if value.producer() is not None}
    shared = [name for name in known if name in present and (name in produced) == (name in computed)]
    before, after = (
        {**feeds, **runtime.Session(runtime.with_outputs(graph, shared), optimize=False).run(feeds)}
        for graph in (model, canonical)
    )
    return {name: known[name] for name in shared if numerics.relative_error(before[name], after[name]) <= SAME}


def derivable(model: ir.Model, known: Mapping[str, Moments]) -> frozenset[str]:
    """Return the values whose distribution follows from known moments through operators that keep hold of it.

    Parameters
    ----------
    model : onnx_ir.Model
        Canonical, topologically sorted.
    known : mapping of str to Moments
    """
    distance = {value.name: 0 for value in model.graph.inputs if value.name in known}
    for node in model.graph:
        behind = _distance(node, distance)
        for value in node.outputs:
            if value.name in known:
                distance[value.name] = 0
            elif behind is not None:
                distance[value.name] = behind
    return frozenset(name for name in distance if name is not None)


def _distance(node: ir.Node, distance: Mapping[str | None, int]) -> int | None:
    """Return how many linear operators stand between a node's results and known moments, None if they do not follow."""
    data = [value for value in node.inputs if value is not None and not _is_constant(value)]
    floats = [value for value in data if value.dtype is None or value.dtype.is_floating_point()]
    if node.domain not in ("", "ai.onnx") or not floats or any(value.name not in distance for value in floats):
        return None
    far = max(distance[value.name] for value in floats)
    if node.op_type in _LINEAR:
        # A product of two activations lives on what they have to do with one another, which noise does not tell.
        return far + 1 if len(floats) == 1 and far < FAR else None
    return far if node.op_type in _KEEPS else None


def _is_constant(value: ir.Value) -> bool:
    return value.is_initializer() and not value.is_graph_input()


def propagate(
    model: ir.Model, known: Mapping[str, Moments], names: Sequence[str], like: Sample | None = None
) -> Statistics:
    """Run the model on noise, with each result whose moments are known brought to them, and count the named values.

    Parameters
    ----------
    model : onnx_ir.Model
        Canonical, topologically sorted.
    known : mapping of str to Moments
        By value name. Channels are on axis 1.
    names : sequence of str
        Values of the main graph, inputs included.
    like : Sample, optional
        Has the inputs' shapes. Without it, axes that the model leaves open are `OPEN` long, the first one 1.

    Returns
    -------
    Statistics
        Of no sample: nothing that was seen is in them.

    Raises
    ------
    ModelError
        If the model does not run on noise of that shape, or not to finite numbers.
    """
    generator = np.random.default_rng(SEED)
    states = _noise(model, like, generator)
    model = typed(model, states[0])
    histograms = {name: Histogram() for name in names}
    given = [value.name for value in model.graph.inputs if value.name in states[0]]
    for name in given:
        _bring(states, str(name), known, generator)
    _count(states, [str(name) for name in given], histograms)
    for stage in _stages(model, known, names):
        for state in states:
            state |= stage.section.run(state)
        if stage.last is not None:
            _bring(states, stage.last, known, generator)
        _count(states, stage.produced, histograms)
        for state in states:
            for name in state.keys() - stage.needed:
                del state[name]
    return Statistics(histograms)


@dataclass(frozen=True)
class _Stage:
    """The nodes behind one value of known moments, up to the next."""

    section: Section
    produced: tuple[str, ...]
    last: str | None
    needed: frozenset[str]


def _stages(model: ir.Model, known: Mapping[str, Moments], names: Sequence[str]) -> list[_Stage]:
    """Cut the graph behind each value of known moments."""
    nodes, wanted = list(model.graph), frozenset(names)
    ends = [index + 1 for index, node in enumerate(nodes) if any(value.name in known for value in node.outputs)]
    if not ends or ends[-1] < len(nodes):
        ends.append(len(nodes))
    stages = []
    for start, end in zip([0, *ends], ends, strict=False):
        last = next((value.name for value in nodes[end - 1].outputs if value.name in known), None)
        needed = frozenset(live_values(model.graph, end))
        read = needed | wanted | {last}
        produced = tuple(
            value.name for node in nodes[start:end] for value in node.outputs if value.name in read and value.name
        )
        if produced:
            part = section(model, live_values(model.graph, start, end), produced)
            stages.append(_Stage(part, produced, last, needed))
    return stages


def _noise(model: ir.Model, like: Sample | None, generator: np.random.Generator) -> list[runtime.Outputs]:
    """Return samples of white noise, of integers where the model wants these."""
    first = dict(like) if like is not None else runtime.synthetic_feeds(model, SEED, OPEN)
    count = max(FEWEST, min(SAMPLES, NUMBERS // max(1, *(array.size for array in first.values()), 1)))
    return [
        {
            name: generator.standard_normal(array.shape).astype(array.dtype) if array.dtype.kind == "f" else array
            for name, array in first.items()
        }
        for _ in range(count)
    ]


def _count(states: Sequence[runtime.Outputs], names: Sequence[str], histograms: Mapping[str, Histogram]) -> None:
    for name in names:
        if name in histograms:
            for state in states:
                try:
                    histograms[name].add(state[name])
                except ValueError as error:
                    fact = f"noise drives tensor '{name}' to a number that is not finite"
                    raise ModelError("model", fact, "calibrate on data") from error


def _bring(
    states: Sequence[runtime.Outputs], name: str, known: Mapping[str, Moments], generator: np.random.Generator
) -> None:
    """Give a value the moments that it is known to have, over all samples and per channel."""
    if name in known:
        known[name].bring([state[name] for state in states], generator)
