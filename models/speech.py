"""Read recordings of speech and turn them into the spectrograms that small audio networks take."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from wheels import FetchError

RATE = 16000  # samples per second, of every recording used here
_INTEGERS, _FLOATS = (1, 16), (3, 32)  # format and bits of a .wav file

Audio = npt.NDArray[np.float32]
"""Samples of one channel, -1 to 1."""

_STRENGTH, _OFFSET, _GAIN_BITS, _SNR_BITS = 0.95, 80.0, 21, 12  # the per-channel gain control, as the packages set it
_SMOOTHING = (0.025, 0.06)  # share of the newest frame in the noise estimate, for even and odd channels
_LOG_SCALE = 64  # a unit of the logarithm, as an integer
_TO_BYTE = 256 / 666  # from there to 0 ... 255, as in TensorFlow's micro_speech example


def read_wav(content: bytes) -> Audio:
    """Decode a .wav file of one channel at 16 kHz, in 16-bit integers or 32-bit floats.

    Notes
    -----
    The standard library's `wave` knows no floats.
    """
    chunks: dict[bytes, bytes] = {}
    start = len(b"RIFF????WAVE")
    while start + 8 <= len(content):
        name, size = struct.unpack_from("<4sI", content, start)
        chunks.setdefault(name, content[start + 8 : start + 8 + size])
        start += 8 + size + size % 2
    kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", chunks.get(b"fmt ", bytes(16)))
    if (rate, channels) != (RATE, 1) or (kind, bits) not in (_INTEGERS, _FLOATS):
        raise FetchError("recording: not one 16-bit or float channel at 16 kHz; check the path in catalog.toml")
    if (kind, bits) == _FLOATS:
        return np.frombuffer(chunks[b"data"], "<f4").astype(np.float32)
    return np.frombuffer(chunks[b"data"], "<i2").astype(np.float32) / np.float32(2**15)


@dataclass(frozen=True)
class Spectrogram:
    """The front end of TensorFlow Lite Micro ("microfrontend"), in floating point, scaled to 0 ... 255.

    Attributes
    ----------
    window, step
        Length and distance of the frames in samples.
    channels
        Bands of equal width on the mel scale.
    low, high
        Edges of the lowest and of the highest band in hertz.
    gain_control
        Whether each band is divided by its own recent loudness ("PCAN").
    """

    window: int
    step: int
    channels: int
    low: float
    high: float
    gain_control: bool

    @property
    def _size(self) -> int:
        return 1 << (self.window - 1).bit_length()

    def of(self, audio: Audio) -> npt.NDArray[np.float32]:
        """Return the spectrogram `[frames, channels]` of a recording."""
        pieces = np.lib.stride_tricks.sliding_window_view(audio.astype(np.float64) * 2**15, self.window)[:: self.step]
        hann = np.hanning(self.window + 1)[: self.window]
        energy = np.abs(np.fft.rfft(pieces * hann, self._size) / self._size) ** 2
        loudness = 64 * np.sqrt(energy @ self._bands().T)  # the original's weights have 12 bits, 6 after the root
        bits = self._size.bit_length() - 1 - 6
        if self.gain_control:
            loudness = self._gained(loudness, bits)
        logarithm = _LOG_SCALE * np.log(np.maximum(loudness * 2**bits, 1))
        spectrogram: npt.NDArray[np.float32] = np.clip(logarithm * _TO_BYTE, 0, 255).astype(np.float32)
        return spectrogram

    def _bands(self) -> npt.NDArray[np.float64]:
        """Return the triangular weights of every band, `[channels, frequencies]`."""
        edges = np.linspace(_mel(np.array(self.low)), _mel(np.array(self.high)), self.channels + 2)[:, None]
        frequencies = _mel(np.arange(self._size // 2 + 1) * RATE / self._size)
        rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
        falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
        weights: npt.NDArray[np.float64] = np.clip(np.minimum(rising, falling), 0, None)
        return weights

    def _gained(self, loudness: npt.NDArray[np.float64], bits: int) -> npt.NDArray[np.float64]:
        smoothing = np.where(np.arange(self.channels) % 2 == 0, *_SMOOTHING)
        recent = np.zeros(self.channels)
        frames = []
        for frame in loudness:
            recent = frame * smoothing + recent * (1 - smoothing)
            gain = np.minimum(2.0**_GAIN_BITS * (recent * 2.0**bits + _OFFSET) ** -_STRENGTH, 2**15 - 1)
            ratio = frame * gain / 2.0 ** (_GAIN_BITS - bits - _SNR_BITS)
            # A parabola below two, a straight line above, with 6 bits behind the point.
            frames.append(np.where(ratio < 2 << _SNR_BITS, ratio**2 / 2**20, ratio / 2**6 - 64))
        return np.array(frames)


def _mel(hertz: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    mel: npt.NDArray[np.float64] = 1127 * np.log1p(hertz / 700)
    return mel


def cut(sequence: npt.NDArray[np.float32], length: int, count: int) -> npt.NDArray[np.float32]:
    """Cut `count` windows of `length` rows out of a sequence, evenly spread: `[count, length, ...]`."""
    if len(sequence) < length:
        raise FetchError(f"recording: {len(sequence)} rows, {length} needed; check the path in catalog.toml")
    starts = np.linspace(0, len(sequence) - length, count).astype(int)
    return np.stack([sequence[start : start + length] for start in starts])
