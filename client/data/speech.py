"""Spoken digits: recordings of several speakers."""

from __future__ import annotations

import io
import wave
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedknow.client.data.ragged import Ragged
from fedknow.client.data.recorded import Records, Rows
from fedknow.client.data.samples import SampleSpec
from fedknow.protocols.config import ConfigError

__all__ = ["SPEECH_COLUMNS", "decode_wav", "read_speech_digits"]

SPEECH_COLUMNS = ("audio", "label", "speaker")

_LENGTH = 6400
"""Samples that a model sees: 0.8 seconds, which nearly all recordings end before."""
_RATE = 8000


def read_speech_digits(tables: Mapping[str, Any]) -> Records:
    """Read the Free Spoken Digit Dataset as waveforms of unequal lengths.

    A row has ``audio``, a struct with the ``bytes`` of a WAV file (8 kHz, one channel, 16
    bit), the digit ``label`` and the ``speaker``.

    Parameters
    ----------
    tables : mapping
        Parquet tables ``train`` and ``test``.

    References
    ----------
    Jackson et al., "Free Spoken Digit Dataset", 2018, doi 10.5281/zenodo.1342401.
    """
    parts = []
    for part in ("train", "test"):
        table = tables[part]
        cells = table["audio"].to_pylist()
        sounds = [
            decode_wav(
                cell.get("bytes"), _RATE, f"speech_digits: {part} row {row}"
            )
            for row, cell in enumerate(cells)
        ]
        labels = np.array(table["label"].to_pylist())
        speakers = np.array(table["speaker"].to_pylist())
        parts.append(Rows(Ragged.join(sounds), labels, {"speaker": speakers}))
    sample = SampleSpec(
        "waveform", (_LENGTH,), "int16", is_ragged=True, rate=_RATE
    )
    # Silence must stay zero, as what fills a recording up is.
    train, test = parts
    return Records(sample, train, test, normalize=False)


def decode_wav(content: bytes | None, rate: int, place: str) -> NDArray[np.int16]:
    """Decode a WAV file of one channel and 16 bits.

    Parameters
    ----------
    content : bytes or None
        The file.
    rate : int
        Samples a second that it must have.
    place : str
        Name of the recording in messages.

    Raises
    ------
    ConfigError
        If it is something else.
    """
    try:
        with wave.open(io.BytesIO(content or b"")) as file:
            form = (file.getnchannels(), file.getsampwidth(), file.getframerate())
            frames = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ConfigError(f"{place}: no WAV file: {error}") from error
    if form != (1, 2, rate):
        raise ConfigError(
            f"{place}: {form[0]} channels of {8 * form[1]} bits at {form[2]} Hz; it must be "
            f"one channel of 16 bits at {rate} Hz"
        )
    # WAV is little-endian on every machine.
    return np.frombuffer(frames, "<i2").astype(np.int16)
