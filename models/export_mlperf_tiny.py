"""The four networks of MLPerf Tiny as Silicon Labs trained them: from Keras .h5 files to ONNX, with data for each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from keras_h5 import KerasToOnnx, read_h5
from photographs import RgbImage, crop_and_resize, decode, labels_from_names, random_crops
from samples import write_npz
from speech import Spectrogram, cut, read_wav
from wheels import Archive

_SEED = 0
_SHIFT = 4  # pixels, as in the training of ResNets on CIFAR (He et al. 2016, section 4.2)
_VWW_SIZE, _VWW_CROPS = 96, 100
_VWW_PARTS = (1.0, 0.9, 0.8, 0.7)  # of an evaluation photograph, each also mirrored
_PERSON, _NO_PERSON = 0, 1  # the order of the classes in visual_wake_words.py, in the archive that holds the weights

# Window, step, channels and upper edge as keyword_spotting.py says, in the archive that holds the weights. It does not
# say the rest; with the gain control the mean behind the first convolution is what its BatchNormalization remembers,
# up to a factor of 1.2.
_KEYWORDS = Spectrogram(window=480, step=320, channels=10, low=125, high=4000, gain_control=True)
_KEYWORD_FRAMES = 50
_KEYWORD_SPEECH = {"calib": 128, "eval": 58}  # windows of the long recordings, and of each meeting: without overlap
_KEYWORD_MEETING = {"calib": 14, "eval": 29}

# Window, step and channels as anomaly_detection.py says; it was trained up to 24 kHz, on recordings of toy cars.
_MACHINE = Spectrogram(window=1024, step=512, channels=128, low=0, high=8000, gain_control=False)
_MACHINE_FRAMES, _MACHINE_CALIBRATION, _MACHINE_EVALUATION = 5, 256, 128
_MACHINE_VOLUME = np.float32(0.25)  # brings the mean to the one that the first BatchNormalization remembers


def _export(archive: Archive, folder: Path, graph: str, output: str) -> None:
    model = KerasToOnnx(*read_h5(archive.read("weights"))).convert(graph, "x", output)
    onnx.checker.check_model(model, full_check=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))


def preprocess(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Scale an RGB image `[32, 32, 3]` as in training, to -1 ... 127/128, and add the batch axis: `[1, 32, 32, 3]`."""
    return ((image.astype(np.float32) - np.float32(128)) / np.float32(128))[None]


def shifted(images: list[RgbImage], seed: int) -> list[RgbImage]:
    """Move each image by up to four pixels along either axis; what comes in from outside is its mirror image.

    Few images make narrow ranges: these show the network what it saw in training, where images were moved likewise.
    """
    rng = np.random.default_rng(seed)
    moved = []
    for image in images:
        top, left = rng.integers(2 * _SHIFT, size=2, endpoint=True)
        wide = np.pad(image, ((_SHIFT, _SHIFT), (_SHIFT, _SHIFT), (0, 0)), mode="reflect")
        moved.append(wide[top : top + image.shape[0], left : left + image.shape[1]])
    return moved


def build_resnet8(archive: Archive, folder: Path) -> None:
    """Write `model.onnx`, `calib.npz` and `eval.npz` of the image classification network, for CIFAR-10.

    Parameters
    ----------
    archive
        Sources `weights`, `cifar10` (evaluation) and `cifar100` (calibration).
    folder
        An existing folder.
    """
    _export(archive, folder, "resnet8", "probabilities")

    originals = [decode(content) for content in archive.read_all("cifar100").values()]
    mirrored = [image[:, ::-1] for image in originals]
    calibration = [*originals, *mirrored, *shifted([*originals, *mirrored], _SEED)]
    write_npz(folder / "calib.npz", {"x": np.stack([preprocess(image) for image in calibration])})

    evaluation = archive.read_all("cifar10")
    images = np.stack([preprocess(decode(content)) for content in evaluation.values()])
    write_npz(folder / "eval.npz", {"x": images, "labels": labels_from_names(evaluation)})


def build_ds_cnn(archive: Archive, folder: Path) -> None:
    """Write `model.onnx`, `calib.npz` and `eval.npz` of the keyword spotting network.

    Parameters
    ----------
    archive
        Sources `weights`, `calib_speech` and `eval_speech`: a recording of running speech each, without
        labels, `calib_meetings` and `eval_meetings`: recordings of other speakers.
    folder
        An existing folder.
    """
    _export(archive, folder, "ds_cnn", "probabilities")
    for kind, count in _KEYWORD_SPEECH.items():
        windows = [cut(_KEYWORDS.of(read_wav(archive.read(f"{kind}_speech"))), _KEYWORD_FRAMES, count)]
        for meeting in archive.read_all(f"{kind}_meetings").values():
            windows.append(cut(_KEYWORDS.of(read_wav(meeting)), _KEYWORD_FRAMES, _KEYWORD_MEETING[kind]))
        write_npz(folder / f"{kind}.npz", {"x": np.concatenate(windows)[:, None, :, :, None]})


def build_vww_mobilenet(archive: Archive, folder: Path) -> None:
    """Write `model.onnx`, `calib.npz` and `eval.npz` of the visual wake words network, which looks for persons.

    Parameters
    ----------
    archive
        Sources `weights`, `calibration` (photographs without labels), `persons` and `others` (evaluation).
    folder
        An existing folder.
    """
    _export(archive, folder, "vww_mobilenet", "probabilities")
    crops = random_crops(archive.read_all("calibration"), _VWW_CROPS, _VWW_SIZE, _SEED)
    write_npz(folder / "calib.npz", {"x": np.stack([crop.astype(np.float32)[None] for crop in crops])})

    images, labels = [], []
    for source, label in (("persons", _PERSON), ("others", _NO_PERSON)):
        for content in archive.read_all(source).values():
            image = decode(content)
            squares = [_centre_square(image, part).astype(np.float32) for part in _VWW_PARTS]
            images += [view for square in squares for view in (square[None], square[None, :, ::-1])]
            labels += [label] * 2 * len(squares)
    write_npz(folder / "eval.npz", {"x": np.stack(images), "labels": np.array(labels, np.int64)})


def _centre_square(image: RgbImage, part: float) -> RgbImage:
    """Cut a square out of the middle, by its side as a part of the image's shorter one."""
    height, width = image.shape[:2]
    side = int(part * min(height, width))
    return crop_and_resize(image, (width - side) // 2, (height - side) // 2, side, _VWW_SIZE)


def build_ad_autoencoder(archive: Archive, folder: Path) -> None:
    """Write `model.onnx`, `calib.npz` and `eval.npz` of the anomaly detection network, which reproduces its input.

    Parameters
    ----------
    archive
        Sources `weights`, `calib_speech` and `eval_speech`: two recordings, which are anomalous both.
    folder
        An existing folder.
    """
    _export(archive, folder, "ad_autoencoder", "reconstruction")
    for kind, count in (("calib", _MACHINE_CALIBRATION), ("eval", _MACHINE_EVALUATION)):
        spectrogram = _MACHINE.of(read_wav(archive.read(f"{kind}_speech")) * _MACHINE_VOLUME)
        windows = cut(spectrogram, _MACHINE_FRAMES, count)
        write_npz(folder / f"{kind}.npz", {"x": windows[:, None, :, :, None]})
