"""Translation validation: what a rounding pass wrote is held to what it was told to write, number by number.

Such a pass may move the outputs, so that running the model tells little of it. But what it was told is known: the plan,
the codes, the corrections. So each of its results is read back without its help and compared with the model in front of
it (Pnueli, Siegel and Singerman 1998, "Translation Validation"): every operator is still there and reads what it read,
codes stand only where the plan has them, and no constant is further from its float than its step explains.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.core import numerics
from qcompile.core.contract import Pass
from qcompile.core.errors import VerificationError
from qcompile.core.plan import Precision, QuantPlan, Role, TensorQuant
from qcompile.origins import MistranslationError, Read, Stored, read
from qcompile.passes import structure
from qcompile.passes.correct_bias import CorrectBias
from qcompile.passes.insert_qdq import InsertQdq
from qcompile.passes.round_weights import RoundWeights
from qcompile.passes.split import Split
from qcompile.ramps import hold_split

Array = npt.NDArray[Any]
#: Half a step, and what float32 may add to that in the quotient by which codes of sixteen bits are found.
HALF_STEP = 0.505
#: Parts of a number that float32 arithmetic on it may be off by.
ROUNDING = 1e-6
#: Types whose scales may clip: where codes are few, the largest weights are given up for shorter steps.
FEW = 4
#: Elements that are compared at once.
PIECE = 1 << 20


#: Judges one input of a node, by node, index and what it was and is; returns what is wrong, or nothing.
Judge = Callable[[ir.Node, int, ir.Value | None, Read | None, Read | None], str]


def validate(pass_: Pass, before: ir.Model, after: ir.Model, refused: Collection[str] = ()) -> None:
    """Hold what a pass wrote to what it was told, where that is known number by number.

    Parameters
    ----------
    pass_ : Pass
    before, after : onnx_ir.Model
    refused : collection of str
        Operators that it left alone, and said so.

    Raises
    ------
    VerificationError
        Naming the first operator where they differ.
    """
    try:
        if isinstance(pass_, InsertQdq) and pass_.plan.tensors:
            chosen = {} if pass_.rounded is None else pass_.rounded.codes
            _hold(before, after, _Planned(pass_.plan, _by_tensor(after, chosen)).judge)
        elif isinstance(pass_, Split):
            hold_split(pass_, before, after, refused)
        elif isinstance(pass_, RoundWeights):
            _hold(before, after, _Rounded(_by_tensor(after, pass_.codes)).judge)
        elif isinstance(pass_, CorrectBias):
            asked = {name: of for name, of in pass_.corrections.items() if name not in refused}
            _hold(before, after, _Corrected(asked, after).judge)
    except MistranslationError as error:
        raise VerificationError(f"pass {type(pass_).__name__}", str(error), "report it with the model") from error


def _by_tensor(model: ir.Model, codes: Mapping[str, numerics.IntArray]) -> dict[int, numerics.IntArray]:
    return {id(model.graph.initializers[name].const_value): of for name, of in codes.items()}


#: What carries codes, and computes nothing else.
CARRIERS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")


def _hold(before: ir.Model, after: ir.Model, judge: Judge) -> None:
    """Compare two models operator by operator."""
    old, new = ({structure.node_name(node): node for node in _computing(model)} for model in (before, after))
    for name in (*(old.keys() - new.keys()), *(new.keys() - old.keys())):
        raise MistranslationError(name, "the operator was left out" if name in old else "the operator was not there")
    for name, node in old.items():
        other = new[name]
        if (node.domain, node.op_type) != (other.domain, other.op_type) or not _same_attributes(node, other):
            raise MistranslationError(name, f"{node.op_type} became another operator")
        for index in range(max(len(node.inputs), len(other.inputs))):
            mine = node.inputs[index] if index < len(node.inputs) else None
            its = other.inputs[index] if index < len(other.inputs) else None
            if fact := judge(other, index, mine, read(mine), read(its)):
                raise MistranslationError(name, f"input {index} {fact}")
    for mine, its in zip(before.graph.outputs, after.graph.outputs, strict=True):
        one, two = read(mine), read(its)
        if mine.name != its.name or (one and one.source) != (two and two.source):
            raise MistranslationError(str(mine.name), "the output is another value")


def _computing(model: ir.Model) -> Iterator[ir.Node]:
    return (node for node in model.graph.all_nodes() if not structure.is_standard(node, *CARRIERS))


def _same_attributes(node: ir.Node, other: ir.Node) -> bool:
    """Compare attributes that are numbers and texts; subgraphs are compared by their own operators."""
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS, ir.AttributeType.TENSOR)
    mine, its = ({key: value.value for key, value in one.attributes.items() if value.type not in kinds}
                 for one in (node, other))  # fmt: skip
    return mine == its


def _same(before: Read | None, after: Read | None) -> str:
    """Say what is wrong where nothing may have changed."""
    if before is None or after is None:
        return "" if before is after else "is there in one of the models only"
    if before.source != after.source:
        return f"is '{_told(after)}', not '{_told(before)}'"
    if before.grid != after.grid:
        return f"is rounded by {after.grid}, not by {before.grid}"
    if before.stored is None or after.stored is None or before.stored.same(after.stored):
        return ""
    return "is a constant of other numbers"


def _told(one: Read) -> str:
    return "a constant" if one.source is None else one.source[0]


def _beyond(before: Array, after: Stored, clips: float | None = None) -> str:
    """Say where codes are further from their floats than their step explains.

    Parameters
    ----------
    before : ndarray of float
    after : Stored
    clips : float, optional
        The highest code, where floats beyond it may have been clipped to it.
    """
    real, steps = after.real, np.broadcast_to(after.steps, after.real.shape)
    if before.size != real.size:
        return f"has {real.size} numbers instead of {before.size}"
    before = np.broadcast_to(before, real.shape) if before.ndim <= real.ndim else before.reshape(real.shape)
    rows = max(1, PIECE * len(real) // max(real.size, 1)) if real.ndim else 1
    for start in range(0, max(len(real), 1) if real.ndim else 1, rows):
        at = slice(start, start + rows) if real.ndim else ()
        was, now, step = before[at], real[at], steps[at]
        was = was if clips is None else np.clip(was, -clips * step, clips * step)
        apart = np.abs(was - now) - ROUNDING * np.abs(was)
        if (wrong := ~(apart <= HALF_STEP * step)).any():
            worst = float(np.max(np.where(wrong, apart / np.maximum(step, numerics.SMALLEST_SCALE), 0.0)))
            return f"has {np.count_nonzero(wrong)} codes that are up to {worst:.3g} steps from their numbers"
    return ""


def _unlike(before: Array, after: Stored) -> str:
    """Say so where codes that were not rounded to nearest are further from their floats than zeros would be."""
    real = after.real
    power, noise = (float(np.sum(np.square(part, dtype=np.float64))) for part in (before, before - real))
    return "" if noise <= power else "has codes that are further from their numbers than zeros would be"


@dataclass(frozen=True, eq=False)
class _Planned:
    """What a plan promises of each input of the operators that it is for."""

    plan: QuantPlan
    #: Codes that were chosen by more than the nearest number, by the tensor that the model has them in.
    chosen: dict[int, numerics.IntArray]

    @cached_property
    def leaving(self) -> frozenset[str]:
        return frozenset(op.output for op in self.plan.ops.values() if op.output)

    def judge(self, node: ir.Node, index: int, value: ir.Value | None, before: Read | None, after: Read | None) -> str:
        if value is None or before is None or after is None:
            return "" if before is after else "is there in one of the models only"
        op = self.plan.ops.get(node.name or "")
        precision = Precision.FLOAT if op is None else op.precision
        quant = self.plan.tensors.get(structure.name_of(value))
        if before.stored is None:
            return self._activation(value, quant, precision is Precision.INTEGER, before, after)
        if after.stored is None:
            return "was a constant"
        if quant is not None and quant.role is Role.WEIGHT and precision is not Precision.FLOAT:
            return self._weights(node, index, quant, before.stored, after.stored)
        is_bias = precision is Precision.INTEGER and index == structure.BIAS_INPUT
        return _beyond(before.stored.real, after.stored) if is_bias else _same(before, after)

    def _activation(self, value: ir.Value, quant: TensorQuant | None, integer: bool, before: Read, after: Read) -> str:
        if before.source != after.source:
            return f"is '{_told(after)}', not '{_told(before)}'"
        planned = quant is not None and quant.role is Role.ACTIVATION
        reads = structure.name_of(value) in self.leaving or (integer and structure.is_float32(value))
        maker = value.producer()
        table = maker is not None and maker.op_type == "Gather" and self._is_table(maker)
        if quant is None or not (planned and reads):
            return "" if after.grid is None or table else "is rounded, and the plan has no codes there"
        wanted = (*quant.scale, *quant.zero_point, quant.dtype) if quant.scale else ()
        if after.grid != wanted:
            return f"is rounded by {after.grid}, not by {wanted} as the plan has it"
        return ""

    def _is_table(self, gather: ir.Node) -> bool:
        table = gather.inputs[0]
        quant = None if table is None else self.plan.tensors.get(table.name or "")
        return quant is not None and quant.role is Role.WEIGHT

    def _weights(self, node: ir.Node, index: int, quant: TensorQuant, before: Stored, after: Stored) -> str:
        if node.op_type == "Gather" and index == 0:
            after = _behind(node, after)
        zeros = np.zeros(1) if after.zero_point is None else after.zero_point
        if after.scale is None or after.tensor.dtype.numpy() != np.dtype(quant.dtype):
            return f"is not stored as {quant.dtype}, as the plan has it"
        if not np.array_equal(after.scale.reshape(-1), quant.scales) or np.any(zeros.reshape(-1) != quant.zero_points):
            return "has other scales or zero points than the plan"
        floats = before.real
        if (chosen := self.chosen.get(id(after.tensor))) is not None:
            given = np.array_equal(after.tensor.numpy(), chosen)
            return _unlike(floats, after) if given else "has other codes than were chosen for it"
        if quant.block_size:
            return _unlike(floats, after)
        most = float(numerics.code_range(quant.dtype, symmetric=True)[1])
        return _beyond(floats, after, most if numerics.bits_of(quant.dtype) <= FEW else None)


def _behind(node: ir.Node, codes: Stored) -> Stored:
    """Return a table's codes as they are read behind the lookup, per column."""
    readers = structure.readers(node.outputs[0])
    if len(readers) != 1 or not structure.is_standard(readers[0], "DequantizeLinear"):
        raise MistranslationError(structure.node_name(node), "the rows of a table of codes are read as they are")
    scale, zero_point = (structure.constant(value) for value in readers[0].inputs[1:3])
    rows = node.outputs[0].shape
    axis = readers[0].attributes.get_int("axis", 1)
    last = rows is not None and axis % max(len(rows), 1) == len(rows) - 1
    if scale is None or (scale.ndim and not last):
        raise MistranslationError(structure.node_name(node), "the rows of a table are not dequantized by column")
    return Stored(codes.tensor, scale, zero_point, len(codes.tensor.shape) - 1 if scale.ndim else None)


@dataclass(frozen=True, eq=False)
class _Rounded:
    """What other codes for weights leave as it was: everything but these."""

    codes: dict[int, numerics.IntArray]

    def judge(self, node: ir.Node, index: int, value: ir.Value | None, before: Read | None, after: Read | None) -> str:
        fact = _same(before, after)
        if not fact or before is None or after is None or before.stored is None or after.stored is None:
            return fact
        chosen = self.codes.get(id(after.stored.tensor))
        parameters = before.stored.scale is not None and np.array_equal(before.stored.scale, after.stored.scale)  # type: ignore[arg-type]
        if chosen is None or not parameters:
            return fact
        given = np.array_equal(chosen, after.stored.tensor.numpy())
        return _unlike(before.stored.real, after.stored) if given else "has other codes than were chosen for it"


@dataclass(frozen=True, eq=False)
class _Corrected:
    """What corrections of biases leave as it was: everything but biases, and these by what was asked for."""

    corrections: Mapping[str, tuple[float, ...]]
    model: ir.Model

    @cached_property
    def places(self) -> dict[tuple[str, int], Array]:
        """The corrections, by who adds them and as which input."""
        found = {}
        for node in self.model.graph:
            if structure.node_name(node) in self.corrections:
                correction = np.asarray(self.corrections[structure.node_name(node)], np.float64)
                adds, index = node, structure.BIAS_INPUT
                if node.op_type == "MatMul":
                    adds, at = next(iter(node.outputs[0].uses()))
                    index = 1 - at
                found[structure.node_name(adds), index] = correction
        return found

    def judge(self, node: ir.Node, index: int, value: ir.Value | None, before: Read | None, after: Read | None) -> str:
        correction = self.places.get((structure.node_name(node), index))
        if correction is None or after is None or after.stored is None or (before and before.stored is None):
            return _same(before, after)
        old = np.zeros(correction.shape) if before is None or before.stored is None else before.stored.real
        wanted = old.astype(np.float64) + correction
        edge = numerics.code_range("int32")[1] if after.stored.scale is not None else None
        fact = _beyond(wanted, after.stored, None if edge is None else float(edge))
        return f"is not what it was with its correction: it {fact}" if fact else ""
