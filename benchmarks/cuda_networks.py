"""Whole networks on a device: how near their outputs are to the float model's there, beside what a compile verified."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
#: Samples, and by how much the mean over them may be worse on a device, in dB. A float that is rounded to another code
#: there gives all roundings behind it another course, at random: twelve of MiniLM-L6's texts on the emulated device had
#: a standard deviation of 0.95 dB, which is 0.24 in the mean of 16. Three of these are allowed.
SAMPLES, TOLERANCE = 16, 0.75
#: What is no part of an artifact on a device.
LEFT_BEHIND = ("report*", "*.onnx", "*.onnx.data", "dist*")


def sqnr(exact: Array, found: Array) -> float:
    """Return the signal's power over the error's, in dB."""
    wide = exact.astype(np.float64)
    error = float(np.square(wide - found).sum())
    return float("inf") if error == 0.0 else 10.0 * float(np.log10(np.square(wide).sum() / error))


def prepare(folder: Path, artifact: Path, model: Path, data: str) -> None:
    """Write an artifact with samples, the float model's outputs, and those that a compile verifies."""
    from qcompile.backends.cuda.backend import CudaBackend
    from qcompile.calib.data import input_specs, open_data
    from qcompile.core import model as models
    from qcompile.core import runtime

    shutil.copytree(artifact, folder, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
    host = CudaBackend().open(artifact, ())
    loaded, content = models.load(model), dict[str, Array]()
    there = runtime.Session(loaded)
    samples = list(islice(iter(open_data(data, input_specs(loaded))), SAMPLES))
    for index, feeds in enumerate(samples):
        made = {"input": feeds, "float": there.run(feeds), "host": host(feeds)}
        content |= {f"{index} {kind} {name}": array for kind, each in made.items() for name, array in each.items()}
    np.savez_compressed(folder / "samples.npz", allow_pickle=False, **content)


def check(folder: Path, session: Any) -> int:
    """Run the samples, print how near each output is to the float model's, and return how many are too far."""
    names = [port.name for port in session.get_outputs()]
    content: Mapping[str, Array] = np.load(folder / "samples.npz")
    count = 1 + max(int(key.split()[0]) for key in content)
    found = {name: ([], []) for name in names}  # type: dict[str, tuple[list[float], list[float]]]
    for index in range(count):
        feeds = {port.name: content[f"{index} input {port.name}"] for port in session.get_inputs()}
        for name, array in zip(names, session.run(None, feeds), strict=True):
            exact = content[f"{index} float {name}"]
            found[name][0].append(sqnr(exact, array))
            found[name][1].append(sqnr(exact, content[f"{index} host {name}"]))
    wrong = 0
    for name, (there, host) in found.items():
        means = float(np.mean(there)), float(np.mean(host))
        wrong += not means[0] >= means[1] - TOLERANCE
        print(f"{folder.name}, '{name}': {means[0]:.2f} dB from float on the device, {means[1]:.2f} as verified")
    return wrong


def measure(session: Any, on_device: Callable[[Any, bool], Callable[[int], float]]) -> dict[str, float]:
    """Return milliseconds of a run whose inputs and outputs stay on the device."""
    run = on_device(session, True)
    run(3)
    return {"ms": float(np.median([run(20) for _ in range(15)]))}


def listed(folder: Path) -> list[Path]:
    """Return the networks that lie in a folder."""
    return sorted(each.parent for each in folder.glob("networks/*/samples.npz"))
