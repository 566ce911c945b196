"""Decoded sounds in files that are mapped into memory."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fedknow.client.data.caches import cache_folder, filled
from fedknow.client.data.cells import read_wav
from fedknow.client.data.files import fingerprint
from fedknow.client.data.ragged import Ragged
from fedknow.protocols.config import ConfigError
from fedknow.protocols.texts import counted

__all__ = ["Sounds", "cached_sounds"]

log = logging.getLogger(__name__)

_FORMAT = 1
"""Counted up whenever the cached files change."""
_PARTS = ("train", "test")


@dataclass(frozen=True)
class Sounds:
    """Sounds of both parts of a data set, of one rate.

    Attributes
    ----------
    train, test : Ragged of int16, [N, length]
        The sounds, in the order of the files.
    rate : int
        Samples a second.
    """

    train: Ragged
    test: Ragged
    rate: int


def cached_sounds(
    place: Path, files: Sequence[Sequence[Path]], marks: Sequence[Path]
) -> Sounds:
    """Decode files into a cache, or find them there.

    Parameters
    ----------
    place : Path
        The folder, for messages.
    files : sequence of sequence of Path
        WAV files for training, and those for testing.
    marks : sequence of Path
        Files and folders on whose names, sizes and times the cache depends.

    Returns
    -------
    Sounds
        Mapped from the cache; in memory where nothing can be written there.

    Raises
    ------
    ConfigError
        If a file is no sound of one channel and 16 bits, rates differ, or the cache is damaged.
    """
    target = cache_folder() / f"sounds-{_key(files, marks)}"
    # The folder appears by one rename, so that its presence means it is whole.
    if not target.is_dir():
        log.info("%s: decoding sounds (once; kept in %s)", place, target.parent)
        try:
            _write(place, files, target)
        except OSError as error:
            log.warning(
                "%s: decoded sounds cannot be cached (%s); they are decoded again next time "
                "and held in memory. Set FEDKNOW_CACHE to a folder with room in it.",
                target,
                error.strerror or error,
            )
            return _in_memory(place, files)
    return _read(target)


def _key(files: Sequence[Sequence[Path]], marks: Sequence[Path]) -> str:
    counts = [len(part) for part in files]
    digest = hashlib.sha256(repr((_FORMAT, counts)).encode())
    for path in marks:
        # Names of files may hold bytes that are no UTF-8.
        digest.update(repr(fingerprint(path)).encode(errors="surrogateescape"))
    # 64 bits: enough for one user's caches, and short enough for a path.
    return digest.hexdigest()[:16]


class _Decoder:
    """Decodes files one after another, which must agree on their rate."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._rates: set[int] = set()

    def sounds(self, files: Sequence[Path]) -> Iterator[NDArray[np.int16]]:
        """Yield the sound of each file.

        Raises
        ------
        ConfigError
            If a file cannot be read, or is no sound of one channel and 16 bits.
        """
        for path in files:
            try:
                content = path.read_bytes()
            except OSError as error:
                # Else it would pass for a cache that cannot be written.
                raise ConfigError(
                    f"{path}: cannot be read: {error.strerror or error}"
                ) from error
            sound, rate = read_wav(content, str(path))
            self._rates.add(rate)
            yield sound

    @property
    def rate(self) -> int:
        """Samples a second, once all is decoded."""
        # A network's spectrogram is computed for one rate.
        if len(self._rates) > 1:
            raise ConfigError(
                f"{self._place}: sounds of {sorted(self._rates)} samples a second; "
                "bring all to one rate"
            )
        return next(iter(self._rates))


def _in_memory(place: Path, files: Sequence[Sequence[Path]]) -> Sounds:
    decoder = _Decoder(place)
    train, test = (Ragged.join(list(decoder.sounds(part))) for part in files)
    return Sounds(train, test, decoder.rate)


def _write(place: Path, files: Sequence[Sequence[Path]], target: Path) -> None:
    decoder = _Decoder(place)
    with filled(target) as draft:
        for name, part in zip(_PARTS, files, strict=True):
            with (draft / f"{name}.int16").open("wb") as file:
                lengths = _append(decoder.sounds(part), file)
            np.save(draft / f"{name}-lengths.npy", lengths, allow_pickle=False)
        text = json.dumps({"rate": decoder.rate})
        (draft / "about.json").write_text(text, "utf-8")


def _append(
    sounds: Iterator[NDArray[np.int16]], file: IO[bytes]
) -> NDArray[np.int64]:
    """Write sounds end to end; give their lengths."""
    lengths = []
    for sound in sounds:
        # Plain writes fail with an error on a full disk, where a mapped file would crash.
        file.write(sound.tobytes())
        lengths.append(len(sound))
    return np.array(lengths, np.int64)


def _read(folder: Path) -> Sounds:
    try:
        description: dict[str, Any] = json.loads(
            (folder / "about.json").read_text("utf-8")
        )
        train, test = (_mapped(folder, name) for name in _PARTS)
        return Sounds(train, test, int(description["rate"]))
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise ConfigError(
            f"{folder}: damaged cache of decoded sounds ({error}); delete this folder"
        ) from error


def _mapped(folder: Path, name: str) -> Ragged:
    lengths = np.load(folder / f"{name}-lengths.npy", allow_pickle=False)
    # A plain array over the mapped file: pages are shared by all processes.
    values = np.asarray(np.memmap(folder / f"{name}.int16", np.int16, "r"))
    if len(values) != lengths.sum():
        raise ValueError(f"{name}.int16 has {counted(len(values), 'value')}")
    return Ragged(values, np.cumsum(lengths) - lengths, lengths)
