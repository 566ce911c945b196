"""Shares laid end to end: the same as one by one, for millions of them."""

import hashlib
import pickle

import numpy as np
import pytest

from fedknow.client.data.packed import PackedShares, Share
from fedknow.client.data.partition import QUANTILES, Partition

CLIENTS = 2300


def shares(client):
    """One to three tasks; each second client moves samples to domains."""
    rng = np.random.default_rng(client)
    tasks = []
    for task in range(1 + client % 3):
        train = np.sort(rng.choice(5000, rng.integers(1, 9), replace=False))
        held = tuple(sorted({int(row) % 7 for row in train}))
        tasks.append(
            Share(
                (*held, 9 + task),
                train,
                rng.integers(0, 99, 3),
                held,
                tuple(range(1, len(held) + 1)),
                task if client % 2 else -1,
                np.full(len(train), task)
                if client % 4 == 1
                else np.empty(0, np.int64),
            )
        )
    return tasks


LOOSE = [shares(client) for client in range(CLIENTS)]
PACKED = PackedShares(iter(LOOSE))


def plain(share):
    return [
        part.tolist() if isinstance(part, np.ndarray) else part for part in share
    ]


def test_each_share_is_as_it_was():
    assert len(PACKED) == CLIENTS
    assert PACKED.lengths.tolist() == [len(tasks) for tasks in LOOSE]
    for packed, loose in zip(PACKED, LOOSE, strict=True):
        assert list(map(plain, packed)) == list(map(plain, loose))
    share = PACKED[-1][-1]
    assert share.train.dtype == share.domains.dtype == np.int64
    assert [plain(share) for share in PACKED[5][1:]] == [
        plain(share) for share in LOOSE[5][1:]
    ]
    for wrong in (CLIENTS, -CLIENTS - 1):
        with pytest.raises(IndexError):
            PACKED[wrong]
    with pytest.raises(IndexError):
        PACKED[0][1]


def test_classes_are_seen_in_the_order_met():
    assert PACKED[5].seen(0) == LOOSE[5][0].classes
    met = [label for share in LOOSE[5] for label in share.classes]
    assert PACKED[5].seen(2) == tuple(dict.fromkeys(met))


def test_digest_is_that_of_all_numbers_behind_their_lengths():
    partition = Partition(LOOSE)
    lengths = [len(tasks) for tasks in LOOSE]
    expected = [CLIENTS, -3, *lengths]
    for share in (share for tasks in LOOSE for share in tasks):
        for part in (share.classes, share.train, share.test):
            expected += [len(part), *part]
        if share.domain >= 0:
            expected += [share.domain, len(share.domains), *share.domains]
    text = np.array(expected, "<i8").tobytes()
    assert partition.digest == hashlib.sha256(text).hexdigest()


def test_processes_share_a_few_arrays():
    buffers = []
    light = pickle.dumps(PACKED, 5, buffer_callback=buffers.append)
    assert len(buffers) < 20
    assert len(light) < 5000
    again = pickle.loads(light, buffers=buffers)
    assert plain(again[7][1]) == plain(LOOSE[7][1])


def test_rows_above_two_thousand_million_are_kept():
    rows = np.array([1, 2**40])
    packed = PackedShares([[Share((0,), rows, rows, (0,), (2,))]])
    assert packed[0][0].train.tolist() == rows.tolist()


def test_a_summary_of_many_clients_lists_some_and_has_quantiles_of_all():
    partition = Partition(LOOSE)
    short = partition.summary(limit=10)
    whole = partition.summary(limit=CLIENTS)
    assert short["clients"] == whole["clients"][:10]
    assert short["digest"] == whole["digest"]
    assert short["total"] == CLIENTS
    assert "total" not in whole
    sizes = [len(tasks[2].train) for tasks in LOOSE if len(tasks) > 2]
    third = short["tasks"][2]
    assert third["clients"] == len(sizes)
    assert third["train_sum"] == sum(sizes)
    assert third["train"] == np.quantile(sizes, QUANTILES).tolist()
