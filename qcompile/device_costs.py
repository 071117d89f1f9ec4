"""Measured on a device: a cost table of what its kernels took while artifacts were compared there.

A compile prices every operator in float and in integers. What was compiled has each in one form only, so two more are
sent along, as `qcompile probe` measures them: weights alone in integers, and everything that can be.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from qcompile import artifact, bundle, runner
from qcompile.backends.base import find_target
from qcompile.backends.ort.probe import AS_IT_CAME, forms_of, one_operator, without_timing
from qcompile.core import model as models
from qcompile.core.costs import OVERHEAD, CostTable
from qcompile.core.errors import TargetError, UsageError
from qcompile.core.execution import Kernel, kernels_of
from qcompile.core.target import Target
from qcompile.options import Options
from qcompile.probing import subject

#: What a form is called that tells what a run takes beside kernels.
BESIDE = "one operator"
OPTION = "--costs-out"


def priced_target(artifacts: Sequence[Mapping[str, Any]]) -> Target:
    """Return the target whose cost table is to be measured: that of the first artifact that has one.

    Raises
    ------
    UsageError
        If none of them has one.
    """
    for one in artifacts:
        if one["kind"] == "onnx" and one["target"] != "float" and "form" not in one:
            target, _ = find_target(one["target"])
            if target.costs is not None:
                return target
    fact = "wants an artifact whose target is priced by a cost table, such as cpu; libraries are not"
    raise UsageError(OPTION, fact, "add one, or leave it out")


def pack(folder: Path, content: dict[str, Any], model: Path, data: str) -> None:
    """Put the forms of a model into a bundle's folder, behind its artifacts.

    Parameters
    ----------
    folder : Path
    content : dict
        What `bundle.json` holds; the forms are added.
    model : Path
    data : str
        As ``--data`` of a compile.

    Raises
    ------
    UsageError
        If no artifact has a cost table.
    """
    target = priced_target(content["artifacts"])
    taken = subject(model.stem, model, Options(target.name, data=data))
    for name, form in forms_of(taken, target).items():
        if name != AS_IT_CAME:
            _pack(folder, content, name, form)
    _pack(folder, content, BESIDE, one_operator())
    arrays: dict[str, Any] = {"0/x": np.zeros(1, np.float32)}
    np.savez(folder / content["artifacts"][-1]["folder"] / "inputs.npz", **arrays)
    artifact.write_json(folder / bundle.DESCRIPTION, content)


def _pack(folder: Path, content: dict[str, Any], name: str, form: ir.Model) -> None:
    place = f"artifacts/{len(content['artifacts'])}"
    (folder / place).mkdir(parents=True)
    models.save(form, folder / place / "model.onnx")
    content["artifacts"].append({"name": name, "target": "", "kind": "onnx", "entry": "model.onnx", "form": name,
                                 "bytes": models.file_bytes(form), "folder": place})  # fmt: skip


def measured(folder: Path, content: Mapping[str, Any], told: Mapping[int, Mapping[str, Any]]) -> CostTable:
    """Return the table of a device: what was measured there, and the target's own moved there for the rest.

    Parameters
    ----------
    folder : Path
        Of the bundle.
    content : mapping
        What `bundle.json` holds.
    told : mapping of int to mapping
        What the device told of each artifact.

    Raises
    ------
    UsageError, TargetError
        If no artifact has a cost table, or none told of its kernels.
    """
    target, artifacts = priced_target(content["artifacts"]), content["artifacts"]
    beside, kernels, about = _beside(artifacts, told), list[Kernel](), dict[str, str]()
    same = runner.alike(runner.samples_of(folder / "inputs.npz"))
    for index, one in enumerate(artifacts):
        if "profile" not in told.get(index, {}) or one.get("form") == BESIDE:
            continue
        if one["target"] in ("float", target.name) or "form" in one:
            about = told[index]["profile"]
            kernels += _kernels(about, told[index]["times_ms"], same, beside)
    if not kernels:
        why = next((one["unprofiled"] for one in told.values() if one.get("unprofiled")), "see their rows")
        raise TargetError(OPTION, f"no kernels were timed: {why}", "compare again")
    seen = CostTable.measured(about["runtime"], about["processor"], beside, kernels)
    assert target.costs is not None
    return target.costs.moved(seen)


def _beside(artifacts: Sequence[Mapping[str, Any]], told: Mapping[int, Mapping[str, Any]]) -> float:
    """Return the microseconds of a run that no kernel takes; the least there can be, where nobody measured it."""
    for index, one in enumerate(artifacts):
        if one.get("form") == BESIDE and told.get(index, {}).get("times_ms"):
            return max(OVERHEAD, 1e3 * float(np.median(told[index]["times_ms"])) - OVERHEAD)
    return OVERHEAD


def _kernels(profile: Mapping[str, Any], times: Sequence[float], same: Sequence[int], beside: float) -> list[Kernel]:
    """Return what kernels took, so that those of a run add up to what it took undisturbed."""
    content = json.loads(zlib.decompress(base64.b64decode(profile["content"])))
    graph = onnx.load_model_from_string(base64.b64decode(content["graph"])).graph
    found: list[Kernel] = []
    for first, run in zip(
        profile["samples"], kernels_of(graph, content["events"], len(profile["samples"])), strict=True
    ):
        whole = [1e3 * time for round_, time in enumerate(times) if same[round_ % len(same)] == first]
        if not whole:
            continue
        total = max(OVERHEAD, float(np.median(whole)) - beside)
        plain = without_timing(run, total)
        factor = total / max(OVERHEAD, sum(kernel.microseconds for kernel in plain))
        found += [replace(kernel, microseconds=factor * kernel.microseconds) for kernel in plain]
    return found
