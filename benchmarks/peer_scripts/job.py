"""What a peer's script is told: a model, calibration samples, a setting, and where its result goes.

Runs inside the peers' environments: of the project it sees nothing, of packages NumPy and onnx alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter

#: What `linear` and `float_outputs` in peers.toml stand for.
LINEAR, FLOAT_OUTPUTS = ["MatMul", "Gemm", "Conv"], ["MatMul", "Gemm"]


class Samples:
    """Feeds that are read one at a time, in every form that peers ask for them.

    Parameters
    ----------
    paths : sequence of Path
        An archive per sample, with an array per input.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self.rewind()

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with np.load(self._paths[index]) as archive:
            return {name: archive[name] for name in archive.files}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def get_next(self) -> dict[str, Any] | None:
        """Return the next sample, None behind the last: onnxruntime's CalibrationDataReader."""
        return next(self._coming, None)

    def rewind(self) -> None:
        """Start again at the first sample."""
        self._coming = iter(self)

    reset_iter = reset = rewind


@dataclass(frozen=True)
class Job:
    """One peer, one model, one setting.

    Parameters
    ----------
    model : Path
    samples : Samples
    setting : dict
        The setting's keys in peers.toml.
    output : Path
        Where the quantized model goes.
    """

    model: Path
    samples: Samples
    setting: dict[str, Any]
    output: Path

    @classmethod
    def read(cls) -> Job:
        """Read the job that the command line names."""
        told = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        samples = Samples(sorted(Path(told["samples"]).glob("*.npz")))
        return cls(Path(told["model"]), samples, told["setting"], Path(told["output"]))

    def raised(self, opset: int) -> onnx.ModelProto:
        """Return the model in that opset at least, as peers ask of their users for scales per channel."""
        model = onnx.load(self.model)
        [current] = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
        return onnx.version_converter.convert_version(model, opset) if current < opset else model
