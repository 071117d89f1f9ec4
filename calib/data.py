"""Calibration and evaluation data: every form that is accepted, checked against the model's inputs sample by sample."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import itertools
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qcompile.core.errors import DataError, first_line

Sample = Mapping[str, npt.NDArray[Any]]

#: Array beside the inputs that holds the class of each sample.
LABELS = "labels"


@dataclass(frozen=True)
class InputSpec:
    """What a model's input accepts: element type and shape, None for an open axis."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...] | None

    def __str__(self) -> str:
        dims = "?" if self.shape is None else ",".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"{self.name} {self.dtype}[{dims}]"


def input_specs(model: ir.Model) -> tuple[InputSpec, ...]:
    """Return what each input of the model accepts; initializers that double as inputs are not asked for."""
    specs = []
    for value in model.graph.inputs:
        if value.name in model.graph.initializers or value.name is None or value.dtype is None:
            continue
        shape = None if value.shape is None else tuple(d if isinstance(d, int) else None for d in value.shape)
        specs.append(InputSpec(value.name, np.dtype(value.dtype.numpy()), shape))
    return tuple(specs)


@dataclass(frozen=True)
class Dataset:
    """Samples that can be iterated any number of times, one at a time in memory.

    Parameters
    ----------
    place : str
        Where they come from, for messages.
    open : callable
        Starts one iteration over raw samples.
    specs : tuple of InputSpec
        What the model accepts; every sample is held against it.
    start, stop : int
        Which of the samples belong to this set.
    """

    place: str
    open: Callable[[], Iterable[Sample]]
    specs: tuple[InputSpec, ...]
    start: int = 0
    stop: int | None = None

    def __iter__(self) -> Iterator[Sample]:
        """Yield each sample's feeds, checked."""
        for _, feeds, _ in self._checked():
            yield feeds

    def labelled(self) -> Iterator[tuple[Sample, int | None]]:
        """Yield each sample's feeds and its label, None where there is none."""
        for _, feeds, label in self._checked():
            yield feeds, label

    def __len__(self) -> int:
        return self._content[0]

    @property
    def digest(self) -> str:
        """SHA-256 over names, types, shapes and bytes of all samples."""
        return self._content[1]

    def split(self, held_out: float) -> tuple[Dataset, Dataset]:
        """Return the set without its last part, and that part; a single sample serves as both."""
        count = len(self)
        if count == 1:
            return self, self
        cut = count - max(1, round(count * held_out))
        middle, end = self.start + cut, self.start + count
        return (
            Dataset(self.place, self.open, self.specs, self.start, middle),
            Dataset(self.place, self.open, self.specs, middle, end),
        )

    @cached_property
    def _content(self) -> tuple[int, str]:
        digest, count = hashlib.sha256(), 0
        for _, feeds, label in self._checked():
            for name in sorted(feeds):
                array = feeds[name]
                digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
            digest.update(f"{label}\n".encode())
            count += 1
        if count == 0:
            raise DataError(self.place, "holds no sample", "give at least one sample, better a hundred")
        return count, digest.hexdigest()

    def _checked(self) -> Iterator[tuple[int, Sample, int | None]]:
        stop = self.stop
        for index, raw in enumerate(itertools.islice(self.open(), self.start, stop), self.start):
            feeds = dict(raw)
            label = feeds.pop(LABELS, None) if not any(spec.name == LABELS for spec in self.specs) else None
            check_sample(feeds, self.specs, f"{self.place}: sample {index}")
            yield index, feeds, None if label is None else _class_of(label, f"{self.place}: sample {index}")


def _class_of(label: npt.NDArray[Any], place: str) -> int:
    try:
        number = label.reshape(-1)[0]
        if int(number) != number:
            raise ValueError
        return int(number)
    except (ValueError, IndexError, OverflowError) as error:
        raise DataError(place, f"its label is no class ({label})", "store one integer per sample") from error


def check_sample(feeds: Sample, specs: tuple[InputSpec, ...], place: str) -> None:
    """Hold one sample against the model's inputs.

    Raises
    ------
    DataError
        For a missing or unknown name, another type or shape, a NaN, an empty array.
    """
    expected = ", ".join(map(str, specs))
    names = {spec.name for spec in specs}
    for name in feeds:
        if name not in names:
            raise DataError(place, f"the model has no input '{name}'", f"its inputs are {expected}")
    for spec in specs:
        if spec.name not in feeds:
            raise DataError(place, f"input '{spec.name}' is missing", f"give an array for each of {expected}")
        array = feeds[spec.name]
        if array.dtype != spec.dtype:
            fact = f"'{spec.name}' is {array.dtype}, the model takes {spec.dtype}"
            raise DataError(place, fact, f"convert it with .astype('{spec.dtype}')")
        if not _shape_fits(array.shape, spec.shape):
            fact = f"'{spec.name}' has shape {list(array.shape)}, the model takes {spec}"
            remedy = "a sample keeps the input's full shape, so an .npz array is [samples, *shape]"
            raise DataError(place, fact, remedy)
        if array.size == 0 and 0 not in (spec.shape or ()):
            raise DataError(place, f"'{spec.name}' is empty (shape {list(array.shape)})", "leave the sample out")
        # Infinities have a meaning in masks; where one reaches a tensor that is measured, `collect` refuses it.
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise DataError(place, f"'{spec.name}' holds NaN", "leave the sample out, or repair its preprocessing")


def _shape_fits(shape: tuple[int, ...], wanted: tuple[int | None, ...] | None) -> bool:
    if wanted is None:
        return True
    return len(shape) == len(wanted) and all(w is None or s == w for s, w in zip(shape, wanted, strict=True))


def open_data(source: str, specs: tuple[InputSpec, ...]) -> Dataset:
    """Open data in any accepted form; `docs/data.md` describes them.

    Parameters
    ----------
    source : str
        An ``.npz`` file with one array per input whose axis 0 counts samples; a folder with one ``.npz`` (or, for a
        single input, ``.npy``) per sample; a folder with ONNX ``test_data_set_*``; or ``module:function``, called
        without arguments, which yields feeds. That last form runs code, by design.
    specs : tuple of InputSpec

    Raises
    ------
    DataError
        If there is nothing of that kind.
    """
    path = Path(source)
    if path.is_dir():
        return Dataset(source, _open_folder(path, specs), specs)
    if path.exists():
        if path.suffix != ".npz":
            fact = f"is a {path.suffix or 'file without suffix'}, not data that can be read"
            raise DataError(source, fact, "give an .npz, a folder of samples, or module:function")
        return Dataset(source, lambda: _read_npz(path), specs)
    module, colon, function = source.partition(":")
    if colon and function.isidentifier() and all(part.isidentifier() for part in module.split(".")):
        return Dataset(source, _open_function(source, module, function), specs)
    raise DataError(source, "no such file or folder", "check the path of the data")


def _read_npz(path: Path) -> Iterator[Sample]:
    """Yield the samples of one file; each array is read as a stream, so that the file's size does not matter."""
    try:
        with zipfile.ZipFile(path) as archive, contextlib.ExitStack() as stack:
            streams = {
                name.removesuffix(".npy"): stack.enter_context(contextlib.closing(_read_rows(archive, name, path)))
                for name in archive.namelist()
            }
            if not streams:
                raise DataError(path, "holds no array", "give one array per input of the model")
            counts = {}
            for name, stream in streams.items():
                counts[name] = next(stream)
            if len(set(counts.values())) > 1:
                listing = ", ".join(f"{name}: {int(count)}" for name, count in counts.items())
                raise DataError(path, f"arrays differ in their number of samples ({listing})", "make axis 0 agree")
            for rows in zip(*streams.values(), strict=True):
                yield dict(zip(streams, rows, strict=True))
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError) as error:
        raise DataError(path, f"cannot be read as .npz ({first_line(error)})", "write it with numpy.savez") from error


def _read_rows(archive: zipfile.ZipFile, name: str, path: Path) -> Generator[Any, None, None]:
    """Yield first the number of rows of one array, then the rows."""
    label = name.removesuffix(".npy")
    with archive.open(name) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        if dtype.hasobject:
            raise DataError(path, f"array '{label}' holds Python objects", "store numbers only")
        if fortran or not shape:
            raise DataError(path, f"array '{label}' has no leading sample axis in C order",
                            "stack the samples along axis 0 with numpy.stack")  # fmt: skip
        yield shape[0]
        size = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        for _ in range(shape[0]):
            content = stream.read(size)
            if len(content) != size:
                raise DataError(path, f"array '{label}' is cut off", "write the file again")
            yield np.frombuffer(content, dtype).reshape(shape[1:])


def _open_folder(folder: Path, specs: tuple[InputSpec, ...]) -> Callable[[], Iterable[Sample]]:
    sets = sorted(folder.glob("test_data_set_*"))
    if sets:
        return lambda: (_read_test_data_set(path, specs) for path in sets)
    files = sorted(path for path in folder.iterdir() if path.suffix in (".npz", ".npy"))
    if not files:
        fact = "holds no .npz, .npy or test_data_set_*"
        raise DataError(folder, fact, "put one file per sample into it")
    return lambda: (_read_sample(path, specs) for path in files)


def _read_sample(path: Path, specs: tuple[InputSpec, ...]) -> Sample:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            if len(specs) != 1:
                names = ", ".join(spec.name for spec in specs)
                raise DataError(path, "holds one array, the model has several inputs", f"use .npz with {names}")
            return {specs[0].name: loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError) as error:
        raise DataError(path, f"cannot be read ({first_line(error)})", "write it with numpy.savez") from error


def _read_test_data_set(folder: Path, specs: tuple[InputSpec, ...]) -> Sample:
    feeds = {}
    for index, spec in enumerate(specs):
        path = folder / f"input_{index}.pb"
        try:
            tensor = onnx.TensorProto.FromString(path.read_bytes())
            feeds[tensor.name or spec.name] = onnx.numpy_helper.to_array(tensor)
        except Exception as error:  # protobuf and onnx raise many kinds, all of which mean the same here
            fact = f"cannot be read as an ONNX tensor ({first_line(error)})"
            raise DataError(path, fact, "write it with onnx.numpy_helper") from error
    return feeds


def _open_function(source: str, module: str, function: str) -> Callable[[], Iterable[Sample]]:
    try:
        call = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise DataError(source, f"cannot be imported ({first_line(error)})", "check PYTHONPATH and the name") from error

    def samples() -> Iterator[Sample]:
        try:
            for feeds in call():
                yield {name: np.asarray(array) for name, array in feeds.items()}
        except Exception as error:  # the user's code may raise anything
            fact = f"raised {type(error).__name__} ({first_line(error)})"
            raise DataError(source, fact, "it must yield mappings of input names to arrays") from error

    return samples
