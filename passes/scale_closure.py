"""The closure of a scaling: from one tensor over everything that is linear, or homogeneous, along its channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from qcompile.core.contract import Refusal
from qcompile.passes.index_maps import MOVES, Labels, scalar
from qcompile.passes.patterns import Norm
from qcompile.passes.scale_classes import (
    FIXED,
    IMAGE,
    Classes,
    channel_axis,
    lengths,
    mixed_axes,
    narrow,
    weight_channels,
)
from qcompile.passes.structure import (
    BIAS_INPUT,
    BIASED_OPS,
    WEIGHT_INPUT,
    constant_tensor,
    data_readers,
    input_of,
    is_float32,
    is_linear,
    is_standard,
    name_of,
    node_name,
    weight_axis,
)

#: One input, and f(s · x) = s · f(x) for s > 0.
_HOMOGENEOUS = frozenset(
    {"Abs", "Dropout", "Identity", "LeakyRelu", "Neg", "PRelu", "Relu", "Pad", *IMAGE}
    | {"ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"}
)  # fmt: skip
#: f(s · x, s · y) = s · f(x, y): all operands are scaled, from the index that is given.
_JOINT = {"Add": 0, "Max": 0, "Min": 0, "Sub": 0, "Sum": 0, "Where": 1}
_PRODUCTS = ("Div", "MatMul", "Mul")
#: Of a MatMul of two activations both factors are scaled, by s and 1/s along the axis that it sums over.
_BOTH = 2
_VECTOR = "it multiplies by a vector"
#: Normalizations of ONNX with a scale and a shift per channel on axis 1.
_CHANNEL_NORMS = ("BatchNormalization", "GroupNormalization", "InstanceNormalization")
#: Of each product one factor is tried after the other; more of them in a row are not.
MOST_PRODUCTS = 8


@dataclass(eq=False)
class Closure:
    """Spreads labels from one tensor over all that must be scaled with it.

    Where it cannot go on, the labels there are joined with `FIXED`, and an obstacle says why.

    Attributes
    ----------
    root, axis
        Where it starts: a tensor, and where its channels are, counted from the last.
    norms
        The recognised norms by result.
    restoring
        The root's own readers that are not linear are to get it as it was: nothing spreads over them.
    labels
        What was reached. Labels stand as `scale_classes` has them.
    folds
        The labels of constants that take factors in: by node, index of the input, and the factors' exponent.
    readings
        By linear operator: what it reads, the axis of the channels there, and their labels, shape (channels,).
    spared
        Readers of the root that are to get it as it was.
    obstacles
        Where it could not go on.
    """

    root: ir.Value
    axis: int
    norms: Mapping[ir.Value, Norm]
    restoring: bool
    classes: Classes
    labels: dict[ir.Value, Labels] = field(default_factory=dict)
    folds: dict[tuple[ir.Node, int, int], Labels] = field(default_factory=dict)
    readings: dict[ir.Node, tuple[ir.Value, int, Labels]] = field(default_factory=dict)
    spared: dict[ir.Node, None] = field(default_factory=dict)
    obstacles: list[Refusal] = field(default_factory=list)
    _edge: list[ir.Value] = field(default_factory=list)
    _chosen: dict[ir.Node, int] = field(default_factory=dict)
    _undecided: list[ir.Node] = field(default_factory=list)

    def _copy(self) -> Closure:
        return Closure(
            self.root, self.axis, self.norms, self.restoring, self.classes.copy(), dict(self.labels), dict(self.folds),
            dict(self.readings), dict(self.spared), list(self.obstacles), list(self._edge), dict(self._chosen),
            list(self._undecided),
        )  # fmt: skip

    @property
    def alive(self) -> int:
        """How many channels of the root are still to be scaled."""
        return int(np.count_nonzero(self.classes.of(self.labels[self.root])))

    def closed(self) -> Closure:
        """Spread as far as it goes; of a product of two activations one is scaled, the one with which more is."""
        while self._edge:
            value = self._edge.pop()
            for spread in (self._behind, self._ahead):
                if self.classes.of(self.labels[value]).any():
                    spread(value)
        while self._undecided:
            node = self._undecided.pop()
            if node in self._chosen:
                continue
            if len(self._chosen) > MOST_PRODUCTS:
                self._stop(self.labels[node.outputs[0]], node, "there are too many products of activations before it")
                continue
            first = self._choosing(node, 0)
            return first if first.alive == self.alive else max(first, self._choosing(node, 1), key=_alive)
        return self

    def _choosing(self, node: ir.Node, index: int) -> Closure:
        trial = self._copy()
        trial._chosen[node] = index
        trial._into_factor(node, index, trial.labels[node.outputs[0]])
        return trial.closed()

    def put(self, value: ir.Value, labels: Labels) -> None:
        """Note a value's labels and that it is to be looked at, or join them with those that it has."""
        fitting = self.classes.fit(labels, value)
        if fitting is None:
            self._stop(labels, value.producer(), f"the shape of '{value.name}' is not known")
        elif value in self.labels:
            self.classes.join(fitting, self.labels[value])
        else:
            self.labels[value] = narrow(self.classes.of(fitting))
            self._edge.append(value)

    def _stop(self, labels: Labels, node: ir.Node | None, reason: str) -> None:
        """Take labels out: what is around them cannot be scaled."""
        self.obstacles.append(Refusal(name_of(self.root) if node is None else node_name(node), reason))
        self.classes.join(labels, np.full(1, FIXED))

    def _fold(self, node: ir.Node, index: int, labels: Labels, exponent: int, rank: int | None = None) -> None:
        """Let a constant take factors in, or stop at it; `rank` is the most axes that it may have then."""
        value = node.inputs[index]
        if constant_tensor(value) is None:
            self._stop(labels, node, f"{node.op_type} has parameters that are not constant")
            return
        if rank is not None and labels.ndim > rank:
            labels = self.classes.flat(labels, range(-labels.ndim, -rank))
            labels = labels.reshape(labels.shape[labels.ndim - rank :])
        self.folds[node, index, exponent] = labels

    # Upstream: what makes a value.

    def _behind(self, value: ir.Value) -> None:
        labels, node = self.labels[value], value.producer()
        if (norm := self.norms.get(value)) is not None:
            self._into_norm(norm, labels)
        elif node is None:
            self._stop(labels, None, f"'{value.name}' is fed to the model")
        elif is_linear(node):
            self._into_linear(node, value, labels)
        elif is_standard(node, "Gather") and constant_tensor(node.inputs[0]) is not None:
            self._into_table(node, labels)
        elif is_standard(node, *_CHANNEL_NORMS) and not node.attributes.get_int("training_mode", 0):
            shape = lengths(value) or (1, 1)
            vector = self.classes.only_along(labels, 1 - len(shape), shape[1])
            self._fold(node, 1, vector, -1)
            self._fold(node, 2, vector, -1)
        else:
            self._through(node, value, labels)

    def _into_norm(self, norm: Norm, labels: Labels) -> None:
        gamma = constant_tensor(norm.gamma)
        if gamma is None or norm.shared:
            self._stop(labels, norm.nodes[-1], "its norm has no factors of its own")
            return
        labels = self.classes.flat(labels, (at for at in range(-labels.ndim, 0) if at not in norm.axes))
        for node in norm.nodes:
            for index, value in enumerate(node.inputs):
                if value is not None and value in (norm.gamma, norm.beta):
                    self._fold(node, index, labels, -1, len(gamma.shape))

    def _into_linear(self, node: ir.Node, value: ir.Value, labels: Labels) -> None:
        weight, axis = constant_tensor(node.inputs[WEIGHT_INPUT]), channel_axis(node, value)
        grouped = node.op_type == "ConvTranspose" and node.attributes.get_int("group", 1) != 1
        if weight is None or axis is None or grouped or weight_channels(node) is None:
            self._stop(labels, node, f"the channels of this {node.op_type} are not followed")
            return
        at, rank = weight_axis(node), len(weight.shape)
        vector = self.classes.only_along(labels, axis, int(weight.shape.numpy()[at]))
        if not self._is_own(node, WEIGHT_INPUT, labels):
            return
        self._fold(node, WEIGHT_INPUT, vector.reshape([-1 if i == at else 1 for i in range(rank)]), -1)
        if node.op_type in BIASED_OPS and len(node.inputs) > BIAS_INPUT and node.inputs[BIAS_INPUT] is not None:
            self._fold(node, BIAS_INPUT, vector, -1)

    def _is_own(self, node: ir.Node, index: int, labels: Labels) -> bool:
        """Tell whether nobody else reads a node's weights, else stop: a copy of them would make the model larger."""
        value = input_of(node, index)
        if len(value.uses()) == 1 and not value.is_graph_output():
            return True
        self._stop(labels, node, f"its weights '{value.name}' are read elsewhere too")
        return False

    def _into_table(self, node: ir.Node, labels: Labels) -> None:
        table = constant_tensor(node.inputs[0])
        if table is None or len(table.shape) != 2 or node.attributes.get_int("axis", 0) != 0:
            self._stop(labels, node, "it picks from a table of other than rows")
        elif self._is_own(node, 0, labels):
            self._fold(node, 0, self.classes.only_along(labels, -1, int(table.shape.numpy()[1])), -1)

    def _through(self, node: ir.Node, value: ir.Value, labels: Labels) -> None:
        """Carry the labels of a result to what it is computed from."""
        if not is_float32(value):
            self._stop(labels, node, f"'{value.name}' is not float32")
        elif is_standard(node, *_JOINT):
            self._into_operands(node, labels)
        elif is_standard(node, *_PRODUCTS):
            self._through_product(node, labels)
        elif is_standard(node, "Concat"):
            self._apart(node, labels)
        elif is_standard(node, *MOVES):
            known = self.labels.get(input_of(node, 0), np.full(1, FIXED))
            source = self.classes.back(node, value.index() or 0, labels, known)
            if source is None:
                self._stop(labels, node, f"where this {node.op_type} moves its elements is not known")
            else:
                self.put(input_of(node, 0), source)
        elif is_standard(node, *_HOMOGENEOUS):
            self._through_homogeneous(node, labels, back=True)
        else:
            self._stop(labels, node, f"no factor passes this {node.op_type}")

    def _into_operands(self, node: ir.Node, labels: Labels) -> None:
        for index, operand in enumerate(node.inputs):
            if operand is None or index < _JOINT[node.op_type]:
                continue
            if constant_tensor(operand) is None:
                self.put(operand, labels)
            elif scalar(operand) != 0.0:
                self._fold(node, index, labels, -1)

    def _through_product(self, node: ir.Node, labels: Labels) -> None:
        """Scale one factor of a product: a constant of each channel, else the one that is no number."""
        constants = [constant_tensor(x) is not None for x in node.inputs]
        if node.op_type == "Mul" and any(constants):
            index = constants.index(True)
            if scalar(node.inputs[index]) is None:
                self._fold(node, index, labels, -1)
            else:
                self._into_factor(node, 1 - index, labels)
        elif node.op_type == "Div":
            self._into_factor(node, 0, labels)
        elif node.op_type == "MatMul" and not _of_matrices(node):
            self._stop(labels, node, _VECTOR)
        elif node.op_type == "MatMul" and labels.ndim and labels.shape[-1] > 1:
            self._into_factor(node, 1, labels)
        elif node.op_type == "MatMul" and labels.ndim > 1 and labels.shape[-2] > 1:
            self._into_factor(node, 0, labels)
        elif node.inputs[0] is node.inputs[1]:
            self._stop(labels, node, "it squares")
        elif node not in self._chosen:
            self._undecided.append(node)

    def _into_factor(self, node: ir.Node, index: int, labels: Labels) -> None:
        """Scale one factor of a product, of which both factors' other axes are joined."""
        if self._chosen.setdefault(node, index) != index:
            self._stop(labels, node, "both of its factors would be scaled")
            return
        if node.op_type == "MatMul":
            labels = self.classes.flat(labels, (-2 if index else -1,))
        if constant_tensor(node.inputs[index]) is not None:
            self._stop(labels, node, f"its {'second' if index else 'first'} factor is constant")
        else:
            self.put(input_of(node, index), labels)

    def _apart(self, node: ir.Node, labels: Labels) -> None:
        """Give the parts of a Concat their labels."""
        parts = self.classes.apart(node, labels)
        if parts is None:
            self._stop(labels, node, "the lengths of its parts are not known")
        for index, part in enumerate(parts or ()):
            if constant_tensor(node.inputs[index]) is not None:
                self._fold(node, index, part, -1)
            else:
                self.put(input_of(node, index), part)

    def _through_homogeneous(self, node: ir.Node, labels: Labels, back: bool) -> None:
        mixed, rank = mixed_axes(node), len(lengths(node.inputs[0]) or ())
        if mixed is None or (node.op_type == "MaxPool" and len(node.outputs) > 1 and node.outputs[1].uses()):
            self._stop(labels, node, f"what this {node.op_type} mixes is not known")
            return
        if is_standard(node, "Pad") and len(node.inputs) > 2 and node.inputs[2] and scalar(node.inputs[2]) != 0.0:
            self._stop(labels, node, "it pads with another number than zero")
            return
        gone = mixed if node.op_type.startswith("Reduce") and not node.attributes.get_int("keepdims", 1) else ()
        if back:
            full = labels.reshape((1,) * (rank - len(gone) - labels.ndim) + labels.shape)
            self.put(input_of(node, 0), self.classes.flat(np.expand_dims(full, gone), mixed))
        else:
            flat = self.classes.flat(labels, mixed)
            self.put(node.outputs[0], flat.reshape((1,) * (rank - flat.ndim) + flat.shape).squeeze(gone))

    # Downstream: who reads a value.

    def _ahead(self, value: ir.Value) -> None:
        labels = self.labels[value]
        if value.is_graph_output():
            self._stop(labels, value.producer(), f"'{value.name}' is an output of the model")
            return
        for node in data_readers(value):
            if node.graph is not self.root.graph:
                self._stop(labels, None, f"'{value.name}' is read inside a subgraph")
            elif is_linear(node) and node.inputs[0] is value:
                self._read(node, value, labels)
            elif self.restoring and value is self.root:
                self.spared[node] = None
            else:
                self._pass_on(node, value, labels)

    def read_directly(self) -> None:
        """Take in the linear operators that read the root, and nothing else."""
        for node in data_readers(self.root):
            if is_linear(node) and node.inputs[0] is self.root and node.graph is self.root.graph:
                self._read(node, self.root, self.labels[self.root])

    def _read(self, node: ir.Node, value: ir.Value, labels: Labels) -> None:
        axis, channels, shape = channel_axis(node, value), weight_channels(node), lengths(value)
        if axis is None or channels is None or shape is None:
            self._stop(labels, node, f"the channels of this {node.op_type} are not followed")
        elif self._is_own(node, WEIGHT_INPUT, labels):
            vector = self.classes.only_along(labels, axis, shape[axis])
            self.readings[node] = value, axis, vector
            self._fold(node, WEIGHT_INPUT, vector[channels], 1)

    def _pass_on(self, node: ir.Node, value: ir.Value, labels: Labels) -> None:
        if is_standard(node, *_JOINT) and value in node.inputs[_JOINT[node.op_type] :]:
            self.put(node.outputs[0], labels)  # from there it goes to the other operands
        elif is_standard(node, *_PRODUCTS):
            self._into_product(node, value, labels)
        elif is_standard(node, "Concat") or (is_standard(node, *MOVES) and node.inputs[0] is value):
            joins = node.op_type == "Concat"  # from its result it goes to the other parts
            results = (self.classes.joined if joins else self.classes.ahead)(node, value, labels)
            if results is None:
                reason = "the lengths of its parts are" if joins else f"where this {node.op_type} moves its elements is"
                self._stop(labels, node, f"{reason} not known")
            for output, result in zip(node.outputs, results or (), strict=results is not None):
                self.put(output, result)
        elif is_standard(node, *_HOMOGENEOUS) and node.inputs[0] is value:
            self._through_homogeneous(node, labels, back=False)
        else:
            self._stop(labels, node, f"no factor passes this {node.op_type}")

    def _into_product(self, node: ir.Node, value: ir.Value, labels: Labels) -> None:
        index = list(node.inputs).index(value)
        other = node.inputs[1 - index]
        if node.inputs[0] is node.inputs[1] or (node.op_type == "Div" and index == 1):
            self._stop(labels, node, "no factor passes this square" if other is value else "it divides by it")
        elif node.op_type == "Mul" and constant_tensor(other) is not None and scalar(other) is None:
            self._fold(node, 1 - index, labels, 1)
        elif node.op_type == "MatMul":
            self._into_matrices(node, index, labels)
        elif self._chosen.setdefault(node, index) != index:
            self._stop(labels, node, "both of its factors would be scaled")
        else:
            self.put(node.outputs[0], labels)

    def _into_matrices(self, node: ir.Node, index: int, labels: Labels) -> None:
        """Go on behind a MatMul of two activations, or into the other one along the axis that is summed over."""
        summed, kept = (-2, -1) if index else (-1, -2)
        contracted = -summed <= labels.ndim and labels.shape[summed] > 1
        scaled = _BOTH if contracted else index
        if not _of_matrices(node):
            self._stop(labels, node, _VECTOR)
        elif self._chosen.setdefault(node, scaled) != scaled:
            self._stop(labels, node, "both of its factors would be scaled")
        elif contracted and constant_tensor(node.inputs[1 - index]) is not None:
            self._stop(labels, node, "its first factor is constant")
        elif contracted:
            rows = self.classes.flat(np.atleast_2d(labels), (kept,))
            self.put(input_of(node, 1 - index), -rows.swapaxes(-1, -2))
        else:
            self.put(node.outputs[0], labels)


def _of_matrices(node: ir.Node) -> bool:
    """Tell whether both factors of a MatMul are known to have rows and columns."""
    return all(len(lengths(value) or ()) > 1 for value in node.inputs)


def _alive(closure: Closure) -> int:
    return closure.alive
