"""Samples of a user's own for evaluation and prediction, from files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedknow.client.data.pixels import to_eight_bit
from fedknow.protocols.config import ConfigError

__all__ = ["Samples", "read_samples"]

_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Samples:
    """Images, their names and, where known, their labels.

    Attributes
    ----------
    x : ndarray [n, C, H, W]
        uint8, or floats from 0 to 1.
    names : list of str
        One a sample: its file, or its place in an array.
    y : int64 [n], optional
        Labels.
    """

    x: NDArray[np.generic]
    names: list[str]
    y: NDArray[np.int64] | None = None


def read_samples(
    path: Path, shape: tuple[int, ...], class_names: tuple[str, ...]
) -> Samples:
    """Read samples from an array file, a picture, or a folder of pictures.

    Parameters
    ----------
    path : Path
        ``.npz`` with ``x`` and perhaps ``y``; a picture; or a folder. The sub-folders of a
        folder are taken for classes if each bears the name of one.
    shape : tuple of int
        Of a sample: of images channels, height and width; pictures are scaled to it.
    class_names : tuple of str
        The model's classes.

    Raises
    ------
    ConfigError
        If there is nothing to read, or it is something else.
    """
    if path.suffix == ".npz":
        return _from_arrays(path)
    if len(shape) != 3:
        raise ConfigError(
            f"{path}: the model takes samples of shape {list(shape)}, no pictures; "
            "give an .npz file"
        )
    if path.is_file():
        return Samples(_picture(path, shape)[None], [str(path)])
    if not path.is_dir():
        raise ConfigError(f"{path}: no such file or folder")
    return _from_folder(path, shape, class_names)


def _from_folder(
    path: Path, shape: tuple[int, ...], class_names: tuple[str, ...]
) -> Samples:
    # Sorted, as folders list their files in any order.
    pictures = sorted(p for p in path.rglob("*") if p.suffix.lower() in _PICTURES)
    if not pictures:
        raise ConfigError(f"{path}: holds no pictures ({', '.join(_PICTURES)})")
    x = np.stack([_picture(picture, shape) for picture in pictures])
    names = [str(picture.relative_to(path)) for picture in pictures]
    labels = {name: label for label, name in enumerate(class_names)}
    folders = [picture.relative_to(path).parts[0] for picture in pictures]
    # Folders of other names say nothing about classes: the pictures have no labels then.
    if not all(folder in labels for folder in folders):
        return Samples(x, names)
    return Samples(x, names, np.array([labels[folder] for folder in folders]))


def _from_arrays(path: Path) -> Samples:
    try:
        # Without pickle: a file from elsewhere must not run code.
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(
            f"{path}: not a file that numpy.savez wrote: {error}"
        ) from None
    if "x" not in arrays:
        raise ConfigError(
            f"{path}: has {', '.join(arrays) or 'nothing'}; it must have an array x, "
            "and y for labels"
        )
    names = [str(place) for place in range(len(arrays["x"]))]
    return Samples(arrays["x"], names, arrays.get("y"))


def _picture(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    from PIL import (
        Image,
        UnidentifiedImageError,
    )  # an extra: arrays need no pictures

    channels, height, width = shape
    if channels not in (1, 3):
        raise ConfigError(
            f"{path}: the model takes {channels} channels, which a picture has not; "
            "give an .npz file"
        )
    try:
        with Image.open(path) as image:
            # By the same rules as in training, or the same picture would give other pixels.
            eight_bit = to_eight_bit(image, "L" if channels == 1 else "RGB")
            pixels = np.asarray(eight_bit.resize((width, height)), np.uint8)
    except (OSError, ValueError, UnidentifiedImageError) as error:
        raise ConfigError(
            f"{path}: cannot be read as a picture: {error}"
        ) from None
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
