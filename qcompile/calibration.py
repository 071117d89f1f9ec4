"""The calibration file: what `qcompile calibrate` measured, for `qcompile plan`."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from qcompile.calib.collect import Statistics
from qcompile.calib.map_losses import MapLosses
from qcompile.calib.observers import Observer
from qcompile.calib.sensitivity import Choice
from qcompile.core.errors import UsageError, first_line
from qcompile.core.plan import ChannelFactors
from qcompile.core.rotation import Rotations
from qcompile.passes.place import Wish

#: Raised when the file's meaning changes; docs/schemas/calibration.schema.json describes this version.
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Calibration:
    """What was measured, and of what.

    Parameters
    ----------
    statistics : Statistics
    choice : Choice
        The observer of each tensor that was measured, and what led to it.
    spared : mapping of str to Wish
        By node name, operators that compute in float though the target could take them, and why.
    model : str
        SHA-256 of the model as it came in.
    data : str
        SHA-256 of the calibration samples.
    calibrated : bool
        Whether activations have ranges; if not, weights alone can be quantized.
    options : mapping
        What decides a plan, as a recipe has it.
    smoothing : mapping of str to ChannelFactors
        What was divided and multiplied before the measurements.
    rotation : Rotations
        What was rotated before them.
    losses : mapping of str to mapping of int to float
        What each weight loses at the outputs in so many bits, where bits are to be chosen (`qcompile/allocation.py`).
    tried : mapping of frozenset of str to float
        What choices of bits lose that were run for the budget, by the weights that they have in four bits.
    pairs : mapping of (str, str) to float
        What two weights lose in four bits together, beyond what each loses alone; empty where that was not measured.
    macs : mapping of str to int
        By node name, multiply-accumulates of one run; empty where bits are not to be chosen.
    float_bytes : int
        What the model's file takes in float.
    maps : MapLosses
        What activations lose in four bits, where a device's memory asks for them.
    """

    statistics: Statistics
    choice: Choice
    spared: Mapping[str, Wish]
    model: str
    data: str
    calibrated: bool
    options: Mapping[str, Any]
    smoothing: Mapping[str, ChannelFactors] = field(default_factory=dict)
    rotation: Rotations = field(default_factory=Rotations)
    losses: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    tried: Mapping[frozenset[str], float] = field(default_factory=dict)
    pairs: Mapping[tuple[str, str], float] = field(default_factory=dict)
    macs: Mapping[str, int] = field(default_factory=dict)
    float_bytes: int = 0
    maps: MapLosses = field(default_factory=MapLosses)

    @property
    def guessed(self) -> bool:
        """Whether the ranges were derived without data: they are of no sample."""
        return self.calibrated and not self.statistics.samples and bool(self.statistics.histograms)

    @property
    def chosen(self) -> dict[str, int]:
        """How many tensors each observer serves."""
        counts = Counter(observer.value for observer in self.choice.observers.values())
        return dict(sorted(counts.items()))

    def to_bytes(self) -> bytes:
        """Return the content of the file, the same bytes for the same measurements."""
        header = {
            "schema_version": SCHEMA_VERSION,
            "model_sha256": self.model,
            "data_sha256": self.data,
            "calibrated": self.calibrated,
            "options": self.options,
            "choice": asdict(self.choice),
            "spared": {node: asdict(wish) for node, wish in self.spared.items()},
            "smoothing": {name: factors.as_json() for name, factors in self.smoothing.items()},
            "rotation": self.rotation.to_json(),
            "losses": self.losses,
            "tried": [[sorted(names), noise] for names, noise in self.tried.items()],
            "pairs": [[*names, loss] for names, loss in self.pairs.items()],
            "macs": dict(self.macs),
            "float_bytes": self.float_bytes,
            "maps": self.maps.as_json(),
        }
        buffer = io.BytesIO()
        with np.load(io.BytesIO(self.statistics.to_bytes()), allow_pickle=False) as arrays:
            np.savez(buffer, header=np.array(json.dumps(header)), **arrays)
        return buffer.getvalue()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file that `to_bytes` filled.

        Raises
        ------
        UsageError
            If it is no such file, is cut off, or is from another version of the format.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UsageError(path, f"cannot be read ({error.strerror})", "check the path of the calibration") from error
        remedy = "make it anew with 'qcompile calibrate'"
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as archive:
                header = json.loads(str(archive["header"]))
            if header["schema_version"] != SCHEMA_VERSION:
                fact = f"has schema version {header['schema_version']}, this release reads {SCHEMA_VERSION}"
                raise UsageError(path, fact, remedy)
            statistics = Statistics.from_bytes(content)
            choice = Choice.from_json(header["choice"])
            measured = {name for name, observer in choice.observers.items() if observer is not Observer.DYNAMIC}
            if not measured <= set(statistics.histograms) <= set(choice.observers):
                raise ValueError("observers and histograms are not of the same tensors")
            digests = str(header["model_sha256"]), str(header["data_sha256"])
            return cls(
                statistics,
                choice,
                {node: Wish.from_json(found) for node, found in header["spared"].items()},
                *digests,
                bool(header["calibrated"]),
                dict(header["options"]),
                {name: ChannelFactors.from_json(entry) for name, entry in header.get("smoothing", {}).items()},
                Rotations.from_json(header["rotation"]) if "rotation" in header else Rotations(),
                {name: {int(bits): float(loss) for bits, loss in of.items()} for name, of in header["losses"].items()},
                {frozenset(map(str, names)): float(noise) for names, noise in header.get("tried", [])},
                {(str(a), str(b)): float(loss) for a, b, loss in header.get("pairs", [])},
                {str(node): int(count) for node, count in header.get("macs", {}).items()},
                int(header["float_bytes"]),
                MapLosses.from_json(header["maps"]) if "maps" in header else MapLosses(),
            )
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, KeyError, TypeError,
                AttributeError, IndexError) as error:  # fmt: skip
            fact = f"is not a calibration, or is cut off ({first_line(error)})"
            raise UsageError(path, fact, remedy) from error

    def require(self, names: Iterable[str]) -> None:
        """Hold the measurements to what a plan needs.

        Raises
        ------
        UsageError
            If one of the tensors was not measured.
        """
        if missing := sorted(set(names) - set(self.choice.observers)):
            remedy = "calibrate again with the overrides of this plan"
            fact = f"has no measurement of tensor '{missing[0]}', which these options need"
            raise UsageError("calibration", fact, remedy)

    def require_model(self, sha256: str, path: object) -> None:
        """Hold the file to the model that it is used for.

        Raises
        ------
        UsageError
            If it was measured on another one.
        """
        if self.model != sha256:
            fact = f"was measured on another model (SHA-256 {self.model[:12]}…, this one has {sha256[:12]}…)"
            raise UsageError(path, fact, "calibrate this model")
