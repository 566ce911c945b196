"""Data sets by name, as plain ``uint8`` arrays.

``digits`` is embedded in scikit-learn. ``cifar100`` and ``omniglot`` are read from parquet files in the layout of the
Hugging Face hub; decoded images are kept in a cache folder and memory-mapped from there, so that the processes of a
simulation share one copy. ``module:callable`` is a user's own.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedknow.protocols.config import ConfigError, DataConfig, closest
from fedknow.protocols.plugins import calling, is_reference, load_object

__all__ = ["Dataset", "list_datasets", "load_dataset", "require"]

log = logging.getLogger(__name__)

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels, train and test apart.

    Attributes
    ----------
    name : str
        What the data set is called in messages.
    train_x, test_x : ndarray of uint8, shape (N, C, H, W)
        Images; may be read-only.
    train_y, test_y : ndarray of int64, shape (N,)
        Labels, 0 to ``classes - 1``.
    class_names : tuple of str
        One name per class.
    mean, std : tuple of float
        Per channel, of the training images on the scale 0..1.
    groups : tuple of tuple of int
        Classes that belong together (Omniglot's alphabets), which make natural tasks; empty where there are none.

    Raises
    ------
    ConfigError
        If the arrays do not fit each other or this description.
    """

    name: str
    train_x: Images
    train_y: Labels
    test_x: Images
    test_y: Labels
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    groups: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        for part, x, y in (("train", self.train_x, self.train_y), ("test", self.test_x, self.test_y)):
            _check_arrays(self.name, part, x, y)
            if y.min() < 0 or y.max() >= self.classes:
                raise self._wrong(
                    f"{part}_y runs from {y.min()} to {y.max()}; "
                    f"with {self.classes} class names it must stay within 0..{self.classes - 1}"
                )
        if self.train_x.shape[1:] != self.test_x.shape[1:]:
            raise self._wrong(f"train images are {self.train_x.shape[1:]}, test images {self.test_x.shape[1:]}")
        channels = self.train_x.shape[1]
        if len(self.mean) != channels or len(self.std) != channels or min(self.std) <= 0:
            raise self._wrong(f"mean and std need {channels} numbers, one a channel, and std above 0")
        grouped = [label for group in self.groups for label in group]
        if len(set(grouped)) != len(grouped) or not set(grouped) <= set(range(self.classes)):
            raise self._wrong("groups must hold each class at most once, and only classes there are")

    @classmethod
    def from_arrays(
        cls,
        name: str,
        train_x: Images,
        train_y: Labels,
        test_x: Images,
        test_y: Labels,
        class_names: Sequence[str] | None = None,
        groups: Sequence[Sequence[int]] = (),
    ) -> Dataset:
        """A data set whose channel statistics, and class names unless given, come from the arrays themselves."""
        _check_arrays(name, "train", train_x, train_y)
        names = tuple(class_names) if class_names is not None else tuple(map(str, range(int(train_y.max()) + 1)))
        mean, std = _channel_statistics(train_x)
        return cls(name, train_x, train_y, test_x, test_y, names, mean, std, tuple(map(tuple, groups)))

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one image: channels, height, width."""
        channels, height, width = self.train_x.shape[1:]
        return channels, height, width

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(f"data set {self.name!r}: {what}")


def _check_arrays(name: str, part: str, x: Any, y: Any) -> None:
    def wrong(what: str, array: Any, right: str) -> ConfigError:
        is_array = isinstance(array, np.ndarray)
        found = f"{array.dtype} {list(array.shape)}" if is_array else type(array).__name__
        return ConfigError(f"data set {name!r}: {part}_{what} is {found}; it must be a NumPy array, {right}")

    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 4:
        raise wrong("x", x, "uint8 [N, C, H, W]")
    if not isinstance(y, np.ndarray) or y.dtype != np.int64 or y.shape != x.shape[:1]:
        raise wrong("y", y, f"int64 [{len(x)}]")
    if len(y) == 0:
        raise ConfigError(f"data set {name!r}: {part}_x holds no samples")


def load_dataset(config: DataConfig) -> Dataset:
    """Load the data set that a configuration names.

    Raises
    ------
    ConfigError
        If the name is unknown, a folder, file, column or package is missing, or an image cannot be decoded.
    """
    if is_reference(config.name):
        build = load_object(config.name, "data.name")
        with calling(config.name, "data.name"):
            dataset = build(config)
        if not isinstance(dataset, Dataset):
            raise ConfigError(
                f"data.name = {config.name!r}: returned {type(dataset).__name__}; "
                "it must return a fedknow.client.data.Dataset (Dataset.from_arrays makes one of four arrays)"
            )
        return dataset
    if config.name == "digits":
        return _digits()
    if config.name in _PARQUET:
        return _load_parquet(config.name, _PARQUET[config.name], config.dir)
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
    return {"digits": _DIGITS_ABOUT} | {name: layout.about for name, layout in _PARQUET.items()}


def require(module: str) -> Any:
    """Import a package of the ``data`` extra.

    Raises
    ------
    ConfigError
        If it is not installed; says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this data set or partition needs the package {error.name!r}: pip install 'fedknow[data]'"
        ) from error


# --- digits -----------------------------------------------------------------------------------------------------------

_DIGITS_ABOUT = "1,797 handwritten digits, 8x8 grey, 10 classes; embedded in scikit-learn, nothing to download"


def _digits() -> Dataset:
    found = importlib.util.find_spec("sklearn") or require("sklearn")
    # What its load_digits reads; to import scikit-learn takes a second.
    table = np.loadtxt(Path(str(found.origin)).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    x = np.rint(table[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)  # 17 grey levels, 0..16
    y = table[:, -1].astype(np.int64)
    # Every fifth sample of each class is for testing: stratified, and the same whatever the seed or library version.
    rank = np.empty_like(y)
    for label in range(10):
        of_class = y == label
        rank[of_class] = np.arange(of_class.sum())
    test = rank % 5 == 4
    return Dataset.from_arrays("digits", x[~test], y[~test], x[test], y[test])


# --- Hugging Face layout ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """How a data set lies in its parquet files."""

    image: str
    """Column of images, ``struct<bytes, path>``."""
    labels: tuple[str, ...]
    """Columns that make a class together; where there are two, the first groups the classes."""
    mode: str
    """Pillow's name for the pixels: ``RGB`` or ``L``."""
    about: str
    hub: str = ""
    """Repository on the hub; empty where no copy there has these columns."""


_PARQUET: Mapping[str, _Layout] = {
    "cifar100": _Layout(
        image="img",
        labels=("fine_label",),
        mode="RGB",
        about="60,000 photographs, 32x32 RGB, 100 classes (Krizhevsky 2009); parquet folder or Hugging Face hub",
        hub="uoft-cs/cifar100",
    ),
    "omniglot": _Layout(
        image="image",
        labels=("alphabet", "character"),
        mode="L",
        about="32,460 handwritten characters, 28x28 grey, 1,623 classes in 50 alphabets (Lake 2015); parquet folder",
    ),
}

_CACHE_FORMAT = 1
"""Counted up whenever the cached arrays or their description change."""


def _load_parquet(name: str, layout: _Layout, folder: str) -> Dataset:
    files = _find_files(name, layout, folder)
    target = _cache_folder() / f"{name}-{_cache_key(layout, files)}"
    if not target.is_dir():
        dataset = _read_parquet(name, layout, files)
        try:
            _write_cache(dataset, target)
        except OSError as error:
            log.warning(
                "%s: decoded images cannot be cached (%s); they are decoded again next time. "
                "Set FEDKNOW_CACHE to a folder with room in it.",
                target,
                error.strerror or error,
            )
            return dataset
    return _read_cache(name, target)


def _find_files(name: str, layout: _Layout, folder: str) -> dict[str, list[Path]]:
    given = folder or os.environ.get("FEDKNOW_DATA", "")
    setting = "data.dir" if folder else "FEDKNOW_DATA" if given else "downloaded copy"
    root = Path(given).expanduser() if given else _download(name, layout)
    if not root.is_dir():
        raise ConfigError(f"{setting} = {str(root)!r}: no such folder; it must hold {name}/train-*.parquet")
    here = next((place for place in (root / name, root) if any(place.glob("train-*.parquet"))), None)
    if here is None:
        inside = ", ".join(sorted(path.name for path in root.iterdir())[:8]) or "nothing"
        raise ConfigError(
            f"{setting} = {str(root)!r}: no {name}/train-*.parquet there (it holds: {inside}); "
            f"point --data-dir or FEDKNOW_DATA at the folder that holds {name}/"
        )
    files = {part: sorted(here.glob(f"{part}-*.parquet")) for part in ("train", "test")}
    if not files["test"]:
        raise ConfigError(f"{here}: train-*.parquet is there but test-*.parquet is missing; both are needed")
    return files


def _download(name: str, layout: _Layout) -> Path:
    how = (
        f"put {name}/train-*.parquet and {name}/test-*.parquet into a folder and name it by --data-dir FOLDER "
        "(data.dir) or the environment variable FEDKNOW_DATA"
    )
    if not layout.hub:
        raise ConfigError(f"data.name = {name!r}: no data folder is given and the set is not on the hub; {how}")
    hub = require("huggingface_hub")
    try:
        return Path(hub.snapshot_download(layout.hub, repo_type="dataset", allow_patterns="*.parquet"))
    except Exception as error:  # a dozen types, from several HTTP libraries; all mean the same to a user
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"data.name = {name!r}: no data folder is given and {layout.hub} could not be fetched from the "
            f"Hugging Face hub ({reason}); go online, or {how}"
        ) from error


def _read_parquet(name: str, layout: _Layout, files: Mapping[str, Sequence[Path]]) -> Dataset:
    log.info("%s: decoding images (once; kept in %s)", name, _cache_folder())
    tables = {part: _read_tables(paths, layout) for part, paths in files.items()}
    images = {part: _decode(table, layout, files[part]) for part, table in tables.items()}
    keys = {
        part: np.stack([_integers(table, column, files[part]) for column in layout.labels], axis=1)
        for part, table in tables.items()
    }
    classes, train_y = np.unique(keys["train"], axis=0, return_inverse=True)  # sorted by the label columns in order
    place = {tuple(row): label for label, row in enumerate(classes.tolist())}
    unknown = {tuple(row) for row in keys["test"].tolist()} - place.keys()
    if unknown:
        raise ConfigError(
            f"{files['test'][0]}: {layout.labels} = {min(unknown)} is not among the training samples; "
            "every class needs samples in both files"
        )
    test_y = np.array([place[tuple(row)] for row in keys["test"].tolist()], np.int64)
    groups: list[list[int]] = []
    if len(layout.labels) > 1:
        groups = [np.flatnonzero(classes[:, 0] == group).tolist() for group in np.unique(classes[:, 0])]
    names = _names(tables["train"].schema.metadata, layout.labels[-1])
    return Dataset.from_arrays(
        name,
        images["train"],
        train_y.reshape(-1).astype(np.int64),
        images["test"],
        test_y,
        [names.get(row[-1], "/".join(map(str, row))) for row in classes.tolist()],
        groups,
    )


def _read_tables(files: Sequence[Path], layout: _Layout) -> Any:
    pa, parquet = require("pyarrow"), require("pyarrow.parquet")
    needed = [layout.image, *layout.labels]
    tables = []
    for path in files:
        try:
            found = parquet.read_schema(path).names
            missing = [column for column in needed if column not in found]
            if missing:
                raise ConfigError(
                    f"{path}: column {', '.join(map(repr, missing))} is missing; "
                    f"needed: {', '.join(needed)}; found: {', '.join(found)}"
                )
            tables.append(parquet.read_table(path, columns=needed))
        except (pa.ArrowException, OSError) as error:
            raise ConfigError(f"{path}: cannot be read as parquet: {error}") from error
    try:
        return pa.concat_tables(tables)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{files[0].parent}: its parquet files differ in their columns: {error}") from error


def _integers(table: Any, column: str, files: Sequence[Path]) -> Labels:
    values = table[column]
    if not str(values.type).startswith(("int", "uint")) or values.null_count:
        raise ConfigError(
            f"{files[0]}: column {column!r} is {values.type} with {values.null_count} empty cells; "
            "it must be whole numbers throughout"
        )
    return np.asarray(values.to_numpy(), np.int64)


def _decode(table: Any, layout: _Layout, files: Sequence[Path]) -> Images:
    pa, compute = require("pyarrow"), require("pyarrow.compute")
    pillow = require("PIL.Image")
    where, column = files[0].parent, table[layout.image]
    kind = column.type
    if not (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
        raise ConfigError(f"{where}: column {layout.image!r} is {kind}; it must be struct<bytes: binary, path: string>")
    images: Images | None = None
    for row, cell in enumerate(compute.struct_field(column, "bytes")):
        try:
            # A cell without bytes (the image left in a file of its own) fails here too: None is no bytes.
            pixels = np.asarray(pillow.open(io.BytesIO(cell.as_py() or b"")).convert(layout.mode))
        except (OSError, ValueError, SyntaxError) as error:  # Pillow reports broken PNG chunks as SyntaxError
            raise ConfigError(
                f"{where}: {files[0].name.split('-')[0]} row {row}: column {layout.image!r} holds no image "
                f"that can be decoded: {error}"
            ) from error
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        if images is None:
            images = np.empty((len(column), *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            raise ConfigError(
                f"{where}: {files[0].name.split('-')[0]} row {row}: image is {pixels.shape}, the first one is "
                f"{images.shape[1:]} (channels, height, width); all must be alike"
            )
        images[row] = pixels
    if images is None:
        raise ConfigError(f"{files[0]}: the file holds no rows")
    return images


def _names(metadata: Mapping[bytes, bytes] | None, column: str) -> dict[int, str]:
    """Names of a column's values, which Hugging Face keeps as JSON in the file's metadata; {} where it has none."""
    described = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    feature = described.get("info", {}).get("features", {}).get(column, {})
    return dict(enumerate(feature.get("names") or []))


def _channel_statistics(x: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel on the scale 0..1, exactly, from counts of the 256 levels."""
    levels = np.arange(256) / 255
    means, stds = [], []
    for channel in range(x.shape[1]):
        weight = np.bincount(x[:, channel].ravel(), minlength=256) / x[:, channel].size
        mean = float(weight @ levels)
        means.append(mean)
        stds.append(float(np.sqrt(weight @ (levels - mean) ** 2)) or 1.0)  # a constant channel stays as it is
    return tuple(means), tuple(stds)


# --- cache ------------------------------------------------------------------------------------------------------------

_ARRAYS = ("train_x", "train_y", "test_x", "test_y")


def _cache_folder() -> Path:
    return Path(os.environ.get("FEDKNOW_CACHE") or "~/.cache/fedknow").expanduser()


def _cache_key(layout: _Layout, files: Mapping[str, Sequence[Path]]) -> str:
    sources = [
        (part, str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
        for part, paths in files.items()
        for path in paths
    ]
    return hashlib.sha256(repr((_CACHE_FORMAT, layout, sources)).encode()).hexdigest()[:16]


def _write_cache(dataset: Dataset, target: Path) -> None:
    """Write a folder beside the target and rename it, so that a cache is there complete or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for array in _ARRAYS:
            np.save(made / f"{array}.npy", getattr(dataset, array), allow_pickle=False)
        described = {key: getattr(dataset, key) for key in ("class_names", "mean", "std", "groups")}
        (made / "about.json").write_text(json.dumps(described), "utf-8")
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _read_cache(name: str, folder: Path) -> Dataset:
    try:
        # A plain array over the mapped file: pages are shared by all processes, and pickling treats it as any array.
        arrays = {array: np.asarray(np.load(folder / f"{array}.npy", mmap_mode="r")) for array in _ARRAYS}
        about = json.loads((folder / "about.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: damaged cache of decoded images ({error}); delete this folder") from error
    return Dataset(
        name,
        **arrays,
        class_names=tuple(about["class_names"]),
        mean=tuple(about["mean"]),
        std=tuple(about["std"]),
        groups=tuple(map(tuple, about["groups"])),
    )
