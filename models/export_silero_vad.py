"""Silero VAD, which hears whether somebody speaks: the ONNX file as it is, and recordings of speech for it.

Of the package's variants this one needs no control flow: it takes a sequence of windows and the state before them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from samples import Arrays, write_npz
from speech import Audio, cut, read_wav
from wheels import Archive

_WINDOW, _CONTEXT = 512, 64  # samples, as in the package's utils_vad.py
_WINDOWS = 64  # in a sequence: two seconds
_STATE = (1, 1, 128)
_SEQUENCES = {"calib": 40, "eval": 29}  # at most as many as the shorter recording holds without overlap


def windows(audio: Audio) -> npt.NDArray[np.float32]:
    """Cut a recording into the model's windows, each behind the last samples of the one before: `[N, 576]`."""
    padded = np.concatenate([np.zeros(_CONTEXT, np.float32), audio])
    return np.lib.stride_tricks.sliding_window_view(padded, _CONTEXT + _WINDOW)[::_WINDOW]


def sequences(audio: Audio, count: int) -> Arrays:
    """Return `count` sequences of windows, each with the empty state that a recording starts with."""
    state = np.zeros((count, *_STATE), np.float32)
    return {"input": cut(windows(audio), _WINDOWS, count), "h": state, "c": state}


def build(archive: Archive, folder: Path) -> None:
    """Write `model.onnx`, `calib.npz` and `eval.npz`.

    Parameters
    ----------
    archive
        Sources `model`, `calib_speech` and `eval_speech`: two recordings of running speech.
    folder
        An existing folder.
    """
    (folder / "model.onnx").write_bytes(archive.read("model"))
    for kind, count in _SEQUENCES.items():
        write_npz(folder / f"{kind}.npz", sequences(read_wav(archive.read(f"{kind}_speech")), count))
