"""Recipes: the options of a compile as a TOML file. One key is one field of `Options`; docs/recipe.md has them all."""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from qcompile.core.errors import UsageError
from qcompile.core.lengths import Shape
from qcompile.options import NO_COSTS, Options
from qcompile.override import Override

#: Data that a function yields are no file, and lie nowhere.
FUNCTION = re.compile(r"[\w.]+:\w+")


def read(path: Path) -> dict[str, Any]:
    """Read a recipe.

    Parameters
    ----------
    path : Path
        A TOML file; relative paths in it are relative to its folder.

    Returns
    -------
    dict of str to object
        Fields of `Options`, those that the recipe has.

    Raises
    ------
    UsageError
        Naming the file, the key, and what is wrong with it.
    """
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise UsageError(path, f"cannot be read ({error.strerror})", "check the path of the recipe") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(path, f"is not TOML ({error})", "see docs/recipe.md") from error
    return parse(table, path, path.parent)


def parse(table: Mapping[str, Any], place: object, folder: Path) -> dict[str, Any]:
    """Turn a recipe's table into fields of `Options`.

    Parameters
    ----------
    table : mapping
    place : object
        What an error is to name: the file.
    folder : Path
        What relative paths are relative to.

    Raises
    ------
    UsageError
        If a key is not known, or its value is none that it can have.
    """
    known = ["override" if field.name == "overrides" else field.name for field in fields(Options)]
    found: dict[str, Any] = {}
    for key, value in table.items():
        _check_known(key, known, place, "key")
        at = f"{place}: {key}"
        if key == "override":
            found["overrides"] = _overrides(value, place)
            continue
        expected, convert = _KINDS[key]
        try:
            found[key] = convert(value, folder)
        except (TypeError, ValueError):
            raise UsageError(at, f"{value!r} is not {expected}", "see docs/recipe.md") from None
        try:
            Options(**{"target": "any", key: found[key]})
        except UsageError as error:
            raise UsageError(at, error.fact, error.remedy) from None
    return found


def _overrides(value: object, place: object) -> tuple[Override, ...]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise UsageError(f"{place}: override", "is not a list of tables", "write each as [[override]]")
    return tuple(_override(entry, f"{place}: override {number}") for number, entry in enumerate(value, 1))


def _override(entry: Mapping[str, Any], place: str) -> Override:
    for key in entry:
        _check_known(key, [field.name for field in fields(Override)], place, "key")
    values = dict(entry)
    if isinstance(values.get("match"), str):
        values["match"] = [values["match"]]
    for key, value in values.items():
        strings = isinstance(value, list) and all(isinstance(pattern, str) for pattern in value)
        fitting = {"match": strings, "keep_float": isinstance(value, bool)}.get(key, isinstance(value, str))
        if not fitting:
            expected = {"match": "a pattern or a list of patterns", "keep_float": "true or false"}.get(key, "a text")
            raise UsageError(f"{place}: {key}", f"{value!r} is not {expected}", "see docs/recipe.md")
    try:
        return Override(**values | {"match": tuple(values.get("match", ()))})
    except UsageError as error:
        raise UsageError(place, error.fact, error.remedy) from None


def _check_known(key: str, known: Iterable[str], place: object, what: str) -> None:
    names = list(known)
    if key not in names:
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
        remedy = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(names)}"
        raise UsageError(place, f"there is no {what} '{key}'", remedy)


def _text(value: object, folder: Path) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError
    return value


def _whole_or_text(value: object, folder: Path) -> str:
    return str(value) if type(value) is int else _text(value, folder)


def _path(value: object, folder: Path) -> Path:
    return folder / _text(value, folder)


def _costs(value: object, folder: Path) -> Path:
    return NO_COSTS if value == str(NO_COSTS) else _path(value, folder)


def _data(value: object, folder: Path) -> str:
    text = _text(value, folder)
    return text if FUNCTION.fullmatch(text) and not (folder / text).exists() else str(folder / text)


def _switch(value: object, folder: Path) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _whole(value: object, folder: Path) -> int:
    if type(value) is not int:
        raise TypeError
    return value


def _shapes(value: object, folder: Path) -> dict[str, Shape]:
    if not isinstance(value, dict):
        raise TypeError
    return {name: tuple(_sizes(dim, folder) for dim in shape) for name, shape in value.items()}


def _sizes(value: object, folder: Path) -> int | tuple[int, ...]:
    sizes = tuple(_whole(size, folder) for size in (value if isinstance(value, list) else [value]))
    if not sizes or min(sizes) < 1:
        raise ValueError
    return sizes if isinstance(value, list) and len(sizes) > 1 else sizes[0]


def _bounds(value: object, folder: Path) -> dict[str, float]:
    if not isinstance(value, dict) or any(type(bound) not in (int, float) for bound in value.values()):
        raise TypeError
    if not all(math.isfinite(bound) for bound in value.values()):
        raise ValueError
    return {name: float(bound) for name, bound in value.items()}


#: What each key must be, in words, and how it becomes the field.
_KINDS: dict[str, tuple[str, Callable[[Any, Path], Any]]] = {
    "target": ("a text", _text),
    "data": ("a path or module:function", _data),
    "enlarge": ("a whole number", _whole),
    "eval": ("a path or module:function", _data),
    "output": ("a path", _path),
    "weights": ('"auto", 8, 4, "mixed" or "none"', _whole_or_text),
    "activations": ('8, 16 or "none"', _whole_or_text),
    "observer": ("a text", _text),
    "smoothing": ("a text", _text),
    "rotation": ("a text", _text),
    "no_added_nodes": ("true or false", _switch),
    "costs": ("a path, or none", _costs),
    "shape": ("a table of lists of sizes, such as x = [1, 128], or x = [1, [32, 128]] of several lengths", _shapes),
    "allow_ort_segments": ("true or false", _switch),
    "min_fidelity": ("a table of numbers, such as sqnr = 20", _bounds),
    "max_size": ("a text, such as 0.2x or 5MB", _text),
    "max_bops": ("a text, such as 0.05x or 20G", _text),
    "max_latency": ("a text, such as 0.6x or 12ms", _text),
    "board": ("a text", _text),
    "max_sram": ("a text, such as 64KB", _text),
    "max_flash": ("a text, such as 512KB", _text),
    "pairs": ("a whole number", _whole),
    "pareto": ("true or false", _switch),
    "cache": ("a path", _path),
    "seed": ("a whole number", _whole),
    "threads": ("a whole number", _whole),
    "max_memory": ("a text, such as 4GB", _text),
    "workers": ("a number of processes, or an address", _whole_or_text),
}
