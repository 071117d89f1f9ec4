"""Place by cost: which operators gain from integers once Q, DQ and changes of layout are paid for.

Each operator has one price in float and one in integers, and each tensor has prices for being converted between what
writes and what reads it. Which operators to leave in float so that the sum is least is a minimum cut; it is solved as
the linear program that it is the dual of, which has whole-numbered solutions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import scipy.optimize
import scipy.sparse

from qcompile.core.plan import Precision
from qcompile.passes import structure
from qcompile.passes.place import Placement

#: Digits of a microsecond to which prices count.
DIGITS = 3


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
    problem = _Problem()
    nodes = [node for node in model.graph if structure.node_name(node) in placement.ops]
    owner = _owners(nodes, placement)
    free = sorted({name for name in owner.values() if name})
    for name in free:
        problem.variable(name)
    for node in nodes:
        name = structure.node_name(node)
        change = prices.as_integer.get(name, 0.0) - prices.as_float.get(name, 0.0)
        # What stays in float in any case may be fused with a float producer, and not with an integer one.
        payer = owner[name] or next((o for o in _producers(node, owner) if o), "")
        if payer:
            problem.charge(payer, change)
    for node in nodes:
        for value in node.outputs:
            _price_tensor(problem, value, owner, placement, prices)
    for value in model.graph.inputs:
        _price_tensor(problem, value, owner, placement, prices)
    for node in nodes:
        # An elementwise operator takes codes where they arrive as such.
        name = owner[structure.node_name(node)]
        if name and not structure.is_linear(node):
            for producer in _producers(node, owner):
                problem.at_most(name, producer)
    return problem.zeros(free)


def _owners(nodes: list[ir.Node], placement: Placement) -> dict[str, str]:
    """Return for each node the operator whose choice is its own too, "" where it stays in float in any case."""
    by_output = {op.output: name for name, op in placement.ops.items() if op.output}
    owner = {}
    for node in nodes:
        name = structure.node_name(node)
        op = placement.ops[name]
        integer = op.precision is Precision.INTEGER
        # An absorbed activation goes where the operator goes that absorbs it.
        absorbed = integer and bool(op.reason)
        owner[name] = (by_output.get(structure.name_of(node.outputs[0]), "") if absorbed else name) if integer else ""
    return owner


def _producers(node: ir.Node, owner: Mapping[str, str]) -> list[str]:
    """Return the owners of what a node reads; "" for an input of the model and for what stays in float."""
    found = []
    for value in structure.activation_inputs(node):
        producer = value.producer()
        found.append("" if producer is None else owner.get(structure.node_name(producer), ""))
    return found


def _price_tensor(
    problem: _Problem, value: ir.Value, owner: Mapping[str, str], placement: Placement, prices: Prices
) -> None:
    conversion = prices.conversions.get(structure.name_of(value))
    producer = value.producer()
    maker = "" if producer is None else owner.get(structure.node_name(producer), "")
    if conversion is None:
        return
    if maker and placement.ops[maker].output != value.name:
        inside = maker and any(owner.get(structure.node_name(r), "") == maker for r in structure.readers(value))
        if inside:
            return  # between an operator and the activation that it absorbs
        coded = False
    else:
        coded = bool(maker)
    blocked = producer is not None and structure.node_name(producer) in prices.blocked
    names = [structure.node_name(reader) for reader in structure.readers(value)]
    codes = sorted({owner[name] for name in names if owner.get(name)})
    plain = any(not owner.get(name) and name not in prices.blocked for name in names) or value.is_graph_output()
    fixed = any(not owner.get(name) and name in prices.blocked for name in names)
    writer = maker if coded else ""
    problem.convert(conversion.quantize, to=codes, unless=writer)
    if coded:
        problem.convert(conversion.dequantize, source=writer, always=plain or fixed, unless_all=codes)
    readers_blocked = [owner[name] for name in names if owner.get(name) and name in prices.blocked]
    if blocked:
        problem.unblock(conversion.unblock, maker, plain, codes)
    else:
        problem.block(conversion.block, "", readers_blocked, fixed)
    if blocked and coded:
        problem.block(conversion.block, writer, readers_blocked, fixed)


@dataclass
class _Problem:
    """min Σ price · z with z ≥ differences of choices: 1 is integers, 0 is float."""

    index: dict[str, int] = field(default_factory=dict)
    price: list[float] = field(default_factory=list)
    rows: list[tuple[dict[int, float], float]] = field(default_factory=list)
    charges: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def variable(self, name: str) -> int:
        if name not in self.index:
            self.index[name] = len(self.price)
            self.price.append(0.0)
        return self.index[name]

    def charge(self, name: str, microseconds: float) -> None:
        """Pay if an operator is in integers."""
        self.price[self.variable(name)] += microseconds

    def at_most(self, name: str, other: str) -> None:
        """Let an operator be in integers only if another is; never if there is no other."""
        row = {self.variable(name): -1.0}
        if other:
            row[self.variable(other)] = row.get(self.variable(other), 0.0) + 1.0
        self.rows.append((row, 0.0))

    def _auxiliary(self, microseconds: float) -> int:
        self.price.append(microseconds)
        return len(self.price) - 1

    def _at_least(self, z: int, plus: Collection[str], minus: Collection[str], constant: float) -> None:
        """Demand z ≥ Σ plus - Σ minus + constant."""
        row: dict[int, float] = {z: 1.0}
        for names, sign in ((plus, -1.0), (minus, 1.0)):
            for name in names:
                row[self.variable(name)] = row.get(self.variable(name), 0.0) + sign
        self.rows.append((row, constant))

    def convert(
        self,
        microseconds: float,
        *,
        to: Collection[str] = (),
        unless: str = "",
        source: str = "",
        always: bool = False,
        unless_all: Collection[str] = (),
    ) -> None:
        """Pay once where an integer reader meets a float writer, or an integer writer a float reader."""
        if microseconds <= 0.0 or not (to or source):
            return
        z = self._auxiliary(microseconds)
        for name in to:
            self._at_least(z, [name], [unless] if unless else [], 0.0)
        if source and always:
            self._at_least(z, [source], [], 0.0)
        for name in unless_all if source and not always else ():
            self._at_least(z, [source], [name], 0.0)

    def unblock(self, microseconds: float, maker: str, plain: bool, codes: Collection[str]) -> None:
        """Pay where a float writer of blocked layout meets a reader of any other."""
        if microseconds <= 0.0 or not (plain or codes):
            return
        z = self._auxiliary(microseconds)
        minus = [maker] if maker else []
        if plain:
            self._at_least(z, [], minus, 1.0)
        for name in codes if not plain else ():
            self._at_least(z, [name], minus, 0.0)

    def block(self, microseconds: float, maker: str, readers: Collection[str], fixed: bool) -> None:
        """Pay where a float reader of blocked layout meets a writer of plain floats or of codes."""
        if microseconds <= 0.0 or not (readers or fixed):
            return
        z = self._auxiliary(microseconds)
        plus = [maker] if maker else []
        constant = 0.0 if maker else 1.0
        if fixed:
            self._at_least(z, plus, [], constant)
        for name in readers if not fixed else ():
            self._at_least(z, plus, [name], constant)

    def zeros(self, names: Collection[str]) -> set[str]:
        """Solve, and return which of these are 0. Of equal solutions the one with more floats is taken."""
        if not names:
            return set()
        chosen = {self.index[name] for name in names}
        # Ties go to float: integers that gain nothing only lose.
        tie = 10.0**-DIGITS / (1 + len(chosen))
        price = np.round(self.price, DIGITS) + np.array([tie if i in chosen else 0.0 for i in range(len(self.price))])
        matrix = scipy.sparse.lil_matrix((len(self.rows), len(price)))
        for place, (row, _) in enumerate(self.rows):
            for column, value in row.items():
                matrix[place, column] = value
        bounds = np.array([constant for _, constant in self.rows])
        constraints = [scipy.optimize.LinearConstraint(matrix.tocsr(), bounds, np.inf)] if self.rows else []
        whole = np.array([1 if i in chosen else 0 for i in range(len(price))])
        found = scipy.optimize.milp(price, integrality=whole, bounds=(0, 1), constraints=constraints)
        assert found.x is not None, found.message
        return {name for name in names if found.x[self.index[name]] < 0.5}
