"""EfficientNet-Lite0 for ImageNet: from a PyTorch checkpoint to ONNX."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from photographs import crop_and_resize, decode, labels_from_names, random_crops
from samples import write_npz
from wheels import Archive

_OPSET = 17
_SIZE = 224
_CENTRE = 224 / 256  # the share of the shorter side that is kept: the usual ImageNet evaluation crop
_CROPS = 32
_SEED = 0


@contextlib.contextmanager
def _importable(wheel: Path) -> Iterator[None]:
    """Let Python import from a wheel, which is a zip archive, for as long as the context lasts."""
    sys.path.insert(0, str(wheel))
    try:
        yield
    finally:
        sys.path.remove(str(wheel))


def load(wheel: Path, checkpoint: bytes) -> Any:
    """Return the trained network as a `torch.nn.Module` in inference mode.

    Parameters
    ----------
    wheel
        Wheel of `efficientnet-lite-pytorch`, which defines the network.
    checkpoint
        Content of the .pth file.

    Notes
    -----
    The network's method `set_swish` must not be called, though its documentation asks for it before an export: it
    replaces ReLU6, with which this variant was trained, by swish.
    """
    import torch

    with _importable(wheel):
        from efficientnet_lite_pytorch import EfficientNet
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(io.BytesIO(checkpoint), map_location="cpu", weights_only=True))
    return network.eval()


def export(network: Any, path: Path) -> None:
    """Export the network with a dynamic batch axis: `x` `[N, 3, 224, 224]` to `logits` `[N, 1000]`."""
    import torch

    torch.set_num_threads(1)  # folding BatchNormalization sums floats: one order, one result
    with warnings.catch_warnings():
        # The exporter over TorchScript is deprecated, but its successor starts at opset 18.
        warnings.simplefilter("ignore", DeprecationWarning)
        # The pads are computed in the graph, from constants; folding them is left to the compiler.
        warnings.filterwarnings("ignore", "Constant folding", UserWarning)
        torch.onnx.export(
            network,
            (torch.zeros(1, 3, _SIZE, _SIZE),),
            str(path),
            opset_version=_OPSET,
            input_names=["x"],
            output_names=["logits"],
            dynamic_axes={"x": {0: "N"}, "logits": {0: "N"}},
            dynamo=False,
        )


def preprocess(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Scale an RGB image `[224, 224, 3]` as in training and return it as `[1, 3, 224, 224]`."""
    return ((image.astype(np.float32) - np.float32(127)) / np.float32(128)).transpose(2, 0, 1)[None]


def centre_crop(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Cut out the centre of an RGB image and resize it to `[224, 224, 3]`; a small image is taken whole."""
    height, width = image.shape[:2]
    shorter = min(height, width)
    side = int(shorter * _CENTRE) if shorter > _SIZE else shorter
    return crop_and_resize(image, (width - side) // 2, (height - side) // 2, side, _SIZE)


def build(archive: Archive, folder: Path) -> None:
    """Write `model.onnx`, `calib.npz` and `eval.npz`.

    Parameters
    ----------
    archive
        Sources `network` (the package that defines it), `weights`, `imagenet` (evaluation) and `photographs`
        (calibration).
    folder
        An existing folder.
    """
    export(load(archive.wheel("network"), archive.read("weights")), folder / "model.onnx")

    crops = random_crops(archive.read_all("photographs"), _CROPS, _SIZE, _SEED)
    write_npz(folder / "calib.npz", {"x": np.stack([preprocess(crop) for crop in crops])})

    evaluation = archive.read_all("imagenet")
    images = np.stack([preprocess(centre_crop(decode(content))) for content in evaluation.values()])
    write_npz(folder / "eval.npz", {"x": images, "labels": labels_from_names(evaluation)})
