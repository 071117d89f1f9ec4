"""Lower for an execution provider that is not here: write the form that it takes, and hold it to its rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompile.backends.base import Lowered, Placed
from qcompile.backends.integer.lower import with_batch_of_one
from qcompile.backends.ort.legalize.drop_bounds import DropBounds
from qcompile.backends.ort.legalize.unpack_weights import UnpackWeightsAtLoad
from qcompile.backends.ort.phones import coreml, qnn, xnnpack
from qcompile.backends.ort.phones.drop_absorbed import DropAbsorbed
from qcompile.backends.ort.phones.qnn_forms import FixRanges, UnsignMatrices
from qcompile.backends.ort.phones.quantize_constants import QuantizeConstants
from qcompile.backends.ort.phones.rules import is_folded
from qcompile.backends.ort.phones.units import Rule, first_broken, units
from qcompile.core.contract import Refusal
from qcompile.core.plan import Precision, QuantPlan
from qcompile.core.target import OpKind, Target

#: The key of a target's settings that names a provider.
PROVIDER = "provider"


@dataclass(frozen=True)
class Provider:
    """What an execution provider takes.

    Parameters
    ----------
    name : str
    forms : sequence of passes
        Which write a QDQ model in its forms.
    rules : sequence of Rule
    static : bool
        It takes no open shapes.
    """

    name: str
    forms: Sequence[ir.passes.PassBase]
    rules: Sequence[Rule]
    static: bool = False

    def legalized(self, model: ir.Model) -> ir.Model:
        """Return the model as it is written for the provider.

        Raises
        ------
        TargetError
            If it has open shapes that the provider does not take.
        """
        legal = with_batch_of_one(model) if self.static else model.clone()
        for form in self.forms:
            form(legal)
        return legal

    def verdicts(self, legal: ir.Model) -> dict[str, tuple[str, str]]:
        """Return for each operator the rule that it breaks and why, both empty where the provider takes it."""
        return {unit.node.name or "": first_broken(unit, self.rules) for unit in units(legal)
                if not all(map(is_folded, filter(None, unit.node.inputs)))}  # fmt: skip


_QNN_FORMS = (DropBounds(), DropAbsorbed(), QuantizeConstants(), UnsignMatrices(), FixRanges())
PROVIDERS: Mapping[str, Provider] = {
    "qnn": Provider("QNN", _QNN_FORMS, qnn.RULES, static=True),
    "coreml": Provider("CoreML", (DropBounds(), UnpackWeightsAtLoad()), coreml.RULES),
    "xnnpack": Provider("XNNPACK", (DropBounds(), DropAbsorbed(), UnpackWeightsAtLoad()), xnnpack.RULES),
}


def provider_of(target: Target) -> Provider | None:
    """Return the provider that a target is for; none where that is ONNX Runtime's own for CPUs."""
    return PROVIDERS.get(str(target.settings.get(PROVIDER, "")))


def lower(
    provider: Provider, model: ir.Model, plan: QuantPlan, target: Target, here: Mapping[str, str],
    written: tuple[str, ...],
) -> Lowered:  # fmt: skip
    """Tell what the provider takes of a model, by its rules.

    Parameters
    ----------
    provider : Provider
    model : onnx_ir.Model
        As `Provider.legalized` returns it.
    plan : QuantPlan
    target : Target
    here : mapping of str to str
        By operator, the integer kernel that the runtime for CPUs has for it: what the provider leaves falls to that.
    written : tuple of str
        Names of the files that it is in.
    """
    verdicts = provider.verdicts(model)
    kernels, refusals = dict[str, str](), list[Refusal]()
    for name, op in plan.ops.items():
        if op.precision is not Precision.INTEGER or op.reason or name not in verdicts:
            continue
        rule, why = verdicts[name]
        if not rule:
            kernels[name] = f"{provider.name} {op.op_type}"
        elif name in here:
            kernels[name] = f"{here[name]} of the CPU's provider"
        elif provider.static or target.ops[op.op_type].kind is not OpKind.PASSTHROUGH:
            refusals.append(Refusal(name, f"{provider.name} does not take it ({rule}): {why}"))
    note = f"Not run on {provider.name} here: held to what it documents; fidelity is that of the CPU's provider."
    return Lowered(written, kernels, tuple(refusals), notes=(note,), placement=_placement(model, verdicts))


def _placement(model: ir.Model, verdicts: Mapping[str, tuple[str, str]]) -> tuple[Placed, ...]:
    """Return where each operator runs, those first that are left to the host."""
    types = {node.name or "": node.op_type for node in model.graph}
    found = [Placed(name, types[name], why if rule else "") for name, (rule, why) in verdicts.items()]
    return tuple(sorted(found, key=lambda one: not one.host))


def is_halvable(node: ir.Node) -> bool:
    """Tell whether a provider that computes in float16 has an operator; CoreML alone does."""
    return node.op_type in coreml.OPERATORS and not coreml.OPERATORS[node.op_type]
