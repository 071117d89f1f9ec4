"""Turn the image files found in packages into RGB arrays: decoding, random crops, and labels from file names."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
from wheels import FetchError

RgbImage = npt.NDArray[np.uint8]
"""An RGB image, `[H, W, 3]`, values 0 to 255."""

_SMALLEST_CROP = 0.4  # of the shorter side: smaller crops of these photographs are mostly blur or plain background


def decode(content: bytes) -> RgbImage:
    """Decode an image file; grey images get three equal channels."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def crop_and_resize(image: RgbImage, left: int, top: int, side: int, size: int) -> RgbImage:
    """Cut out a square of `side` pixels and resize it to `size` pixels, bicubic."""
    from PIL import Image

    square = Image.fromarray(image[top : top + side, left : left + side])
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def random_crops(photographs: Mapping[str, bytes], count: int, size: int, seed: int) -> list[RgbImage]:
    """Cut random squares from photographs, taking the photographs in turn.

    Parameters
    ----------
    photographs
        Image files by name.
    count
        How many crops to make.
    size
        Height and width of a crop in pixels, after resizing.
    seed
        Seed of the random positions, sides and horizontal flips.

    Returns
    -------
    list of RgbImage
        `count` images `[size, size, 3]`.
    """
    rng = np.random.default_rng(seed)
    images = [decode(content) for content in photographs.values()]
    crops = []
    for index in range(count):
        image = images[index % len(images)]
        height, width = image.shape[:2]
        shorter = min(height, width)
        side = int(rng.integers(int(_SMALLEST_CROP * shorter), shorter, endpoint=True))
        left = int(rng.integers(width - side, endpoint=True))
        top = int(rng.integers(height - side, endpoint=True))
        crop = crop_and_resize(image, left, top, side, size)
        crops.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return crops


def labels_from_names(names: Iterable[str]) -> npt.NDArray[np.int64]:
    """Read the class index out of names such as `imagenet_03_990.jpg`.

    Raises
    ------
    FetchError
        If a name carries no label.
    """
    labels = []
    for name in names:
        match = re.search(r"_(\d+)\.\w+$", name)
        if match is None:
            raise FetchError(f"{name}: the file name carries no label; check the path in catalog.toml")
        labels.append(int(match[1]))
    return np.array(labels, np.int64)
