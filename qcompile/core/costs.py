"""Cost tables: what a runtime's kernels take on a class of processors, measured once and shipped as data.

A table answers for shapes that were never measured by the nearest ones that were, at the rate of work that those
reached. It is an input of a compile like the model is: nothing is timed while decisions are made.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.resources.abc import Traversable
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from qcompile.core.capabilities import Capability
from qcompile.core.errors import UsageError, first_line
from qcompile.core.execution import Kernel, Shape

#: Raised when the file's meaning changes; docs/schemas/costs.schema.json describes this version.
SCHEMA_VERSION = 1
#: So many of the nearest shapes tell the rate for one that was not measured.
NEIGHBOURS = 4
#: Microseconds of a kernel that are not work: looking it up, its outputs' memory. None takes less.
OVERHEAD = 0.5
#: Digits that are kept of a time: more would be noise, and noise must not decide.
DIGITS = 3

CONVOLUTIONS = ("Conv", "FusedConv", "QLinearConv", "ConvInteger", "ConvTranspose")
PRODUCTS = (
    "DynamicQuantizeMatMul", "FusedGemm", "FusedMatMul", "Gemm", "MatMul", "MatMulInteger", "MatMulIntegerToFloat",
    "MatMulNBits", "QGemm", "QLinearMatMul",
)  # fmt: skip
PICKING = ("Gather", "GatherElements", "GatherND", "Slice")
#: What only tells a tensor's shape: the memory is handed on, so that the size does not matter.
VIEWS = ("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")

#: Whole numbers that tell how large a kernel's task is, and how much work that makes.
Size = tuple[tuple[int, ...], float]


def kernel_key(kernel: Kernel) -> str:
    """Return the table's key: the operator, what it computes on, and for a convolution whether it is depthwise."""
    weights = _weights(kernel)
    types = [kernel.dtypes[0] if kernel.dtypes else ""]
    types += [kernel.dtypes[weights]] if weights is not None else []
    depthwise = "/depthwise" if _is_depthwise(kernel, weights) else ""
    return f"{kernel.op_type}{depthwise}[{','.join(types)}]"


def kernel_size(kernel: Kernel) -> Size:
    """Return the shape features of a kernel and its work, in multiply-accumulates or elements read and written."""
    written = sum(_elements(shape) for shape in kernel.outputs)
    weights = _weights(kernel)
    plain = kernel.op_type.rpartition(".")[2]
    if plain in CONVOLUTIONS and weights is not None:
        w, read = kernel.inputs[weights], _elements(kernel.inputs[0])
        work = (read if plain == "ConvTranspose" else written) * _elements(w[1:])
        return (read, written, w[0], w[1], _elements(w[2:])), float(max(1, work))
    if plain in PRODUCTS and kernel.inputs and kernel.inputs[0] and kernel.outputs and kernel.outputs[0]:
        depth, columns = kernel.inputs[0][-1], kernel.outputs[0][-1]
        return (written // max(1, columns), depth, columns), float(max(1, written * depth))
    # What picks from a table touches only what it takes.
    read = written if plain in PICKING else sum(_elements(shape) for shape in kernel.inputs if shape)
    return (read, written), float(max(1, read + written))


def _weights(kernel: Kernel) -> int | None:
    """Return which input has the second operand of a product: the next one with axes behind the first."""
    if kernel.op_type.rpartition(".")[2] not in (*CONVOLUTIONS, *PRODUCTS):
        return None
    return next((index for index, shape in enumerate(kernel.inputs) if index and len(shape) > 1), None)


def _is_depthwise(kernel: Kernel, weights: int | None) -> bool:
    plain = kernel.op_type.rpartition(".")[2]
    return plain in CONVOLUTIONS and weights is not None and kernel.inputs[weights][1] == 1 != kernel.inputs[weights][0]


def _elements(shape: Shape) -> int:
    return math.prod(shape)


@dataclass(frozen=True)
class CostTable:
    """What a runtime makes of patterns, and what its kernels take.

    Parameters
    ----------
    runtime : str
        Name and version of the runtime that was measured.
    processor : str
        What it was measured on, for people.
    run : float
        Microseconds of a run that no kernel takes: checking inputs, handing outputs over. 0 without entries.
    entries : mapping of str to mapping of tuple of int to float
        Per key, microseconds by shape features; none in a table that has the structure only.
    works : mapping of str to mapping of tuple of int to float
        Per key, the work by shape features.
    capabilities : tuple of Capability
    """

    runtime: str
    processor: str
    run: float
    entries: Mapping[str, Mapping[tuple[int, ...], float]] = field(default_factory=dict)
    works: Mapping[str, Mapping[tuple[int, ...], float]] = field(default_factory=dict)
    capabilities: tuple[Capability, ...] = ()

    @classmethod
    def measured(
        cls,
        runtime: str,
        processor: str,
        run: float,
        kernels: Iterable[Kernel],
        capabilities: Sequence[Capability] = (),
    ) -> Self:
        """Make a table of kernels that were timed; several of one size count by their median."""
        times: defaultdict[str, defaultdict[tuple[int, ...], list[float]]] = defaultdict(lambda: defaultdict(list))
        works: defaultdict[str, dict[tuple[int, ...], float]] = defaultdict(dict)
        for kernel in kernels:
            key, (features, work) = kernel_key(kernel), kernel_size(kernel)
            times[key][features].append(max(kernel.microseconds, OVERHEAD))
            works[key][features] = work
        entries = {key: {size: _rounded(float(np.median(found))) for size, found in sorted(sizes.items())}
                   for key, sizes in sorted(times.items())}  # fmt: skip
        return cls(runtime, processor, _rounded(run), entries, works, tuple(capabilities))

    @classmethod
    def from_json(cls, source: Traversable) -> Self:
        """Read a table that `to_json` wrote.

        Raises
        ------
        UsageError
            If the file is none.
        """
        try:
            content = json.loads(source.read_text(encoding="utf-8"))
            if content["schema_version"] != SCHEMA_VERSION:
                fact = f"has schema version {content['schema_version']}, this release reads {SCHEMA_VERSION}"
                raise UsageError(source, fact, "measure it again with 'qcompile probe'")
            entries: dict[str, dict[tuple[int, ...], float]] = {}
            works: dict[str, dict[tuple[int, ...], float]] = {}
            for key, rows in content["kernels"].items():
                entries[key] = {tuple(map(int, row[:-2])): _positive(row[-1]) for row in rows}
                works[key] = {tuple(map(int, row[:-2])): _positive(row[-2]) for row in rows}
            rows = tuple(map(Capability.from_row, content.get("capabilities", ())))
            head = str(content["runtime"]), str(content["processor"]), _positive(content["run"], least=0.0)
            return cls(*head, entries, works, rows)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            fact = f"is not a cost table ({first_line(error)})"
            raise UsageError(source, fact, "measure one with 'qcompile probe'") from error

    def to_json(self) -> str:
        """Return the table as JSON text, a row per size: its features, its work, its microseconds."""
        kernels = {key: [[*size, self.works[key][size], time] for size, time in sizes.items()]
                   for key, sizes in self.entries.items()}  # fmt: skip
        head: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "runtime": self.runtime, "processor": self.processor,
                                "run": self.run}  # fmt: skip
        rows = ",".join(f"\n {json.dumps(key)}: [{_lines(found)}\n ]" for key, found in kernels.items())
        patterns = _lines([row.as_row() for row in self.capabilities])
        return json.dumps(head, indent=1)[:-2] + (
            f',\n "capabilities": [{patterns}\n ],\n "kernels": {{{rows}\n }}\n}}\n'
        )

    def price(self, kernel: Kernel) -> float:
        """Return the microseconds that a kernel takes, as far as the table tells.

        A size that was measured takes what it took. Another takes its work at the rate of its nearest neighbours, the
        nearer the more; a view takes the median of all. A kernel that was never measured takes its elements at the rate
        of those that only move data.
        """
        return self._price(kernel_key(kernel), *kernel_size(kernel))

    def _price(self, key: str, features: tuple[int, ...], work: float) -> float:
        sizes = self.entries.get(key)
        if sizes is None:
            return OVERHEAD + work * self._moving
        if (known := sizes.get(features)) is not None:
            return known
        if _operator(key) in VIEWS:
            return float(np.median(list(sizes.values())))
        points, rates = self._rates[key]
        distances = np.sqrt(np.mean((points - np.log2(np.maximum(features, 1))) ** 2, axis=1))
        nearest = np.argsort(distances, kind="stable")[:NEIGHBOURS]
        weights = 1.0 / (distances[nearest] + 1e-3) ** 2
        return OVERHEAD + work * float(np.exp(np.average(rates[nearest], weights=weights)))

    def moved(self, seen: Self) -> Self:
        """Return the table as a device has it on which a few kernels were measured.

        Those take what they took there. What is left takes what it takes in this table, times the median ratio of the
        kernels under the same key; times that of all, where none of them was measured.

        Parameters
        ----------
        seen : CostTable
            What was measured there. Capabilities are this table's: times tell nothing of patterns.
        """
        ratios = {key: [time / self._price(key, size, seen.works[key][size]) for size, time in sizes.items()]
                  for key, sizes in seen.entries.items() if key in self.entries}  # fmt: skip
        overall = float(np.median([ratio for found in ratios.values() for ratio in found])) if ratios else 1.0
        entries, works = dict[str, Mapping[tuple[int, ...], float]](), dict[str, Mapping[tuple[int, ...], float]]()
        for key in sorted({*self.entries, *seen.entries}):
            factor = float(np.median(ratios[key])) if key in ratios else overall
            own = {size: max(OVERHEAD, _rounded(factor * time)) for size, time in self.entries.get(key, {}).items()}
            entries[key] = dict(sorted({**own, **seen.entries.get(key, {})}.items()))
            works[key] = {**self.works.get(key, {}), **seen.works.get(key, {})}
        return replace(seen, entries=entries, works=works, capabilities=self.capabilities)

    def total(self, kernels: Iterable[Kernel]) -> float:
        """Return the microseconds of a run."""
        return self.run + sum(map(self.price, kernels))

    def mean(self, runs: Sequence[Sequence[Kernel]]) -> float:
        """Return the mean of what runs take, in microseconds."""
        return sum(map(self.total, runs)) / len(runs)

    @cached_property
    def _rates(self) -> dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
        """Logarithms of features and of microseconds per unit of work."""
        return {
            key: (
                np.log2(np.maximum(np.array(list(sizes), np.float64), 1)),
                np.log([max(time - OVERHEAD, 0.05) / self.works[key][size] for size, time in sizes.items()]),
            )
            for key, sizes in self.entries.items()
        }

    @cached_property
    def _moving(self) -> float:
        computing = (*CONVOLUTIONS, *PRODUCTS)
        rates = [rate for key, (_, found) in self._rates.items() for rate in found if _operator(key) not in computing]
        return float(np.exp(np.median(rates))) if rates else 1e-3


def _operator(key: str) -> str:
    return key.partition("[")[0].partition("/")[0].rpartition(".")[2]


def _lines(rows: Iterable[object]) -> str:
    return ",".join(f"\n  {json.dumps(row)}" for row in rows)


def _rounded(number: float) -> float:
    return float(f"{number:.{DIGITS}g}")


def _positive(number: object, least: float = math.ulp(0.0)) -> float:
    if not isinstance(number, int | float) or not least <= number < math.inf:
        raise ValueError(f"{number!r} is no time")
    return float(number)
