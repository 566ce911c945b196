"""Tiny data sets of sentences and of sensor windows, for tests of every learner."""

import numpy as np

from fedknow.client.data import Dataset, Ragged, SampleSpec

CLASSES = 4
EACH = 12
"""Samples a class, in training and in testing."""
SENTENCES = SampleSpec("tokens", (6,), "int32", is_ragged=True, vocabulary=12)
WINDOWS = SampleSpec("series", (12, 2), "float32", rate=32)


def _labels():
    return np.arange(CLASSES * EACH, dtype=np.int64) % CLASSES


def sentences(config):
    """Words of a class of its own among words of all, of 2 to 8 tokens."""
    draws = np.random.default_rng(5)

    def part():
        rows = []
        for label in _labels():
            words = draws.integers(1, 4, draws.integers(2, 9))
            words[0] = 4 + 2 * label + draws.integers(2)
            rows.append(words.astype(np.int32))
        return Ragged.join(rows)

    return Dataset.from_arrays(
        "sentences", part(), _labels(), part(), _labels(), sample=SENTENCES
    )


def windows(config):
    """Waves of a frequency for each class, with noise."""
    draws = np.random.default_rng(6)
    time = np.arange(12)[:, None]

    def part():
        phase = draws.random((len(_labels()), 1, 2)) * 6.28
        angle = (1 + _labels()[:, None, None]) * time * 0.5 + phase
        noise = draws.normal(0, 0.2, angle.shape)
        return (np.sin(angle) + noise).astype(np.float32)

    return Dataset.from_arrays(
        "windows", part(), _labels(), part(), _labels(), sample=WINDOWS
    )
