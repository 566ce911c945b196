"""WHARF: movements of a wrist, cut into windows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedknow.client.data.recorded import Records, Rows
from fedknow.client.data.samples import SampleSpec
from fedknow.protocols.config import ConfigError

__all__ = ["WHARF_COLUMNS", "read_wharf"]

WHARF_COLUMNS = ("signal", "activity", "volunteer", "day")

_LENGTH = 64
"""Time steps of a window: two seconds."""
_STEP = 32
"""Windows overlap by half, as is usual for activities."""
_RATE = 32.0
_AXES = 3


def read_wharf(tables: Mapping[str, Any]) -> Records:
    """Cut the recordings of WHARF into windows of two seconds.

    A row is one recording: ``signal``, a list of [x, y, z], 32 a second; ``activity``,
    ``volunteer`` and ``day``. No split is published. Of each volunteer's recordings of an
    activity, the second, the fifth, the eighth and so on are for testing. So no window
    of a test recording is trained on, and its person is known.

    Parameters
    ----------
    tables : mapping
        Parquet table ``train``.

    References
    ----------
    Bruno, Mastrogiovanni, Sgorbissa, Vernazza and Zaccaria, "Analysis of human behavior
    recognition algorithms based on acceleration data", ICRA 2013.
    """
    table = tables["train"]
    values = {
        name: np.array(table[name].to_pylist())
        for name in ("activity", "volunteer", "day")
    }
    is_test = _every_third(values["volunteer"], values["activity"])
    windows, origins = [], []
    for row, signal in enumerate(_signals(table)):
        # Only whole windows: a filled one would look like a wrist at rest.
        for start in range(0, len(signal) - _LENGTH + 1, _STEP):
            windows.append(signal[start : start + _LENGTH])
            origins.append(row)
    if not windows:
        raise ConfigError(
            f"wharf: no recording has {_LENGTH} time steps, as many as a window"
        )
    x = np.stack(windows)
    rows = np.array(origins)

    def part(chosen: NDArray[np.bool_]) -> Rows:
        places = rows[chosen]
        columns = {name: values[name][places] for name in ("volunteer", "day")}
        return Rows(x[chosen], values["activity"][places], columns)

    # By recording and not by window, since neighbours overlap by half.
    sample = SampleSpec("series", (_LENGTH, _AXES), "int16", rate=_RATE)
    return Records(sample, part(~is_test[rows]), part(is_test[rows]))


def _signals(table: Any) -> Iterator[NDArray[np.int16]]:
    """Yield each recording, int16 [length, 3]."""
    for chunk in table["signal"].chunks:
        offsets = chunk.offsets.to_numpy()
        values = chunk.values.flatten().to_numpy(zero_copy_only=False)
        # Flat values are read, so that a list of another length would shift all others.
        if len(values) != _AXES * len(chunk.values):
            raise ConfigError("wharf: signal must be lists of [x, y, z]")
        steps = values.astype(np.int16).reshape(-1, _AXES)
        for start, end in pairwise(offsets):
            yield steps[start:end]


def _every_third(*keys: NDArray[Any]) -> NDArray[np.bool_]:
    """Mark the second, fifth, eighth ... row of each combination of keys."""
    counts: dict[tuple[Any, ...], int] = {}
    marks = np.zeros(len(keys[0]), bool)
    for row, key in enumerate(zip(*keys, strict=True)):
        counts[key] = counts.get(key, 0) + 1
        marks[row] = counts[key] % 3 == 2
    return marks
