"""The stage that brings a model to float16: what values reach is measured, then `backends/ort/half.py` rewrites."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from qcompile import continuous
from qcompile.backends.ort.half import Halve, float_values
from qcompile.calib.reach import collect_reach
from qcompile.half_noise import coarse_nodes
from qcompile.job import Job
from qcompile.pipeline import NOISE

#: The `float_dtype` of a target that asks for it.
HALF = "float16"
#: How far beyond the largest value of the data others may reach, and beyond that of inputs that stand in for data.
HEADROOM, GUESSED = 4.0, 16.0
#: Why a node stays in float32 that float16 could compute.
COARSE = (
    "float16's rounding of it and its neighbours alone moves the outputs by {moved:.2g} of their largest value, and "
    "that of all nodes by more than {bound:g}"
)


def halve(job: Job, quantized: ir.Model) -> ir.Model:
    """Compute in float16 what fits it by the calibration data; without data by random inputs, which the report says."""
    data = job.evidence.calibration
    reach = job.pipeline.measure(
        "reach", NOISE, lambda: collect_reach(quantized, float_values(quantized), data, job.track)
    )
    known = job.evidence.calibrated
    fitting = Halve(
        reach,
        HEADROOM if known else GUESSED,
        lambda node: job.backend.halvable(node, job.target),
        "" if known else "random inputs",
    )
    coarse = job.pipeline.measure("float16", NOISE, lambda: coarse_nodes(fitting, quantized, job.evidence.samples))
    reasons = {name: COARSE.format(moved=moved, bound=continuous.FORM_BOUND) for name, moved in coarse.items()}
    halved = job.pipeline.apply(replace(fitting, coarse=reasons), quantized)
    continuous.hold("pass Halve", quantized, halved, job.evidence.samples)
    return halved
