"""Silero VAD, which hears whether somebody speaks: the ONNX file as it is, and recordings of speech for it.

Of the package's variants this one needs no control flow: it takes a sequence of windows and the state before them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from samples import write_npz
from speech import Audio, cut, read_wav
from wheels import Archive

_WINDOW, _CONTEXT = 512, 64  # samples, as in the package's utils_vad.py
_WINDOWS = 64  # in a sequence: two seconds
_STATE = (1, 1, 128)
_SPOKEN = {"calib": 40, "eval": 29}  # sequences of the long recordings, and of each meeting: without overlap
_MEETING = 14


def windows(audio: Audio) -> npt.NDArray[np.float32]:
    """Cut a recording into the model's windows, each behind the last samples of the one before: `[N, 576]`."""
    padded = np.concatenate([np.zeros(_CONTEXT, np.float32), audio])
    return np.lib.stride_tricks.sliding_window_view(padded, _CONTEXT + _WINDOW)[::_WINDOW]


def build(archive: Archive, folder: Path) -> None:
    """Write `model.onnx`, `calib.npz` and `eval.npz`; every sequence has the empty state that a recording starts with.

    Parameters
    ----------
    archive
        Sources `model`, `calib_speech` and `eval_speech`: a recording of running speech each, `calib_meetings` and
        `eval_meetings`: recordings of other speakers.
    folder
        An existing folder.
    """
    (folder / "model.onnx").write_bytes(archive.read("model"))
    for kind, count in _SPOKEN.items():
        meetings = archive.read_all(f"{kind}_meetings").values()
        sequences = [cut(windows(read_wav(archive.read(f"{kind}_speech"))), _WINDOWS, count)]
        sequences += [cut(windows(read_wav(meeting)), _WINDOWS, _MEETING) for meeting in meetings]
        inputs = np.concatenate(sequences)
        state = np.zeros((len(inputs), *_STATE), np.float32)
        write_npz(folder / f"{kind}.npz", {"input": inputs, "h": state, "c": state})
