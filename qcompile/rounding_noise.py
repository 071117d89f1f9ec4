"""What float32's last digits make of a QDQ model: where it magnifies them, no kernel can be held to less.

A sum in another order is off by some 1e-6 of itself, and a number that lies near the middle of two codes then becomes
the other one. Most models make little of that. One that amplifies a code's step from layer to layer moves its outputs
by as much as quantization does, whichever kernels run it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from qcompile.calib.data import Sample
from qcompile.core import runtime
from qcompile.fidelity import Fidelity
from qcompile.passes import structure

#: Scales are off by at most so much of themselves; so many models with such scales are run: on a single sample most of
#: them change no code that matters, and few of them much.
DIGITS, MODELS = 2.0**-20, 16


def nudged(model: ir.Model, seed: int) -> ir.Model:
    """Return a QDQ model with each activation's scale off in its last digits, by up to `DIGITS` of it."""
    result, random = model.clone(), np.random.default_rng(seed)
    scales = [node.inputs[1] for node in result.graph if node.op_type == "QuantizeLinear"]
    for value in dict.fromkeys(scale for scale in scales if scale is not None):
        scale = structure.constant(value)
        if scale is not None and scale.dtype == np.float32:
            off = scale * np.float32(1.0 + DIGITS * random.uniform(-1.0, 1.0))
            value.const_value = ir.tensor(off, name=value.name)
    return result


def rounding_noise(
    quantized: ir.Model, samples: Iterable[Sample], expected: Sequence[runtime.Outputs]
) -> dict[str, float]:
    """Return how near a QDQ model is to itself with scales off in their last digits: the least SQNR, by output, in dB.

    Parameters
    ----------
    quantized : onnx_ir.Model
    samples : iterable of Sample
        As many as there are of `expected`.
    expected : sequence of Outputs
        What the model makes of them, run as written.
    """
    sessions = [runtime.Session(nudged(quantized, seed), optimize=False) for seed in range(MODELS)]
    found = [Fidelity() for _ in sessions]
    for feeds, outputs in zip(samples, expected, strict=True):
        for session, fidelity in zip(sessions, found, strict=True):
            moved = session.run(feeds)
            fidelity.add({name: y for name, y in outputs.items() if name in moved}, moved)
    return {name: min(of.outputs[name].sqnr for of in found) for name in found[0].outputs}
