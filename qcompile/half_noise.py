"""Which nodes float16 is too coarse for: those whose rounding moves the outputs most, where all of it does too far.

A range tells whether float16 holds a value, not what becomes of its rounding: a network may magnify that of its first
layers a hundredfold. So rounding is simulated, on the float32 model, by Casts that no pass of ours has a part in: what
is kept in float32 here is chosen by the model's own conditioning, and a fault of the pass is found behind it as before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from qcompile import continuous, verify
from qcompile.backends.ort.half import Halve
from qcompile.backends.ort.simulate_halves import simulated
from qcompile.calib.data import Sample
from qcompile.core import numerics, runtime
from qcompile.passes import structure

#: Groups of nodes in a row that are rounded alone at most: a run of the model each.
GROUPS = 64


def coarse_nodes(pass_: Halve, model: ir.Model, samples: Sequence[Sample]) -> dict[str, float]:
    """Return the nodes to keep in float32, with what the rounding of each and of its neighbours moves the outputs by.

    Groups of nodes in a row are rounded alone, on the sample that all of it moves most; those that move the outputs
    most are kept, as many as it takes for the others to stay within the bound that the pass is held to.

    Parameters
    ----------
    pass_ : Halve
        Which nodes can be float16 otherwise.
    model : onnx_ir.Model
    samples : sequence of Sample

    Returns
    -------
    dict of str to float
        max|Δ| / max|y| by node name; empty where nothing moves too far, or rounding to codes hides what does.
    """
    smooth = continuous.without_rounding(model)
    if smooth is None:
        return {}
    search = _Search(pass_, model, smooth, samples, verify.outputs_of(smooth, samples))
    moved = search.moved(search.halves({}), range(len(samples)))
    if max(moved, default=0.0) <= continuous.FORM_BOUND:
        return {}
    return search.run(int(np.argmax(moved)))


@dataclass(frozen=True)
class _Search:
    """A model, and what it makes of the samples where nothing is rounded."""

    pass_: Halve
    model: ir.Model
    smooth: ir.Model
    samples: Sequence[Sample]
    expected: Sequence[runtime.Outputs]

    def run(self, worst: int) -> dict[str, float]:
        """Find the fewest groups, by what each moves on one sample, that suffice on all of them."""
        names = self.halves({})
        groups = [list(map(str, group)) for group in np.array_split(np.array(names), min(GROUPS, len(names)))]
        alone = [self.moved(group, [worst])[0] for group in groups]
        order = sorted(range(len(groups)), key=lambda index: -alone[index])

        def kept(count: int) -> dict[str, float]:
            return {name: float(f"{alone[index]:.2g}") for index in order[:count] for name in groups[index]}

        def enough(count: int) -> bool:
            return max(self.moved(self.halves(kept(count)), range(len(self.samples)))) <= continuous.FORM_BOUND

        return kept(fewest(enough, len(groups)))

    def halves(self, kept: Collection[str]) -> list[str]:
        """Return the nodes in float16, in their order, where some are kept from it."""
        chosen, _ = replace(self.pass_, coarse=dict.fromkeys(kept, "it is kept")).chosen(self.model)
        return [structure.node_name(node) for node in self.model.graph if node in chosen]

    def moved(self, nodes: Collection[str], samples: Sequence[int]) -> list[float]:
        """Return by how much of their largest value the outputs of samples move where nodes are rounded."""
        session = runtime.Session(simulated(self.smooth, frozenset(nodes)), optimize=False)
        found = []
        for index in samples:
            outputs = session.run(self.samples[index])
            pairs = [(y, outputs[name]) for name, y in self.expected[index].items() if y.dtype.kind == "f"]
            found.append(max((numerics.relative_error(y, z) for y, z in pairs), default=0.0))
        return found


def fewest(enough: Callable[[int], bool], most: int) -> int:
    """Return a count that is enough where one less is not, found by doubling and halving; `most` always is.

    Parameters
    ----------
    enough : callable
    most : int
    """
    low, high = 0, 1
    while high < most and not enough(high):
        low, high = high, 2 * high
    high = min(high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
