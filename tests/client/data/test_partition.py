"""Who holds what: the properties every partition must have, and the errors."""

import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedknow.client.data import Dataset, Partition, load_dataset, make_partition
from fedknow.client.data.shares import proportional
from fedknow.protocols.config import ConfigError, DataConfig


def synthetic(
    train: list[int], test: list[int], groups: tuple[tuple[int, ...], ...] = ()
) -> Dataset:
    """A data set with the given number of samples per class, rows mixed."""
    rng = np.random.default_rng(0)
    train_y, test_y = (
        rng.permutation(np.repeat(np.arange(len(n)), n)) for n in (train, test)
    )
    images = (np.zeros((len(y), 1, 2, 2), np.uint8) for y in (train_y, test_y))
    return Dataset.from_arrays(
        "synthetic", next(images), train_y, next(images), test_y, groups=groups
    )


DATA = synthetic([40] * 12, [10] * 12)

paper = st.builds(
    lambda low, extra, **settings: DataConfig(
        classes_min=low, classes_max=low + extra, **settings
    ),
    low=st.integers(1, 3),
    extra=st.integers(0, 3),
    tasks=st.integers(1, 4),
    clients=st.integers(1, 12),
    samples=st.floats(0.01, 1),
    test_samples=st.floats(0.01, 1),
    class_order=st.sampled_from(["natural", "shuffled"]),
    task_order=st.sampled_from(["same", "shuffled"]),
    share=st.sampled_from(["disjoint", "overlapping"]),
)
seeds = st.integers(0, 2**31 - 1)


def check_always(
    partition: Partition, config: DataConfig, data: Dataset = DATA
) -> None:
    assert len(partition.tasks) == config.clients
    blocks = {frozenset(share.classes) for share in partition.tasks[0]}
    assert len(blocks) == config.tasks
    assert all(not a & b for a, b in combinations(blocks, 2))
    for client in partition.tasks:
        assert {frozenset(share.classes) for share in client} == blocks
        for share in client:
            assert share.train.dtype == share.test.dtype == np.int64
            assert len(share.train) >= 1
            assert len(share.test) >= 1
            for places in (share.train, share.test):
                assert (np.diff(places) > 0).all()  # ascending, none twice
            assert (
                set(share.held)
                == set(data.train_y[share.train].tolist())
                <= set(share.classes)
            )
            assert set(data.test_y[share.test].tolist()) <= set(share.classes)


def all_places(partition: Partition, part: str) -> np.ndarray:
    return np.sort(
        np.concatenate(
            [
                getattr(share, part)
                for client in partition.tasks
                for share in client
            ]
        )
    )


@given(config=paper, seed=seeds)
@settings(max_examples=150, deadline=None)
def test_paper(config: DataConfig, seed: int) -> None:
    try:
        partition = make_partition(DATA, config, seed)
    except ConfigError as error:
        fits = int(str(error).split("room for ")[1].split(" client")[0])
        assert 1 <= fits < config.clients
        config = config.model_copy(
            update={"clients": fits}
        )  # the number named does fit
        partition = make_partition(DATA, config, seed)
    check_always(partition, config)
    size = {
        "train": max(1, int(config.samples * 40 + 0.5)),
        "test": max(1, int(config.test_samples * 10 + 0.5)),
    }
    for client in partition.tasks:
        for share in client:
            task = len(share.classes)
            assert (
                config.classes_min
                <= len(share.held)
                <= min(config.classes_max, task)
            )
            assert np.bincount(DATA.train_y[share.train])[
                list(share.held)
            ].tolist() == [size["train"]] * len(share.held)
            assert np.bincount(DATA.test_y[share.test])[
                list(share.held)
            ].tolist() == [size["test"]] * len(share.held)
            assert len(share.test) == size["test"] * len(
                share.held
            )  # and none of a class not trained on
    if config.share == "disjoint":
        for part in ("train", "test"):
            assert (np.diff(all_places(partition, part)) > 0).all()
    assert make_partition(DATA, config, seed).digest == partition.digest


def test_paper_protocol_on_cifar_sizes() -> None:
    data = synthetic([500] * 100, [100] * 100)
    config = DataConfig(tasks=10, clients=20, share="disjoint")
    partition = make_partition(data, config, 0)
    check_always(partition, config, data)
    shares = [share for client in partition.tasks for share in client]
    assert all(
        len(share.train) == 50 * len(share.held)
        and len(share.test) == 10 * len(share.held)
        for share in shares
    )
    held = np.array([len(share.held) for share in shares])
    assert (held.min(), held.max()) == (2, 5)
    assert held.mean() == pytest.approx(
        3.5, abs=0.25
    )  # uniform on 2..5, 200 draws: 3 standard errors
    assert partition.tasks[0][3].classes == tuple(range(30, 40))


def test_seed_fixes_everything_and_nothing_else_does() -> None:
    config = DataConfig(
        tasks=3,
        clients=6,
        samples=0.1,
        test_samples=0.1,
        classes_max=4,
        task_order="shuffled",
    )
    digests = [make_partition(DATA, config, seed).digest for seed in (0, 1, 2, 0)]
    assert digests[0] == digests[3]
    assert len(set(digests)) == 3
    # A run with fewer clients has the same first clients.
    fewer = make_partition(DATA, config.model_copy(update={"clients": 3}), 0)
    whole = make_partition(DATA, config, 0)
    for a, b in zip(fewer.tasks, whole.tasks[:3], strict=True):
        assert [share.held for share in a] == [share.held for share in b]


def test_digest_is_pinned() -> None:
    """The same seed gives the same partition in every release: a change here changes everybody's
    numbers."""
    partition = make_partition(
        load_dataset(DataConfig()), DataConfig(share="overlapping"), 0
    )
    assert (
        partition.digest
        == "2ab2b56f2dec643329ddfcb9d055d2d6d03da073af229d11b22ab306dbfaff5b"
    )


def test_summary_is_json_with_sizes_and_classes() -> None:
    config = DataConfig(tasks=2, clients=3, share="disjoint")
    partition = make_partition(DATA, config, 4)
    summary = json.loads(json.dumps(partition.summary()))
    assert summary["digest"] == partition.digest
    assert len(summary["clients"]) == 3
    share = partition.tasks[2][1]
    assert summary["clients"][2][1] == {
        "classes": [6, 7, 8, 9, 10, 11],
        "held": list(share.held),
        "counts": [4] * len(share.held),
        "train": 4 * len(share.held),
        "test": len(share.held),
    }


def test_overlapping_clients_draw_for_themselves() -> None:
    config = DataConfig(
        tasks=2,
        clients=12,
        samples=0.5,
        share="overlapping",
        classes_min=6,
        classes_max=6,
    )
    partition = make_partition(DATA, config, 0)
    places = all_places(partition, "train")
    assert len(np.unique(places)) < len(places) == 12 * 2 * 6 * 20
    assert (
        len(
            {
                share.train.tobytes()
                for client in partition.tasks
                for share in client
            }
        )
        == 24
    )


def test_orders() -> None:
    config = DataConfig(
        tasks=6,
        clients=8,
        share="overlapping",
        classes_max=2,
        task_order="shuffled",
    )
    partition = make_partition(DATA, config, 0)
    assert (
        len(
            {
                tuple(share.classes for share in client)
                for client in partition.tasks
            }
        )
        == 8
    )
    same = make_partition(
        DATA, config.model_copy(update={"task_order": "same"}), 0
    )
    for own, common in zip(
        partition.tasks, same.tasks, strict=True
    ):  # the same shares in another order
        by_task = {share.classes: share for share in own}
        assert all(
            np.array_equal(by_task[share.classes].train, share.train)
            for share in common
        )
    shuffled = make_partition(
        DATA, config.model_copy(update={"class_order": "shuffled"}), 0
    )
    classes = [
        label for share in sorted(shuffled.tasks[0]) for label in share.classes
    ]
    assert sorted(classes) == list(range(12))
    assert {share.classes for share in shuffled.tasks[0]} != {
        share.classes for share in same.tasks[0]
    }


def test_groups_are_natural_tasks() -> None:
    groups = ((3, 4), (0, 1, 2), (5, 6, 7, 8))
    data = synthetic([20] * 9, [5] * 9, groups)
    config = DataConfig(tasks=2, clients=2, samples=0.2, test_samples=0.2)
    assert [
        share.classes for share in make_partition(data, config, 0).tasks[0]
    ] == [
        (3, 4),
        (0, 1, 2),
    ]
    blocks = make_partition(
        data, config.model_copy(update={"classes_per_task": 3}), 0
    ).tasks[0]
    assert [share.classes for share in blocks] == [(0, 1, 2), (3, 4, 5)]
    shuffled = [
        make_partition(
            data, config.model_copy(update={"class_order": "shuffled"}), seed
        ).tasks[0]
        for seed in range(8)
    ]
    assert {share.classes for client in shuffled for share in client} == set(
        groups
    )
    with pytest.raises(
        ConfigError,
        match=r"data.tasks = 4: synthetic has 3 natural tasks.*classes_per_task",
    ):
        make_partition(data, config.model_copy(update={"tasks": 4}), 0)


@given(
    clients=st.integers(1, 20),
    tasks=st.integers(1, 4),
    seed=seeds,
    kind=st.sampled_from(["iid", "dirichlet"]),
    alpha=st.floats(0.3, 100),
)
@settings(max_examples=40, deadline=None)
def test_iid_and_dirichlet_give_every_sample_to_one_client(
    clients: int, tasks: int, seed: int, kind: str, alpha: float
) -> None:
    config = DataConfig(
        clients=clients,
        tasks=tasks,
        partition=kind,
        **({"alpha": alpha} if kind != "iid" else {}),
    )
    partition = make_partition(DATA, config, seed)
    check_always(partition, config)
    assert all_places(partition, "train").tolist() == list(range(480))
    assert all_places(partition, "test").tolist() == list(range(120))
    for task in range(tasks):
        shares = [client[task] for client in partition.tasks]
        if kind == "iid":
            for part in ("train", "test"):
                sizes = [len(getattr(share, part)) for share in shares]
                assert max(sizes) - min(sizes) <= 1
        else:
            for share in shares:
                assert set(DATA.test_y[share.test].tolist()) <= set(share.held)
    assert make_partition(DATA, config, seed).digest == partition.digest


@pytest.mark.parametrize(("rows", "clients"), [(480, 7), (10, 10), (100, 1)])
def test_iid_parts_are_those_of_flwr_datasets(rows: int, clients: int) -> None:
    from datasets import Dataset as Table
    from flwr_datasets.partitioner import IidPartitioner

    partitioner = IidPartitioner(clients)
    partitioner.dataset = Table.from_dict({"place": np.arange(rows)})
    theirs = [
        partitioner.load_partition(part)["place"][:] for part in range(clients)
    ]
    assert [
        part.tolist() for part in np.array_split(np.arange(rows), clients)
    ] == theirs


def test_seed_reaches_every_draw() -> None:
    for kind in ("iid", "dirichlet"):
        config = DataConfig(clients=5, tasks=2, partition=kind)
        assert (
            len({make_partition(DATA, config, seed).digest for seed in range(4)})
            == 4
        )
    tasks = make_partition(
        DATA, DataConfig(clients=5, tasks=2, partition="dirichlet"), 0
    ).tasks
    sizes = np.array([[len(share.train) for share in client] for client in tasks])
    assert (sizes[:, 0] != sizes[:, 1]).any()  # each task is drawn for itself


def test_small_alpha_is_skewed() -> None:
    def spread(alpha: float) -> float:
        config = DataConfig(
            clients=5, tasks=1, partition="dirichlet", alpha=alpha
        )
        (shares,) = zip(*make_partition(DATA, config, 0).tasks, strict=True)
        counts = np.stack(
            [
                np.bincount(DATA.train_y[share.train], minlength=12)
                for share in shares
            ]
        )
        return float((counts.max(axis=0) / 40).mean())

    assert spread(1000) < 0.25
    assert spread(0.3) > 0.5


@given(st.data())
@settings(max_examples=100, deadline=None)
def testproportional(data: st.DataObject) -> None:
    clients, classes = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    counts = np.array(
        data.draw(
            st.lists(
                st.lists(st.integers(0, 20), min_size=classes, max_size=classes),
                min_size=clients,
                max_size=clients,
            )
        )
    )
    counts[0] += 1  # every class is held by someone
    available = data.draw(
        st.lists(st.integers(1, 15), min_size=classes, max_size=classes)
    )
    tests = proportional(counts, available)
    if tests is None:
        return
    assert tests.sum(axis=0).tolist() == available
    assert (tests >= 0).all()
    assert (tests.sum(axis=1) >= 1).all()
    assert (counts[tests > 0] > 0).all()


def testproportional_by_hand() -> None:
    # Quotas 6.67 and 3.33 of ten; then 0.5 and 3.5 of four, the half going to the first client.
    assert proportional(np.array([[2, 1], [1, 7]]), [10, 4]).tolist() == [
        [7, 1],
        [3, 3],
    ]
    # The last client's quota is 0.09: it takes one from whoever has most.
    assert proportional(np.array([[60], [30], [1]]), [8]).tolist() == [
        [4],
        [3],
        [1],
    ]
    assert proportional(np.array([[5], [5], [5]]), [2]) is None


def fails(data: Dataset, config: DataConfig, *parts: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_partition(data, config, 0)
    for part in parts:
        assert part in str(caught.value)


def test_errors_say_what_to_change() -> None:
    fails(
        DATA,
        DataConfig(tasks=5, classes_per_task=3),
        "data.tasks = 5",
        "15 classes",
        "has 12",
        "lower",
    )
    fails(DATA, DataConfig(tasks=13), "data.tasks = 13", "13 classes", "has 12")
    fails(
        DATA,
        DataConfig(tasks=12),
        "data.classes_min = 2",
        "has 1 class;",
        "data.tasks",
    )
    # 40 samples make 10 shares of 4, 10 test samples 10 shares of 1; 4 classes of 10 shares, 4
    # a client.
    full = DataConfig(
        tasks=3, clients=11, classes_min=4, classes_max=4, share="disjoint"
    )
    fails(
        DATA,
        full,
        "data.clients = 11",
        "room for 10 clients",
        "data.samples = 0.1",
        'data.share = "overlapping"',
    )
    assert (
        len(
            make_partition(DATA, full.model_copy(update={"clients": 10}), 0).tasks
        )
        == 10
    )
    for kind in ("iid", "dirichlet"):
        fails(
            DATA,
            DataConfig(tasks=6, clients=21, partition=kind),
            "data.clients = 21",
            "only 20 test samples",
        )
        fails(
            DATA,
            DataConfig(tasks=6, clients=81, partition=kind),
            "data.clients = 81",
            "only 80 training samples",
        )
    fails(
        DATA,
        DataConfig(tasks=6, clients=20, partition="dirichlet", alpha=0.001),
        "data.alpha = 0.001",
        "data.clients = 20",
    )
    hole = replace(DATA, test_y=np.where(DATA.test_y == 3, 2, DATA.test_y))
    fails(hole, DataConfig(), "class '3' of task 1 has no test samples")
