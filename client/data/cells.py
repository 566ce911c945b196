"""Cells of a table's input columns, as the samples of a data set."""

from __future__ import annotations

import io
import re
import wave
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedknow.client.data.arrays import require
from fedknow.client.data.pixels import UnusablePictureError, to_eight_bit
from fedknow.client.data.ragged import Ragged
from fedknow.client.data.samples import Raw, SampleSpec
from fedknow.client.data.sentences import make_tokenizer
from fedknow.protocols.config import ConfigError
from fedknow.protocols.texts import counted

__all__ = ["read_inputs", "read_wav"]

_FLOAT = np.float32
_MOST_WORDS = 256
"""Words of a text that a model sees; the rest of a longer one is cut."""


def read_inputs(
    name: str,
    tables: Sequence[Any],
    inputs: Sequence[str],
    tokenizer: str = "words",
) -> tuple[list[Raw], SampleSpec]:
    """Read the samples of tables, and say what they are.

    Several columns of numbers make a row of a table. One column may hold numbers, lists of
    numbers (a row), lists of lists (a series), texts, bytes of pictures, or bytes of WAV files.

    Parameters
    ----------
    name : str
        Of the data set, for messages.
    tables : sequence of pyarrow.Table
        Training and test samples.
    inputs : sequence of str
        Columns.
    tokenizer : str
        What turns texts into ids, as ``data.tokenizer`` names it.

    Returns
    -------
    (list of ndarray [N, ...] or Ragged, SampleSpec)
        Samples of each table, and what all of them are.

    Raises
    ------
    ConfigError
        Naming the column, if its cells are something else.
    """
    if len(inputs) > 1:
        parts = [_columns_of_numbers(name, table, inputs) for table in tables]
        return list(parts), SampleSpec("table", (len(inputs),), "float32")
    column = inputs[0]
    kind = tables[0].schema.field(column).type
    place = f"data set {name!r}: column {column!r}"
    if _NUMBER.match(str(kind)):
        parts = [_columns_of_numbers(name, table, inputs) for table in tables]
        return list(parts), SampleSpec("table", (1,), "float32")
    read = _reader(kind)
    if read is None:
        raise ConfigError(
            f"{place} is {kind}; data.input names columns of numbers, or one of texts, lists, "
            "pictures or WAV files"
        )
    cells = [table[column].to_pylist() for table in tables]
    if read is _read_texts:
        return _read_texts(place, cells, tokenizer)
    return read(place, cells)


_NUMBER = re.compile("u?int|float|double|halffloat")
"""Arrow's types of numbers, as it names them."""

Reader = Callable[[str, Sequence[Sequence[Any]]], tuple[list[Raw], SampleSpec]]


def _reader(kind: Any) -> Reader | None:
    """Choose what reads the cells of an Arrow type; None: nothing does."""
    types = require("pyarrow").types
    if types.is_struct(kind) or types.is_binary(kind):
        return _read_files
    if types.is_list(kind) or types.is_fixed_size_list(kind):
        return _read_lists
    if types.is_string(kind) or types.is_large_string(kind):
        return _read_texts
    return None


def _columns_of_numbers(
    name: str, table: Any, inputs: Sequence[str]
) -> NDArray[np.float32]:
    columns = []
    for column in inputs:
        values = table[column]
        if not _NUMBER.match(str(values.type)):
            raise ConfigError(
                f"data set {name!r}: column {column!r} is {values.type}; several columns of "
                "data.input must all hold numbers"
            )
        columns.append(np.asarray(values.to_numpy(), _FLOAT))
    return np.stack(columns, axis=1)


def _read_lists(
    place: str, cells: Sequence[Sequence[Any]]
) -> tuple[list[Raw], SampleSpec]:
    """Read lists of numbers as rows, lists of lists as series."""
    parts = list(map(_as_arrays, cells))
    # Of both parts: a shape that the test part alone has must be refused, too.
    shapes = set(map(np.shape, parts[0] + parts[1]))
    example = parts[0][0]
    if example.ndim == 1 and len(shapes) == 1:
        spec = SampleSpec("table", example.shape, "float32")
        return [np.stack(part) for part in parts], spec
    # Series may differ in their length and in nothing else.
    if {(len(shape), *shape[1:]) for shape in shapes} != {
        (2, *example.shape[1:])
    }:
        raise ConfigError(
            f"{place} holds lists of shapes {sorted(shapes)[:4]}; they must be numbers, all "
            "equally many, or steps of equally many numbers each"
        )
    is_ragged = len(shapes) > 1
    # The longest series: shorter ones are filled up to it.
    size = max(shapes)
    spec = SampleSpec("series", size, "float32", is_ragged=is_ragged)
    if is_ragged:
        return [Ragged.join(part) for part in parts], spec
    return [np.stack(part) for part in parts], spec


def _read_texts(
    place: str, cells: Sequence[Sequence[str]], tokenizer: str = "words"
) -> tuple[list[Raw], SampleSpec]:
    """Read texts as ids, by default of the words of the training samples."""
    # From training samples alone: a word that only tests have must stay unknown.
    vocabulary = make_tokenizer(tokenizer, cells[0])
    parts = [vocabulary.encode(part) for part in cells]
    longest = max(int(part.lengths.max()) for part in parts)
    spec = SampleSpec(
        "tokens",
        # One step at least, for texts that are all empty.
        (max(1, min(longest, _MOST_WORDS)),),
        "int32",
        is_ragged=True,
        vocabulary=len(vocabulary),
    )
    return list(parts), spec


def _as_arrays(cells: Sequence[Any]) -> list[NDArray[np.float32]]:
    return [np.asarray(cell, _FLOAT) for cell in cells]


# --- files within cells ---------------------------------------------------------------------


def _content(cell: Any) -> bytes:
    """Give the bytes of a cell; the hub keeps them in a struct."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    return content or b""


def _read_files(
    place: str, cells: Sequence[Sequence[Any]]
) -> tuple[list[Raw], SampleSpec]:
    contents = [list(map(_content, part)) for part in cells]
    # A column's type says only that it holds bytes, so a file says what it is.
    if contents[0][0].startswith(b"RIFF"):
        return _read_sounds(place, contents)
    return _read_pictures(place, contents)


def _read_pictures(
    place: str, cells: Sequence[Sequence[bytes]]
) -> tuple[list[Raw], SampleSpec]:
    parts = []
    for part in cells:
        images = [
            _picture(content, f"{place}, row {row}")
            for row, content in enumerate(part)
        ]
        shapes = {image.shape for image in images}
        if len(shapes) > 1:
            raise ConfigError(
                f"{place} holds pictures of {sorted(shapes)[:4]} (channels, height, width); "
                "all must be alike"
            )
        parts.append(np.stack(images))
    return list(parts), SampleSpec("image", parts[0].shape[1:], "uint8")


def _picture(content: bytes, place: str) -> NDArray[np.uint8]:
    pillow = require("PIL.Image")
    try:
        with pillow.open(io.BytesIO(content)) as opened:
            # Grey pictures stay grey; of all others one form is certain.
            mode = "L" if opened.mode in ("1", "L", "I;16") else "RGB"
            pixels = np.asarray(to_eight_bit(opened, mode))
    except UnusablePictureError as error:
        raise ConfigError(f"{place}: the picture {error}") from error
    # Pillow's readers raise a dozen types for a damaged file.
    except Exception as error:
        raise ConfigError(f"{place}: no picture: {error}") from error
    if pixels.ndim == 2:
        return pixels[None]
    # Pillow lays channels last, and models take them first.
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _read_sounds(
    place: str, cells: Sequence[Sequence[bytes]]
) -> tuple[list[Raw], SampleSpec]:
    rates: set[int] = set()
    parts = []
    for part in cells:
        sounds = []
        for row, content in enumerate(part):
            sound, rate = read_wav(content, f"{place}, row {row}")
            sounds.append(sound)
            rates.add(rate)
        parts.append(Ragged.join(sounds))
    # A network's spectrogram is computed for one rate.
    if len(rates) > 1:
        raise ConfigError(
            f"{place} holds sounds of {sorted(rates)} samples a second; bring all to one rate"
        )
    longest = max(int(part.lengths.max()) for part in parts)
    spec = SampleSpec(
        "waveform", (longest,), "int16", is_ragged=True, rate=rates.pop()
    )
    return list(parts), spec


def read_wav(content: bytes, place: str) -> tuple[NDArray[np.int16], int]:
    """Decode a WAV file of one channel and 16 bits.

    Parameters
    ----------
    content : bytes
        The file.
    place : str
        Its name in messages.

    Returns
    -------
    (ndarray of int16 [T], int)
        The sound, and samples a second.

    Raises
    ------
    ConfigError
        If it is something else.
    """
    try:
        with wave.open(io.BytesIO(content)) as file:
            form = file.getnchannels(), file.getsampwidth()
            rate = file.getframerate()
            frames = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ConfigError(f"{place}: no WAV file: {error}") from error
    if form != (1, 2) or not frames:
        raise ConfigError(
            f"{place}: {form[0]} channels of {8 * form[1]} bits and "
            f"{counted(len(frames), 'byte')}; it must be one channel of 16 bits, and not empty"
        )
    # WAV is little-endian on every machine.
    return np.frombuffer(frames, "<i2").astype(np.int16), rate
