"""Which rotation: the one that leaves quantized readers the least noise, of some that are drawn or learned.

Candidates are randomized Hadamard matrices, and the same behind the eigenvectors of the second moments, which gives
every channel the same one (K·H; MambaQuant, Xu et al. 2025). The best of these is improved without gradients, by turns:
the codes of what is rotated, and the rotation nearest to these codes (ITQ, Gong and Lazebnik 2011, with the codes of
the quantizer that will be used). For frozen codes Z the R that minimises ‖A R - Z‖ is U Vᵀ of the singular vectors of
AᵀZ (Procrustes; Schönemann 1966).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.calib.data import Dataset, Sample
from qcompile.core import numerics, runtime
from qcompile.core.contract import Track
from qcompile.core.orthogonal import Matrix, Orthogonal, keeping_ones

#: Steps of alternation; each costs as much as judging one candidate.
STEPS = 12
#: Rows of each tensor that candidates are judged on.
ROWS = 384
#: Noise that a matrix of stored numbers must leave, of what one from a seed does.
WORTH_STORING = 0.9


@dataclass(frozen=True)
class Reading:
    """What a quantized operator reads before it is rotated.

    Parameters
    ----------
    rows : ndarray `[t, k n]`
        Its input, a token or a place a row; behind a norm without γ. Where k heads are rotated by one matrix of n
        channels, they stand side by side and share a scale.
    weights : ndarray `[k n, m]`
        Its weights (some of their columns), with that γ.
    """

    rows: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scheme:
    """How readers are quantized: activations asymmetric per tensor, weights symmetric per output channel.

    Parameters
    ----------
    activation_bits, weight_bits : int
        At most 8.
    """

    activation_bits: int = 8
    weight_bits: int = 8

    def activation(self, rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return an input as its codes hold it."""
        low, high = min(float(rows.min()), 0.0), max(float(rows.max()), 0.0)
        scale = max((high - low) / (2**self.activation_bits - 1), numerics.SMALLEST_SCALE)
        zero = np.rint(-low / scale)
        codes = np.clip(np.rint(rows / scale) + zero, 0, 2**self.activation_bits - 1)
        held: npt.NDArray[np.float64] = (codes - zero) * scale
        return held

    def weight(self, weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return weights `[n, m]` as their codes hold them."""
        scale = np.abs(weights).max(axis=0) / (2 ** (self.weight_bits - 1) - 1)
        scale = np.where(scale > 0, scale, 1.0)
        held: npt.NDArray[np.float64] = np.rint(weights / scale) * scale
        return held


def measure_rows(
    model: ir.Model, axes: Mapping[str, int], data: Dataset, track: Track[Sample]
) -> dict[str, npt.NDArray[np.float32]]:
    """Stream the data through the float model and keep some rows of the named tensors.

    Parameters
    ----------
    model : onnx_ir.Model
    axes : mapping of str to int
        The channel axis of each tensor, by value name.
    data : Dataset
    track : callable
        Shows progress.

    Returns
    -------
    dict of str to ndarray `[t, n]`
        About `ROWS` of each, the same number of each sample: evenly spaced ones, and the one that reaches farthest.
    """
    session = runtime.Session(runtime.with_outputs(model, list(axes)), optimize=True)
    each, kept = -(-ROWS // len(data)), {name: list[npt.NDArray[np.float32]]() for name in axes}
    for feeds in track(data, len(data), "measuring rows"):
        values = {**feeds, **session.run(feeds)}
        for name, axis in axes.items():
            rows = np.moveaxis(values[name], axis, -1)
            rows = rows.reshape(-1, rows.shape[-1])
            if len(rows):
                some = np.linspace(0, len(rows) - 1, min(each, len(rows))).astype(np.int64)
                kept[name].append(rows[np.append(some, np.abs(rows).max(axis=1).argmax())].astype(np.float32))
    return {name: np.concatenate(parts) for name, parts in kept.items() if parts}


def normalized(rows: npt.NDArray[np.float64], centre: bool, epsilon: float) -> npt.NDArray[np.float64]:
    """Return rows as LayerNorm (centre) or RMSNorm makes them, without γ and β."""
    rows = rows - rows.mean(axis=1, keepdims=True) if centre else rows
    made: npt.NDArray[np.float64] = rows / np.sqrt((rows**2).mean(axis=1, keepdims=True) + epsilon)
    return made


def noise(readings: Iterable[Reading], r: Matrix, scheme: Scheme) -> float:
    """Return the noise power over the signal power of what the readers make with a rotation, their mean.

    Parameters
    ----------
    readings : iterable of Reading
    r : ndarray `[n, n]`
        Rotates every n neighbouring channels.
    scheme : Scheme
    """
    ratios = []
    for reading in readings:
        exact = reading.rows @ reading.weights
        found = scheme.activation(_rotated(reading.rows, r)) @ scheme.weight(_rotated(reading.weights.T, r).T)
        signal = float(np.sum(exact * exact))
        if signal > 0:
            ratios.append(float(np.sum((found - exact) ** 2)) / signal)
    return float(np.mean(ratios)) if ratios else 0.0


def _rotated(rows: npt.NDArray[np.float64], r: Matrix) -> npt.NDArray[np.float64]:
    """Return rows `[t, k n]` with every n neighbouring channels rotated."""
    product: npt.NDArray[np.float64] = (rows.reshape(-1, len(r)) @ r).reshape(rows.shape)
    return product


def second_moments(readings: Sequence[Reading], width: int) -> Matrix:
    """Return XᵀX `[n, n]` of every n neighbouring channels, each reader's rows scaled to count the same."""
    total = np.zeros((width, width))
    for reading in readings:
        rows, power = reading.rows.reshape(-1, width), float(np.sum(reading.rows**2))
        if power > 0:
            total += rows.T @ rows / power
    return total


def spread_moments(moments: Matrix, hadamard: Orthogonal) -> Orthogonal:
    """Return K·H: with eigenvectors K of the second moments, all channels behind it have the same one.

    Where R must keep ones it is only nearly so.

    Parameters
    ----------
    moments : ndarray `[n, n]`
    hadamard : Orthogonal
        H, whose entries are ±1/√n where there is such a matrix.
    """
    _, vectors = np.linalg.eigh(moments)
    # They come in the order of their moments: where H is in blocks, each block gets some of all sizes.
    dealt = vectors[:, np.arange(hadamard.width).reshape(hadamard.block, -1).T.reshape(-1)]
    r = dealt @ hadamard.matrix()
    return Orthogonal.of(keeping_ones(r) if hadamard.keeps_ones else r, keeps_ones=hadamard.keeps_ones)


def learn(readings: Sequence[Reading], start: Orthogonal, scheme: Scheme, steps: int = STEPS) -> Orthogonal:
    """Alternate between the codes of what is rotated and the rotation nearest to them; return the best that was met.

    Parameters
    ----------
    readings : sequence of Reading
    start : Orthogonal
        Returned itself if nothing is better.
    scheme : Scheme
    steps : int
    """
    best, least, r = start, noise(readings, start.matrix(), scheme), start.matrix()
    for _ in range(steps):
        r = _nearest(sum((_pull(reading, r, scheme) for reading in readings), np.zeros_like(r)), start.keeps_ones)
        found = noise(readings, r, scheme)
        if found < least:
            best, least = Orthogonal.of(r, keeps_ones=start.keeps_ones), found
    return best


def _pull(reading: Reading, r: Matrix, scheme: Scheme) -> Matrix:
    """Return AᵀZ of a reader: its rows and its weights, each of power one, against what their codes hold."""
    total = np.zeros_like(r)
    columns = reading.weights.T
    held = scheme.activation(_rotated(reading.rows, r)), scheme.weight(_rotated(columns, r).T).T
    for part, codes in zip((reading.rows, columns), held, strict=True):
        power = max(float(np.sum(part**2)), numerics.SMALLEST_SCALE)
        total += part.reshape(-1, len(r)).T @ codes.reshape(-1, len(r)) / power
    return total


def _nearest(pull: Matrix, keeps_ones: bool) -> Matrix:
    """Return the orthogonal R that maximises tr(Rᵀ pull), with R·1 = 1 where that is asked."""
    if not keeps_ones:
        u, _, vt = np.linalg.svd(pull)
        nearest: Matrix = u @ vt
        return nearest
    width = len(pull)
    basis = np.linalg.qr(np.column_stack([np.ones(width), np.eye(width)[:, 1:]]))[0][:, 1:]
    u, _, vt = np.linalg.svd(basis.T @ pull @ basis)
    kept: Matrix = np.full((width, width), 1 / width) + basis @ (u @ vt) @ basis.T
    return kept


def choose(
    readings: Sequence[Reading],
    width: int,
    scheme: Scheme,
    *,
    keeps_ones: bool = False,
    seeds: Sequence[int] = (0, 1, 2, 3),
    steps: int = STEPS,
) -> tuple[Orthogonal, dict[str, float]]:
    """Return the rotation with the least noise in its readers, and the noise of the best of each kind.

    The last quarter of each reader's rows judges between the kinds: what was learned fits the others.

    Parameters
    ----------
    readings : sequence of Reading
    width : int
        n, the channels of the matrix.
    scheme : Scheme
    keeps_ones : bool
        R·1 must be 1.
    seeds : sequence of int
        Of the Hadamard matrices that are tried.
    steps : int
        Of learning; with 0 nothing is learned.

    Returns
    -------
    Orthogonal
        One that a seed describes unless a stored one leaves less than `WORTH_STORING` of its noise.
    dict of str to float
        Noise over signal by "none", "hadamard", "klt hadamard" and "learned".
    """
    seen, unseen = _split(readings)
    drawn = [Orthogonal.spreading(width, seed, keeps_ones=keeps_ones) for seed in seeds]
    candidates = {"hadamard": min(drawn, key=lambda one: noise(seen, one.matrix(), scheme))}
    moments = second_moments(seen, width)
    spread = [spread_moments(moments, one) for one in drawn]
    candidates["klt hadamard"] = min(spread, key=lambda one: noise(seen, one.matrix(), scheme))
    if steps:
        candidates["learned"] = learn(seen, candidates["klt hadamard"], scheme, steps)
    table = {kind: noise(unseen, one.matrix(), scheme) for kind, one in candidates.items()}
    # A seed takes no room: numbers are stored where they are worth it.
    best = min(candidates, key=lambda kind: table[kind] / (1.0 if kind == "hadamard" else WORTH_STORING))
    return candidates[best], {"none": noise(unseen, np.eye(width), scheme)} | table


def _split(readings: Sequence[Reading]) -> tuple[list[Reading], list[Reading]]:
    """Return three quarters of each reader's rows, and the rest."""
    cuts = [max(1, len(reading.rows) * 3 // 4) for reading in readings]
    seen = [Reading(reading.rows[:cut], reading.weights) for reading, cut in zip(readings, cuts, strict=True)]
    unseen = [
        Reading(reading.rows[cut:] if cut < len(reading.rows) else reading.rows, reading.weights)
        for reading, cut in zip(readings, cuts, strict=True)
    ]
    return seen, unseen
