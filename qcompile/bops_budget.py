"""A budget of bit operations: how many a model takes (`passes/bit_operations.py`), and what there are at most."""

from __future__ import annotations

import math
from collections.abc import Collection

import onnx_ir as ir

from qcompile.budget import Budget
from qcompile.calibration import Calibration
from qcompile.core.errors import BudgetError, UsageError
from qcompile.core.plan import QuantPlan
from qcompile.options import Options
from qcompile.passes.bit_operations import bit_operations, float_operations
from qcompile.passes.resources import Resource
from qcompile.weight_losses import EIGHT, FOUR


def operations_of(
    canonical: ir.Model, plan: QuantPlan, calibration: Calibration, options: Options, weights: Collection[str] = ()
) -> tuple[Resource, ...]:
    """Return bit operations as a resource, where multiplications were counted.

    Parameters
    ----------
    canonical : onnx_ir.Model
    plan : QuantPlan
    calibration : Calibration
    options : Options
        Its `max_bops` is the budget.
    weights : collection of str
        Those whose bits are to be chosen; others have what the plan says.

    Raises
    ------
    BudgetError
        If fewer bits do not suffice for the budget.
    UsageError
        If there is a budget, and multiplications were not counted.
    """
    text, macs = options.max_bops, calibration.macs
    if not macs:
        if text is None:
            return ()
        fact = "has no count of multiplications, which --max-bops needs: there are none, or it was not asked for"
        raise UsageError("calibration", fact, "calibrate again with --weights mixed or --max-bops, or leave it out")
    whole = float_operations(macs)
    most = math.inf if text is None else Budget.parse(text, "--max-bops").of(whole)
    found = bit_operations(canonical, plan, macs, weights, (EIGHT, FOUR), most)
    if found.least > most:
        reached = f"{found.least:.4g} of {most:.4g} bit operations, {found.least / whole:.4f}x of float's"
        fact = f"cannot be met: with weights in as few bits as they may have a run takes {reached}"
        raise BudgetError(f"--max-bops {text}", fact, "give a larger budget")
    return (found,)
