"""People who are held out: who they are, and what they have."""

import numpy as np
import pytest

from fedknow.client.data import Benchmark, Column, Dataset, make_partition
from fedknow.protocols.config import ConfigError, DataConfig, read_config

CLASSES, PEOPLE = 6, 8


def people_data() -> Dataset:
    """Six classes of 40 and 20 samples, and eight people."""
    rng = np.random.default_rng(5)
    labels, people = [], []
    for count in (40, 20):
        y = rng.permutation(np.repeat(np.arange(CLASSES), count))
        person = rng.integers(0, PEOPLE, len(y))
        # Person 7 never shows class 0.
        person[(y == 0) & (person == 7)] = 1
        labels.append(y)
        people.append(person)
    x = [np.zeros((len(y), 1, 2, 2), np.uint8) for y in labels]
    columns = {"person": Column.from_values(*people)}
    return Dataset.from_arrays(
        "people", x[0], labels[0], x[1], labels[1], columns=columns
    )


DATA = people_data()
NATURAL = {"partition": "natural", "client_column": "person", "clients": 4}


def data_config(**changes) -> DataConfig:
    return DataConfig(**{"tasks": 3, "clients": 4} | changes)


CLASS_STREAM = {"tasks": 3, "scenario": "class-incremental"}
PERSON = DATA.columns["person"]


def config(held_out, **changes) -> DataConfig:
    return data_config(
        **NATURAL | {"clients": 2} | CLASS_STREAM | changes, held_out=held_out
    )


def rows_of(shares, part):
    return np.concatenate([getattr(share, part) for share in shares])


def test_nobody_is_held_out_by_default() -> None:
    partition = make_partition(DATA, data_config(**NATURAL), 1)
    assert partition.held_out == {}
    assert "held_out" not in partition.summary()


@pytest.mark.parametrize(
    ("held_out", "count"), [(0.25, 2), (0.01, 1), (["7", "0"], 2)]
)
def test_they_have_all_their_samples_and_clients_have_none(
    held_out, count
) -> None:
    partition = make_partition(DATA, config(held_out), 3)
    assert len(partition.held_out) == count
    for name, shares in partition.held_out.items():
        person = PERSON.names.index(name)
        assert len(shares) == 3
        for part in ("train", "test"):
            values = getattr(PERSON, part)
            assert sorted(rows_of(shares, part)) == list(
                np.flatnonzero(values == person)
            )
    hidden = [PERSON.names.index(name) for name in partition.held_out]
    for client in partition.tasks:
        assert not np.isin(PERSON.train[rows_of(client, "train")], hidden).any()
        assert not np.isin(PERSON.test[rows_of(client, "test")], hidden).any()
    if isinstance(held_out, list):
        assert set(partition.held_out) == set(held_out)


def test_a_share_is_drawn_by_the_seed() -> None:
    drawn = {
        tuple(make_partition(DATA, config(0.5), seed).held_out)
        for seed in range(8)
    }
    assert len(drawn) > 1
    again = make_partition(DATA, config(0.5), 0)
    assert tuple(again.held_out) == tuple(
        make_partition(DATA, config(0.5), 0).held_out
    )


def test_their_tasks_are_those_of_the_stream() -> None:
    # Person 7 never shows class 0, and the classes of a task are still the stream's.
    partition = make_partition(DATA, config(["7"], tasks=6), 1)
    stream = Benchmark(DATA, partition, "class-incremental")
    assert stream.people == ("7",)
    nothing, something = (stream.held_out("7", task) for task in (0, 1))
    assert nothing.parts == ()
    assert nothing.classes == (0,)
    assert something.classes == (1,)
    assert {len(np.unique(part.y)) for part in something.parts} == {1}
    assert stream.stream_classes(2) == (0, 1, 2)


def test_a_repeated_task_has_the_same_samples() -> None:
    partition = make_partition(
        DATA, config(["1"], tasks=6, repeats=2, classes_per_task=2), 1
    )
    shares = partition.held_out["1"]
    for task in range(3):
        assert shares[task].train.tolist() == shares[task + 3].train.tolist()


@pytest.mark.parametrize(
    ("held_out", "changes", "message"),
    [
        (["8"], {}, r"names nobody '8'.* it names: 0, 1, 2"),
        (0.9, {}, r"names 1 person who are not held out|hold out fewer"),
        (
            [str(k) for k in range(PEOPLE) if k != 7],
            {"tasks": 6, "clients": 1},
            r"no client has .* task 0.*hold out fewer people",
        ),
    ],
)
def test_what_cannot_be_held_out_is_refused(held_out, changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make_partition(DATA, config(held_out, **changes), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.partition=iid", "data.client_column="], r"set data\.partition"),
        (["data.task_order=shuffled"], r"set data\.task_order = 'same'"),
        (["data.arrival=poisson"], r"set data\.arrival = 'same'"),
        (["data.held_out=1.0"], r"a share of the people"),
        (["data.held_out=true"], r"or their names"),
        (["data.held_out=[]"], r"or their names"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message) -> None:
    base = {"data": NATURAL | {"held_out": 0.2}}
    with pytest.raises(ConfigError, match=message):
        read_config(base, changes)


def test_names_may_be_given_as_text_with_commas() -> None:
    read = read_config({"data": NATURAL}, ["data.held_out=ann, bob"])
    assert read.data.held_out == ["ann", "bob"]
    again = read_config({"data": NATURAL}, ["data.held_out=[3, 4]"])
    assert again.data.held_out == ["3", "4"]
    assert "held_out = [" in read.to_toml()
