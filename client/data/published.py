"""Data sets in layouts that are neither parquet nor files of pictures."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedknow.client.data.arrays import (
    Dataset,
    Labels,
    require,
)
from fedknow.client.data.recorded import Records, Rows
from fedknow.client.data.samples import SampleSpec
from fedknow.client.data.sounds import from_sounds
from fedknow.client.data.source import (
    Contents,
    Part,
    Source,
)
from fedknow.protocols.config import ConfigError

__all__ = [
    "Emnist",
    "ReadySource",
    "SpeechCommands",
    "UciHar",
]


@dataclass(frozen=True)
class ReadySource:
    """A data set found on disk that is read as a whole."""

    make: Callable[[str], Dataset]

    def dataset(self, name: str) -> Dataset:
        """Read it.

        Raises
        ------
        ConfigError
            If a file is missing or is not what it should be.
        """
        return self.make(name)


# --- UCI HAR --------------------------------------------------------------------------------

_CHANNELS = [
    f"{signal}_{axis}"
    for signal, axis in product(("body_acc", "body_gyro", "total_acc"), "xyz")
]
_STEPS, _RATE = 128, 50.0


@dataclass(frozen=True)
class UciHar:
    """Windows of a phone's sensors at the waist, of 30 people.

    A window has 128 steps of 2.56 seconds and nine channels: body acceleration, angular velocity
    and total acceleration along x, y and z. The split is by person.

    References
    ----------
    Anguita, Ghio, Oneto, Parra and Reyes-Ortiz, "A public domain dataset for human activity
    recognition using smartphones", ESANN 2013.
    """

    wants = "train/Inertial Signals/*.txt"

    def find(self, place: Path) -> ReadySource | None:
        """Look for the unpacked archive in a folder."""
        for folder in (place, place / "UCI HAR Dataset"):
            if (folder / "train" / "Inertial Signals").is_dir():
                return ReadySource(partial(_har, folder=folder))
        return None


def _har(name: str, folder: Path) -> Dataset:
    names = _activities(folder / "activity_labels.txt")
    parts = []
    for part in ("train", "test"):
        place = folder / part / "Inertial Signals"
        channels = [_table(place / f"{name}_{part}.txt") for name in _CHANNELS]
        x = np.stack(channels, axis=2)
        labels = _table(folder / part / f"y_{part}.txt").reshape(-1).astype(int)
        people = _table(folder / part / f"subject_{part}.txt").reshape(-1)
        lengths = {len(labels), len(people), len(x)}
        if x.shape[1] != _STEPS or len(lengths) > 1:
            raise ConfigError(
                f"{folder / part}: {list(x.shape)} signals, {len(labels)} labels and "
                f"{len(people)} people; it must be [n, {_STEPS}, 9] and n of each"
            )
        activities = np.array([names[label] for label in labels.tolist()])
        parts.append(
            Rows(
                x,
                activities,
                {"subject": people.astype(int)},
            )
        )
    sample = SampleSpec("series", (_STEPS, 9), "float32", rate=_RATE)
    return Records(sample, parts[0], parts[1]).dataset(name)


def _activities(path: Path) -> dict[int, str]:
    lines = [line.split() for line in path.read_text("utf-8").splitlines()]
    return {int(line[0]): line[1] for line in lines if len(line) == 2}


def _table(path: Path) -> NDArray[np.float32]:
    try:
        return np.loadtxt(path, dtype=np.float32, ndmin=2)
    except ValueError as error:
        raise ConfigError(f"{path}: no table of numbers: {error}") from error


# --- Speech Commands ------------------------------------------------------------------------


@dataclass(frozen=True)
class SpeechCommands:
    """Spoken words of a second at 16 kHz, ``WORD/SPEAKER_nohash_0.wav``.

    ``testing_list.txt`` names the recordings for testing, whose speakers are in no other part.

    References
    ----------
    Warden, "Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition", 2018, arXiv
    1804.03209.
    """

    wants = "testing_list.txt"

    def find(self, place: Path) -> ReadySource | None:
        """Look for the unpacked archive in a folder."""
        if not (place / "testing_list.txt").is_file():
            return None
        return ReadySource(partial(from_sounds, place=place))


# --- EMNIST ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Emnist:
    """Handwritten letters and digits in the files of MNIST, 47 classes.

    The split ``balanced``: ``emnist-balanced-train-images-idx3-ubyte`` and so on, packed by gzip or
    not. A picture lies on its side in them, and is turned.

    References
    ----------
    Cohen, Afshar, Tapson and van Schaik, "EMNIST: an extension of MNIST to handwritten letters",
    2017, arXiv 1702.05373.
    """

    wants = "emnist-balanced-train-images-idx3-ubyte.gz"

    def find(self, place: Path) -> Source | None:
        """Look for the files in a folder, or in its folder ``gzip``."""
        for folder in (place, place / "gzip"):
            stem = folder / "emnist-balanced-train-images-idx3-ubyte"
            if stem.is_file() or stem.with_name(f"{stem.name}.gz").is_file():
                marks = sorted(folder.glob("emnist-balanced-*"))
                return Source(marks, partial(_emnist, folder))
        return None


def _emnist(folder: Path) -> Contents:
    parts = []
    for part in ("train", "test"):
        x = _idx(
            folder / f"emnist-balanced-{part}-images-idx3-ubyte",
            axes=3,
        )
        y = _idx(
            folder / f"emnist-balanced-{part}-labels-idx1-ubyte",
            axes=1,
        )
        if len(x) != len(y):
            raise ConfigError(
                f"{folder}: {len(x)} {part} images and {len(y)} labels"
            )
        parts.append(
            _pictures(
                x,
                y.astype(np.int64),
                f"{folder}: {part} image",
            )
        )
    count = 1 + max(int(part.labels.max()) for part in parts)
    return Contents(parts[0], parts[1], _characters(folder, count))


def _pictures(x: NDArray[np.uint8], labels: Labels, place: str) -> Part:
    pillow = require("PIL.Image")
    return Part(
        labels,
        # Columns come first in these files.
        lambda row: pillow.fromarray(np.ascontiguousarray(x[row].T)),
        lambda row: f"{place} {row}",
    )


def _idx(stem: Path, axes: int) -> NDArray[np.uint8]:
    """Read an array of bytes in the format of MNIST's files."""
    packed = stem.with_name(f"{stem.name}.gz")
    path = packed if packed.is_file() else stem
    try:
        content = path.read_bytes()
        if path is packed:
            content = gzip.decompress(content)
        head = struct.unpack(f">HBB{axes}I", content[: 4 + 4 * axes])
        # Two zeros, 8 for bytes, and the number of axes.
        if head[:3] != (0, 8, axes):
            raise ValueError(
                f"it begins with {head[:3]} and not with (0, 8, {axes})"
            )
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(
            head[3:]
        )
    except (
        ValueError,
        EOFError,
        struct.error,
        gzip.BadGzipFile,
    ) as error:
        raise ConfigError(
            f"{path}: not a file of MNIST's format: {error}"
        ) from error


def _characters(folder: Path, count: int) -> Sequence[str]:
    """Name the classes, where the mapping lies beside the images."""
    names = [str(label) for label in range(count)]
    path = folder / "emnist-balanced-mapping.txt"
    if path.is_file():
        for line in path.read_text("utf-8").splitlines():
            label, code = map(int, line.split()[:2])
            if label < count:
                names[label] = chr(code)
    return names
