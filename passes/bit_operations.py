"""Bit operations: what the products of a model take where each multiplier has as many bits as its operands.

A multiply-accumulate of weights of b_w bits and activations of b_a counts as b_w · b_a (Yao et al. 2021, *HAWQ-V3*,
arXiv 2011.10680; Baskin et al. 2018, *UNIQ*, arXiv 1804.10969, who add the accumulator's). Floats count as 32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir

from qcompile.core.plan import Precision, QuantPlan, Role, TensorQuant
from qcompile.passes import structure
from qcompile.passes.resources import Resource

#: Bits of a float. Models that compute in float16 are widened before anything is decided.
FLOAT = 32
#: What this resource is called.
WHAT = "bit operations"


def bit_operations(
    model: ir.Model,
    plan: QuantPlan,
    macs: Mapping[str, int],
    weights: Collection[str],
    widths: Collection[int],
    most: float,
) -> Resource:
    """Return the bit operations of a model as a resource that the bits of its weights take.

    Parameters
    ----------
    model : onnx_ir.Model
        Canonical.
    plan : QuantPlan
        Says the bits of activations, and of weights that are not to be chosen.
    macs : mapping of str to int
        By node name, multiply-accumulates of one run.
    weights : collection of str
        Those whose bits are to be chosen.
    widths : collection of int
        The bits that these may have.
    most : float
        The budget.
    """
    fixed, per_bit = 0, dict.fromkeys(weights, 0)
    for node in model.graph:
        count = macs.get(structure.node_name(node), 0)
        if not count:
            continue
        integer = _is_integer(plan, node)
        first, second = (structure.name_of(structure.input_of(node, at)) for at in (0, 1))
        if second in per_bit:
            per_bit[second] += count * _bits(plan.tensors.get(first), integer)
        else:
            fixed += count * _bits(plan.tensors.get(first), integer) * _bits(plan.tensors.get(second), integer)
    taken = {name: {bits: float(bits * per) for bits in widths} for name, per in per_bit.items()}
    return Resource(WHAT, float(fixed), taken, most)


def float_operations(macs: Mapping[str, int]) -> int:
    """Return the bit operations of the model in float."""
    return sum(macs.values()) * FLOAT * FLOAT


def _is_integer(plan: QuantPlan, node: ir.Node) -> bool:
    op = plan.ops.get(structure.node_name(node))
    return op is not None and op.precision is Precision.INTEGER


def _bits(quant: TensorQuant | None, integer: bool) -> int:
    """Return how many bits an operand has: stored ones count, codes of activations where they are what is read."""
    if quant is None or (quant.role is Role.ACTIVATION and not integer):
        return FLOAT
    return int(quant.bits)
