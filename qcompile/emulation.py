"""Run an artifact where it was not made: on an emulated device, with data as a compile takes them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from qcompile.backends.mcu.backend import REFERENCE
from qcompile.backends.mcu.emulated_run import EmulatedRun, run_package
from qcompile.calib.data import input_specs, open_data
from qcompile.core import model as models
from qcompile.core.errors import UsageError


def run(package: Path, data: str | None, samples: int) -> EmulatedRun:
    """Run a microcontroller's package under emulation.

    Parameters
    ----------
    package : Path
    data : str, optional
        As ``--data`` of a compile; without them random codes are run.
    samples : int
        How many inputs at most.

    Raises
    ------
    QcompileError
        If the package, the data or the tools are not there, or an output is not the integer program's.
    """
    if data is None:
        return run_package(package, (), samples)
    if not (package / REFERENCE).is_file():
        fact = f"holds no {REFERENCE}"
        raise UsageError(package, fact, "give the folder that a compile for a microcontroller wrote")
    found = open_data(data, input_specs(models.load(package / REFERENCE)))
    return run_package(package, list(islice(iter(found), samples)), samples)
