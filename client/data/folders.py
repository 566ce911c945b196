"""Data sets as published: folders of images, and MATLAB's files."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from fedknow.client.data.arrays import Labels, require
from fedknow.client.data.files import pictures, subfolders
from fedknow.client.data.parquet import Parquet
from fedknow.client.data.source import Contents, Part, Source, joined, resplit
from fedknow.protocols.config import ConfigError
from fedknow.protocols.texts import counted

__all__ = [
    "Core50",
    "Fc100",
    "MiniImageNetCsv",
    "MiniImageNetFolders",
    "SvhnMat",
    "TinyImageNet",
]


def _images(samples: Sequence[tuple[Path, int]]) -> Part:
    """Make a part of image files and their labels."""
    pillow = require("PIL.Image")
    files = [path for path, _ in samples]
    return Part(
        np.array([label for _, label in samples], np.int64),
        lambda row: pillow.open(files[row]),
        lambda row: f"{files[row]}",
    )


def _labelled(folder: Path, label: int) -> list[tuple[Path, int]]:
    """List the pictures of a folder that holds one class."""
    return [(path, label) for path in pictures(folder)]


def _text(path: Path) -> str:
    try:
        # Spreadsheets begin their files with a mark, which this encoding takes away.
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not text in UTF-8: {error}") from error


# --- CORe50 ---------------------------------------------------------------------------------

_CATEGORIES = (
    "plug adapter",
    "mobile phone",
    "scissors",
    "light bulb",
    "can",
    "glasses",
    "ball",
    "marker",
    "cup",
    "remote control",
)
_SESSIONS = range(1, 12)
_TEST_SESSIONS = (3, 7, 10)
_OBJECTS = range(50)


@dataclass(frozen=True)
class Core50:
    """``s1/o1/*.png`` to ``s11/o50/*.png``: a folder for each video.

    There are 11 videos (sessions) of each of 50 objects, five of a category. Sessions 3, 7 and
    10 are for testing, as its authors have it (Lomonaco and Maltoni, CoRL 2017). Frames of one
    video are near copies of each other, and a random split of them puts what is trained on
    into the test.
    """

    wants = "s1/o1/*.png"

    def find(self, place: Path) -> Source | None:
        """Look for the data set in a folder."""
        if not (place / "s1" / "o1").is_dir():
            return None
        videos = {session: _videos(place, session) for session in _SESSIONS}
        folders = list(chain.from_iterable(videos.values()))
        missing = [folder for folder in folders if not folder.is_dir()]
        if missing:
            raise ConfigError(
                f"{missing[0]}: no such folder; CORe50 has s1 to s11, "
                "and o1 to o50 in each"
            )

        def read() -> Contents:
            train = [
                session for session in _SESSIONS if session not in _TEST_SESSIONS
            ]
            return Contents(
                self._part(videos[session] for session in train),
                self._part(videos[session] for session in _TEST_SESSIONS),
                [
                    f"{_CATEGORIES[label // 5]} {label % 5 + 1}"
                    for label in _OBJECTS
                ],
                [range(5 * category, 5 * category + 5) for category in range(10)],
            )

        return Source(folders, read)

    def _part(self, sessions: Iterable[Sequence[Path]]) -> Part:
        samples: list[tuple[Path, int]] = []
        for folders in sessions:
            for label, folder in enumerate(folders):
                samples += _labelled(folder, label)
        return _images(samples)


def _videos(place: Path, session: int) -> list[Path]:
    """Name the folders of a session, object by object."""
    return [place / f"s{session}" / f"o{label + 1}" for label in _OBJECTS]


# --- MiniImageNet ---------------------------------------------------------------------------

_PARTS = ("train", "val", "test")
"""Parts of its classes, made for learning from few samples.

Each class has all its images in one of them.
"""


@dataclass(frozen=True)
class MiniImageNetFolders:
    """``{train,val,test}/CLASS/*.jpg``.

    Each sixth image of a class is for testing (100 of 600).
    """

    wants = "{train,val,test}/CLASS/*.jpg"

    def find(self, place: Path) -> Source | None:
        """Look for the data set in a folder."""
        parts = [place / part for part in _PARTS]
        if not all(part.is_dir() for part in parts):
            return None
        classes = list(chain.from_iterable(map(subfolders, parts)))

        def read() -> Contents:
            files = chain.from_iterable(map(pictures, classes))
            return _pool([(path, path.parent.name) for path in files])

        return Source(classes, read)


@dataclass(frozen=True)
class MiniImageNetCsv:
    """``{train,val,test}.csv`` and ``images/``; split like the folders.

    The lists are those of Ravi and Larochelle: filename, label.
    """

    wants = "{train,val,test}.csv"

    def find(self, place: Path) -> Source | None:
        """Look for the data set in a folder."""
        lists = [place / f"{part}.csv" for part in _PARTS]
        if not all(path.is_file() for path in lists):
            return None
        samples: list[tuple[Path, str]] = []
        for path in lists:
            samples += _listed(path, place / "images")
        # In the order of the lists, each once.
        folders = dict.fromkeys(path.parent for path, _ in samples)
        return Source([*lists, *folders], lambda: _pool(samples))


def _listed(path: Path, folder: Path) -> list[tuple[Path, str]]:
    """Read the pictures and the classes that a list names."""
    lines = _text(path).splitlines()
    table = csv.DictReader(lines)
    if not {"filename", "label"} <= set(table.fieldnames or ()):
        raise ConfigError(
            f"{path}: its first line is {table.fieldnames}; it must be filename,label"
        )
    samples = []
    for row in table:
        if not row["filename"] or not row["label"]:
            raise ConfigError(
                f"{path}: line {table.line_num}: a filename and a label are needed; "
                f"found {list(row.values())}"
            )
        samples.append((folder / row["filename"], row["label"]))
    return samples


def _pool(samples: Sequence[tuple[Path, str]]) -> Contents:
    """Label the classes in the order of the parts, and split each anew."""
    names = list(dict.fromkeys(name for _, name in samples))
    labels = {name: label for label, name in enumerate(names)}
    pool = _images([(path, labels[name]) for path, name in samples])
    return Contents(*resplit(pool, every=6), names)


# --- TinyImageNet ---------------------------------------------------------------------------


@dataclass(frozen=True)
class TinyImageNet:
    """``train/CLASS/images/*.JPEG``, ``val/images/`` and their annotations.

    ``val/images/*.JPEG`` with ``val/val_annotations.txt`` is for testing: the labels of the
    test images were never published.
    """

    wants = "train/CLASS/images/*.JPEG"

    def find(self, place: Path) -> Source | None:
        """Look for the data set in a folder."""
        annotations = place / "val" / "val_annotations.txt"
        if not annotations.is_file():
            return None
        classes = subfolders(place / "train")
        names = [folder.name for folder in classes]

        def read() -> Contents:
            train: list[tuple[Path, int]] = []
            for label, folder in enumerate(classes):
                train += _labelled(folder / "images", label)
            # The published test images have no labels, so the validation images take their
            # place.
            test = _annotated(annotations, names, place / "train")
            return Contents(_images(train), _images(test), names)

        folders = [folder / "images" for folder in classes]
        return Source(
            [*folders, annotations, annotations.parent / "images"], read
        )


def _annotated(
    annotations: Path, names: Sequence[str], classes: Path
) -> list[tuple[Path, int]]:
    """Read the test images and their labels from TinyImageNet's annotations."""
    labels = {name: label for label, name in enumerate(names)}
    samples = []
    for number, line in enumerate(_text(annotations).splitlines(), start=1):
        file, _, columns = line.partition("\t")
        # Further columns are a bounding box.
        name = columns.partition("\t")[0]
        if name not in labels:
            raise ConfigError(
                f"{annotations}: line {number}: class {name!r} has no folder in {classes}"
            )
        samples.append((annotations.parent / "images" / file, labels[name]))
    return samples


# --- SVHN -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SvhnMat:
    """``train_32x32.mat`` and ``test_32x32.mat``.

    X is uint8 [32, 32, 3, N], y [N, 1] with 10 for the digit 0.
    """

    wants = "train_32x32.mat"

    def find(self, place: Path) -> Source | None:
        """Look for the data set in a folder."""
        train, test = (place / f"{part}_32x32.mat" for part in ("train", "test"))
        if not train.is_file():
            return None
        if not test.is_file():
            raise ConfigError(
                f"{test}: no such file; it is needed beside {train.name}"
            )
        digits = [str(digit) for digit in range(10)]

        def read() -> Contents:
            return Contents(self._part(train), self._part(test), digits)

        return Source([train, test], read)

    def _part(self, path: Path) -> Part:
        scipy = require("scipy.io")
        try:
            content = scipy.loadmat(path)
            x = content["X"]
            y = content["y"].reshape(-1)
        # scipy raises a dozen types for a damaged file.
        except Exception as error:
            raise ConfigError(
                f"{path}: cannot be read as MATLAB's file of X and y: {error}"
            ) from error
        if y.dtype.kind not in "iuf" or not np.isin(y, np.arange(11)).all():
            raise ConfigError(
                f"{path}: y must hold whole numbers from 0 to 10; "
                "10 stands for the digit 0"
            )
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[2:] != (3, len(y)):
            raise ConfigError(
                f"{path}: X is {x.dtype} {list(x.shape)}; "
                f"it must be uint8 [H, W, 3, {len(y)}]"
            )
        pillow = require("PIL.Image")
        # MATLAB counts from 1, so its file calls the digit 0 a 10.
        digits = y.astype(np.int64) % 10
        return Part(
            digits,
            lambda row: pillow.fromarray(x[..., row]),
            lambda row: f"{path}: image {row}",
        )


# --- FC100 ----------------------------------------------------------------------------------

_FC100 = (1, 2, 3, 4, 5, 6, 9, 10, 15, 17, 18, 19, 8, 11, 13, 16, 0, 7, 12, 14)
"""CIFAR-100's superclasses in the order of FC100's training, validation and test classes."""


@dataclass(frozen=True)
class Fc100:
    """CIFAR-100's images and classes in FC100's order of superclasses.

    There are 20 superclasses of five classes (Oreshkin et al., NeurIPS 2018). FC100 keeps whole
    superclasses for testing, as learning from few samples needs. A stream of tasks needs
    training and test samples of every class. So each sixth of CIFAR-100's 600 images of a
    class, training and test images together, is for testing. The result is another split and
    another order of CIFAR-100, and no independent data set.
    """

    wants = "train-*.parquet"

    def find(self, place: Path) -> Source | None:
        """Look for CIFAR-100's parquet files in a folder."""
        cifar = Parquet("img", ("coarse_label", "fine_label")).find(place)
        if cifar is None:
            return None
        return Source(cifar.marks, lambda: self._read(cifar.read()))

    def _read(self, cifar: Contents) -> Contents:
        if len(cifar.groups) != len(_FC100):
            raise ConfigError(
                f"data.name = 'fc100': coarse_label has "
                f"{counted(len(cifar.groups), 'value')}; CIFAR-100 has {len(_FC100)}"
            )
        groups = [cifar.groups[superclass] for superclass in _FC100]
        order = list(chain.from_iterable(groups))
        # The inverse of the order: from CIFAR-100's label to FC100's.
        new_labels: Labels = np.empty(len(order), np.int64)
        new_labels[order] = np.arange(len(order))
        # FC100 splits by class and not by image, so both parts are one pool here.
        pool = joined([cifar.train, cifar.test])
        pool = Part(new_labels[pool.labels], pool.image, pool.place)
        starts = np.cumsum([0, *map(len, groups)])
        return Contents(
            *resplit(pool, every=6),
            [cifar.class_names[label] for label in order],
            [range(start, end) for start, end in pairwise(starts)],
        )
