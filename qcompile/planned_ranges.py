"""The ranges of a plan, read back from its scales and zero points, held to those that its observers chose."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qcompile.calib.observers import value_range
from qcompile.calibration import Calibration
from qcompile.core import numerics
from qcompile.core.errors import VerificationError
from qcompile.core.plan import QuantPlan, TensorQuant
from qcompile.core.target import Target
from qcompile.passes.allocate_bits import HEADROOM, scores_of
from qcompile.passes.place import Placement

#: Half a step, by which a range moves so that zero has a code, and what float32 adds to that.
HALF_STEP = 0.505


def require_ranges(
    canonical: ir.Model, plan: QuantPlan, placement: Placement, calibration: Calibration, target: Target
) -> None:
    """Hold a plan to what was measured: each range reaches as far as it is to, and hardly farther.

    Ranges in four bits are a part of others, and those that follow another tensor's are that one's: these are only held
    to having a code for zero.

    Raises
    ------
    VerificationError
        Naming the tensor.
    """
    sure = scores_of(canonical) if target.integer_only else frozenset()
    for name in placement.activations:
        quant = plan.tensors[name]
        if quant.is_dynamic:
            continue
        scale, zero_point, (lowest, highest) = quant.scale[0], quant.zero_point[0], numerics.code_range(quant.dtype)
        reached = (lowest - zero_point) * scale, (highest - zero_point) * scale
        if not reached[0] <= 0.0 <= reached[1]:
            raise _wrong(name, reached, "has no code for zero")
        if quant.dtype != target.activation_dtype or name in placement.same_scale:
            continue
        seen = calibration.statistics.histograms[name]
        seen = seen.mirrored() if target.symmetric else seen
        low, high = value_range(seen, calibration.choice.observers[name], quant.dtype)
        wanted = min(low, 0.0), max(high, 0.0)
        room = HEADROOM if name in sure else 0.0
        _hold(name, quant, reached, wanted, room)


def _hold(
    name: str, quant: TensorQuant, reached: tuple[float, float], wanted: tuple[float, float], room: float
) -> None:
    step = quant.scale[0]
    if step == 1.0 and wanted[1] - wanted[0] < numerics.SMALLEST_SCALE * 256:
        return  # a constant: any scale will do
    slack = HALF_STEP * step
    if reached[0] > wanted[0] + slack or reached[1] < wanted[1] - slack:
        raise _wrong(name, reached, f"does not hold [{wanted[0]:.4g}, {wanted[1]:.4g}], which was chosen for it")
    widest = np.abs(wanted).max() * 2.0 if quant.zero_point[0] == 0 else wanted[1] - wanted[0]
    if reached[1] - reached[0] > widest + room + 2.0 * step:
        raise _wrong(name, reached, f"is wider than [{wanted[0]:.4g}, {wanted[1]:.4g}], which was chosen for it")


def _wrong(name: str, reached: tuple[float, float], fact: str) -> VerificationError:
    text = f"the range of its codes, [{reached[0]:.4g}, {reached[1]:.4g}], {fact}"
    return VerificationError(f"plan of '{name}'", text, "report it with the model")
