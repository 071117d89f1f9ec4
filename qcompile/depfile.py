"""Write which files an artifact was made from, as make and ninja read it: a build compiles again when one changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx

from qcompile import artifact
from qcompile.options import NO_COSTS, Options


def write_depfile(file: Path, output: Path, model: Path, options: Options, recipe: Path | None) -> None:
    """Write one rule: the artifact's manifest depends on everything that was read.

    Parameters
    ----------
    file : Path
    output : Path
        The artifact's folder.
    model : Path
    options : Options
        What a recipe says included.
    recipe : Path, optional

    Raises
    ------
    UsageError
        If it cannot be written.
    """
    read = dict.fromkeys([*_model_files(model), *_option_files(options), *([recipe] if recipe else [])])
    rule = " \\\n ".join([f"{_escaped(output / artifact.MANIFEST)}:", *map(_escaped, read)])
    artifact.write_file(file, f"{rule}\n".encode())


def _model_files(model: Path) -> Iterator[Path]:
    """Yield the model's file and those that hold its weights."""
    yield model
    helper = onnx.external_data_helper
    for tensor in helper._get_all_tensors(onnx.load(model, load_external_data=False)):
        if helper.uses_external_data(tensor):
            yield model.parent / helper.ExternalDataInfo(tensor).location


def _option_files(options: Options) -> Iterator[Path]:
    """Yield the files of data and costs; what a function yields is in no file."""
    for source in (options.data, options.eval):
        place = Path(source) if source is not None else None
        if place is not None and place.is_dir():
            yield from sorted(path for path in place.rglob("*") if path.is_file())
        elif place is not None and place.is_file():
            yield place
    if options.costs is not None and options.costs != NO_COSTS:
        yield options.costs


def _escaped(path: Path) -> str:
    """Return a path as make reads it: a space, # and $ end or change a word otherwise."""
    text = path.absolute().as_posix()
    return text.replace("\\", "\\\\").replace(" ", "\\ ").replace("#", "\\#").replace("$", "$$")
