"""Write a QDQ model in the forms that ONNX Runtime runs fastest, without changing what it computes.

Contrib operators (``com.microsoft``) appear here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from qcompile.backends.ort.legalize.block_matmuls import BlockMatMuls
from qcompile.backends.ort.legalize.drop_bounds import DropBounds
from qcompile.backends.ort.legalize.drop_inferable import DropInferable
from qcompile.backends.ort.legalize.four_bit_blocks import FourBitBlocks
from qcompile.backends.ort.legalize.hide_skip_add import HideSkipAdd
from qcompile.backends.ort.legalize.join_matmul_bias import JoinMatMulBias
from qcompile.backends.ort.legalize.keep_float_convs import KeepFloatConvs
from qcompile.backends.ort.legalize.pack_weights import PackWeights
from qcompile.backends.ort.legalize.requantize_captured import RequantizeCaptured
from qcompile.backends.ort.legalize.sink_factors import SinkFactors
from qcompile.backends.ort.legalize.store_halves import StoreHalves
from qcompile.backends.ort.legalize.tensorrt_placement import (
    DequantizeTables,
    FloatBiases,
    FreeResiduals,
    QuantizeConcats,
)
from qcompile.backends.ort.legalize.unpack_biases import UnpackBiases
from qcompile.backends.ort.legalize.unpack_weights import UnpackWeightsAtLoad
from qcompile.passes.join_activations import JoinActivations

__all__ = ["RULES", "RULES_OF", "legalize"]

#: In their order: a factor that a joined activation leaves sinks into scales before the operators that hold those are
#: rewritten, and what can be left out is known last.
RULES: tuple[ir.passes.PassBase, ...] = (
    DropBounds(),
    JoinActivations(),
    SinkFactors(),
    JoinMatMulBias(),
    UnpackWeightsAtLoad(),
    UnpackBiases(),
    KeepFloatConvs(),
    HideSkipAdd(),
    RequantizeCaptured(),
    PackWeights(),
    StoreHalves(),
    DropInferable(),
)


#: For a GPU: products read codes, everything else has its weights unpacked when the model is loaded.
CUDA_RULES: tuple[ir.passes.PassBase, ...] = (
    JoinActivations(),
    BlockMatMuls(),
    UnpackWeightsAtLoad(),
    PackWeights(),
    DropInferable(),
)
#: For TensorRT: its rules of where Q/DQ may stand, and floats for all that it knows no codes of.
TENSORRT_RULES: tuple[ir.passes.PassBase, ...] = (
    FloatBiases(),
    DequantizeTables(),
    FreeResiduals(),
    QuantizeConcats(),
    FourBitBlocks(),
    UnpackWeightsAtLoad(leave_float=True),
    PackWeights(leave_dequantized=True),
    DropInferable(),
)
#: By the provider of a target's settings.
RULES_OF: Mapping[str, tuple[ir.passes.PassBase, ...]] = {"cpu": RULES, "cuda": CUDA_RULES, "tensorrt": TENSORRT_RULES}


def legalize(model: ir.Model, rules: Sequence[ir.passes.PassBase] = RULES) -> ir.Model:
    """Return the model as it is written for ONNX Runtime; `model` stays as it was.

    Parameters
    ----------
    model : onnx_ir.Model
        With Q/DQ nodes, or in float.
    rules : sequence of onnx_ir.passes.PassBase
        What to apply, in this order.
    """
    legal = model.clone()
    for rule in rules:
        rule(legal)
    return legal
