"""Data sets by name, as plain ``uint8`` arrays.

``digits`` is embedded in scikit-learn. The others are read from files in the layout of the
Hugging Face hub, or in their publisher's. ``module:callable`` is a user's own.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from fedknow.client.data.arrays import Dataset, Images, Labels, require
from fedknow.client.data.folders import (
    Core50,
    Fc100,
    MiniImageNetCsv,
    MiniImageNetFolders,
    SvhnMat,
    TinyImageNet,
)
from fedknow.client.data.parquet import Parquet
from fedknow.client.data.source import Contents, Form, Part, Source, joined, load
from fedknow.protocols.config import ConfigError, DataConfig, closest
from fedknow.protocols.plugins import calling, check_maker, is_reference, load_object

__all__ = [
    "Dataset",
    "Images",
    "Labels",
    "dataset_facts",
    "list_datasets",
    "load_dataset",
    "require",
]


class Layout(Protocol):
    """How a data set may lie in its folder."""

    @property
    def wants(self) -> str:
        """The file it is known by."""

    def find(self, place: Path) -> Source | None:
        """The data set, or None if it does not lie here like this."""


@dataclass(frozen=True)
class _Known:
    """A data set known by name.

    Attributes
    ----------
    form : Form
        Its images; ``data.image_size`` has precedence over the size.
    layouts : tuple of Layout
        How it may lie in its folder.
    folders : tuple of str
        What the folder may be called, besides the data set's name.
    hub : str
        Repository on the hub; empty where no copy there has the columns needed.
    mix : tuple of str
        The data sets it is made of, each with its own layouts.
    """

    about: str
    form: Form
    layouts: tuple[Layout, ...] = ()
    folders: tuple[str, ...] = ()
    hub: str = ""
    mix: tuple[str, ...] = ()


_CIFAR100 = Parquet("img", ("fine_label",))

_KNOWN: Mapping[str, _Known] = {
    "cifar100": _Known(
        "60,000 photographs, 32x32 RGB, 100 classes (Krizhevsky 2009); parquet folder or Hugging Face hub",
        Form("RGB"),
        (_CIFAR100,),
        hub="uoft-cs/cifar100",
    ),
    "omniglot": _Known(
        "32,460 handwritten characters, 28x28 grey, 1,623 classes in 50 alphabets (Lake 2015); parquet folder",
        Form("L"),
        (Parquet("image", ("alphabet", "character")),),
    ),
    "fc100": _Known(
        "CIFAR-100 ordered by FC100's superclasses and split anew, 500 / 100 a class; CIFAR-100's parquet folder",
        Form("RGB"),
        (Fc100(),),
        folders=("cifar100",),
        hub="uoft-cs/cifar100",
    ),
    "core50": _Known(
        "165,000 video frames of 50 objects in 10 categories, to 32x32 RGB, split by session (Lomonaco 2017); folders",
        Form("RGB", 32),
        (Core50(),),
        folders=("core50_128x128",),
    ),
    "miniimagenet": _Known(
        "60,000 photographs, to 84x84 RGB, 100 classes (Vinyals 2016); folders, CSV lists, or parquet folder",
        Form("RGB", 84),
        (
            Parquet("image", ("label",), test="validation"),
            MiniImageNetCsv(),
            MiniImageNetFolders(),
        ),
        folders=("mini-imagenet", "miniImageNet"),
    ),
    "tinyimagenet": _Known(
        "110,000 photographs, 64x64 RGB, 200 classes (Stanford CS231N); its folders, or parquet folder",
        Form("RGB", 64),
        (Parquet("image", ("label",), test="valid"), TinyImageNet()),
        folders=("tiny-imagenet-200", "tiny-imagenet"),
    ),
    "svhn": _Known(
        "99,289 house numbers, 32x32 RGB, 10 classes (Netzer 2011); *_32x32.mat, or parquet folder",
        Form("RGB"),
        (
            Parquet("image", ("label",), folders=("", "data", "cropped_digits")),
            SvhnMat(),
        ),
    ),
    "mix80": _Known(
        "80 tasks of 5 classes: miniimagenet, tinyimagenet and cifar100 one after another, to 32x32 RGB",
        Form("RGB", 32),
        mix=("miniimagenet", "tinyimagenet", "cifar100"),
    ),
}


def load_dataset(config: DataConfig) -> Dataset:
    """Load the data set that a configuration names.

    Raises
    ------
    ConfigError
        If the name is unknown, a folder, file, column or package is missing, or an image cannot
        be decoded.
    """
    if is_reference(config.name):
        found = load_object(config.name, "data.name")
        build = check_maker(
            found, config.name, "data.name", Dataset, "fedknow.client.data.Dataset"
        )
        with calling(config.name, "data.name"):
            dataset = build(config)
        if not isinstance(dataset, Dataset):
            raise ConfigError(
                f"data.name = {config.name!r}: returned {type(dataset).__name__}; "
                "it must return a fedknow.client.data.Dataset (Dataset.from_arrays makes one of four arrays)"
            )
        dataset.check_labels()
        return dataset
    if config.name == "digits":
        return _digits()
    if config.name in _KNOWN:
        form = _KNOWN[config.name].form
        try:
            source = _find(config.name, config.dir)
            return load(
                config.name, source, Form(form.mode, config.image_size or form.size)
            )
        except OSError as error:
            raise ConfigError(
                f"data.name = {config.name!r}: {error.filename}: {error.strerror or error}"
            ) from error
    if config.name == "local":
        raise ConfigError(
            "data.name = 'local': the data are with real clients (fedknow server, fedknow client --data DIR); "
            "a simulation needs a data set: set data.name"
        )
    known = list_datasets()
    raise ConfigError(
        f"data.name = {config.name!r}: no such data set{closest(config.name, known)}; "
        f"known: {', '.join(known)}, or module:callable for your own"
    )


def list_datasets() -> dict[str, str]:
    """The data sets known by name, with a line about each."""
    return {"digits": _DIGITS_ABOUT} | {
        name: known.about for name, known in _KNOWN.items()
    }


def dataset_facts(name: str) -> dict[str, str]:
    """Say what the images of a data set become, and where its files must lie."""
    known = _KNOWN.get(name)
    if known is None:  # digits
        return {"Files": "none: they come with scikit-learn"}
    size = (
        f"{known.form.size}x{known.form.size}"
        if known.form.size
        else "as large as in the files"
    )
    facts = {
        "Images": f"{'grey' if known.form.mode == 'L' else known.form.mode}, {size} (data.image_size)"
    }
    if known.mix:
        facts["Made of"] = ", ".join(known.mix)
        return facts
    facts["Folder"] = " or ".join(f"{folder}/" for folder in (name, *known.folders))
    facts["Folder"] += " in the folder that --data-dir, data.dir or FEDKNOW_DATA names"
    facts["Files in it"] = " or ".join(layout.wants for layout in known.layouts)
    facts["Hub"] = (
        f"{known.hub}, where no folder is named" if known.hub else "not from there"
    )
    return facts


# --- digits
# -----------------------------------------------------------------------------------------------------------

_DIGITS_ABOUT = "1,797 handwritten digits, 8x8 grey, 10 classes; embedded in scikit-learn, nothing to download"


def _digits() -> Dataset:
    found = importlib.util.find_spec("sklearn") or require("sklearn")
    # What its load_digits reads; to import scikit-learn takes a second.
    table = np.loadtxt(
        Path(str(found.origin)).parent / "datasets" / "data" / "digits.csv.gz",
        delimiter=",",
    )
    x = np.rint(table[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(
        np.uint8
    )  # 17 grey levels, 0..16
    y = table[:, -1].astype(np.int64)
    # Every fifth sample of each class is for testing: stratified, and the same whatever the
    # seed or library version.
    rank = np.empty_like(y)
    for label in range(10):
        of_class = y == label
        rank[of_class] = np.arange(of_class.sum())
    test = rank % 5 == 4
    return Dataset.from_arrays("digits", x[~test], y[~test], x[test], y[test])


# --- on disk
# ----------------------------------------------------------------------------------------------------------


def _find(name: str, folder: str) -> Source:
    known = _KNOWN[name]
    if known.mix:
        return _mix(known.mix, [_find(part, folder) for part in known.mix])
    given = folder or os.environ.get("FEDKNOW_DATA", "")
    setting = "data.dir" if folder else "FEDKNOW_DATA" if given else "downloaded copy"
    root = Path(given).expanduser() if given else _download(name)
    wants = " or ".join(f"{name}/{layout.wants}" for layout in known.layouts)
    if not root.is_dir():
        raise ConfigError(
            f"{setting} = {str(root)!r}: no such folder; it must hold {wants}"
        )
    for place in [*(root / alias for alias in (name, *known.folders)), root]:
        for layout in known.layouts:
            source = layout.find(place)
            if source is not None:
                return source
    inside = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
    raise ConfigError(
        f"{setting} = {str(root)!r}: no {wants} there (it holds: {inside}); "
        f"point --data-dir or FEDKNOW_DATA at the folder that holds {name}/"
    )


def _download(name: str) -> Path:
    known = _KNOWN[name]
    wants = " or ".join(f"{name}/{layout.wants}" for layout in known.layouts)
    how = f"put {wants} into a folder and name it by --data-dir FOLDER (data.dir) or the variable FEDKNOW_DATA"
    if not known.hub:
        raise ConfigError(
            f"data.name = {name!r}: no data folder is given and the set is not on the hub; {how}"
        )
    hub = require("huggingface_hub")
    try:
        return Path(
            hub.snapshot_download(
                known.hub, repo_type="dataset", allow_patterns="*.parquet"
            )
        )
    except Exception as error:  # a dozen types, from several HTTP libraries; all mean the same to a user
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"data.name = {name!r}: no data folder is given and {known.hub} could not be fetched from the "
            f"Hugging Face hub ({reason}); go online, or {how}"
        ) from error


def _mix(names: Sequence[str], sources: Sequence[Source]) -> Source:
    """Several data sets as one, their classes one after another, five of them a group.

    So the FedKNOW paper's 80 tasks of 5 classes may be read: its 400 classes are those of
    MiniImageNet, TinyImageNet and CIFAR-100. It names FC100 too, whose classes and images are
    CIFAR-100's.
    """

    def read() -> Contents:
        contents = [source.read() for source in sources]
        starts = np.cumsum([0, *(len(each.class_names) for each in contents)]).tolist()

        def moved(part: Part, start: int) -> Part:
            return Part(part.labels + start, part.image, part.place)

        return Contents(
            joined(
                [
                    moved(each.train, start)
                    for each, start in zip(contents, starts, strict=False)
                ]
            ),
            joined(
                [
                    moved(each.test, start)
                    for each, start in zip(contents, starts, strict=False)
                ]
            ),
            [
                f"{name}/{label}"
                for name, each in zip(names, contents, strict=True)
                for label in each.class_names
            ],
            [
                range(start, min(start + 5, starts[-1]))
                for start in range(0, starts[-1], 5)
            ],
        )

    return Source([mark for source in sources for mark in source.marks], read)
