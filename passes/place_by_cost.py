"""Place by cost: which operators gain from integers once Q, DQ and changes of layout are paid for.

Each operator has one price in float and one in integers, and each tensor has prices for being converted between what
writes and what reads it. Which operators to leave in float so that the sum is least is a minimum cut (Picard and
Ratliff 1975), solved here as a linear program: its rows are differences of choices, so that its corners are whole.
Which of them so that noise is least within a budget of time is an integer program with the same rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import scipy.optimize
import scipy.sparse

from qcompile.core.plan import Precision
from qcompile.passes import structure
from qcompile.passes.highs import milp
from qcompile.passes.place import Placement

#: Digits of a microsecond to which prices count.
DIGITS = 3
#: What all time is worth, in parts of all noise, where there is a budget of time.
QUIET = 1e-5
#: Seconds after which the best placement that was found is taken; what is known today takes less than one.
SECONDS = 60.0


@dataclass(frozen=True)
class Conversion:
    """What it takes to turn a tensor from one form into another, in microseconds.

    Parameters
    ----------
    quantize, dequantize : float
        Between plain floats and codes, with the transpose into the layout of integer kernels where there is one.
    block, unblock : float
        Between plain floats and the blocked layout of float convolutions; 0 where there is none.
    """

    quantize: float
    dequantize: float
    block: float = 0.0
    unblock: float = 0.0


@dataclass(frozen=True)
class Prices:
    """What a model's parts take, in microseconds.

    Parameters
    ----------
    as_float, as_integer : mapping of str to float
        By node name; one that is missing takes nothing (it is fused into another).
    conversions : mapping of str to Conversion
        By value name.
    blocked : collection of str
        Names of the nodes that work on the blocked layout when they are in float.
    """

    as_float: Mapping[str, float]
    as_integer: Mapping[str, float]
    conversions: Mapping[str, Conversion]
    blocked: Collection[str] = frozenset()


def cheapest_in_float(model: ir.Model, placement: Placement, prices: Prices) -> set[str]:
    """Return the names of the operators to leave in float although they could be integers.

    Parameters
    ----------
    model : onnx_ir.Model
    placement : Placement
        With every operator in integers that can be.
    prices : Prices
    """
    problem, names = _problem(model, placement, prices)
    return problem.zeros(names)


def quietest_in_float(
    model: ir.Model, placement: Placement, prices: Prices, sources: Sequence[Source], budget: float
) -> set[str] | None:
    """Return the names of the operators to leave in float so that noise is least and time within a budget.

    None where not even the fastest placement is. It is an integer program: under a budget corners need not be whole.

    Parameters
    ----------
    model : onnx_ir.Model
    placement : Placement
        With every operator in integers that can be.
    prices : Prices
    sources : sequence of Source
    budget : float
        Microseconds more than what everything in float takes; less is negative.
    """
    problem, names = _problem(model, placement, prices)
    for source in sources:
        problem.blame(source.noise, [name for name in source.operators if name in problem.index])
    return problem.quietest(names, budget)


@dataclass(frozen=True)
class Source:
    """What adds noise as long as one of some operators is in integers.

    Parameters
    ----------
    noise : float
    operators : tuple of str
        By node name.
    """

    noise: float
    operators: tuple[str, ...]


def _problem(model: ir.Model, placement: Placement, prices: Prices) -> tuple[_Problem, list[str]]:
    """Return the prices of all choices, and the operators that have one."""
    problem = _Problem()
    nodes = [node for node in model.graph if structure.node_name(node) in placement.ops]
    owners = _owners(nodes, placement)
    for node in nodes:
        name = structure.node_name(node)
        makers = [_owner(value.producer(), owners) for value in structure.activation_inputs(node)]
        # What stays in float in any case may be fused with a float producer, and not with an integer one.
        payer = owners[name] or next(filter(None, makers), "")
        if payer:
            problem.charge(payer, prices.as_integer.get(name, 0.0) - prices.as_float.get(name, 0.0))
        if owners[name] and not structure.is_linear(node):
            # An elementwise operator takes codes where they arrive as such.
            for maker in makers:
                if maker != owners[name]:
                    problem.demand(_if_integer(maker), _if_integer(owners[name]))
    for value in (*model.graph.inputs, *(value for node in nodes for value in node.outputs)):
        if (conversion := prices.conversions.get(structure.name_of(value))) is not None:
            _convert(problem, value, conversion, owners, placement, prices.blocked)
    names = sorted(set(filter(None, owners.values())))
    for name in names:
        problem.charge(name, 0.0)
    return problem, names


def _owners(nodes: Sequence[ir.Node], placement: Placement) -> dict[str, str]:
    """Return for each node the operator whose choice is its own too, "" where it stays in float in any case."""
    absorbing = {op.output: name for name, op in placement.ops.items() if op.output}
    owners = {}
    for node in nodes:
        name = structure.node_name(node)
        op = placement.ops[name]
        # An absorbed activation goes where the operator goes that absorbs it.
        own = absorbing.get(structure.name_of(node.outputs[0]), "") if op.reason else name
        owners[name] = own if op.precision is Precision.INTEGER else ""
    return owners


def _owner(node: ir.Node | None, owners: Mapping[str, str]) -> str:
    return "" if node is None else owners.get(structure.node_name(node), "")


@dataclass(frozen=True)
class _Indicator:
    """A number that is 0 or 1: constant + sign · (whether an operator is in integers)."""

    constant: float = 0.0
    sign: float = 0.0
    name: str = ""


def _if_integer(name: str) -> _Indicator:
    return _Indicator(0.0, 1.0, name) if name else _Indicator()


def _if_blocked(node: ir.Node | None, owners: Mapping[str, str], blocked: Collection[str]) -> _Indicator:
    if node is None or structure.node_name(node) not in blocked:
        return _Indicator()
    owner = _owner(node, owners)
    return _Indicator(1.0, -1.0, owner) if owner else _Indicator(1.0)


def _convert(
    problem: _Problem,
    value: ir.Value,
    conversion: Conversion,
    owners: Mapping[str, str],
    placement: Placement,
    blocked: Collection[str],
) -> None:
    """Price what it takes to bring a value from the form that it is made in to those that it is read in."""
    producer = value.producer()
    maker = _owner(producer, owners)
    readers = [node for node in structure.readers(value) if not maker or _owner(node, owners) != maker]
    written = placement.ops[maker].output if maker else ""
    gives_codes, gives_blocks = (
        _if_integer(maker if written == value.name else ""),
        _if_blocked(producer, owners, blocked),
    )
    # For each reader whether it wants codes, and whether blocks; the caller of the model wants neither.
    wants = [(_if_integer(_owner(node, owners)), _if_blocked(node, owners, blocked)) for node in readers]
    wants += [(_Indicator(), _Indicator())] if value.is_graph_output() else []
    problem.convert(conversion.quantize, [(codes, gives_codes) for codes, _ in wants])
    problem.convert(conversion.dequantize, [(gives_codes, codes) for codes, _ in wants])
    problem.convert(conversion.unblock, [(gives_blocks, blocks) for _, blocks in wants])
    problem.convert(conversion.block, [(blocks, gives_blocks) for _, blocks in wants])


@dataclass
class _Problem:
    """The least sum of prices over choices, 1 for integers and 0 for float, and over conversions that follow."""

    index: dict[str, int] = field(default_factory=dict)
    prices: list[float] = field(default_factory=list)
    rows: list[tuple[dict[int, float], float]] = field(default_factory=list)
    noise: dict[int, float] = field(default_factory=dict)

    def _column(self, name: str) -> int:
        if name not in self.index:
            self.index[name] = self._new(0.0)
        return self.index[name]

    def _new(self, microseconds: float) -> int:
        self.prices.append(microseconds)
        return len(self.prices) - 1

    def charge(self, name: str, microseconds: float) -> None:
        """Pay if an operator is in integers."""
        self.prices[self._column(name)] += microseconds

    def demand(self, more: _Indicator, less: _Indicator, column: int | None = None) -> None:
        """Let z + more ≥ less, where z is a column, or 0."""
        row: defaultdict[int, float] = defaultdict(float, {} if column is None else {column: 1.0})
        for indicator, sign in ((more, 1.0), (less, -1.0)):
            if indicator.name:
                row[self._column(indicator.name)] += sign * indicator.sign
        self.rows.append((dict(row), less.constant - more.constant))

    def convert(self, microseconds: float, cases: Sequence[tuple[_Indicator, _Indicator]]) -> None:
        """Pay once if in any of the cases the first is 1 and the second 0."""
        cases = [(wanted, given) for wanted, given in cases if wanted != given and wanted != _Indicator()]
        if microseconds > 0.0 and cases:
            z = self._new(microseconds)
            for wanted, given in cases:
                self.demand(given, wanted, z)

    def blame(self, noise: float, names: Sequence[str]) -> None:
        """Count noise if any of these operators is in integers."""
        if noise > 0.0 and names:
            z = self._new(0.0)
            self.noise[z] = noise
            for name in names:
                self.demand(_Indicator(), _if_integer(name), z)

    def zeros(self, names: Sequence[str]) -> set[str]:
        """Return which of these are 0 where all is cheapest; of equally cheap solutions one with many of them."""
        if not names:
            return set()
        columns = [self.index[name] for name in names]
        prices = np.round(self.prices, DIGITS)
        prices[columns] += 10.0**-DIGITS / (1 + len(columns))
        found = milp(prices, bounds=(0, 1), constraints=self._constraints())
        assert found.x is not None, found.message
        return {name for name, column in zip(names, columns, strict=True) if found.x[column] < 0.5}

    def quietest(self, names: Sequence[str], budget: float) -> set[str] | None:
        """Return which of these are 0 where noise is least and the sum of prices within a budget."""
        columns = [self.index[name] for name in names]
        total, prices = sum(self.noise.values()), np.round(self.prices, DIGITS)
        if not names or total == 0.0:
            return set() if budget >= 0.0 else None
        objective = np.zeros(len(prices))
        objective[list(self.noise)] = np.array(list(self.noise.values())) / total
        # Of equally quiet placements the cheapest: time counts, for less than any noise that can be told.
        objective += QUIET * prices / max(1.0, float(np.abs(prices).sum()))
        whole = np.zeros(len(prices))
        whole[columns] = 1.0
        constraints = [*self._constraints(), scipy.optimize.LinearConstraint(prices[None, :], -np.inf, budget)]
        found = milp(
            objective, integrality=whole, bounds=(0, 1), constraints=constraints, options={"time_limit": SECONDS}
        )
        if found.x is None:
            return None
        return {name for name, column in zip(names, columns, strict=True) if found.x[column] < 0.5}

    def _constraints(self) -> list[scipy.optimize.LinearConstraint]:
        """Return the rows."""
        matrix = scipy.sparse.lil_array((len(self.rows), len(self.prices)))
        for place, (row, _) in enumerate(self.rows):
            for column, factor in row.items():
                matrix[place, column] = factor
        bounds = [constant for _, constant in self.rows]
        return [scipy.optimize.LinearConstraint(matrix.tocsr(), bounds, np.inf)] if self.rows else []
