"""Pricing: what a placement will take on the target, by its cost table and what its runtime really executes.

Nothing is timed here: the runtime's optimizer tells which kernels a candidate ends up as, one run of it tells their
shapes, and the table what those take.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from qcompile.backends.base import Backend
from qcompile.calib.collect import Statistics, collect
from qcompile.calib.data import Dataset, Sample, input_specs
from qcompile.calib.observers import Observer
from qcompile.calib.sensitivity import Choice
from qcompile.calib.work import value_shapes
from qcompile.core import model as models
from qcompile.core import numerics
from qcompile.core.costs import CostTable
from qcompile.core.execution import Kernel, Shape, execute
from qcompile.core.plan import Precision
from qcompile.core.target import OpKind, Target
from qcompile.passes import structure
from qcompile.passes.allocate_bits import allocate_bits
from qcompile.passes.insert_qdq import InsertQdq, quantized_name
from qcompile.passes.place import Placement, Wish, sparing
from qcompile.passes.place_by_cost import Conversion, Prices, cheapest_in_float
from qcompile.pipeline import untracked

#: What the optimizer and `backends/ort/legalize/` append to the name of a node or a value.
SUFFIXES = re.compile(r"(_token_\d+|_nchwc|_unscaled)+$")
#: Kernels that convert what others read; they belong to no operator.
CONVERSIONS = (
    "QuantizeLinear",
    "DynamicQuantizeLinear",
    "DequantizeLinear",
    "Transpose",
    "ReorderInput",
    "ReorderOutput",
)
#: Axes of what convolutions work on: integer kernels have channels last, float ones in blocks.
IMAGE_RANK = 4
#: What noise power over signal power at the outputs is worth, in parts of float's latency: next to nothing at 30 dB, a
#: twentieth of float's time at 20 dB, half of it at 10 dB.
WORTH = 5.0
#: What bytes of constants, in parts of float's, are worth in parts of float's latency.
SIZE = 0.2
#: Noise beyond this is all the same.
WORST = 1e3
#: Less than this, in parts of float's time, is not worth a change.
GAIN = 0.01


@dataclass(frozen=True)
class Prediction:
    """What the cost table says of two models, in microseconds for a run.

    Parameters
    ----------
    reference, candidate : float
    """

    reference: float
    candidate: float

    @property
    def ratio(self) -> float:
        """Candidate over reference: below 1 is faster."""
        return self.candidate / self.reference


def predict(
    table: CostTable | None, backend: Backend, original: ir.Model, quantized: ir.Model, samples: Sequence[Sample]
) -> Prediction | None:
    """Predict the latency of a quantized model, and of the model as it came in; None without a table."""
    if table is None:
        return None
    return Prediction(table.mean(execute(original, samples)), table.mean(backend.executed(quantized, samples)))


@dataclass
class Pricer:
    """Prices placements of one model.

    Parameters
    ----------
    model : onnx_ir.Model
        Canonical.
    target : Target
        With a cost table.
    backend : Backend
    samples : sequence of Sample
        Whose shapes count; the latency is the mean over them.
    placed : callable
        Places the operators, given wishes.
    """

    model: ir.Model
    target: Target
    backend: Backend
    samples: Sequence[Sample]
    placed: Callable[[Mapping[str, Wish]], Placement]
    _statistics: Statistics = field(default_factory=Statistics)

    @property
    def table(self) -> CostTable:
        """The target's cost table."""
        assert self.target.costs is not None
        return self.target.costs

    def kernels(self, placement: Placement, dynamic: Collection[str] = ()) -> list[list[Kernel]]:
        """Return what is executed of a placement, for each sample; some ranges may be taken when the model runs."""
        return self.backend.executed(self._quantized(placement, dynamic), self.samples)

    def latency(self, placement: Placement, dynamic: Collection[str] = ()) -> float:
        """Return the microseconds that a run of a placement takes."""
        return self.table.mean(self.kernels(placement, dynamic))

    def dynamic(self, placement: Placement) -> dict[str, float]:
        """Return the tensors whose range may be taken when the model runs, and how much noise must be less for that.

        That noise is what the time is worth which it takes to look for the least and the greatest value.
        """
        if not placement.dynamic:
            return {}
        fixed, own = (self._around(placement, dynamic) for dynamic in ((), placement.dynamic))
        return {name: max(0.0, own[name] - fixed[name]) / self._float_latency / WORTH for name in sorted(own)}

    def _around(self, placement: Placement, dynamic: Collection[str]) -> dict[str, float]:
        """Return for each tensor that may be dynamic what turning it into codes and reading these takes."""
        kernels = self.kernels(placement, dynamic)[0]
        owned, writers = self._per_node(kernels), {name: kernel for kernel in kernels for name in kernel.results}
        values = ir.convenience.create_value_mapping(self.model.graph)
        found = {}
        for name in placement.dynamic:
            readers = [
                reader for node in structure.readers(values[name]) for reader in owned[structure.node_name(node)]
            ]
            quantizer = writers.get(quantized_name(name))
            found[name] = sum(map(self.table.price, (*readers, *([quantizer] if quantizer else []))))
        return found

    def dear(self) -> dict[str, Wish]:
        """Return what to wish for so that no operator is in integers that gains nothing by that.

        What the linear program finds is held, like the two extremes, against what the runtime makes of it: the cheapest
        of the three is taken, and of equal ones that with the fewest operators in integers.
        """
        integer = self.placed({})
        names = _integers(integer)
        if not names:
            return {}
        in_integers, in_float = self.kernels(integer), self.kernels(self._weights_alone(names))
        prices = self.prices(in_float[0], in_integers[0])
        some = sorted(cheapest_in_float(self.model, integer, prices) & set(names))
        found = [(self.table.mean(in_float), names), (self.table.mean(in_integers), [])]
        if 0 < len(some) < len(names):
            found.insert(1, (self.latency(self._weights_alone(some)), some))
        chosen = min(found, key=lambda one: float(f"{one[0]:.3g}"))[1]
        groups = self.groups(integer, chosen)
        return {name: Wish(Precision.WEIGHT_ONLY, _dear(group, prices)) for name, group in groups.items()}

    def groups(self, placement: Placement, names: Iterable[str]) -> dict[str, list[str]]:
        """Return each of these operators together with the activation that it absorbs."""
        absorbed = {op.output: name for name, op in placement.ops.items() if op.output}
        groups = {name: [name] for name in names}
        for node in self.model.graph:
            owner = absorbed.get(structure.name_of(node.outputs[0]))
            if owner in groups and owner != node.name:
                groups[owner].append(structure.node_name(node))
        return groups

    def worth(self, wishes: Mapping[str, Wish], choice: Choice, noise: float | None = None) -> float:
        """Return what a placement costs: latency and `SIZE` times bytes, in parts of float's, and `WORTH` times noise.

        The noise is that of the choice, or another.
        """
        placement = self.placed(wishes)
        quantized = self._quantized(placement, choice.dynamic)
        latency = self.table.mean(self.backend.executed(quantized, self.samples)) / self._float_latency
        return latency + SIZE * self._size(quantized) + WORTH * (choice.noise if noise is None else noise)

    def _size(self, quantized: ir.Model) -> float:
        """Return the bytes of constants, in parts of those in float."""
        return models.initializer_bytes(quantized) / max(1, models.initializer_bytes(self.model))

    def spoiling(
        self, choice: Choice, spared: Mapping[str, Wish], weights: Mapping[str, float] = MappingProxyType({})
    ) -> dict[str, Wish]:
        """Return what to wish for, beside what is spared, so that noise is not paid for with too little time.

        The tensors and weights that add most to the noise are spared, as many as make the worth of it all least.

        Parameters
        ----------
        choice : Choice
            What was measured with all that is not spared in integers.
        spared : mapping of str to Wish
        weights : mapping of str to float
            By node name, noise over signal at the outputs with that operator's weights alone in codes.
        """
        placement, noise = self.placed(spared), min(choice.noise, WORST)
        names = _integers(placement)
        if WORTH * noise < GAIN or not names:
            return {}
        # What drives an output to infinity is as bad as can be, and still to be reckoned with.
        alone = {(name, False): min(error, WORST) for name, error in choice.alone.items()}
        alone |= {(name, True): min(weights[name], WORST) for name in names if name in weights}
        worst, total = sorted(alone, key=lambda source: -alone[source]), sum(alone.values())
        best, least = dict[str, Wish](), self.worth(spared, choice, noise)
        everywhere = {name: Wish(Precision.WEIGHT_ONLY, _spoils(noise, "codes everywhere")) for name in names}
        if (price := self.worth({**spared, **everywhere}, choice, 0.0)) < least - GAIN:
            best, least = everywhere, price
        for count in _counts(len(worst)) if total > 0.0 else ():
            rest = noise * sum(alone[source] for source in worst[count:]) / total
            if WORTH * (noise - rest) < GAIN:
                continue
            tensors = {name: _spoils(choice.alone[name]) for name, of_weights in worst[:count] if not of_weights}
            wishes = sparing(self.model, placement, tensors) | {
                name: Wish(Precision.WEIGHT_ONLY, _spoils(weights[name], "codes of its weights"), wide=True)
                for name, of_weights in worst[:count] if of_weights
            }  # fmt: skip
            wishes |= self.spoilt(wishes, weights)
            if (price := self.worth({**spared, **wishes}, choice, rest)) < least - GAIN:
                best, least = wishes, price
            if WORTH * rest < GAIN:
                break
        return best

    @cached_property
    def weights(self) -> dict[str, tuple[str, ...]]:
        """The names of the weights that operators have as integers, by node name; tables are not among them."""
        ops, found = self.placed({}).ops, {}
        for node in self.model.graph:
            rule, op = self.target.ops.get(node.op_type), ops[structure.node_name(node)]
            if rule is not None and op.precision is not Precision.FLOAT and rule.kind is not OpKind.LOOKUP:
                values = structure.stored_weights(node, rule.kind)
                found[structure.node_name(node)] = tuple(structure.name_of(value) for value, _ in values)
        return {name: values for name, values in found.items() if values}

    def spoilt(self, wishes: Mapping[str, Wish], noise: Mapping[str, float]) -> dict[str, Wish]:
        """Return what to wish for where the codes of weights that are only stored cost more than they save in bytes.

        Parameters
        ----------
        wishes : mapping of str to Wish
        noise : mapping of str to float
            By node name, noise over signal at the outputs with that operator's weights alone in codes.
        """
        sizes, whole, found = self.model.graph.initializers, max(1, models.initializer_bytes(self.model)), {}
        for name, wish in wishes.items():
            error, tensors = noise.get(name, 0.0), [sizes[value].const_value for value in self.weights.get(name, ())]
            saved = SIZE * self._narrower * sum(tensor.nbytes for tensor in tensors if tensor is not None) / whole
            narrow = wish.precision is Precision.WEIGHT_ONLY and not wish.wide
            if narrow and WORTH * min(error, WORST) > max(saved, GAIN / 10):
                reason = f"{wish.reason}; {_spoils(error, 'codes of its weights')}"
                found[name] = Wish(Precision.WEIGHT_ONLY, reason, wide=True)
        return found

    @property
    def _narrower(self) -> float:
        """Which part of a float's bytes its code saves, against what is stored where codes spoil the outputs."""
        wide = np.dtype(self.target.wide_weight_dtype or np.float32).itemsize
        return (wide - np.dtype(self.target.weight_dtype).itemsize) / np.dtype(np.float32).itemsize

    @cached_property
    def _float_latency(self) -> float:
        return self.latency(self._weights_alone(_integers(self.placed({}))))

    def _weights_alone(self, names: Iterable[str]) -> Placement:
        return self.placed(dict.fromkeys(names, Wish(Precision.WEIGHT_ONLY, "")))

    def prices(self, in_float: Sequence[Kernel], in_integers: Sequence[Kernel]) -> Prices:
        """Return what each operator takes in either form, and each conversion between them."""
        as_float, as_integer = self._per_node(in_float), self._per_node(in_integers)
        blocked = {name for name, kernels in as_float.items() if any(k.op_type.startswith("nchwc.") for k in kernels)}
        for node in self.model.graph:
            # What was taken into a kernel on blocked layout is behind the one that gave its name to it.
            name, producers = structure.node_name(node), (v.producer() for v in structure.activation_inputs(node))
            if name not in as_float and any(p is not None and p.name in blocked for p in producers):
                blocked.add(name)
        return Prices(
            {name: sum(map(self.table.price, kernels)) for name, kernels in as_float.items()},
            {name: sum(map(self.table.price, kernels)) for name, kernels in as_integer.items()},
            {name: self._conversion(shape) for name, shape in value_shapes(self.model, self.samples[0]).items()},
            blocked,
        )

    def _per_node(self, kernels: Sequence[Kernel]) -> dict[str, list[Kernel]]:
        """Return which kernels came of each node of the model.

        A kernel has the node's name or writes one of its values; one that the optimizer made up belongs to what reads
        its result.
        """
        nodes = {structure.node_name(node): structure.node_name(node) for node in self.model.graph}
        nodes |= {structure.name_of(value): name for node in self.model.graph for value in node.outputs
                  for name in [structure.node_name(node)]}  # fmt: skip
        readers: defaultdict[str, list[int]] = defaultdict(list)
        for index, kernel in enumerate(kernels):
            for value in kernel.reads:
                readers[value].append(index)
        owners: dict[int, str] = {}
        for index, kernel in reversed(list(enumerate(kernels))):
            if kernel.op_type.rpartition(".")[2] in CONVERSIONS and kernel.name not in nodes:
                continue
            keys = [SUFFIXES.sub("", name) for name in (kernel.name, *kernel.results)]
            behind = [owners[reader] for value in kernel.results for reader in readers[value] if reader in owners]
            owner = next((nodes[key] for key in keys if key in nodes), next(iter(behind), None))
            if owner is not None:
                owners[index] = owner
        found: defaultdict[str, list[Kernel]] = defaultdict(list)
        for index, owner in owners.items():
            found[owner].append(kernels[index])
        return found

    def _conversion(self, shape: Shape) -> Conversion:
        def price(op_type: str, *dtypes: str) -> float:
            inputs = (shape, *((),) * (len(dtypes) - 1))
            return self.table.price(Kernel("", op_type, "", dtypes, inputs, (shape,)))

        quantize = price("QuantizeLinear", "float", "float", "uint8")
        dequantize = price("DequantizeLinear", "uint8", "float", "uint8")
        if len(shape) != IMAGE_RANK:
            return Conversion(quantize, dequantize)
        turn = price("Transpose", "uint8")
        block, unblock = price("nchwc.ReorderInput", "float"), price("nchwc.ReorderOutput", "float")
        return Conversion(quantize + turn, dequantize + turn, block, unblock)

    def _quantized(self, placement: Placement, dynamic: Collection[str]) -> ir.Model:
        """Return the model with Q/DQ where a placement has them; ranges that are not dynamic are of one sample."""
        missing = [name for name in placement.activations if name not in self._statistics.histograms]
        if missing:
            one = Dataset("one sample", lambda: self.samples[:1], input_specs(self.model))
            found = collect(self.model, missing, one, untracked)
            self._statistics = Statistics({**self._statistics.histograms, **found.histograms}, 1)
        observers = {name: Observer.DYNAMIC if name in dynamic else Observer.MINMAX for name in placement.activations}
        plan = allocate_bits(self.model, placement, self._statistics, self.target, observers)
        return InsertQdq(plan)(self.model.clone()).model


def _integers(placement: Placement) -> list[str]:
    """Return the operators in integers, without those that others absorb."""
    return [name for name, op in placement.ops.items() if op.precision is Precision.INTEGER and not op.reason]


def _counts(most: int) -> list[int]:
    """Return how many tensors to try: fewer of the large numbers."""
    return sorted({min(most, 2**step) for step in range(20)} - {0})


def _dear(names: Sequence[str], prices: Prices) -> str:
    """Say what an operator, and the activation that it would absorb, take."""
    as_float, as_integer = (sum(of.get(name, 0.0) for name in names) for of in (prices.as_float, prices.as_integer))
    if not 0.0 < as_float < as_integer:  # fused into others in one of the forms: it has no price of its own
        return "integers do not pay there, with the operators around it and conversions"
    return f"integers do not pay: {as_float:.3g} µs in float, {as_integer:.3g} µs in integers and conversions around it"


def _spoils(error: float, what: str = "its codes alone") -> str:
    return f"{what} would leave {numerics.decibel(1.0, error):.1f} dB at the outputs"
