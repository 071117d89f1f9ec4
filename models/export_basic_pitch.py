"""Basic Pitch, which turns audio into notes: the ONNX file as it is, with tones and speech for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from samples import write_npz
from speech import RATE, Audio, cut, read_wav
from wheels import Archive

_INPUT = "serving_default_input_2:0"
_RATE = 22050
_LENGTH = 43844  # samples in a window, as in the package's constants.py
_SPEECH = {"calib": 24, "eval": 12}
_NOTES = {"calib": range(36, 84, 2), "eval": range(37, 84, 4)}  # MIDI numbers: no tone is in both
_OVERTONES = (1.0, 0.5, 0.3, 0.2)
_PEAK = 0.8


def tone(note: int) -> Audio:
    """Return a decaying tone with overtones, which strikes a second time in the middle of the window."""
    time = np.arange(_LENGTH) / _RATE
    frequency = 440 * 2 ** ((note - 69) / 12)
    wave = sum(share * np.sin(2 * np.pi * frequency * (k + 1) * time) for k, share in enumerate(_OVERTONES))
    decayed = wave * np.exp(-2 * (time % (time[-1] / 2)))
    scaled: Audio = (_PEAK * decayed / np.abs(decayed).max()).astype(np.float32)
    return scaled


def resampled(audio: Audio) -> Audio:
    """Bring a recording from 16000 to 22050 Hz; the model looks at bands that lie far below either limit."""
    length = len(audio) * _RATE // RATE
    places = np.arange(length) * (RATE / _RATE)
    denser: Audio = np.interp(places, np.arange(len(audio)), audio).astype(np.float32)
    return denser


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
    for kind, count in _SPEECH.items():
        spoken = cut(resampled(read_wav(archive.read(f"{kind}_speech"))), _LENGTH, count)
        windows = np.stack([*(tone(note) for note in _NOTES[kind]), *spoken])
        write_npz(folder / f"{kind}.npz", {_INPUT: windows[:, None, :, None]})
