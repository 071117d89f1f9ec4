"""What a network's static executable reads and writes (`runner_aarch64.s`): runs from floats to floats, in bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.backends.cpu.session import DESCRIPTION, Port

Array = npt.NDArray[Any]
#: Seconds and nanoseconds when a run began, and when it ended; outputs follow.
CLOCK = struct.Struct("<4q")


class Wire:
    """Requests to a network's executable, and its answers.

    Parameters
    ----------
    folder : Path
        With the executable and `network.json`.
    """

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        self.program = folder / about["executable"]
        self.inputs, self.outputs = ([Port.read(port) for port in about[key]] for key in ("inputs", "outputs"))

    @property
    def answer_bytes(self) -> int:
        """How long an answer is."""
        return CLOCK.size + sum(4 * int(np.prod(port.shape, dtype=np.int64)) for port in self.outputs)

    def request(self, feeds: Mapping[str, Array]) -> bytes:
        """Return what asks for one run.

        Raises
        ------
        ValueError
            If an input is missing or has another shape.
        """
        parts = [b"\1"]
        for port in self.inputs:
            array = np.asarray(feeds[port.name]) if port.name in feeds else np.empty(0)
            if array.shape != port.shape:
                raise ValueError(f"input '{port.name}' has shape {array.shape}, not {port.shape}")
            parts.append(np.ascontiguousarray(array, np.float32 if port.is_codes else port.dtype).tobytes())
        return b"".join(parts)

    def answer(self, content: bytes) -> tuple[float, dict[str, Array]]:
        """Return the milliseconds of a run, by the clock of where it ran, and its outputs."""
        began, began_ns, ended, ended_ns = CLOCK.unpack(content[: CLOCK.size])
        found, at = {}, CLOCK.size
        for port in self.outputs:
            count = int(np.prod(port.shape, dtype=np.int64))
            found[port.name] = np.frombuffer(content, np.float32, count, at).reshape(port.shape)
            at += 4 * count
        return 1e3 * (ended - began) + 1e-6 * (ended_ns - began_ns), found
