"""Enlarge: further samples, made of those that there are, where no more real ones can be had.

Ranges and second moments of a few samples are those of a few words or pictures. Texts are spliced, and some of their
tokens replaced by others of theirs; pictures are mirrored, cropped, mixed and made brighter or darker. What is made
serves to fit, never to judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.calib.data import Dataset, Sample
from qcompile.core.errors import UsageError

Array = npt.NDArray[Any]

#: Part of a text's tokens that others take the place of.
REPLACED = 0.2
#: What a crop keeps of height and width, at least; a mixture of the picture that it is mostly of; contrast, in parts;
#: and by how much a picture is made brighter or darker, in parts of the data's range.
CROP, MIXED, CONTRAST, BRIGHTNESS = 0.6, 0.5, 0.3, 0.1
#: Axes that hold channels have at most so many.
CHANNELS = 4
#: The same samples are made in every compile.
SEED = 0


@dataclass(frozen=True)
class Enlarger:
    """Makes samples of a model's inputs.

    Parameters
    ----------
    times : float
        How many samples there are to be for each that is given.
    name : str
        The input that holds tokens, or the picture.
    tokens : bool
        Which of them it holds.
    """

    times: float
    name: str
    tokens: bool

    @classmethod
    def of(cls, model: ir.Model, data: Dataset, count: int) -> Self:
        """Find out what a model reads, for so many samples in all.

        Raises
        ------
        UsageError
            If it is neither tokens nor one picture.
        """
        times, specs = count / len(data), data.specs
        if (name := token_input(model)) is not None:
            return cls(times, name, True)
        if len(specs) == 1 and _channel_axis(specs[0].shape or ()) is not None:
            return cls(times, specs[0].name, False)
        listed = ", ".join(map(str, specs))
        fact = f"knows how to make texts and pictures, and the model reads neither ({listed})"
        raise UsageError(f"--enlarge {count}", fact, "leave it out")

    def __call__(self, data: Dataset) -> Dataset:
        """Return the samples, each with those behind it that are its share."""

        def samples() -> Iterator[Sample]:
            real, generator = list(data), np.random.default_rng(SEED)
            make, more = self._text if self.tokens else self._picture, self.times - 1.0
            for index, feeds in enumerate(real):
                yield feeds
                share = round((index + 1) * more) - round(index * more)
                yield from (make(real, generator) for _ in range(share))

        return Dataset(data.place, samples, data.specs)

    def _text(self, real: Sequence[Sample], generator: np.random.Generator) -> Sample:
        first, second = (real[index] for index in _two(len(real), generator))
        made = spliced(first, second, self.name, generator)
        tokens, ordinary = made[self.name], _ordinary([feeds[self.name] for feeds in real])
        replaced = np.isin(tokens, ordinary) & (generator.random(tokens.shape) < REPLACED)
        if ordinary.size:
            tokens = np.where(replaced, generator.choice(ordinary, tokens.shape), tokens)
        return {**made, self.name: tokens}

    def _picture(self, real: Sequence[Sample], generator: np.random.Generator) -> Sample:
        pictures = [feeds[self.name] for feeds in real]
        first, second = (pictures[index] for index in _two(len(real), generator))
        axis = _channel_axis(first.shape)
        assert axis is not None
        made = _cropped(np.moveaxis(first.astype(np.float64), axis, 1), generator)
        other = np.moveaxis(second, axis, 1)
        if other.shape == made.shape:
            part = generator.uniform(MIXED, 1.0)
            made = part * made + (1.0 - part) * other
        low, high = min(map(np.min, pictures)), max(map(np.max, pictures))
        made = (made - made.mean()) * generator.uniform(1.0 - CONTRAST, 1.0 + CONTRAST) + made.mean()
        made += generator.uniform(-BRIGHTNESS, BRIGHTNESS) * (float(high) - float(low))
        made = np.clip(np.moveaxis(made, 1, axis), low, high)
        return {self.name: (made if first.dtype.kind == "f" else np.rint(made)).astype(first.dtype)}


def _two(count: int, generator: np.random.Generator) -> Sequence[int]:
    """Draw two of so many, not the same where there are more than one."""
    return [int(index) for index in generator.choice(count, 2, replace=count == 1)]


def token_input(model: ir.Model) -> str | None:
    """Return the input that indexes the model's largest table: that of words, not those of types and positions."""
    rows: dict[str, int] = {}
    for value in model.graph.inputs:
        readers = [node for node, _ in value.uses()]
        readers += [behind for node in readers if node.op_type == "Cast" for behind, _ in node.outputs[0].uses()]
        for node in readers:
            table = node.inputs[0].const_value if node.op_type == "Gather" and node.inputs[0] is not None else None
            if table is not None and table.shape.rank() == 2 and value.name is not None:
                rows[value.name] = max(rows.get(value.name, 0), table.shape.numpy()[0])
    return max(rows, key=lambda name: rows[name], default=None)


def spliced(first: Sample, second: Sample, name: str, generator: np.random.Generator) -> dict[str, Array]:
    """Return the beginning of one text with the end of another, cut where masks, types and positions of both agree."""
    length = min(first[name].shape[-1], second[name].shape[-1])
    beside = [other for other in second if other != name and second[other].shape == second[name].shape]
    agree = np.ones(length, bool)
    for other in beside:
        agree &= (first[other][..., :length] == second[other][..., :length]).reshape(-1, length).all(axis=0)
    cuts = np.flatnonzero(agree[:-1] & agree[1:]) + 1
    if not cuts.size:
        return dict(second)
    cut = generator.choice(cuts)
    ends = {other: [first[other][..., :cut], second[other][..., cut:]] for other in (name, *beside)}
    return {**second, **{other: np.concatenate(parts, axis=-1) for other, parts in ends.items()}}


def _ordinary(texts: Sequence[Array]) -> Array:
    """Return the tokens that words have, as often as they occur: not those at the ends, nor in every text."""
    structural = {int(token) for text in texts for token in (*text[..., 0].flat, *text[..., -1].flat)}
    if len(texts) > 1:
        structural |= set.intersection(*({int(token) for token in text.flat} for text in texts))
    every = np.concatenate([text.reshape(-1) for text in texts])
    return every[~np.isin(every, list(structural))]


def _channel_axis(shape: Sequence[int | None]) -> int | None:
    """Return the axis of a picture's channels, None for what is none."""
    if len(shape) != 4:
        return None
    axes = [axis for axis in (1, 3) if (channels := shape[axis]) is not None and channels <= CHANNELS]
    return axes[0] if axes else None


def _cropped(picture: Array, generator: np.random.Generator) -> Array:
    """Return a part of a picture [batch, channels, height, width] at its size, every second time mirrored."""
    sizes = picture.shape[2:]
    kept = [max(1, round(size * generator.uniform(CROP, 1.0))) for size in sizes]
    for axis, (size, part) in enumerate(zip(sizes, kept, strict=True), start=2):
        start = generator.integers(size - part + 1)
        picture = _resampled(np.take(picture, range(start, start + part), axis), size, axis)
    return np.flip(picture, 3) if generator.random() < 0.5 else picture


def _resampled(picture: Array, size: int, axis: int) -> Array:
    """Return a picture with so many rows along an axis, by linear interpolation."""
    have = picture.shape[axis]
    where = np.clip((np.arange(size) + 0.5) * have / size - 0.5, 0, have - 1)
    below = np.floor(where).astype(np.int64)
    part = (where - below).reshape([-1 if one == axis else 1 for one in range(picture.ndim)])
    above = np.minimum(below + 1, have - 1)
    return np.asarray((1.0 - part) * np.take(picture, below, axis) + part * np.take(picture, above, axis))
