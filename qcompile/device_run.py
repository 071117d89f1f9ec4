"""Run an artifact on the device that it is for: time it there, and hold its outputs to those of the host."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qcompile import artifact, timing
from qcompile.backends.base import find_target
from qcompile.calib.data import input_specs, open_data
from qcompile.core import model as models
from qcompile.core import runtime
from qcompile.core.errors import UsageError
from qcompile.core.target import Target
from qcompile.fidelity import Fidelity
from qcompile.read_report import require_whole

MEASUREMENTS = "measurements.json"


@dataclass(frozen=True)
class DeviceRun:
    """What was seen on a device.

    Parameters
    ----------
    provider, name, runtime : str
        Of the runtime that ran it, the device's, and the runtime's own with its version.
    artifact_ms : float
        Median of the runs, copies to and from the host included.
    float_ms, ratio : float, optional
        The float model's on the same device, in turns with it, and the artifact's over that.
    rounds : int
    sqnr_of_host : float, optional
        Of the worst output, in dB, against the same artifact as it was verified on the host; None where they are equal.
    """

    provider: str
    name: str
    runtime: str
    artifact_ms: float
    float_ms: float | None
    ratio: float | None
    rounds: int
    sqnr_of_host: float | None

    def lines(self) -> list[str]:
        """Return it in words."""
        beside = "" if self.ratio is None else f", {self.ratio:.2f}x of the float model's {self.float_ms:.3g} ms"
        apart = "the same outputs as" if self.sqnr_of_host is None else f"{self.sqnr_of_host:.1f} dB from"
        return [
            f"{self.name}, {self.provider} of {self.runtime}",
            f"{self.artifact_ms:.3g} ms, median of {self.rounds} runs{beside}",
            f"{apart} the host's run of the same files",
        ]


def device_target(folder: Path) -> Target | None:
    """Return the target of an artifact that has a device of its own; None for any other folder."""
    try:
        name = str(json.loads((folder / artifact.MANIFEST).read_text(encoding="utf-8"))["target"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    target, _ = find_target(name)
    return target if target.device else None


def run(folder: Path, model: Path | None, data: str | None, samples: int, fallback: bool) -> DeviceRun:
    """Run an artifact on its device, and add what was seen to its ``measurements.json``.

    Parameters
    ----------
    folder : Path
    model : Path, optional
        The float model that it was made from, to be timed beside it.
    data : str, optional
        Inputs, as of a compile; random ones without.
    samples : int
        How many of them at most.
    fallback : bool
        Whether nodes that the device has no kernel for may run on the host.

    Raises
    ------
    QcompileError
        If the artifact, the data or the device are not there.
    """
    require_whole(folder)
    target = device_target(folder)
    if target is None:
        raise UsageError(folder, "is no artifact for a device", "give the folder of one")
    _, backend = find_target(target.name)
    files = tuple(json.loads((folder / "report.json").read_text(encoding="utf-8"))["files"])
    here, on_device = backend.open(folder, files), backend.on_device(target, fallback)
    there = on_device(folder / files[0])
    loaded = models.load(model or folder / next(name for name in files if name.endswith(".onnx")))
    feeds: list[runtime.Feeds] = [runtime.synthetic_feeds(loaded, 0)]
    if data is not None:
        feeds = list(islice(iter(open_data(data, input_specs(loaded))), samples))
    fidelity = Fidelity()
    for each in feeds:
        fidelity.add(here(each), there.run(each))
    reference = None if model is None else on_device(model)
    seen = _timed(there.run, None if reference is None else reference.run, feeds)
    worst = fidelity.worst("sqnr")
    found = DeviceRun(there.provider, there.device, there.runtime, *seen, None if worst == float("inf") else worst)
    _add(folder / MEASUREMENTS, found)
    return found


def _timed(
    candidate: Callable[[runtime.Feeds], Any], reference: Callable[[runtime.Feeds], Any] | None, feeds: list[Any]
) -> tuple[float, float | None, float | None, int]:
    """Return the artifact's median, float's, the ratio and the rounds."""
    if reference is None:
        [times] = timing.in_turns((candidate,), feeds)
        return statistics.median(times), None, None, len(times)
    found = timing.interleave(reference, candidate, feeds)
    return found.candidate_ms, found.reference_ms, found.ratio, found.rounds


def _add(path: Path, found: DeviceRun) -> None:
    """Write what was seen beside what was measured before."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(path, "cannot be read", "compile again") from error
    content["on_device"] = asdict(found)
    artifact.write_file(path, (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
