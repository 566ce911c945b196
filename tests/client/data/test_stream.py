"""What a client sees: normalised tensors, slices of the head, nothing shared with the data set."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedknow.client.data import (
    Benchmark,
    Dataset,
    Partition,
    Share,
    TaskStream,
    benchmark,
    load_dataset,
    make_benchmark,
)
from fedknow.client.data.benchmark import hold_out
from fedknow.protocols.config import ConfigError, ExperimentConfig, read_config


@pytest.fixture(scope="module")
def digits() -> Benchmark:
    return make_benchmark(
        read_config(
            {
                "seed": 3,
                "data": {"share": "overlapping", "task_order": "shuffled"},
            }
        )
    )


def tiny(scenario: str = "task-incremental") -> Benchmark:
    x = np.arange(6, dtype=np.uint8).repeat(8).reshape(6, 2, 2, 2) * 50
    y = np.array([0, 1, 2, 3, 4, 5])
    x.setflags(write=False)
    y.setflags(write=False)
    data = Dataset("tiny", x, y, x, y, tuple("abcdef"), (0.5, 0.25), (0.5, 2.0))
    at = np.array
    tasks = (
        Share((2, 3), at([2, 3]), at([3]), (2, 3)),
        Share((0, 1), at([1]), at([0, 1]), (1,)),
    )
    return Benchmark(data, Partition((tasks, tasks[::-1])), scenario)


def test_contract(digits: Benchmark) -> None:
    stream: TaskStream = digits
    assert (stream.tasks, stream.classes, stream.shape, stream.clients) == (
        5,
        10,
        (1, 8, 8),
        20,
    )


def test_values() -> None:
    task = tiny().task(0, 0)
    assert task.train.x.dtype == torch.float32
    assert task.train.y.dtype == torch.int64
    assert task.train.x.shape == (2, 2, 2, 2)
    assert task.train.y.tolist() == [2, 3]
    assert len(task.train) == 2
    expected = np.array(
        [
            [(100 / 255 - 0.5) / 0.5, (100 / 255 - 0.25) / 2],
            [(150 / 255 - 0.5) / 0.5, (150 / 255 - 0.25) / 2],
        ]
    )
    np.testing.assert_allclose(
        task.train.x[:, :, 1, 1].numpy(), expected, rtol=1e-6
    )
    assert task.test.y.tolist() == [3]


def test_classes_seen_and_head() -> None:
    stream = tiny()
    assert stream.classes == 4  # no task uses 4 and 5
    assert [stream.task(0, t).classes for t in (0, 1)] == [(2, 3), (0, 1)]
    assert [stream.task(0, t).seen for t in (0, 1)] == [(2, 3), (2, 3, 0, 1)]
    assert [stream.task(1, t).seen for t in (0, 1)] == [(0, 1), (0, 1, 2, 3)]
    assert [stream.task(0, t).head for t in (0, 1)] == [(2, 3), (0, 1)]
    growing = tiny("class-incremental")
    assert [growing.task(0, t).head for t in (0, 1)] == [(2, 3), (2, 3, 0, 1)]


def test_tensors_are_copies_and_warn_of_nothing(
    recwarn: pytest.WarningsRecorder,
) -> None:
    stream = tiny()
    before = stream.dataset.train_x.copy()
    split = stream.task(0, 0).train
    split.x.zero_()
    split.y.zero_()
    np.testing.assert_array_equal(stream.dataset.train_x, before)
    assert stream.dataset.train_y.tolist() == [0, 1, 2, 3, 4, 5]
    assert len(recwarn) == 0


def test_recent_shares_are_kept_up_to_a_size_and_others_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = tiny()
    first = stream.task(0, 0)
    size = sum(
        t.nbytes
        for split in (first.train, first.test)
        for t in (split.x, split.y)
    )
    monkeypatch.setattr(benchmark, "_REMEMBERED", size)
    assert stream.task(0, 0) is first
    other = stream.task(0, 1)
    assert list(stream._recent) == [(0, 1)]
    assert stream._bytes == sum(
        t.nbytes
        for split in (other.train, other.test)
        for t in (split.x, split.y)
    )
    again = stream.task(0, 0)
    assert again is not first
    assert torch.equal(again.train.x, first.train.x)
    monkeypatch.setattr(benchmark, "_REMEMBERED", 0)  # not even one fits
    assert torch.equal(stream.task(0, 1).train.x, other.train.x)
    assert (len(stream._recent), stream._bytes) == (0, 0)


def test_travels_without_what_it_remembers(digits: Benchmark) -> None:
    digits.task(1, 1)
    copy = pickle.loads(pickle.dumps(digits))
    assert len(copy._recent) == 0
    assert torch.equal(copy.task(1, 1).test.x, digits.task(1, 1).test.x)
    assert copy.partition.digest == digits.partition.digest


def test_sizes_and_bounds(digits: Benchmark) -> None:
    assert digits.train_size(4, 2) == len(digits.task(4, 2).train)
    for client, task in ((20, 0), (0, 5), (-1, 0), (0, -1)):
        with pytest.raises(IndexError, match="20 clients and 5 tasks"):
            digits.task(client, task)
        with pytest.raises(IndexError):
            digits.train_size(client, task)


def test_normalisation_of_the_whole_is_standard() -> None:
    config = read_config({"data": {"partition": "iid", "clients": 2, "tasks": 1}})
    stream = make_benchmark(config)
    x = torch.cat([stream.task(client, 0).train.x for client in (0, 1)])
    assert float(x.mean()) == pytest.approx(0, abs=1e-5)
    assert float(x.std(unbiased=False)) == pytest.approx(1, abs=1e-5)


def test_seed_is_the_experiments(digits: Benchmark) -> None:
    data = {"share": "overlapping", "task_order": "shuffled"}
    assert (
        make_benchmark(read_config({"seed": 3, "data": data})).partition.digest
        == digits.partition.digest
    )
    assert (
        make_benchmark(read_config({"seed": 4, "data": data})).partition.digest
        != digits.partition.digest
    )
    other = read_config(
        {"seed": 3, "data": data, "learner": "finetune", "strategy": "fedadam"}
    )
    assert (
        make_benchmark(other).partition.digest == digits.partition.digest
    )  # shared by all methods


def test_default_data_with_too_many_disjoint_clients_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.clients = 60"):
        make_benchmark(
            ExperimentConfig.model_validate(
                {"data": {"clients": 60, "share": "disjoint"}}
            )
        )


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 0.99), st.integers(0, 5))
def test_what_is_held_out_is_neither_trained_on_nor_test_data(fraction, seed):
    config = read_config(
        {"data": {"clients": 3, "holdout": fraction}, "seed": seed}
    )
    whole, part = (
        load_dataset(config.data),
        hold_out(load_dataset(config.data), fraction, seed),
    )
    assert len(part.train_y) + len(part.test_y) == len(whole.train_y)
    sizes = np.bincount(whole.train_y)
    held = np.bincount(part.test_y, minlength=10)
    np.testing.assert_array_equal(
        held, np.clip(np.round(fraction * sizes), 1, sizes - 1)
    )
    together = np.concatenate([part.train_x, part.test_x]).reshape(
        len(whole.train_y), -1
    )
    np.testing.assert_array_equal(
        np.sort(together @ np.arange(1, 65)),
        np.sort(whole.train_x.reshape(len(together), -1) @ np.arange(1, 65)),
    )
    assert (part.mean, part.std) == (whole.mean, whole.std)
    benchmark = make_benchmark(config)
    for share in benchmark.partition.tasks[0]:
        assert share.test.max() < len(part.test_y)


def test_a_class_of_one_sample_cannot_be_held_out_of():
    x = np.zeros((3, 1, 2, 2), np.uint8)
    data = Dataset.from_arrays(
        "tiny", x, np.array([0, 0, 1]), x, np.array([0, 1, 1])
    )
    with pytest.raises(
        ConfigError,
        match=r"data.holdout = 0.5: class '1' of tiny has one training sample",
    ):
        hold_out(data, 0.5, 0)


def test_holding_out_of_clients_own_data_is_refused():
    with pytest.raises(
        ConfigError, match=r"data.holdout = 0.2: with data.name = 'local'"
    ):
        read_config({"data": {"name": "local", "holdout": 0.2}})
