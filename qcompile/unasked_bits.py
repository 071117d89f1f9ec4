"""Where weights get fewer bits though nobody asked for it: a large file, a small flash."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qcompile.backends.base import Backend
from qcompile.backends.integer.fix_length import at_length
from qcompile.calibration import Calibration
from qcompile.core.lengths import Lengths
from qcompile.core.plan import QuantPlan
from qcompile.options import Options
from qcompile.passes.insert_qdq import InsertQdq
from qcompile.passes.read_plan import is_quantized
from qcompile.weight_losses import FOUR, Planned, packable, takes_four

#: Without a budget, what the file of a model of so many bytes or more is to take at most, in parts of float's: a
#: quarter, and what goes with codes.
QUARTER, LARGE = 0.26, 10e6


def above_a_quarter(
    canonical: ir.Model, calibration: Calibration, planned: Planned, backend: Backend, options: Options
) -> bool:
    """Tell whether a large model's file is above a quarter of float's with eight bits, and nobody said what it may be.

    Scales, biases and what spoils the outputs in eight bits take bytes too. Where four bits are stored as eight, they
    are no remedy; where kernels take them as they are, constants of integers are beside the weights, a few hundredths
    that are not worth decibels.
    """
    free = options.weights == "auto" and not (options.max_size or options.max_bops or options.min_fidelity)
    large = calibration.float_bytes >= LARGE
    if not (free and large) or takes_four(canonical, planned):
        return False
    eight = written_bytes(canonical, planned({}), backend)
    if eight <= QUARTER * calibration.float_bytes:
        return False
    return written_bytes(canonical, planned(dict.fromkeys(packable(canonical, planned), FOUR)), backend) < eight


def short_of_flash(canonical: ir.Model, planned: Planned, backend: Backend, options: Options) -> int | None:
    """Return the bytes that a device's flash has for constants, where all weights in eight bits take more."""
    room = backend.room(options.limits) if options.weights in ("auto", "mixed") else None
    if room is None or is_quantized(canonical) or not takes_four(canonical, planned):
        return None
    return room if written_bytes(canonical, planned({}), backend) > room else None


def written_bytes(model: ir.Model, plan: QuantPlan, backend: Backend) -> int:
    """Return the bytes of the file that a plan leads to."""
    written, lengths = InsertQdq(plan)(model.clone()).model, _lengths(plan)
    return backend.size(written if lengths is None else at_length(written, lengths.at(lengths.sizes[-1])))


def _lengths(plan: QuantPlan) -> Lengths | None:
    """Return the lengths that a plan is for; what is stored is the same at each."""
    shapes = {name: tuple(tuple(size) if isinstance(size, Sequence) else size for size in shape)
              for name, shape in plan.options.get("shape", {}).items()}  # fmt: skip
    return Lengths.of(shapes)
