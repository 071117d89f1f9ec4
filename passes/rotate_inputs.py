"""Rotate what a linear operator reads, where nothing in front of it can take the rotation in: by products at run time.

QuaRot and SpinQuant call this R4. A Hadamard matrix of n = a·b channels is the Kronecker product of one of a and one of
b: two small products for each token, n (a + b) multiply-accumulates instead of n². The inverse goes into the weights.
Unlike `rotate.py` this adds nodes, so it is for whoever has weighed what they cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import onnx_ir as ir

from qcompile.core.contract import Effect, Refusal, Rewritten
from qcompile.core.hadamard import hadamard
from qcompile.core.orthogonal import Matrix, Orthogonal
from qcompile.passes.canonicalize.editing import add_constant
from qcompile.passes.fold_matrix import multiply_inputs
from qcompile.passes.patterns import projection_at
from qcompile.passes.structure import constant_tensor, input_of, is_float32, is_standard, node_name, only_reader

#: Fewer channels are not worth four nodes.
FEWEST_CHANNELS = 16


@dataclass(frozen=True)
class InputRotation:
    """A linear operator, and the matrices whose Kronecker product rotates what it reads.

    Parameters
    ----------
    node : str
    factors : tuple of Orthogonal
        One or two, of b, or of a and b channels, a·b = n; one of fewer than n channels serves every block of b.
    """

    node: str
    factors: tuple[Orthogonal, ...]

    def __post_init__(self) -> None:
        """Refuse other numbers of factors."""
        if len(self.factors) not in (1, 2):
            raise ValueError(f"{self.node}: {len(self.factors)} factors, not one or two")

    @property
    def block(self) -> int:
        """Return how many neighbouring channels are mixed."""
        return math.prod(factor.width for factor in self.factors)

    def matrix(self, width: int) -> Matrix:
        """Compute the whole R `[n, n]` that the products amount to."""
        whole: Matrix = np.eye(width // self.block)
        for factor in self.factors:
            whole = np.asarray(np.kron(whole, factor.matrix()), np.float64)
        return whole

    def to_json(self) -> dict[str, Any]:
        """Return the rotation as JSON's types."""
        return {"node": self.node, "factors": [factor.to_json() for factor in self.factors]}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Self:
        """Read what `to_json` returned."""
        return cls(entry["node"], tuple(Orthogonal.from_json(factor) for factor in entry["factors"]))


@dataclass(frozen=True)
class RotateInputs(ir.passes.InPlacePass):
    """Put products in front of linear operators and their inverse into the weights.

    Parameters
    ----------
    rotations : tuple of InputRotation
    """

    rotations: tuple[InputRotation, ...]
    effect: ClassVar[Effect] = Effect.CLOSE

    def requires(self, model: ir.Model) -> None:
        """Refuse rotations of another graph."""
        known = {node.name for node in model.graph}
        if missing := sorted({rotation.node for rotation in self.rotations} - known):
            raise ir.passes.PreconditionError(f"a rotation names node '{missing[0]}', which the graph does not have")

    def call(self, model: ir.Model) -> Rewritten:
        """Rewrite in place; operators that cannot be treated so are refusals."""
        nodes, before = {node_name(node): node for node in model.graph}, len(model.graph)
        refusals = []
        for rotation in self.rotations:
            node = nodes[rotation.node]
            if reason := obstacle(node) or _misfit(node, rotation):
                refusals.append(Refusal(rotation.node, f"what it reads is not rotated: {reason}"))
            else:
                _rotate(node, rotation)
        added = len(model.graph) - before
        notes = (f"rotation added {added} nodes in front of linear operators",) if added else ()
        return Rewritten(model, bool(added), tuple(refusals), notes)


def kronecker(node: str, width: int, seed: int = 0) -> InputRotation | None:
    """Describe the Hadamard matrix of all n channels that takes the least work; None if there is none of order n.

    Parameters
    ----------
    node : str
        A linear operator.
    width : int
        n, the channels that it reads.
    seed : int
        Draws the signs.
    """
    halves = [(a, width // a) for a in range(1, width + 1) if width % a == 0]
    halves = [(a, b) for a, b in halves if hadamard(a) is not None and hadamard(b) is not None]
    if not halves:
        return None
    a, b = min(halves, key=lambda pair: (sum(pair) if pair[0] > 1 else pair[1], pair))
    factors = (Orthogonal.spreading(a, seed, block=a), Orthogonal.spreading(b, seed + 1, block=b))
    return InputRotation(node, factors[1:] if a == 1 else factors)


def obstacle(node: ir.Node) -> str:
    """Return why what an operator reads cannot be rotated in front of it alone, or nothing."""
    if not is_standard(node, "MatMul", "Gemm") or projection_at(node) is None:
        return "it is no product with constant weights"
    value = input_of(node, 0)
    if not is_float32(value) or value.shape is None:
        return "what it reads is of unknown rank or not float32"
    if only_reader(value) is not node:
        return "others read the same"
    if not isinstance(value.shape[-1], int) or value.shape[-1] < FEWEST_CHANNELS:
        return f"it reads fewer than {FEWEST_CHANNELS} channels"
    return ""


def rotated_products(rotations: Iterable[InputRotation], graph: ir.Graph) -> tuple[str, ...]:
    """Return the products that were added for rotations, which are to stay in float: integers are what they prepare."""
    names = {node_name(node) for node in graph}
    made = (f"{rotation.node}_rotation_{i}" for rotation in rotations for i in range(len(rotation.factors)))
    return tuple(name for name in made if name in names)


def _misfit(node: ir.Node, rotation: InputRotation) -> str:
    tensor = constant_tensor(node.inputs[1])
    assert tensor is not None
    width = _width(node)
    return f"matrices of {rotation.block} channels do not divide {width}" if width % rotation.block else ""


def _width(node: ir.Node) -> int:
    shape = input_of(node, 0).shape
    assert shape is not None and isinstance(shape[-1], int), "`obstacle` has seen to that"
    return shape[-1]


def _rotate(node: ir.Node, rotation: InputRotation) -> None:
    graph, value, width = node.graph, input_of(node, 0), _width(node)
    assert isinstance(graph, ir.Graph)
    rank, dtype = len(value.shape or ()), ir.DataType.FLOAT
    sizes = [width // rotation.block, *(factor.width for factor in rotation.factors)]
    if sizes[0] == 1:
        sizes = sizes[1:]
    added: list[ir.Node] = []

    def add(op_type: str, inputs: list[ir.Value], name: str, shape: list[Any]) -> ir.Value:
        new = ir.node(op_type, inputs, name=f"{node.name}_{name}")
        new.outputs[0].name, new.outputs[0].type = f"{node.name}_{name}", ir.TensorType(dtype)
        new.outputs[0].shape = ir.Shape(shape)
        added.append(new)
        return new.outputs[0]

    def reshaped(x: ir.Value, name: str, last: list[int]) -> ir.Value:
        target = add_constant(graph, f"{node.name}_{name}_shape", np.array([0] * (rank - 1) + last, np.int64))
        return add("Reshape", [x, target], name, [*outer, *last])

    outer = list(value.shape or ())[:-1]
    x = reshaped(value, "split", sizes) if len(sizes) > 1 else value
    for index, factor in enumerate(reversed(rotation.factors)):
        matrix = factor.matrix() if index == 0 else factor.matrix().T
        weights = add_constant(graph, f"{node.name}_factor_{index}", matrix.astype(np.float32))
        x = add("MatMul", [x, weights] if index == 0 else [weights, x], f"rotation_{index}", [*outer, *sizes])
    x = reshaped(x, "joined", [width]) if len(sizes) > 1 else x
    graph.insert_before(node, added)
    node.replace_input_with(0, x)
    multiply_inputs(node, rotation.matrix(width).T)
