"""Rounding: codes of weights that make up for one another's errors in what an operator computes.

Rounding to nearest makes every weight's error as small as it can be; what counts is the error of X · W, in which the
errors of a column add up as the rows of X let them. GPTQ (Frantar et al. 2023, "GPTQ: Accurate Post-Training
Quantization for Generative Pre-trained Transformers", algorithm 1, after Hassibi and Stork 1993) rounds one row of W
after another, those that are used most first, and lets the rows that are still free take over what was lost:

    e = (w_i - q_i) / U_ii,    W_j ← W_j - U_ij · e  for j behind i,    H⁻¹ = Uᵀ U,    H = E[xᵀx] + damping

The scales stay as they are. Codes of activations are not their values: what rounding adds to them, uniform and
independent, is a diagonal of Δ²/12 in H, which damps besides.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.calib.data import Dataset, Sample
from qcompile.calib.drift import position_weights
from qcompile.calib.packed_rounding import descend, factor_of_inverse, fit_multiples
from qcompile.calib.sensitivity import MEMORY, SAMPLES, spread
from qcompile.calib.work import Cost
from qcompile.calib.workers import abreast
from qcompile.core import numerics, packing, runtime, scratch
from qcompile.core.contract import Track
from qcompile.core.plan import TensorQuant

FloatArray = npt.NDArray[np.float64]

#: Rows of each operator's input that second moments are taken over, at most.
ROWS = 4096
#: Rows that are multiplied at once.
AT_ONCE = 512
#: Added to the diagonal of H, in parts of its mean: what few samples tell of small directions is chance. Coarse steps
#: make more of it, so that packed codes have as much as there are columns for each row.
DAMPING = 0.1
#: Of fewer bits steps are so coarse that this is done, and codes are gone over once more (`calib/packed_rounding.py`).
MANY = 8
#: Rows of weights whose errors are passed on at once to those behind them.
BLOCK = 128
#: Columns of weights that are rounded at once: they have nothing to do with one another, and take float64.
COLUMNS = 8192
#: Multiply-accumulates that collecting the rows may take, over all batches of operators.
WORK = 1e12


@dataclass(frozen=True)
class Operator:
    """A linear operator whose weights are codes.

    Parameters
    ----------
    node : onnx_ir.Node
        Conv, Gemm or MatMul of the float model, with constant weights.
    quant : TensorQuant
        How these are quantized.
    step : float
        Step of its input's codes; zero where it reads float values.
    """

    node: ir.Node
    quant: TensorQuant
    step: float = 0.0

    @property
    def reads(self) -> str:
        """The name of its input."""
        value = self.node.inputs[0]
        assert value is not None and value.name is not None
        return value.name

    @property
    def writes(self) -> str:
        """The name of its result."""
        name = self.node.outputs[0].name
        assert name is not None
        return name

    @property
    def shape(self) -> tuple[int, ...]:
        """The weights' shape."""
        value = self.node.inputs[1]
        assert value is not None and value.const_value is not None
        return tuple(value.const_value.shape.numpy())

    @property
    def groups(self) -> int:
        """How many parts of the channels are multiplied apart from one another."""
        return self.node.attributes.get_int("group", 1) if self.node.op_type == "Conv" else 1

    @property
    def depth(self) -> int:
        """How many weights make one number."""
        if self.node.op_type == "Conv":
            return int(np.prod(self.shape[1:]))
        return self.shape[1 if self._transposed else 0]

    def matrix(self, weights: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return weights as rows are multiplied by them, `[groups, depth, channels / groups]`."""
        if self.node.op_type == "Conv":
            return np.asarray(weights.reshape(self.groups, weights.shape[0] // self.groups, -1).transpose(0, 2, 1))
        return np.asarray((weights.T if self._transposed else weights)[None])

    def weights(self, matrix: FloatArray) -> FloatArray:
        """Turn what `matrix` returns into weights again."""
        if self.node.op_type == "Conv":
            return np.asarray(matrix.transpose(0, 2, 1).reshape(self.shape))
        return np.asarray(matrix[0].T if self._transposed else matrix[0])

    def rows(
        self, x: npt.NDArray[np.float32], written: Sequence[int], positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Return what the weights are multiplied by at some positions of the result, `[groups, positions, depth]`.

        Parameters
        ----------
        x : ndarray
            Its input.
        written : sequence of int
            The shape of its result.
        positions : ndarray of int
            Of the result without channels, flat.
        """
        if self.node.op_type != "Conv":
            return x.reshape(1, -1, x.shape[-1])[:, positions]
        where = np.unravel_index(positions, (written[0], *written[2:]))
        patches = _windows(self.node, x, self.shape[2:])[where]
        return patches.reshape(len(positions), self.groups, -1).transpose(1, 0, 2)

    @property
    def _transposed(self) -> bool:
        return self.node.op_type == "Gemm" and self.node.attributes.get_int("transB", 0) != 0


def _windows(node: ir.Node, x: npt.NDArray[np.float32], kernel: Sequence[int]) -> npt.NDArray[np.float32]:
    """Return a view of what a Conv multiplies its weights by, `[batch, *positions, channels, *kernel]`."""
    rank = len(kernel)
    strides = node.attributes.get_ints("strides", (1,) * rank)
    dilations = node.attributes.get_ints("dilations", (1,) * rank)
    pads = node.attributes.get_ints("pads", (0,) * 2 * rank)
    padded = np.pad(x, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)]) if any(pads) else x
    reach = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    view = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, 2 + rank)))
    for axis, step in enumerate((*strides, *dilations), start=2):
        view = np.moveaxis(np.moveaxis(view, axis, 0)[::step], 0, axis)
    return np.moveaxis(view, 1, 1 + rank)


@dataclass(frozen=True)
class SecondMoments:
    """What an operator's weights are multiplied by, on average.

    Parameters
    ----------
    matrices : ndarray of float64, shape (groups, depth, depth)
    rows : int
        How many rows they are the mean of.
    """

    matrices: FloatArray
    rows: int


def second_moments(
    model: ir.Model, operators: Sequence[Operator], data: Dataset, track: Track[Sample], threads: int = 1
) -> Iterator[tuple[Operator, SecondMoments]]:
    """Yield for each operator the second moments of what its weights are multiplied by.

    Positions count by 1 / variance of the result over its channels, as in `drift`: a normalization divides by that.
    As many operators are measured in one run as `sensitivity.MEMORY` has room for.

    Parameters
    ----------
    model : onnx_ir.Model
        The float model.
    operators : sequence of Operator
    data : Dataset
        At most `sensitivity.SAMPLES` of it are run, as many as `WORK` allows, spread evenly.
    track : callable
        Shows progress.
    threads : int
        Operators that are measured at a time; changes no result.

    Yields
    ------
    Operator, SecondMoments
    """
    first = next(iter(data))
    batches = list(_batches(operators))
    most = min(SAMPLES, WORK / max(1, len(batches)) / Cost.of(model, first).total)
    samples = spread(data, sum(array.nbytes for array in first.values()), most)
    for batch in batches:
        sums = [_Products(np.zeros((one.groups, one.depth, one.depth))) for one in batch]
        asked = dict.fromkeys(name for one in batch for name in (one.reads, one.writes))
        session = runtime.Session(runtime.with_outputs(model, list(asked)))

        def run(feeds: Sample, session: runtime.Session = session) -> runtime.Outputs:
            return {**feeds, **session.run(feeds)}

        for values in abreast(run, track(samples, len(samples), "weighing inputs"), min(threads, 2)):

            def add(pair: tuple[Operator, _Products], values: runtime.Outputs = values) -> None:
                one, total = pair
                total.add(*_rows(one, values[one.reads], values[one.writes], -(-ROWS // len(samples))))

            deque(abreast(add, zip(batch, sums, strict=True), threads), 0)
        del session  # it holds the model, which whoever rounds weights meanwhile has no use for
        scratch.give_back()
        yield from ((one, total.mean(len(samples))) for one, total in zip(batch, sums, strict=True))


@dataclass
class _Products:
    """Sums of products of rows; many rows are multiplied at once, which takes a quarter of the time."""

    total: FloatArray
    rows: int = 0
    pending: list[tuple[npt.NDArray[np.float32], FloatArray]] = field(default_factory=list)

    def add(self, rows: npt.NDArray[np.float32], factors: FloatArray) -> None:
        """Add the products of some rows, `[groups, rows, depth]`, each times its factor, `[rows, 1]`."""
        self.pending.append((rows, factors))
        self.rows += rows.shape[1]
        if sum(len(part) for _, part in self.pending) >= AT_ONCE:
            self._multiply()

    def mean(self, samples: int) -> SecondMoments:
        """Return the mean over so many samples of what was added."""
        if self.pending:
            self._multiply()
        return SecondMoments(self.total / samples, self.rows)

    def _multiply(self) -> None:
        groups, _, depth = self.total.shape
        rows, end = np.empty((groups, sum(len(part) for _, part in self.pending), depth)), 0
        for part, factors in self.pending:
            start, end = end, end + len(factors)
            np.multiply(part, factors, out=rows[:, start:end], dtype=np.float64)
        self.total += rows.transpose(0, 2, 1) @ rows
        self.pending.clear()


def _rows(
    operator: Operator, read: npt.NDArray[np.float32], written: npt.NDArray[np.float32], most: int
) -> tuple[npt.NDArray[np.float32], FloatArray]:
    """Return the rows at so many positions of a sample at most, and factors by which their products sum to the mean."""
    weights = position_weights(written, 1 if operator.node.op_type == "Conv" else -1).reshape(-1)
    chosen = np.unique(np.linspace(0, weights.size - 1, min(most, weights.size)).round().astype(np.int64))
    rows = operator.rows(read, written.shape, chosen)
    return rows, np.sqrt(weights[chosen] / weights[chosen].sum())[:, None]


def _batches(operators: Sequence[Operator]) -> Iterator[list[Operator]]:
    """Yield operators whose moments are held at the same time."""
    batch, size = list[Operator](), 0
    for operator in operators:
        needed = 8 * operator.groups * operator.depth**2
        if batch and size + needed > MEMORY:
            yield batch
            batch, size = [], 0
        batch.append(operator)
        size += needed
    if batch:
        yield batch


def round_weights(operator: Operator, moments: SecondMoments) -> numerics.IntArray:
    """Return the codes of an operator's weights by GPTQ, in the weights' shape.

    Parameters
    ----------
    operator : Operator
    moments : SecondMoments
    """
    quant, value = operator.quant, operator.node.inputs[1]
    assert value is not None and value.const_value is not None
    weights = value.const_value.numpy()
    scales = np.broadcast_to(numerics.along_axis(quant.scales, quant.axis, weights.ndim), weights.shape)
    multiples = np.broadcast_to(np.ones((), weights.dtype), weights.shape)
    if quant.block_size:
        multiples = packing.multiples(weights / scales, quant.axis, quant.block_size)
    matrices = (operator.matrix(array) for array in (weights, scales, multiples))
    few = quant.bits < MANY
    damping = operator.depth / max(1, moments.rows) if few else DAMPING
    limits = (packing.LOWEST, packing.HIGHEST) if quant.block_size else numerics.code_range(quant.dtype, symmetric=True)
    parts, steps, grids = matrices
    trusted = damped(moments.matrices + operator.step**2 / 12.0 * np.eye(operator.depth), damping)
    codes = gptq(parts, steps[:, 0].astype(np.float64), trusted, limits, grids)
    if few:
        for group, h in enumerate(trusted):
            multiple = grids[group].astype(np.float64)
            scaled = parts[group].astype(np.float64) / steps[group, 0].astype(np.float64)
            if quant.block_size and quant.axis is not None:
                length = packing.block_length(operator.depth, quant.block_size)
                codes[group], multiple = fit_multiples(codes[group], scaled, h, limits, multiple, length)
            codes[group] = descend(codes[group], scaled, h, limits, multiple)
    return np.ascontiguousarray(operator.weights(codes).astype(quant.dtype))


def gptq(
    weights: FloatArray,
    step: FloatArray,
    moments: FloatArray,
    limits: tuple[int, int],
    multiple: FloatArray | float = 1.0,
) -> FloatArray:
    """Round matrices so that X · W changes little.

    Parameters
    ----------
    weights : ndarray of float64, shape (..., n, m)
    step : ndarray of float64, shape (..., m)
        What a code stands for, by column.
    moments : ndarray of float64, shape (..., n, n)
        E[xᵀx] of the rows that are multiplied by them, `damped`.
    limits : tuple of int
        The lowest and the highest code, of those that have no multiple.
    multiple : float, or ndarray of float64, shape (..., n, m)
        What each code is to be a whole multiple of.

    Returns
    -------
    ndarray of float64, shape (..., n, m)
        Integers.
    """
    order = np.argsort(-moments.diagonal(axis1=-2, axis2=-1), axis=-1, kind="stable")[..., None]
    across = order.swapaxes(-1, -2)
    upper = factor_of_inverse(np.take_along_axis(np.take_along_axis(moments, order, -2), across, -1))
    grid, found = np.broadcast_to(multiple, weights.shape), np.empty(weights.shape)
    for start in range(0, weights.shape[-1], COLUMNS):
        part = np.s_[..., start : start + COLUMNS]
        left = np.take_along_axis(weights[part], order, -2).astype(np.float64) / step[..., None, :][part]
        codes = _in_turn(left, upper, limits, np.take_along_axis(grid[part], order, -2).astype(np.float64))
        np.put_along_axis(found[part], order, codes, -2)
    return found


def _in_turn(left: FloatArray, upper: FloatArray, limits: tuple[int, int], grid: FloatArray) -> FloatArray:
    """Round one row after another; those behind it, in `left`, take over what is lost."""
    codes, count = np.empty_like(left), left.shape[-2]
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        errors = np.empty_like(left[..., start:stop, :])
        for row in range(start, stop):
            codes[..., row, :] = np.clip(np.rint(left[..., row, :] / grid[..., row, :]), *limits) * grid[..., row, :]
            error = (left[..., row, :] - codes[..., row, :]) / upper[..., row, row, None]
            left[..., row + 1 : stop, :] -= upper[..., row, row + 1 : stop, None] * error[..., None, :]
            errors[..., row - start, :] = error
        left[..., stop:, :] -= upper[..., start:stop, stop:].swapaxes(-1, -2) @ errors
    return codes


def damped(moments: FloatArray, damping: float = DAMPING) -> FloatArray:
    """Return second moments that trust the samples less in directions of which they tell little."""
    diagonals = moments.diagonal(axis1=-2, axis2=-1)
    more = damping * diagonals.mean(axis=-1) + float(np.finfo(np.float32).tiny)
    return np.asarray(moments + more[..., None, None] * np.eye(moments.shape[-1]))
