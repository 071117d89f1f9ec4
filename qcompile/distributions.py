"""How the values of quantized tensors are distributed, and which of them their range leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.calib.observers import Histogram
from qcompile.core import model as models
from qcompile.core import numerics
from qcompile.core.plan import QuantPlan, Role, TensorQuant
from qcompile.passes import structure

#: Raised when the meaning of distributions.json changes; docs/schemas/distributions.schema.json describes this version.
SCHEMA_VERSION = 1
#: Most bars of one tensor.
BARS = 64
#: Of a larger weight every n-th value is counted, so that about as many are.
COUNTED = 1 << 20

Content = dict[str, Any]


def distributions(canonical: ir.Model, plan: QuantPlan, histograms: Mapping[str, Histogram]) -> Content:
    """Return the content of distributions.json.

    Parameters
    ----------
    canonical : onnx_ir.Model
        What the plan names: its weights are those that are quantized.
    plan : QuantPlan
    histograms : mapping of str to Histogram
        What calibration saw of activations; empty where a plan is applied without.
    """
    stored = {str(value.name): structure.constant_tensor(value) for value in models.initializers(canonical)}
    tensors: dict[str, Content] = {}
    for name, quant in plan.tensors.items():
        if quant.role is Role.WEIGHT and (tensor := stored.get(name)) is not None:
            tensors[name] = _weight(tensor.numpy().astype(np.float32), quant)
        elif name in histograms and histograms[name].counts.size:
            tensors[name] = _activation(histograms[name], quant)
    return {"schema_version": SCHEMA_VERSION, "tensors": tensors}


def _activation(histogram: Histogram, quant: TensorQuant) -> Content:
    joined = -(-histogram.counts.size // BARS)
    # The bins' own numbers are joined, not their places, so that the edges of bars are multiples of their width.
    bars = (histogram.start + np.arange(histogram.counts.size)) // joined
    counts = np.bincount(bars - bars[0], histogram.counts).astype(np.int64)
    width = histogram.width * joined
    content = {"role": "activation", "dtype": quant.dtype, "unit": "value",
               **_bars(float(bars[0]) * width, width, counts)}  # fmt: skip
    if quant.is_dynamic:
        return content | {"range": None, "outside": None}
    low, high = (float(np.float32(code - quant.zero_point[0]) * quant.scales[0])
                 for code in numerics.code_range(quant.dtype))  # fmt: skip
    half, centres = float(quant.scales[0]) / 2, histogram.centres
    beyond = histogram.counts[(centres < low - half) | (centres > high + half)].sum()
    return content | {"range": [low, high], "outside": _rounded(beyond / histogram.counts.sum())}


def _weight(values: npt.NDArray[np.float32], quant: TensorQuant) -> Content:
    """Return a weight's, in units of the largest magnitude that its channel's codes can have."""
    if quant.block_size:  # its multiple decides what a code reaches, block by block: the channel's own is taken instead
        axes = tuple(axis for axis in range(values.ndim) if axis != quant.axis)
        reach = np.maximum(np.abs(values).max(axis=axes, keepdims=True), np.finfo(np.float32).tiny)
    else:
        low, high = numerics.code_range(quant.dtype, symmetric=numerics.code_range(quant.dtype)[0] < 0)
        steps = np.maximum(high - quant.zero_points, quant.zero_points - low)
        reach = numerics.along_axis(quant.scales * steps, quant.axis, values.ndim)
    relative = (values / reach).reshape(-1)
    relative = relative[:: -(-relative.size // COUNTED)] if relative.size else relative
    most = float(np.abs(relative).max(initial=0.0)) or 1.0
    counts, edges = np.histogram(relative, BARS, (-most, most))
    # Half a step beyond the last code still rounds to it.
    outside = None if quant.block_size else _rounded(float(np.mean(np.abs(relative) > 1.0 + 0.5 / steps.max())))
    return {
        "role": "weight", "dtype": quant.dtype, "unit": "reach of its channel's codes",
        **_bars(float(edges[0]), 2.0 * most / BARS, counts), "range": [-1.0, 1.0], "outside": outside,
    }  # fmt: skip


def _bars(low: float, width: float, counts: npt.NDArray[Any]) -> Content:
    return {"low": _rounded(low), "width": _rounded(width), "counts": [int(count) for count in counts]}


def _rounded(number: float) -> float:
    return float(f"{number:.6g}")
