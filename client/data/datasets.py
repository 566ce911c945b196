"""Data sets by name, as plain ``uint8`` arrays.

``digits`` is embedded in scikit-learn. The others are read from files in the layout of the
Hugging Face hub, or in their publisher's. ``module:callable`` is a user's own.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any, Protocol

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
from fedknow.protocols.installed import find_installed, list_installed
from fedknow.protocols.plugins import (
    calling,
    check_maker,
    is_reference,
    load_object,
)

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
        """Look for the data set in a folder.

        Returns
        -------
        Source or None
            None if the folder has another layout.
        """


@dataclass(frozen=True)
class _Listing:
    """A data set known by name.

    Attributes
    ----------
    summary : str
        A line for the list of data sets.
    form : Form
        Its images; ``data.image_size`` has precedence over the size.
    layouts : tuple of Layout
        How it may lie in its folder.
    folders : tuple of str
        Names that the folder may have, besides the data set's name.
    hub : str
        Repository on the hub; empty where no copy there has the columns needed.
    mix : tuple of str
        The data sets it is made of, each with its own layouts.
    """

    summary: str
    form: Form
    layouts: tuple[Layout, ...] = ()
    folders: tuple[str, ...] = ()
    hub: str = ""
    mix: tuple[str, ...] = ()

    def files(self, name: str) -> str:
        """Name the files that the data set is known by, for messages."""
        return " or ".join(f"{name}/{layout.wants}" for layout in self.layouts)


_CIFAR100 = Parquet("img", ("fine_label",))

# Names are written in configurations and results, so they never change.
_LISTED: Mapping[str, _Listing] = {
    "cifar100": _Listing(
        "60,000 photographs, 32x32 RGB, 100 classes (Krizhevsky 2009); "
        "parquet folder or Hugging Face hub",
        Form("RGB"),
        (_CIFAR100,),
        hub="uoft-cs/cifar100",
    ),
    "omniglot": _Listing(
        "32,460 handwritten characters, 28x28 grey, 1,623 classes in 50 alphabets "
        "(Lake 2015); parquet folder",
        Form("L"),
        (Parquet("image", ("alphabet", "character")),),
    ),
    "fc100": _Listing(
        "CIFAR-100 ordered by FC100's superclasses and split anew, 500 / 100 a class; "
        "CIFAR-100's parquet folder",
        Form("RGB"),
        (Fc100(),),
        folders=("cifar100",),
        hub="uoft-cs/cifar100",
    ),
    "core50": _Listing(
        "165,000 video frames of 50 objects in 10 categories, to 32x32 RGB, "
        "split by session (Lomonaco 2017); folders",
        Form("RGB", 32),
        (Core50(),),
        folders=("core50_128x128",),
    ),
    "miniimagenet": _Listing(
        "60,000 photographs, to 84x84 RGB, 100 classes (Vinyals 2016); "
        "folders, CSV lists, or parquet folder",
        Form("RGB", 84),
        (
            Parquet("image", ("label",), test="validation"),
            MiniImageNetCsv(),
            MiniImageNetFolders(),
        ),
        folders=("mini-imagenet", "miniImageNet"),
    ),
    "tinyimagenet": _Listing(
        "110,000 photographs, 64x64 RGB, 200 classes (Stanford CS231N); "
        "its folders, or parquet folder",
        Form("RGB", 64),
        (Parquet("image", ("label",), test="valid"), TinyImageNet()),
        folders=("tiny-imagenet-200", "tiny-imagenet"),
    ),
    "svhn": _Listing(
        "99,289 house numbers, 32x32 RGB, 10 classes (Netzer 2011); "
        "*_32x32.mat, or parquet folder",
        Form("RGB"),
        (
            Parquet("image", ("label",), folders=("", "data", "cropped_digits")),
            SvhnMat(),
        ),
    ),
    "mix80": _Listing(
        "80 tasks of 5 classes: miniimagenet, tinyimagenet and cifar100 "
        "one after another, to 32x32 RGB",
        Form("RGB", 32),
        mix=("miniimagenet", "tinyimagenet", "cifar100"),
    ),
}

NAMES = ("digits", "local", *_LISTED)
"""Names that no installed package can take."""


def load_dataset(config: DataConfig) -> Dataset:
    """Load the data set that a configuration names.

    Raises
    ------
    ConfigError
        If the name is unknown, a folder, file, column or package is missing, or an image cannot
        be decoded.
    """
    if is_reference(config.name):
        return _load_users(config, load_object(config.name, "data.name"))
    if config.name == "digits":
        return _load_digits()
    if config.name in _LISTED:
        return _load_listed(config)
    # It is a name for servers alone, and no data set that could be missing.
    if config.name == "local":
        raise ConfigError(
            "data.name = 'local': the data are with real clients (fedknow server, "
            "fedknow client --data DIR); a simulation needs a data set: set data.name"
        )
    part = find_installed("data", config.name, "data.name")
    if part is not None:
        return _load_users(config, part)
    names = [*list_datasets(), *list_installed("data", NAMES)]
    raise ConfigError(
        f"data.name = {config.name!r}: no such data set{closest(config.name, names)}; "
        f"known: {', '.join(names)}, or module:callable for your own"
    )


def _load_users(config: DataConfig, loaded: Any) -> Dataset:
    build = check_maker(
        loaded, config.name, "data.name", Dataset, "fedknow.client.data.Dataset"
    )
    with calling(config.name, "data.name"):
        dataset = build(config)
    if not isinstance(dataset, Dataset):
        raise ConfigError(
            f"data.name = {config.name!r}: returned {type(dataset).__name__}; "
            "it must return a fedknow.client.data.Dataset "
            "(Dataset.from_arrays makes one of four arrays)"
        )
    # A user's arrays are checked once here, and trusted everywhere else.
    dataset.check_labels()
    return dataset


def _load_listed(config: DataConfig) -> Dataset:
    standard = _LISTED[config.name].form
    form = Form(standard.mode, config.image_size or standard.size)
    try:
        return load(config.name, _find(config.name, config.dir), form)
    except OSError as error:
        raise ConfigError(
            f"data.name = {config.name!r}: {error.filename}: {error.strerror or error}"
        ) from error


def list_datasets() -> dict[str, str]:
    """List the data sets known by name, with a line about each."""
    listed = {name: listing.summary for name, listing in _LISTED.items()}
    return {"digits": _DIGITS_SUMMARY} | listed


def dataset_facts(name: str) -> dict[str, str]:
    """Say what becomes of a data set's images, and where its files must lie."""
    listing = _LISTED.get(name)
    if listing is None:  # digits
        return {"Files": "none: they come with scikit-learn"}
    side = listing.form.size
    size = f"{side}x{side}" if side else "as large as in the files"
    colours = "grey" if listing.form.mode == "L" else listing.form.mode
    facts = {"Images": f"{colours}, {size} (data.image_size)"}
    if listing.mix:
        facts["Made of"] = ", ".join(listing.mix)
        return facts
    folders = " or ".join(f"{folder}/" for folder in (name, *listing.folders))
    facts["Folder"] = (
        f"{folders} in the folder that --data-dir, data.dir or FEDKNOW_DATA names"
    )
    facts["Files in it"] = " or ".join(layout.wants for layout in listing.layouts)
    facts["Hub"] = (
        f"{listing.hub}, where no folder is named"
        if listing.hub
        else "not from there"
    )
    return facts


# --- digits ---------------------------------------------------------------------------------

_DIGITS_SUMMARY = (
    "1,797 handwritten digits, 8x8 grey, 10 classes; "
    "embedded in scikit-learn, nothing to download"
)


def _load_digits() -> Dataset:
    package = importlib.util.find_spec("sklearn") or require("sklearn")
    # The file that its load_digits reads; to import scikit-learn takes a second.
    table = np.loadtxt(
        Path(str(package.origin)).parent / "datasets" / "data" / "digits.csv.gz",
        delimiter=",",
    )
    # 17 grey levels, 0..16, on the scale of all other data sets.
    levels = table[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)
    x = np.rint(levels).astype(np.uint8)
    y = table[:, -1].astype(np.int64)
    # Every fifth sample of each class is for testing: stratified, and the same whatever the
    # seed or library version.
    rank = np.empty_like(y)
    for label in range(10):
        members = y == label
        rank[members] = np.arange(members.sum())
    test = rank % 5 == 4
    return Dataset.from_arrays("digits", x[~test], y[~test], x[test], y[test])


# --- files ----------------------------------------------------------------------------------


def _find(name: str, folder: str) -> Source:
    listing = _LISTED[name]
    if listing.mix:
        return _mix(listing.mix, [_find(part, folder) for part in listing.mix])
    setting, root = _root(name, folder)
    wants = listing.files(name)
    if not root.is_dir():
        raise ConfigError(
            f"{setting} = {str(root)!r}: no such folder; it must hold {wants}"
        )
    # The root itself comes last: a user may point at the data set's own folder.
    places = [*(root / alias for alias in (name, *listing.folders)), root]
    for place, layout in product(places, listing.layouts):
        source = layout.find(place)
        if source is not None:
            return source
    entries = sorted(path.name for path in root.iterdir())
    content = ", ".join(entries[:8]) or "nothing"
    raise ConfigError(
        f"{setting} = {str(root)!r}: no {wants} there (it holds: {content}); "
        f"point --data-dir or FEDKNOW_DATA at the folder that holds {name}/"
    )


def _root(name: str, folder: str) -> tuple[str, Path]:
    """Find the folder of data sets, and the setting that names it."""
    if folder:
        return "data.dir", Path(folder).expanduser()
    variable = os.environ.get("FEDKNOW_DATA", "")
    if variable:
        return "FEDKNOW_DATA", Path(variable).expanduser()
    return "downloaded copy", _download(name)


def _download(name: str) -> Path:
    listing = _LISTED[name]
    remedy = (
        f"put {listing.files(name)} into a folder and name it by --data-dir FOLDER "
        "(data.dir) or the variable FEDKNOW_DATA"
    )
    if not listing.hub:
        raise ConfigError(
            f"data.name = {name!r}: no data folder is given and the set is not on the "
            f"hub; {remedy}"
        )
    hub = require("huggingface_hub")
    try:
        copy = hub.snapshot_download(
            listing.hub, repo_type="dataset", allow_patterns="*.parquet"
        )
        return Path(copy)
    # A dozen types, from several HTTP libraries. All mean the same to a user.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"data.name = {name!r}: no data folder is given and {listing.hub} could not "
            f"be fetched from the Hugging Face hub ({reason}); go online, or {remedy}"
        ) from error


# --- several data sets as one ---------------------------------------------------------------

_MIX_GROUP = 5
"""Classes of a task of a mix, as in the FedKNOW paper."""


def _mix(names: Sequence[str], sources: Sequence[Source]) -> Source:
    """Join data sets: their classes one after another, five of them a group.

    So the FedKNOW paper's 80 tasks of 5 classes may be read: its 400 classes are those of
    MiniImageNet, TinyImageNet and CIFAR-100. It names FC100 too, whose classes and images are
    CIFAR-100's.
    """

    def read() -> Contents:
        return _joined_contents(names, [source.read() for source in sources])

    marks = chain.from_iterable(source.marks for source in sources)
    return Source(list(marks), read)


def _joined_contents(
    names: Sequence[str], contents: Sequence[Contents]
) -> Contents:
    trains = []
    tests = []
    class_names: list[str] = []
    for name, content in zip(names, contents, strict=True):
        # Labels of a data set begin where those of the one before it end.
        start = len(class_names)
        trains.append(_moved(content.train, start))
        tests.append(_moved(content.test, start))
        class_names += [f"{name}/{label}" for label in content.class_names]
    total = len(class_names)
    starts = range(0, total, _MIX_GROUP)
    groups = [range(start, min(start + _MIX_GROUP, total)) for start in starts]
    return Contents(joined(trains), joined(tests), class_names, groups)


def _moved(part: Part, start: int) -> Part:
    return Part(part.labels + start, part.image, part.place)
