"""Data sets as their publishers give them: folders of images, and MATLAB's files."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
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


def _images(files: Sequence[Path], labels: Sequence[int]) -> Part:
    pillow = require("PIL.Image")
    return Part(
        np.array(labels, np.int64),
        lambda row: pillow.open(files[row]),
        lambda row: f"{files[row]}",
    )


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")  # spreadsheets begin their files with a mark
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not text in UTF-8: {error}") from error


# --- CORe50
# -----------------------------------------------------------------------------------------------------------

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


@dataclass(frozen=True)
class Core50:
    """``s1/o1/*.png`` to ``s11/o50/*.png``: 11 videos (sessions) of each of 50 objects, five of a
    category.

    Sessions 3, 7 and 10 are for testing, as its authors have it (Lomonaco and Maltoni, CoRL
    2017). Frames of one video are near copies of each other, and a random split of them puts
    what is trained on into the test.
    """

    wants = "s1/o1/*.png"

    def find(self, place: Path) -> Source | None:
        """The data set in a folder, or None."""
        if not (place / "s1" / "o1").is_dir():
            return None
        sessions = [
            [place / f"s{session}" / f"o{number}" for number in range(1, 51)]
            for session in range(1, 12)
        ]
        gone = next(
            (
                folder
                for session in sessions
                for folder in session
                if not folder.is_dir()
            ),
            None,
        )
        if gone is not None:
            raise ConfigError(
                f"{gone}: no such folder; CORe50 has s1 to s11, and o1 to o50 in each"
            )

        def read() -> Contents:
            return Contents(
                self._part(
                    folders
                    for number, folders in enumerate(sessions, start=1)
                    if number not in (3, 7, 10)
                ),
                self._part(
                    folders
                    for number, folders in enumerate(sessions, start=1)
                    if number in (3, 7, 10)
                ),
                [f"{_CATEGORIES[label // 5]} {label % 5 + 1}" for label in range(50)],
                [range(5 * category, 5 * category + 5) for category in range(10)],
            )

        return Source([folder for session in sessions for folder in session], read)

    def _part(self, sessions: Iterable[Sequence[Path]]) -> Part:
        found = [
            (path, label)
            for objects in sessions
            for label, folder in enumerate(objects)
            for path in pictures(folder)
        ]
        return _images([path for path, _ in found], [label for _, label in found])


# --- MiniImageNet
# -----------------------------------------------------------------------------------------------------

_PARTS = ("train", "val", "test")
"""Its classes are divided into these, for learning from few samples: each class has all its images
in one of them."""


@dataclass(frozen=True)
class MiniImageNetFolders:
    """``{train,val,test}/CLASS/*.jpg``; each sixth image of a class is for testing (100 of 600)."""

    wants = "{train,val,test}/CLASS/*.jpg"

    def find(self, place: Path) -> Source | None:
        """The data set in a folder, or None."""
        if not all((place / part).is_dir() for part in _PARTS):
            return None
        classes = [folder for part in _PARTS for folder in subfolders(place / part)]
        return Source(
            classes,
            lambda: _pool(
                [(path, path.parent.name) for c in classes for path in pictures(c)]
            ),
        )


@dataclass(frozen=True)
class MiniImageNetCsv:
    """``{train,val,test}.csv`` (filename, label; Ravi and Larochelle's) and ``images/``; split
    like the folders."""

    wants = "{train,val,test}.csv"

    def find(self, place: Path) -> Source | None:
        """The data set in a folder, or None."""
        lists = [place / f"{part}.csv" for part in _PARTS]
        if not all(path.is_file() for path in lists):
            return None
        samples = [
            sample for path in lists for sample in _listed(path, place / "images")
        ]
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
                f"{path}: line {table.line_num}: a filename and a label are needed; found {list(row.values())}"
            )
        samples.append((folder / row["filename"], row["label"]))
    return samples


def _pool(samples: Sequence[tuple[Path, str]]) -> Contents:
    names = list(
        dict.fromkeys(name for _, name in samples)
    )  # in the order of the parts
    labels = {name: label for label, name in enumerate(names)}
    pool = _images([path for path, _ in samples], [labels[name] for _, name in samples])
    return Contents(*resplit(pool, every=6), names)


# --- TinyImageNet
# -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TinyImageNet:
    """``train/CLASS/images/*.JPEG``, ``val/images/*.JPEG`` and ``val/val_annotations.txt``, which
    is for testing."""

    wants = "train/CLASS/images/*.JPEG"

    def find(self, place: Path) -> Source | None:
        """The data set in a folder, or None."""
        answers = place / "val" / "val_annotations.txt"
        if not answers.is_file():
            return None
        classes = subfolders(place / "train")
        names = [folder.name for folder in classes]
        labels = {name: label for label, name in enumerate(names)}

        def read() -> Contents:
            train = [
                (path, label)
                for label, c in enumerate(classes)
                for path in pictures(c / "images")
            ]
            test = []
            for number, line in enumerate(_text(answers).splitlines(), start=1):
                file, _, rest = line.partition("\t")
                name = rest.partition("\t")[0]
                if name not in labels:
                    raise ConfigError(
                        f"{answers}: line {number}: class {name!r} has no folder in {place / 'train'}"
                    )
                test.append((answers.parent / "images" / file, labels[name]))
            return Contents(
                _images([path for path, _ in train], [label for _, label in train]),
                _images([path for path, _ in test], [label for _, label in test]),
                names,
            )

        return Source(
            [
                *(folder / "images" for folder in classes),
                answers,
                answers.parent / "images",
            ],
            read,
        )


# --- SVHN
# -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SvhnMat:
    """``train_32x32.mat`` and ``test_32x32.mat``: X uint8 [32, 32, 3, N], y [N, 1] with 10 for the
    digit 0."""

    wants = "train_32x32.mat"

    def find(self, place: Path) -> Source | None:
        """The data set in a folder, or None."""
        files = [place / f"{part}_32x32.mat" for part in ("train", "test")]
        if not files[0].is_file():
            return None
        if not files[1].is_file():
            raise ConfigError(
                f"{files[1]}: no such file; it is needed beside {files[0].name}"
            )
        digits = [str(digit) for digit in range(10)]
        return Source(
            files, lambda: Contents(self._part(files[0]), self._part(files[1]), digits)
        )

    def _part(self, path: Path) -> Part:
        scipy = require("scipy.io")
        try:
            held = scipy.loadmat(path)
            x, y = held["X"], held["y"].reshape(-1)
        except Exception as error:  # scipy raises a dozen types for a damaged file
            raise ConfigError(
                f"{path}: cannot be read as MATLAB's file of X and y: {error}"
            ) from error
        if y.dtype.kind not in "iuf" or not np.isin(y, np.arange(11)).all():
            raise ConfigError(
                f"{path}: y must hold whole numbers from 0 to 10; 10 stands for the digit 0"
            )
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[2:] != (3, len(y)):
            raise ConfigError(
                f"{path}: X is {x.dtype} {list(x.shape)}; it must be uint8 [H, W, 3, {len(y)}]"
            )
        pillow = require("PIL.Image")
        digits = y.astype(np.int64) % 10
        return Part(
            digits,
            lambda row: pillow.fromarray(x[..., row]),
            lambda row: f"{path}: image {row}",
        )


# --- FC100
# ------------------------------------------------------------------------------------------------------------

_FC100 = (1, 2, 3, 4, 5, 6, 9, 10, 15, 17, 18, 19, 8, 11, 13, 16, 0, 7, 12, 14)
"""CIFAR-100's superclasses in the order of FC100's training, validation and test classes."""


@dataclass(frozen=True)
class Fc100:
    """CIFAR-100's images and classes in FC100's order: 20 superclasses of five classes (Oreshkin
    et al., NeurIPS 2018).

    FC100 keeps whole superclasses for testing, as learning from few samples needs. A stream of
    tasks needs training and test samples of every class: each sixth of CIFAR-100's 600 images
    of a class, training and test images together, is for testing. So it is another split and
    another order of CIFAR-100, and no independent data set.
    """

    wants = "train-*.parquet"

    def find(self, place: Path) -> Source | None:
        """The data set in a folder of CIFAR-100's parquet files, or None."""
        cifar = Parquet("img", ("coarse_label", "fine_label")).find(place)
        return (
            None
            if cifar is None
            else Source(cifar.marks, lambda: self._read(cifar.read()))
        )

    def _read(self, cifar: Contents) -> Contents:
        if len(cifar.groups) != len(_FC100):
            raise ConfigError(
                f"data.name = 'fc100': coarse_label has "
                f"{counted(len(cifar.groups), 'value')}; CIFAR-100 has {len(_FC100)}"
            )
        order = [label for superclass in _FC100 for label in cifar.groups[superclass]]
        new: Labels = np.empty(len(order), np.int64)
        new[order] = np.arange(len(order))
        pool = joined([cifar.train, cifar.test])
        starts = np.cumsum(
            [0, *(len(cifar.groups[superclass]) for superclass in _FC100)]
        )
        return Contents(
            *resplit(Part(new[pool.labels], pool.image, pool.place), every=6),
            [cifar.class_names[label] for label in order],
            [range(start, end) for start, end in pairwise(starts)],
        )
