"""Folders of sound: WAV files, one folder a class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedknow.client.data.arrays import Dataset, Labels
from fedknow.client.data.columns import Column
from fedknow.client.data.files import subfolders
from fedknow.client.data.samples import SampleSpec
from fedknow.client.data.sound_cache import cached_sounds
from fedknow.client.data.tables import each_fifth
from fedknow.protocols.config import ConfigError

__all__ = ["from_sounds"]


def from_sounds(name: str, place: Path) -> Dataset:
    """Make a data set of ``CLASS/*.wav``, or ``{train,test}/`` of these.

    Sounds are decoded once, into the cache, and mapped from there.

    ``testing_list.txt`` may name the files for testing, as Speech Commands has it; the speaker
    is then what stands before ``_nohash_``.

    Parameters
    ----------
    name : str
        What the data set is called in messages.
    place : Path
        The folder.

    Raises
    ------
    ConfigError
        If a file is no sound of one channel and 16 bits, or rates differ.
    """
    files = _parts(place)
    classes = sorted(set(map(_word, files[0] + files[1])))
    sounds = cached_sounds(place, files, _marks(place, files))
    labels = [_labels(part, classes) for part in files]
    longest = max(int(part.lengths.max()) for part in (sounds.train, sounds.test))
    dataset = Dataset.from_arrays(
        name,
        sounds.train,
        labels[0],
        sounds.test,
        labels[1],
        classes,
        columns=_speakers(files),
        sample=SampleSpec(
            "waveform", (longest,), "int16", is_ragged=True, rate=sounds.rate
        ),
        # Silence must stay zero, as what fills a recording up is.
        normalize=False,
    )
    dataset.check_labels()
    return dataset


def _marks(place: Path, files: Sequence[list[Path]]) -> list[Path]:
    """List what the decoded sounds depend on: folders, and who is tested."""
    marks = sorted({path.parent for path in files[0] + files[1]})
    listed = place / "testing_list.txt"
    return [*marks, listed] if listed.is_file() else marks


def _word(path: Path) -> str:
    return path.parent.name


def _labels(files: Sequence[Path], classes: Sequence[str]) -> Labels:
    places = {name: place for place, name in enumerate(classes)}
    return np.array([places[_word(path)] for path in files], np.int64)


def _parts(place: Path) -> list[list[Path]]:
    """List the files for training and for testing.

    Raises
    ------
    ConfigError
        If one of them has none.
    """
    train, test = place / "train", place / "test"
    if train.is_dir() and test.is_dir():
        files = [_sound_files(train), _sound_files(test)]
    else:
        # Without two folders, a list of names or every fifth sound decides.
        files = _split_files(place, _sound_files(place))
    if not all(files):
        raise ConfigError(
            f"{place}: there are no sounds to train on or to test; put CLASS/*.wav there, at "
            "least five a class, or both train/ and test/"
        )
    return files


def _sound_files(root: Path) -> list[Path]:
    files: list[Path] = []
    for folder in subfolders(root):
        # Speech Commands keeps noise beside its words, which is no class.
        if not folder.name.startswith("_"):
            files += sorted(folder.glob("*.wav"))
    return files


def _split_files(place: Path, files: Sequence[Path]) -> list[list[Path]]:
    names = [f"{_word(path)}/{path.name}" for path in files]
    # Speech Commands says by this list which speakers are for testing.
    listed = place / "testing_list.txt"
    if listed.is_file():
        testing = set(listed.read_text("utf-8").split())
        is_test = np.array([name in testing for name in names], bool)
    else:
        is_test = each_fifth(np.array([_word(path) for path in files]))
    train = [
        path for path, tested in zip(files, is_test, strict=True) if not tested
    ]
    test = [path for path, tested in zip(files, is_test, strict=True) if tested]
    return [train, test]


def _speakers(files: Sequence[Sequence[Path]]) -> dict[str, Column]:
    """Read who speaks, where the names of all files say it."""
    train, test = (list(map(_speaker, part)) for part in files)
    # A partition by speaker needs to know each sample's.
    if not all(train + test):
        return {}
    return {"speaker": Column.from_values(np.array(train), np.array(test))}


def _speaker(path: Path) -> str:
    # Speech Commands names a file by its speaker and a count.
    speaker, mark, _ = path.name.partition("_nohash_")
    return speaker if mark else ""
