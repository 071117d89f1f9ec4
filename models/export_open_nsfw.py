"""Yahoo's Open-NSFW, a ResNet-50 that scores photographs: the ONNX file as it is, and photographs for it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from photographs import RgbImage, random_crops
from samples import write_npz
from wheels import Archive

_RESIZED, _SIZE = 256, 224
_MEAN = (104.0, 117.0, 123.0)  # of blue, green, red
_CALIBRATION_CROPS, _EVALUATION_CROPS = 80, 96  # four of each photograph, and eight
_SEED = 0


def preprocess(image: RgbImage) -> npt.NDArray[np.float32]:
    """Prepare an RGB image `[256, 256, 3]` as the package does and return it as `[1, 224, 224, 3]`.

    Notes
    -----
    The network was trained on images that had been compressed once more; the package says that it matters.
    """
    from PIL import Image

    compressed = io.BytesIO()
    Image.fromarray(image).save(compressed, format="JPEG")
    decoded = np.asarray(Image.open(compressed).convert("RGB"), np.float32)
    edge = (_RESIZED - _SIZE) // 2
    return (decoded[edge : edge + _SIZE, edge : edge + _SIZE, ::-1] - np.array(_MEAN, np.float32))[None]


def build(archive: Archive, folder: Path) -> None:
    """Write `model.onnx`, `calib.npz` and `eval.npz`.

    Parameters
    ----------
    archive
        Sources `model`, `calibration` and `evaluation`, the latter two photographs.
    folder
        An existing folder.
    """
    (folder / "model.onnx").write_bytes(archive.read("model"))
    for kind, source, count in (
        ("calib", "calibration", _CALIBRATION_CROPS),
        ("eval", "evaluation", _EVALUATION_CROPS),
    ):
        crops = random_crops(archive.read_all(source), count, _RESIZED, _SEED)
        write_npz(folder / f"{kind}.npz", {"input_0": np.stack([preprocess(crop) for crop in crops])})
