"""Samples of each kind: what is stored, what a model sees, what is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedknow.client.data import (
    Benchmark,
    Dataset,
    Partition,
    Ragged,
    SampleSpec,
    Share,
)
from fedknow.client.data.samples import as_spec, local_input, model_input
from fedknow.client.data.statistics import channel_statistics
from fedknow.protocols.config import ConfigError

WINDOW = SampleSpec("series", (4, 2), "float32", rate=32)
TOKENS = SampleSpec("tokens", (5,), "int32", is_ragged=True, vocabulary=9)


def share(x, y, sample, **options):
    """What the one client of a data set trains on."""
    data = Dataset.from_arrays("own", x, y, x, y, sample=sample, **options)
    rows = np.arange(len(y))
    classes = tuple(range(data.classes))
    partition = Partition(((Share(classes, rows, rows, classes),),))
    return Benchmark(data, partition).task(0, 0).train


def labels(count):
    return np.arange(count, dtype=np.int64) % 2


def test_series_are_normalised_per_channel():
    x = np.random.default_rng(0).normal(3, 2, (50, 4, 2)).astype(np.float32)
    x[..., 1] *= 100
    got = share(x, labels(50), WINDOW).x
    assert got.dtype == torch.float32
    assert got.shape == (50, 4, 2)
    assert torch.allclose(got.mean((0, 1)), torch.zeros(2), atol=1e-5)
    assert torch.allclose(got.std((0, 1), correction=0), torch.ones(2), atol=1e-5)
    plain = share(x, labels(50), WINDOW, normalize=False).x
    assert torch.equal(plain, torch.from_numpy(x))


def test_float_images_are_what_real_clients_have():
    x = np.random.default_rng(0).random((6, 3, 4, 4), np.float32)
    spec = SampleSpec("image", (3, 4, 4), "float32")
    simulated = share(x, labels(6), spec, normalize=False).x
    assert torch.equal(simulated, local_input(x, spec))


def test_tokens_are_filled_up_and_cut():
    rows = [np.array([3, 8], np.int32), np.arange(1, 8, dtype=np.int32)]
    got = share(Ragged.join(rows), labels(2), TOKENS).x
    assert got.dtype == torch.int64
    assert got.tolist() == [[3, 8, 0, 0, 0], [1, 2, 3, 4, 5]]


def test_a_token_outside_the_vocabulary_is_refused():
    rows = Ragged.join([np.array([1, 9], np.int32), np.array([1], np.int32)])
    with pytest.raises(ConfigError, match="vocabulary has 9 ids"):
        share(rows, labels(2), TOKENS)


def test_waveforms_are_scaled_and_silence_stays():
    spec = SampleSpec("waveform", (4,), "int16", is_ragged=True, rate=8000)
    rows = Ragged.join(
        [np.array([16384, -32768], np.int16), np.array([8192], np.int16)]
    )
    got = share(rows, labels(2), spec, normalize=False).x
    assert got.tolist() == [[0.5, -1, 0, 0], [0.25, 0, 0, 0]]


def test_what_fills_a_ragged_series_up_stays_zero():
    spec = SampleSpec("series", (3, 1), "float32", is_ragged=True)
    rows = [np.array([[1.0], [5.0]], np.float32), np.array([[9.0]], np.float32)]
    got = share(Ragged.join(rows), labels(2), spec).x
    # Mean 5 and variance 32 / 3 over the three steps that there are.
    step = 4 / (32 / 3) ** 0.5
    expected = [[[-step], [0], [0]], [[step], [0], [0]]]
    assert torch.allclose(got, torch.tensor(expected))


def test_nan_is_refused_when_a_client_meets_it():
    x = np.zeros((2, 4, 2), np.float32)
    x[1, 2, 0] = np.nan
    with pytest.raises(ConfigError, match="'own': samples hold NaN"):
        share(x, labels(2), WINDOW, normalize=False)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"kind": "video", "shape": (3,), "dtype": "uint8"}, "one of image"),
        ({"kind": "series", "shape": (3,), "dtype": "float32"}, "channels"),
        ({"kind": "table", "shape": (3,), "dtype": "float64"}, "float32"),
        ({"kind": "tokens", "shape": (3,), "dtype": "int32"}, "vocabulary"),
        (
            {
                "kind": "table",
                "shape": (3,),
                "dtype": "float32",
                "is_ragged": True,
            },
            "one shape",
        ),
    ],
)
def test_impossible_samples_are_refused(arguments, reason):
    with pytest.raises(ConfigError, match=reason):
        SampleSpec(**arguments)


def test_arrays_that_do_not_fit_are_refused():
    x = np.zeros((2, 4, 3), np.float32)
    with pytest.raises(ConfigError, match=r"float32 \[N, 4, 2\]"):
        Dataset.from_arrays("own", x, labels(2), x, labels(2), sample=WINDOW)
    with pytest.raises(ConfigError, match="Ragged"):
        Dataset.from_arrays("own", x, labels(2), x, labels(2), sample=TOKENS)


def test_statistics_need_no_copy_of_a_mapped_file(tmp_path, monkeypatch):
    """In pieces they are what they are in one."""
    from fedknow.client.data import statistics as module

    x = np.random.default_rng(1).normal(1e4, 1, (90, 4, 2)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    monkeypatch.setattr(module, "_CHUNK_BYTES", 100)
    mean, std = channel_statistics(mapped, WINDOW)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 1)), rtol=1e-12)
    np.testing.assert_allclose(std, exact.std((0, 1)), rtol=1e-9)


@given(
    st.lists(st.lists(st.integers(1, 8), max_size=7), min_size=1, max_size=6),
    st.data(),
)
def test_rows_are_chosen_without_their_values(rows, data):
    ragged = Ragged.join([np.array(row, np.int32) for row in rows])
    order = data.draw(st.permutations(range(len(rows))))
    chosen = ragged[np.array(order)]
    assert chosen.values is ragged.values
    for place, number in enumerate(order):
        assert chosen.row(place).tolist() == rows[number]
        padded = (rows[number] + [0] * 5)[:5]
        assert chosen.padded(5)[place].tolist() == padded


def test_a_shape_alone_is_that_of_images():
    spec = as_spec((3, 8, 8))
    assert str(spec) == "images of 3x8x8"
    x = np.full((1, 3, 8, 8), 255, np.uint8)
    got = model_input(x, spec, (0.5,) * 3, (0.5,) * 3)
    assert torch.equal(got, torch.ones(1, 3, 8, 8))


def test_ten_million_samples_are_declared_without_being_read(tmp_path):
    """A file of 3.8 GB, without content on disk, costs the memory of its labels."""
    shape = (10_000_000, 64, 3)
    path = tmp_path / "x.npy"
    x = np.lib.format.open_memmap(path, "w+", np.int16, shape)
    y = np.zeros(len(x), np.int64)
    y[1::2] = 1
    before = _resident()
    spec = SampleSpec("series", shape[1:], "int16")
    numbers = ((0.0,) * 3, (1.0,) * 3)
    data = Dataset("large", x, y, x[:2], y[:2], ("a", "b"), *numbers, sample=spec)
    rows = np.arange(0, len(x), 200_000)
    share = Share((0, 1), rows, np.arange(2), (0,))
    task = Benchmark(data, Partition(((share,),))).task(0, 0)
    assert task.train.x.shape == (50, 64, 3)
    assert _resident() - before < 64 * 2**20


def _resident():
    """Bytes of this process in memory, mapped pages that were touched among them."""
    import psutil

    return psutil.Process().memory_info().rss
