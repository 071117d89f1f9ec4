"""Shift: constants that are taken off the channels of a tensor, and given back by the biases behind what reads it.

X · W + b = (X - z) · W + (b + z · W). Where channels lie off zero, each on its own side, one range for all of them is
wider than the widest channel; z moves the middle of each to zero (Wei et al. 2023, "Outlier Suppression+: Accurate
Quantization of Large Language Models by Equivalent and Effective Shifting and Scaling"; the shift of Li et al. 2023,
"RepQ-ViT", section 3.2). Here nothing is added to a model for that: z goes into the constant that is added last where
the tensor is made, and what it amounts to behind each reader into a constant that is added there, a residual's into the
bias of the branch that it meets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.core import scratch
from qcompile.core.contract import Refusal
from qcompile.passes import structure
from qcompile.passes.canonicalize.editing import add_constant
from qcompile.passes.patterns.norms import Norm

Numbers = npt.NDArray[np.float64]
#: A constant, as who reads it and as which input.
Place = tuple[ir.Node, int]


@dataclass(eq=False)
class Shift:
    """What is added to which constants when z is taken off a tensor's channels.

    Parameters
    ----------
    root : onnx_ir.Value
        Its channels are along the last axis.
    z : ndarray of float64, shape (channels,)
    norms : mapping of Value to Norm
        By result.
    """

    root: ir.Value
    z: Numbers
    norms: Mapping[ir.Value, Norm]
    addends: list[tuple[Place, Numbers]] = field(default_factory=list)

    def obstacle(self) -> Refusal | None:
        """Follow z from where the tensor is made to what takes it back; return what is in the way."""
        if (place := self._last_constant(self.root, self.z.size)) is None:
            return Refusal(structure.name_of(self.root), "no constant is added to each channel where it is made")
        self.addends = [(place, -self.z)]
        pending = [(self.root, self.z)]
        while pending:
            value, lack = pending.pop()
            if value.is_graph_output():
                return Refusal(structure.name_of(value), "it is an output of the model")
            for node, index in value.uses():
                found = self._behind(node, index, lack)
                if isinstance(found, Refusal):
                    return found
                pending += [] if found is None else [(node.outputs[0], found)]
        return None

    def apply(self) -> None:
        """Change the constants that `obstacle` found."""
        for (node, index), addend in self.addends:
            value = structure.input_of(node, index)
            array = structure.constant(value)
            assert array is not None and isinstance(node.graph, ir.Graph)
            shifted = (array.astype(np.float64) + addend).astype(array.dtype)
            if len(value.uses()) == 1 and shifted.shape == array.shape:
                value.const_value = scratch.tensor(shifted, value.name)
            else:
                node.replace_input_with(index, add_constant(node.graph, f"{value.name}/shift", shifted))

    def _behind(self, node: ir.Node, index: int, lack: Numbers) -> Numbers | Refusal | None:
        """Return what an operator's result lacks; None where a constant of its own makes up for it."""
        if structure.is_standard(node, "MatMul", "Gemm") and index == 0:
            return self._behind_product(node, lack)
        if structure.is_standard(node, "Mul"):
            return self._behind_factor(node, structure.constant(node.inputs[1 - index]), lack)
        if structure.is_standard(node, "Add"):
            return self._behind_sum(node, 1 - index, lack)
        return Refusal(structure.node_name(node), f"{node.op_type} reads it, which takes nothing back")

    def _behind_factor(self, node: ir.Node, factor: npt.NDArray[Any] | None, lack: Numbers) -> Numbers | Refusal:
        if factor is None or not _fits(factor, lack.size):
            return Refusal(structure.node_name(node), "it is multiplied by another activation")
        return np.asarray(lack * factor.reshape(-1), np.float64)

    def _behind_sum(self, node: ir.Node, index: int, lack: Numbers) -> Numbers | Refusal | None:
        other = structure.input_of(node, index)
        if (constant := structure.constant(other)) is not None:
            if not _fits(constant, lack.size):
                return Refusal(structure.node_name(node), "what is added to it is not one number per channel")
            self.addends.append(((node, index), lack))
            return None
        if other.shape is None or not len(other.shape) or other.shape[-1] != lack.size:
            return Refusal(structure.node_name(node), "it is added to what has other channels")
        alone = len(list(other.uses())) == 1 and not other.is_graph_output()
        place = self._last_constant(other, lack.size) if alone else None
        if place is None:
            return lack
        self.addends.append((place, lack))
        return None

    def _behind_product(self, node: ir.Node, lack: Numbers) -> Numbers | Refusal | None:
        weight = structure.constant(node.inputs[1]) if structure.is_standard(node, node.op_type) else None
        if weight is None or weight.ndim != 2:
            return Refusal(structure.node_name(node), f"{node.op_type} reads it without constant weights of two axes")
        if node.op_type == "MatMul":
            return np.asarray(lack @ weight.astype(np.float64))
        turned = bool(node.attributes.get_int("transB", 0))
        bias = structure.constant(node.inputs[2]) if len(node.inputs) > 2 else None
        count = weight.shape[0 if turned else 1]
        ones = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
        if node.attributes.get_int("transA", 0) or not ones or bias is None or bias.shape != (count,):
            return Refusal(structure.node_name(node), "Gemm reads it without a bias of one number per channel")
        self.addends.append(((node, 2), np.matmul(lack, weight.T if turned else weight, dtype=np.float64)))
        return None

    def _last_constant(self, value: ir.Value, channels: int) -> Place | None:
        """Return the constant that is added to each channel of a value last, where it is made."""
        places = self._added_last(value)
        array = structure.constant(places[0][0].inputs[places[0][1]]) if len(places) == 1 else None
        fits = array is not None and array.size == channels and array.shape[-1] == channels
        return places[0] if fits else None

    def _added_last(self, value: ir.Value) -> list[Place]:
        if (norm := self.norms.get(value)) is not None:
            read = ((node, index) for node in norm.nodes for index, one in enumerate(node.inputs) if one is norm.beta)
            return list(read) if norm.beta is not None and norm.axes == (-1,) and not norm.shared else []
        node = structure.produced_by(value, "Add", "Gemm")
        if node is None or node.attributes.get_float("beta", 1.0) != 1.0:
            return []
        first = structure.BIAS_INPUT if node.op_type == "Gemm" else 0
        return [(node, index) for index in range(first, len(node.inputs))
                if structure.constant(node.inputs[index]) is not None]  # fmt: skip


def _fits(constant: npt.NDArray[Any], channels: int) -> bool:
    """Tell whether a constant has one number for all, or one per channel of the last axis."""
    return constant.size == 1 or (constant.size == channels and constant.shape[-1] == channels)
