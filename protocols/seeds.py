"""Where every random draw of a run comes from.

A seed depends on the run's seed, a purpose and the numbers given (client, task, round), never
on time, order or worker, so that a run gives the same numbers wherever and however often it is
done.
"""

from __future__ import annotations

import zlib

import numpy as np

__all__ = ["generator", "integer"]


def _sequence(seed: int, purpose: str, *numbers: int) -> np.random.SeedSequence:
    # CRC-32, as Python's own hash of a text differs from process to process.
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *numbers])


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """Make a generator for a purpose: ``generator(seed, "partition")``."""
    return np.random.default_rng(_sequence(seed, purpose, *numbers))


def integer(seed: int, purpose: str, *numbers: int) -> int:
    """Return a 63-bit integer for libraries that take a plain seed."""
    return int(
        _sequence(seed, purpose, *numbers).generate_state(1, np.uint64)[0]
        # Libraries often read a seed as a signed number of 64 bits.
        >> np.uint64(1)
    )
