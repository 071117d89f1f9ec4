"""`qcompile probe`: a cost table of this machine, for `--costs`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcompile import artifact, timing
from qcompile.backends.base import Subject, find_target
from qcompile.core.contract import Track
from qcompile.core.costs import CostTable
from qcompile.core.errors import UsageError
from qcompile.driver import canonical_form
from qcompile.evidence import gather
from qcompile.job import Source, take
from qcompile.options import Options
from qcompile.pipeline import untracked


def probe(source: Source | None, options: Options, output: Path, track: Track[Any] = untracked) -> dict[str, Any]:
    """Measure what the target's runtime makes of patterns and what its kernels take here, and write that to a file.

    Parameters
    ----------
    source : path, onnx.ModelProto or onnx_ir.Model, optional
        A model whose own kernels are measured beside the built-in grid of shapes.
    options : Options
        Target, and for the model its data and shapes.
    output : Path
    track : callable
        Shows progress.

    Returns
    -------
    dict
        What there is to tell, JSON-ready.

    Raises
    ------
    QcompileError
        Nothing is written then.
    """
    artifact.check_own(output, CostTable.from_json)
    target, backend = find_target(options.target)
    table = backend.measure(target, _subjects(source, options), here(), track)
    artifact.write_file(output, table.to_json().encode())
    return {
        "output": str(output),
        "runtime": table.runtime,
        "processor": table.processor,
        "patterns": len(table.capabilities),
        "kernels": sum(map(len, table.entries.values())),
    }


def here() -> str:
    """Return what a table says of the machine that it was measured on."""
    return ", ".join(filter(None, (timing.processor(), timing.instructions())))


def _subjects(source: Source | None, options: Options) -> Sequence[Subject]:
    if source is None:
        if options.data is not None or options.shape:
            raise UsageError("--data", "is of no use without a model", "name the model, or leave it out")
        return ()
    name = Path(source).stem if isinstance(source, str | Path) else "model"
    return (subject(name, source, options),)


def subject(name: str, source: Source, options: Options) -> Subject:
    """Return a model as the backend measures it: as it came and canonical, with the first samples of its data."""
    target, _ = find_target(options.target)
    model = take(source).model
    canonical = canonical_form(target, options, calibrated=True)(model.clone()).model
    return Subject(name, model, canonical, gather(model, options).samples)
