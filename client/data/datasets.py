"""Data sets by name, as arrays of samples.

``digits`` is embedded in scikit-learn. The others are read from files in the layout of the
Hugging Face hub, or in their publisher's. ``module:callable`` is a user's own.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np

from fedknow.client.data.arrays import Dataset, Images, Labels, require
from fedknow.client.data.listing import LISTED
from fedknow.client.data.own import is_own, load_own
from fedknow.client.data.published import ReadySource
from fedknow.client.data.recorded import RecordedSource
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


NAMES = ("digits", "local", *LISTED)
"""Names that no installed package can take."""


def load_dataset(config: DataConfig) -> Dataset:
    """Load the data set that a configuration names.

    Raises
    ------
    ConfigError
        If the name is unknown, a folder, file, column or package is missing, or an image cannot
        be decoded.
    """
    dataset = _load(config)
    if config.tokenizer != "words" and dataset.spec.kind != "tokens":
        raise ConfigError(
            f"data.tokenizer = {config.tokenizer!r} does nothing with {dataset.name}, which has "
            f"{dataset.spec} and no texts; leave data.tokenizer at 'words'"
        )
    return dataset


def _load(config: DataConfig) -> Dataset:
    if is_own(config.name):
        return load_own(config)
    if is_reference(config.name):
        return _load_users(config, load_object(config.name, "data.name"))
    if config.name == "digits":
        return _load_digits()
    if config.name in LISTED:
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
    standard = LISTED[config.name].form
    if isinstance(standard, str) and config.image_size:
        raise ConfigError(
            f"data.image_size = {config.image_size}: data.name = {config.name!r} has no images "
            f"but {standard}; leave data.image_size at 0"
        )
    try:
        source = _find(config.name, config.dir)
        if isinstance(source, RecordedSource):
            return source.dataset(config.name, config.tokenizer)
        if isinstance(source, ReadySource):
            return source.dataset(config.name)
        assert isinstance(standard, Form)
        form = Form(standard.mode, config.image_size or standard.size)
        return load(config.name, source, form)
    except OSError as error:
        raise ConfigError(
            f"data.name = {config.name!r}: {error.filename}: {error.strerror or error}"
        ) from error


def is_fetched(config: DataConfig) -> bool:
    """Say whether a data set would be fetched from a public hub."""
    has_folder = config.dir or os.environ.get("FEDKNOW_DATA", "")
    return config.name in LISTED and not has_folder


def list_datasets() -> dict[str, str]:
    """List the data sets known by name, with a line about each."""
    listed = {name: listing.summary for name, listing in LISTED.items()}
    return {"digits": _DIGITS_SUMMARY} | listed


def dataset_facts(name: str) -> dict[str, str]:
    """Say what becomes of a data set's images, and where its files must lie."""
    listing = LISTED.get(name)
    if listing is None:  # digits
        return {"Files": "none: they come with scikit-learn"}
    facts = _sample_facts(listing.form)
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


def _sample_facts(form: Form | str) -> dict[str, str]:
    if isinstance(form, str):
        return {"Samples": form}
    size = f"{form.size}x{form.size}" if form.size else "as large as in the files"
    colours = "grey" if form.mode == "L" else form.mode
    return {"Images": f"{colours}, {size} (data.image_size)"}


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


def _find(name: str, folder: str) -> Source | RecordedSource | ReadySource:
    listing = LISTED[name]
    if listing.mix:
        sources = [_find(part, folder) for part in listing.mix]
        images = [source for source in sources if isinstance(source, Source)]
        return _mix(listing.mix, images)
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
    listing = LISTED[name]
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
