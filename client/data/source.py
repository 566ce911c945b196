"""From files to arrays: a reader of images, and a cache of decoded ones.

Decoded images are written to a folder and memory-mapped from there, so that the processes of a
simulation share one copy and none holds a data set in memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedknow.client.data.arrays import (
    Dataset,
    Images,
    Labels,
    require,
)
from fedknow.client.data.caches import cache_folder, filled
from fedknow.client.data.columns import Column, read_columns, write_columns
from fedknow.client.data.files import fingerprint
from fedknow.client.data.pixels import UnusablePictureError, to_eight_bit
from fedknow.client.data.statistics import levels, statistics
from fedknow.protocols.config import ConfigError

__all__ = ["Contents", "Form", "Part", "Source", "joined", "load", "resplit"]

log = logging.getLogger(__name__)

_CACHE_FORMAT = 3
"""Counted up whenever the cached arrays, their description, or the rules of decoding change."""
_BATCH_BYTES = 1 << 24
"""Decoded images are held in memory so much at a time."""


@dataclass(frozen=True)
class Part:
    """The training or the test samples of a data set, not decoded yet.

    Attributes
    ----------
    labels : ndarray of int64, shape (N,)
        Labels.
    image : callable
        From a row to its image, as Pillow has it. Called in rising order.
    place : callable
        From a row to the name of its image in messages.
    """

    labels: Labels
    image: Callable[[int], Any]
    place: Callable[[int], str]

    def pick(self, rows: Labels) -> Part:
        """Give these rows alone, in this order."""
        return Part(
            self.labels[rows],
            lambda row: self.image(int(rows[row])),
            lambda row: self.place(int(rows[row])),
        )


@dataclass(frozen=True)
class Contents:
    """The content of a data set's files.

    See :class:`~fedknow.client.data.Dataset` for the attributes.
    """

    train: Part
    test: Part
    class_names: Sequence[str]
    groups: Sequence[Sequence[int]] = ()
    columns: Mapping[str, Column] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A data set found on disk.

    Attributes
    ----------
    marks : sequence of Path
        Files, and folders in place of all files in them, on whose names, sizes and times of
        change the cache depends.
    read : callable
        Reads all but the images.
    columns : tuple of str
        Columns that are read where files have them; the cache depends on them, too.
    """

    marks: Sequence[Path]
    read: Callable[[], Contents]
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Form:
    """The form that all images of a data set are brought into.

    Attributes
    ----------
    mode : str
        Pillow's mode: ``RGB`` or ``L``.
    size : int
        The side in pixels; 0: that of the files.
    """

    mode: str
    size: int = 0


def joined(parts: Sequence[Part]) -> Part:
    """Join parts one after another."""
    starts = np.cumsum([0, *(len(part.labels) for part in parts)])

    def locate(row: int) -> tuple[Part, int]:
        number = int(np.searchsorted(starts, row, side="right")) - 1
        return parts[number], row - int(starts[number])

    def image(row: int) -> Any:
        part, own_row = locate(row)
        return part.image(own_row)

    def place(row: int) -> str:
        part, own_row = locate(row)
        return part.place(own_row)

    return Part(np.concatenate([part.labels for part in parts]), image, place)


def resplit(pool: Part, every: int) -> tuple[Part, Part]:
    """Split a pool: each ``every``-th sample of a class is for testing.

    Samples of a class count in the pool's order.

    Returns
    -------
    (Part, Part)
        Training samples, test samples.
    """
    test = np.zeros(len(pool.labels), bool)
    for label in np.unique(pool.labels):
        rows = np.flatnonzero(pool.labels == label)
        test[rows[every - 1 :: every]] = True
    train_part = pool.pick(np.flatnonzero(~test))
    test_part = pool.pick(np.flatnonzero(test))
    return train_part, test_part


def load(name: str, source: Source, form: Form) -> Dataset:
    """Load the arrays of a source, decoded by this call or an earlier one.

    Raises
    ------
    ConfigError
        If a file cannot be read or decoded, images differ in size, no samples are left to train
        on or to test, or the cache is damaged.
    """
    folder = cache_folder()
    target = folder / f"{name}-{_key(source, form)}"
    # The folder appears by one rename, so that its presence means it is whole.
    if not target.is_dir():
        contents = source.read()
        _check_samples(name, contents)
        log.info("%s: decoding images (once; kept in %s)", name, folder)
        try:
            _write(contents, form, target)
        except OSError as error:
            log.warning(
                "%s: decoded images cannot be cached (%s); they are decoded again next "
                "time and held in memory. Set FEDKNOW_CACHE to a folder with room in it.",
                target,
                error.strerror or error,
            )
            return _in_memory(name, contents, form)
    return _read(name, target)


def _in_memory(name: str, contents: Contents, form: Form) -> Dataset:
    train_x = np.concatenate(list(_decoded(contents.train, form)))
    test_x = np.concatenate(list(_decoded(contents.test, form)))
    return Dataset.from_arrays(
        name,
        train_x,
        contents.train.labels,
        test_x,
        contents.test.labels,
        contents.class_names,
        contents.groups,
        contents.columns,
    )


def _decoded(part: Part, form: Form) -> Iterator[Images]:
    """Decode images in batches, uint8 [n, C, H, W]."""
    batch: list[Images] = []
    shape: tuple[int, ...] | None = None
    for row in range(len(part.labels)):
        pixels = _pixels(part, row, form)
        shape = shape or pixels.shape
        if pixels.shape != shape:
            raise ConfigError(
                f"{part.place(row)}: the image is {pixels.shape}, the first one is {shape} "
                "(channels, height, width); all must be alike, or data.image_size must "
                "say what to make of them"
            )
        batch.append(pixels)
        if len(batch) * pixels.nbytes >= _BATCH_BYTES:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def _pixels(part: Part, row: int, form: Form) -> Images:
    """Decode one image, uint8 [C, H, W].

    For another size it is scaled, and its longer side is cut to make a square.
    """
    image = _decoded_image(part, row, form)
    if form.size and image.size != (form.size, form.size):
        resampling = require("PIL.Image").Resampling.BICUBIC
        image = require("PIL.ImageOps").fit(
            image, (form.size, form.size), resampling
        )
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        return pixels[None]
    # Contiguous, as the rows of a batch are written to a file as they lie in memory.
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _decoded_image(part: Part, row: int, form: Form) -> Any:
    pillow = require("PIL.Image")
    place = part.place(row)
    try:
        with part.image(row) as opened:
            return to_eight_bit(opened, form.mode)
    except ConfigError:
        raise
    except UnusablePictureError as error:
        raise ConfigError(f"{place}: the image {error}") from error
    except pillow.DecompressionBombError as error:
        raise ConfigError(
            f"{place}: the image has more than {2 * pillow.MAX_IMAGE_PIXELS:,} pixels, the "
            "most that are opened; scale it down or take it out of the data set"
        ) from error
    except pillow.UnidentifiedImageError as error:
        raise ConfigError(
            f"{place} holds no image that can be decoded: none of the formats that Pillow "
            "reads"
        ) from error
    except MemoryError as error:
        raise ConfigError(
            f"{place}: the image does not fit into the memory; scale it down or take it "
            "out of the data set"
        ) from error
    # Pillow's readers raise a dozen types for a damaged file.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ConfigError(
            f"{place} holds no image that can be decoded: {reason}"
        ) from error


def _check_samples(name: str, contents: Contents) -> None:
    parts = {"train on": contents.train, "test": contents.test}
    for purpose, part in parts.items():
        if len(part.labels) == 0:
            raise ConfigError(
                f"data.name = {name!r}: there are no samples to {purpose}; "
                "add images (README.md, Data, says which ones are tested)"
            )


# --- cache ----------------------------------------------------------------------------------

_ARRAYS = ("train_x", "train_y", "test_x", "test_y")


def _key(source: Source, form: Form) -> str:
    # Any change of the files, of the form or of our rules makes another cache.
    digest = hashlib.sha256(repr((_CACHE_FORMAT, form)).encode())
    # Only where there are any: other caches stay as they always were.
    if source.columns:
        digest.update(repr(source.columns).encode())
    for path in source.marks:
        # Names of files may hold bytes that are no UTF-8.
        digest.update(repr(fingerprint(path)).encode(errors="surrogateescape"))
    # 64 bits: enough for one user's caches, and short enough for a path.
    return digest.hexdigest()[:16]


def _write(contents: Contents, form: Form, target: Path) -> None:
    """Write a cache as a whole or not at all."""
    with filled(target) as draft:
        # Train comes last: its mean and std are those that stay.
        for name, part in (("test", contents.test), ("train", contents.train)):
            np.save(draft / f"{name}_y.npy", part.labels, allow_pickle=False)
            mean, std = _write_images(part, form, draft / f"{name}_x.npy")
        groups = [list(map(int, group)) for group in contents.groups]
        description: dict[str, Any] = {
            "class_names": list(contents.class_names),
            "groups": groups,
            "mean": mean,
            "std": std,
        }
        # Only where there are columns: other caches stay as they always were.
        if contents.columns:
            description["columns"] = write_columns(draft, contents.columns)
        (draft / "about.json").write_text(json.dumps(description), "utf-8")


def _write_images(
    part: Part, form: Form, path: Path
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Write a .npy file as images are decoded; return their mean and std.

    Plain writes fail with an error on a full disk, where a mapped file would crash.
    """
    counts: Any = 0
    with path.open("wb") as file:
        for batch in _decoded(part, form):
            # The shape of an image is known with the first batch.
            if file.tell() == 0:
                header = {
                    "descr": "|u1",
                    "fortran_order": False,
                    "shape": (len(part.labels), *batch.shape[1:]),
                }
                np.lib.format.write_array_header_1_0(file, header)
            file.write(batch.tobytes())
            counts = counts + levels(batch)
    return statistics(counts)


def _read(name: str, folder: Path) -> Dataset:
    try:
        # A plain array over the mapped file: pages are shared by all processes, and pickling
        # treats it as any array.
        arrays: dict[str, Any] = {
            array: np.asarray(np.load(folder / f"{array}.npy", mmap_mode="r"))
            for array in _ARRAYS
        }
        description = json.loads((folder / "about.json").read_text("utf-8"))
        return Dataset(
            name,
            **arrays,
            class_names=tuple(description["class_names"]),
            mean=tuple(description["mean"]),
            std=tuple(description["std"]),
            groups=tuple(map(tuple, description["groups"])),
            columns=read_columns(folder, description.get("columns", {})),
        )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        ConfigError,
    ) as error:
        raise ConfigError(
            f"{folder}: damaged cache of decoded images ({error}); delete this folder"
        ) from error
