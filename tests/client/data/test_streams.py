"""Streams of natural clients, domains, repeats and blurred boundaries."""

from collections import Counter
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedknow.client.data import (
    Benchmark,
    Column,
    Dataset,
    Partition,
    make_benchmark,
    make_partition,
)
from fedknow.client.data.recurrence import count_tasks
from fedknow.protocols.config import ConfigError, DataConfig, read_config

CLASSES, PEOPLE, SITES = 6, 8, 3


def people_data() -> Dataset:
    """Six classes of 40 and 20 samples, eight people, three sites."""
    rng = np.random.default_rng(5)
    parts = {}
    for part, count in (("train", 40), ("test", 20)):
        y = rng.permutation(np.repeat(np.arange(CLASSES), count))
        person = rng.integers(0, PEOPLE, len(y))
        # Person 7 never shows class 0, and person 6 is alone at site 2.
        person[(y == 0) & (person == 7)] = 1
        site = np.where(person == 6, 2, person % 2)
        parts[part] = y, person, site
    (train_y, *train), (test_y, *test) = parts["train"], parts["test"]
    columns = {
        name: Column.from_values(a, b)
        for name, a, b in zip(("person", "site"), train, test, strict=True)
    }
    x = [np.zeros((len(y), 1, 2, 2), np.uint8) for y in (train_y, test_y)]
    return Dataset.from_arrays(
        "people", x[0], train_y, x[1], test_y, columns=columns
    )


DATA = people_data()
NATURAL = {"partition": "natural", "client_column": "person", "clients": 4}


def data_config(**changes: Any) -> DataConfig:
    base = {"tasks": 3, "clients": 4, "partition": "iid"}
    return DataConfig(**base | changes)


def rows(partition: Partition, part: str) -> list[int]:
    shares = chain.from_iterable(partition.tasks)
    return np.concatenate([getattr(s, part) for s in shares]).tolist()


# --- every stream ---------------------------------------------------------------------------

streams = st.fixed_dictionaries(
    {
        "scenario": st.sampled_from(["class-incremental", "domain-incremental"]),
        "partition": st.sampled_from(
            ["iid", "dirichlet", "quantity", "shards", "natural"]
        ),
        "domain": st.sampled_from(["column", "rotation", "labels"]),
        "repeats": st.sampled_from([1, 3]),
        "blur": st.sampled_from([0.0, 0.3]),
        "labelled": st.sampled_from([1.0, 0.4]),
        "tasks_min": st.sampled_from([0, 1]),
        "task_order": st.sampled_from(["same", "shuffled"]),
    }
)


def stream_config(drawn: dict[str, Any]) -> DataConfig:
    changes = dict(drawn)
    if changes["scenario"] != "domain-incremental":
        changes["domain"] = ""
    if changes["domain"] == "column":
        changes["domain_column"] = "site"
    if changes["domain"] == "labels":
        changes["domain_alpha"] = 5.0
    if changes["partition"] == "natural":
        changes["client_column"] = "person"
    if changes["partition"] in ("dirichlet", "quantity"):
        changes["alpha"] = 5.0
    return data_config(clients=2, **changes)


@given(drawn=streams, seed=st.integers(0, 2**31 - 1))
@settings(max_examples=60, deadline=None)
def test_no_training_sample_comes_twice(drawn: dict[str, Any], seed: int) -> None:
    config = stream_config(drawn)
    try:
        partition = make_partition(DATA, config, seed)
    except ConfigError:
        # People may be grouped so that a client has no task with both kinds of samples.
        if config.partition != "natural":
            raise
        return
    train = rows(partition, "train")
    assert len(set(train)) == len(train)
    for client in partition.tasks:
        assert 1 <= len(client) <= config.tasks
        for share in client:
            assert len(share.train) >= 1
            assert len(share.test) >= 1
            labels = Counter(DATA.train_y[share.train].tolist())
            assert dict(zip(share.held, share.counts, strict=True)) == labels
            assert set(share.held) <= set(share.classes)
            assert set(DATA.test_y[share.test].tolist()) <= set(share.classes)
            assert (np.diff(share.train) > 0).all()
    # A test sample is one client's, and of one task, which may come again.
    for test in (rows(Partition((c,)), "test") for c in partition.tasks):
        assert max(Counter(test).values()) <= config.repeats
    assert make_partition(DATA, config, seed).digest == partition.digest


@pytest.mark.parametrize("scenario", ["class-incremental", "task-incremental"])
@pytest.mark.parametrize("sharing", ["iid", "dirichlet", "quantity", "shards"])
def test_all_samples_are_given_out(scenario: str, sharing: str) -> None:
    config = data_config(scenario=scenario, partition=sharing)
    partition = make_partition(DATA, config, 3)
    for part, y in (("train", DATA.train_y), ("test", DATA.test_y)):
        assert sorted(rows(partition, part)) == list(range(len(y)))


# --- natural clients ------------------------------------------------------------------------


def test_natural_clients_hold_their_people_alone() -> None:
    person = DATA.columns["person"]
    partition = make_partition(DATA, data_config(**NATURAL), 1)
    owners = []
    for client in partition.tasks:
        train = np.concatenate([share.train for share in client])
        test = np.concatenate([share.test for share in client])
        owners.append(set(person.train[train].tolist()))
        assert set(person.test[test].tolist()) <= owners[-1]
        # All that these people have is theirs.
        assert len(train) == np.isin(person.train, list(owners[-1])).sum()
    # Eight people make four clients of two, and none is in two of them.
    assert [len(people) for people in owners] == [2, 2, 2, 2]
    assert len(set.union(*owners)) == PEOPLE


def test_a_person_without_samples_of_a_task_does_not_meet_it() -> None:
    config = data_config(
        **NATURAL | {"clients": 8}, tasks=6, scenario="class-incremental"
    )
    partition = make_partition(DATA, config, 1)
    stream = Benchmark(DATA, partition, "class-incremental")
    # Each client is one person: the one whose samples are person 7's.
    person = DATA.columns["person"].train
    people = [int(person[client[0].train[0]]) for client in partition.tasks]
    short = people.index(7)
    assert (stream.tasks, stream.length(short)) == (6, 5)
    # Its first task is class 1, as it never shows class 0, and its last one goes on.
    assert stream.task(short, 0).classes == (1,)
    assert stream.task(short, 5) is stream.task(short, 4)
    assert stream.task(short, 5).task == 4


def test_more_clients_than_people_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"set data\.clients to 8 or less"):
        make_partition(DATA, data_config(**NATURAL | {"clients": 9}), 0)
    config = data_config(**NATURAL | {"client_column": "persn"})
    with pytest.raises(ConfigError, match=r"it has: person, site\."):
        make_partition(DATA, config, 0)


# --- domains --------------------------------------------------------------------------------


def test_a_column_makes_the_domains() -> None:
    config = data_config(
        scenario="domain-incremental", domain="column", domain_column="site"
    )
    partition = make_partition(DATA, config, 2)
    site = DATA.columns["site"]
    for client in partition.tasks:
        for task, share in enumerate(client):
            assert set(site.train[share.train].tolist()) == {task}
            assert set(site.test[share.test].tolist()) == {task}
            assert share.classes == tuple(range(CLASSES))
    with pytest.raises(ConfigError, match=r"has 3 domains; set data\.tasks to 3"):
        make_partition(DATA, config.model_copy(update={"tasks": 4}), 2)


def test_labels_shift_from_task_to_task(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = data_config(
        scenario="domain-incremental",
        domain="labels",
        domain_alpha=0.3,
        clients=1,
    )
    (client,) = make_partition(DATA, config, 4).tasks
    tables = []
    for share in client:
        labels = DATA.train_y[share.train]
        tables.append(np.bincount(labels, minlength=CLASSES))
    # A class with one training sample in a task and no test sample is left out of it.
    assert np.sum(tables) == 239
    assert "1 training sample and 0 test samples belong to no task" in caplog.text
    # No two tasks have a class alike.
    assert np.ptp(tables, axis=0).min() > 5


def digits_stream(**data: Any) -> Benchmark:
    base = {
        "scenario": "domain-incremental",
        "tasks": 4,
        "clients": 2,
        "partition": "iid",
    }
    return make_benchmark(read_config({"seed": 1, "data": base | data}))


@pytest.mark.parametrize("domain", ["rotation", "noise", "permutation", "season"])
def test_changed_images_are_those_of_the_data_set(domain: str) -> None:
    stream = digits_stream(domain=domain)
    same = digits_stream(domain=domain, domain_strength=0.0)
    assert stream.partition.digest == same.partition.digest
    for task in range(4):
        moved, still = stream.task(1, task).train, same.task(1, task).train
        assert (moved.y == still.y).all()
        # The first domain is the data set as it is.
        assert moved.x.equal(still.x) == (task == 0)
    # Who holds a sample does not matter to it.
    other = digits_stream(domain=domain, clients=1)
    whole = other.partition.tasks[0][2].train
    places = np.searchsorted(whole, stream.partition.tasks[1][2].train)
    expected = other.task(0, 2).train.x[places]
    assert stream.task(1, 2).train.x.equal(expected)


def test_half_a_turn_is_exact() -> None:
    stream = digits_stream(domain="rotation")
    same = digits_stream(domain="rotation", domain_strength=0.0)
    turned = stream.task(0, 3).test.x
    expected = same.task(0, 3).test.x.flip(2, 3)
    assert (turned - expected).abs().max() < 1e-4


# --- recurrence -----------------------------------------------------------------------------


def test_repeats_bring_new_samples_of_old_classes() -> None:
    config = data_config(tasks=6, repeats=2, scenario="class-incremental")
    partition = make_partition(DATA, config, 0)
    for client in partition.tasks:
        assert [share.classes for share in client] == [
            (0, 1),
            (2, 3),
            (4, 5),
        ] * 2
        for early, late in zip(client[:3], client[3:], strict=True):
            assert not set(early.train) & set(late.train)
            assert early.test.tolist() == late.test.tolist()
            # 80 samples of two classes, for four clients and two times.
            assert len(early.train) == len(late.train) == 10
    stream = Benchmark(DATA, partition, "class-incremental")
    assert stream.task(0, 5).seen == (0, 1, 2, 3, 4, 5)


def test_blurred_samples_move_to_their_neighbours() -> None:
    sharp = data_config(scenario="class-incremental")
    blurred = sharp.model_copy(update={"blur": 0.2})
    before = make_partition(DATA, sharp, 0)
    after = make_partition(DATA, blurred, 0)
    assert sorted(rows(before, "train")) == sorted(rows(after, "train"))
    for client, moved in zip(before.tasks, after.tasks, strict=True):
        # 20 samples a task: 4 leave each, 2 come from either side (4 to the ends' neighbour).
        stays = [
            len(set(a.train) & set(b.train))
            for a, b in zip(client, moved, strict=True)
        ]
        assert stays == [16, 16, 16]
        assert [len(share.train) for share in moved] == [18, 24, 18]
        # The head grows by a class as soon as a sample of it comes.
        early = set(DATA.train_y[moved[0].train].tolist())
        assert {0, 1} < set(moved[0].classes) == early | {0, 1}


def test_a_blurred_sample_keeps_its_domain() -> None:
    stream = digits_stream(domain="season", blur=0.4)
    sharp = digits_stream(domain="season")
    for task in range(4):
        share = stream.partition.tasks[0][task]
        for domain in np.unique(share.domains).tolist():
            original = sharp.partition.tasks[0][domain].train
            moved = share.train[share.domains == domain]
            assert set(moved.tolist()) <= set(original.tolist())
            places = np.searchsorted(original, moved)
            expected = sharp.task(0, domain).train.x[places]
            found = stream.task(0, task).train.x[share.domains == domain]
            assert found.equal(expected)


def test_few_labels_leave_some_of_each_class() -> None:
    everything = make_partition(DATA, data_config(), 0)
    scarce = make_partition(DATA, data_config(labelled=0.1), 0)
    for whole, few in zip(
        chain.from_iterable(everything.tasks),
        chain.from_iterable(scarce.tasks),
        strict=True,
    ):
        assert whole.held == few.held
        expected = [max(1, round(0.1 * count)) for count in whole.counts]
        assert list(few.counts) == expected
        assert whole.test.tolist() == few.test.tolist()


def test_clients_differ_in_their_number_of_tasks() -> None:
    config = data_config(tasks=6, tasks_min=2, clients=5)
    assert count_tasks(config) == [6, 5, 4, 3, 2]
    partition = make_partition(DATA, config, 0)
    assert list(map(len, partition.tasks)) == [6, 5, 4, 3, 2]
    assert partition.positions == 6
    assert count_tasks(data_config(tasks_min=1, clients=1)) == [3]


def test_quantity_skews_sizes_and_not_classes() -> None:
    config = data_config(tasks=1, partition="quantity", alpha=0.5, clients=6)
    partition = make_partition(DATA, config, 8)
    sizes = [len(client[0].train) for client in partition.tasks]
    assert sum(sizes) == 240
    assert max(sizes) > 4 * min(sizes) >= 4
    largest = partition.tasks[int(np.argmax(sizes))][0]
    assert len(largest.held) == CLASSES


def test_shards_give_few_classes() -> None:
    config = data_config(tasks=1, partition="shards", clients=6, shards=1)
    partition = make_partition(DATA, config, 8)
    # As many shards as classes, and all classes of one size: one class each.
    held = [client[0].held for client in partition.tasks]
    assert sorted(held) == [(k,) for k in range(CLASSES)]
    assert all(client[0].counts == (40,) for client in partition.tasks)
    too_many = config.model_copy(update={"shards": 41})
    with pytest.raises(ConfigError, match=r"data\.shards = 41"):
        make_partition(DATA, too_many, 0)


# --- settings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scenario": "domain-incremental"}, r"needs data\.domain"),
        ({"domain": "noise"}, r"data\.domain = 'noise' does nothing"),
        ({"partition": "natural"}, r"needs data\.client_column"),
        ({"client_column": "a"}, r"client_column = 'a' does nothing"),
        ({"shards": 3}, r"data\.shards = 3 does nothing"),
        ({"tasks": 5, "repeats": 2}, r"a multiple of data\.repeats"),
        ({"tasks_min": 4}, r"data\.tasks_min = 4 is above data\.tasks = 3"),
        ({"blur": 0.1}, r"data\.blur = 0\.1 with .* 'task-incremental'"),
        ({"domain_strength": 0.5}, r"data\.domain_strength = 0\.5 does nothing"),
        (
            {"scenario": "domain-incremental", "domain": "column"},
            r"needs data\.domain_column",
        ),
        (
            {
                "scenario": "domain-incremental",
                "domain": "noise",
                "classes_per_task": 2,
            },
            r"data\.classes_per_task = 2",
        ),
        ({"name": "local", "labelled": 0.5}, r"data\.labelled = 0\.5: with"),
    ],
)
def test_contradictions_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    base = {"tasks": 3, "partition": "paper"}
    with pytest.raises(ConfigError, match=message):
        read_config({"data": base | changes})
