"""Write calibration and evaluation samples so that the same arrays always give the same bytes."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = Mapping[str, npt.NDArray[Any]]

_NO_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip archive can hold
_UNIX = 3


def write_npz(path: Path, arrays: Arrays) -> None:
    """Write arrays as a compressed `.npz` whose bytes do not depend on when or where it is written.

    Parameters
    ----------
    path
        The file to write.
    arrays
        Arrays by name. For samples of one shape, axis 0 counts samples and each sample keeps the model input's full
        shape, batch axis included: `[S, 1, ...]`.

    Notes
    -----
    `numpy.savez_compressed` stamps the members with the time and the platform.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            info = zipfile.ZipInfo(f"{name}.npy", _NO_TIME)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.create_system = _UNIX
            info.external_attr = 0o644 << 16
            with archive.open(info, "w") as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)


def write_npz_folder(folder: Path, samples: Iterable[Arrays]) -> None:
    """Write samples of varying shapes, one `.npz` each: `000.npz`, `001.npz`, ...

    Parameters
    ----------
    folder
        The folder to make.
    samples
        One mapping per sample, from input name to an array of that input's full shape.
    """
    folder.mkdir()
    for index, arrays in enumerate(samples):
        write_npz(folder / f"{index:03d}.npz", arrays)
