"""The three networks of PP-OCR as RapidOCR carries them: find lines of text, turn them upright, read them.

The ONNX files are taken as they are; the texts are rendered, so that it is known what they say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from photographs import RgbImage, decode
from rendered_text import phrases, render_line, render_page
from samples import write_npz, write_npz_folder
from wheels import Archive

_HEIGHT = 48  # of a line, for the networks that take lines
_CLS_WIDTH, _REC_MIN_WIDTH = 192, 320
_DET_SHORTER_SIDE, _DET_MULTIPLE = 736, 32

_LINE_FONT, _LINE_MARGIN = 32, 6
_CLS_CALIBRATION, _CLS_EVALUATION, _CLS_WORDS = 240, 400, 2  # lines; each also stands on its head
_REC_CALIBRATION, _REC_EVALUATION = 40, 60
_REC_WORDS = (1, 2, 3)  # words in a line, taken in turn

_DET_CALIBRATION, _DET_EVALUATION = 9, 8
_DET_PAGES = ((736, 736), (800, 736), (736, 832))  # width and height in pixels, taken in turn
_DET_FONTS = (18, 24, 32, 44)


def _resized(image: RgbImage, width: int, height: int) -> npt.NDArray[np.float32]:
    """Resize an RGB image, scale it to -1 ... 1 and return it as blue, green, red: `[3, height, width]`."""
    from PIL import Image

    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    scaled = np.asarray(resized, np.float32)[:, :, ::-1] / np.float32(255)
    return ((scaled - np.float32(0.5)) / np.float32(0.5)).transpose(2, 0, 1)


def preprocess_line(image: RgbImage, width: int) -> npt.NDArray[np.float32]:
    """Bring a line to the height that the networks take and to at most `width`; zeros fill the rest of `width`."""
    proportional = math.ceil(_HEIGHT * image.shape[1] / image.shape[0])
    line = _resized(image, min(proportional, width), _HEIGHT)
    return np.pad(line, ((0, 0), (0, 0), (0, width - line.shape[2])))[None]


def preprocess_page(image: RgbImage) -> npt.NDArray[np.float32]:
    """Enlarge a page to a shorter side of 736 if it is smaller, and round both sides to multiples of 32."""
    height, width = image.shape[:2]
    ratio = max(1.0, _DET_SHORTER_SIDE / min(height, width))
    sides = [round(int(side * ratio) / _DET_MULTIPLE) * _DET_MULTIPLE for side in (width, height)]
    return _resized(image, *sides)[None]


def _halves(archive: Archive) -> tuple[str, str]:
    """Return the documents before and after the middle: no word of the one text is a word of the other's place."""
    documents = [line for line in archive.read("text").decode().splitlines() if line.strip()]
    middle = len(documents) // 2
    return "\n".join(documents[:middle]), "\n".join(documents[middle:])


def _lines(texts: Sequence[str], fonts: Sequence[bytes]) -> list[RgbImage]:
    return [render_line(text, fonts[index % len(fonts)], _LINE_FONT, _LINE_MARGIN) for index, text in enumerate(texts)]


def build_cls(archive: Archive, folder: Path) -> None:
    """Write `model.onnx`, `calib.npz` and `eval.npz` of the network that tells whether a line is upside down.

    Parameters
    ----------
    archive
        Sources `model`, `fonts` and `text`.
    folder
        An existing folder.
    """
    (folder / "model.onnx").write_bytes(archive.read("model"))
    fonts = list(archive.read_all("fonts").values())
    counts = {"calib": _CLS_CALIBRATION, "eval": _CLS_EVALUATION}
    for (kind, count), text in zip(counts.items(), _halves(archive), strict=True):
        upright = _lines(phrases(text, _CLS_WORDS)[:count], fonts)
        images = [preprocess_line(np.rot90(line, turn).copy(), _CLS_WIDTH) for line in upright for turn in (0, 2)]
        labels = {"labels": np.tile([0, 1], count)} if kind == "eval" else {}
        write_npz(folder / f"{kind}.npz", {"x": np.stack(images), **labels})


def rec_texts(text: str, count: int) -> list[str]:
    """Take `count` phrases of one, two and three words out of a text."""
    drawn = [phrases(text, words) for words in _REC_WORDS]
    # From places that lie apart, so that no line repeats a part of another.
    return [drawn[index % len(drawn)][7 * index] for index in range(count)]


def build_rec(archive: Archive, folder: Path) -> None:
    """Write `model.onnx` and the folders `calib` and `eval` of the network that reads a line.

    Parameters
    ----------
    archive
        Sources `model`, `fonts` and `text`.
    folder
        An existing folder.
    """
    (folder / "model.onnx").write_bytes(archive.read("model"))
    fonts = list(archive.read_all("fonts").values())
    counts = {"calib": _REC_CALIBRATION, "eval": _REC_EVALUATION}
    for (kind, count), text in zip(counts.items(), _halves(archive), strict=True):
        samples = []
        for line in _lines(rec_texts(text, count), fonts):
            width = max(_REC_MIN_WIDTH, _HEIGHT * line.shape[1] // line.shape[0])
            samples.append({"x": preprocess_line(line, width)})
        write_npz_folder(folder / kind, samples)


def build_det(archive: Archive, folder: Path) -> None:
    """Write `model.onnx` and the folders `calib` and `eval` of the network that finds lines on a page.

    Parameters
    ----------
    archive
        Sources `model`, `fonts`, `text`, `calib_page` and `eval_page`, the latter two photographs of printed pages.
    folder
        An existing folder.
    """
    (folder / "model.onnx").write_bytes(archive.read("model"))
    fonts = list(archive.read_all("fonts").values())
    counts = {"calib": _DET_CALIBRATION, "eval": _DET_EVALUATION}
    for (kind, count), text in zip(counts.items(), _halves(archive), strict=True):
        images = [decode(archive.read(f"{kind}_page"))]
        for index, document in enumerate(text.splitlines()[: count - 1]):
            width, height = _DET_PAGES[index % len(_DET_PAGES)]
            size = _DET_FONTS[index % len(_DET_FONTS)]
            images.append(render_page(document, fonts[index % len(fonts)], size, width, height))
        write_npz_folder(folder / kind, [{"x": preprocess_page(image)} for image in images])
