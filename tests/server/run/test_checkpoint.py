import errno
import os
import random
import shutil

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM

from fedknow.protocols.config import StrategyConfig
from fedknow.protocols.flower import to_record
from fedknow.protocols.messages import Arrays
from fedknow.server.checks.faults import RunError
from fedknow.server.run import checkpoint as module
from fedknow.server.run.checkpoint import (
    Checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from fedknow.server.run.strategy_state import restore_strategy, strategy_state
from fedknow.strategies import build_strategy


def checkpoint(server_round=1, **changes):
    fields = {
        "task": 0,
        "round": server_round,
        "server_round": server_round,
        "arrays": Arrays(
            z=np.full(3, 0.1 * server_round, np.float32),
            a=np.array(2.5),
            e=np.zeros((0, 4)),
        ),
        "strategy": {"attributes": {}},
        "scores": {
            "personal": np.array([[0.5, np.nan]]),
            "steps": np.zeros((0, 3), np.int64),
        },
        "versions": {0: 2**47 + 1, 5: 3},
        "traffic": {"train": {"down": 1, "up": 2, "messages": 3}},
        "position": 77,
        "seconds": 1.25,
    }
    return Checkpoint(**(fields | changes))


def assert_same(a, b):
    assert list(a.arrays) == list(b.arrays)
    for left, right in ((a.arrays, b.arrays), (a.scores, b.scores)):
        assert left.keys() == right.keys()
        for name in left:
            assert left[name].dtype == right[name].dtype
            np.testing.assert_array_equal(left[name], right[name])
    for name in (
        "task",
        "round",
        "server_round",
        "versions",
        "traffic",
        "position",
        "seconds",
    ):
        assert getattr(a, name) == getattr(b, name)


def test_round_trip(tmp_path):
    assert load_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, checkpoint())
    assert_same(load_checkpoint(tmp_path), checkpoint())


def test_only_the_latest_is_kept(tmp_path):
    for server_round in (1, 2, 10):
        deleting = save_checkpoint(tmp_path, checkpoint(server_round))
    deleting.join()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-10",
        "latest",
    ]
    assert load_checkpoint(tmp_path).server_round == 10


def test_the_disk_is_waited_for_before_a_checkpoint_counts_and_before_older_ones_go(
    tmp_path, monkeypatch
):
    save_checkpoint(tmp_path, checkpoint(1))
    seen = []

    def look(name, real):
        def call(*args):
            files = sorted(
                path.name for path in tmp_path.rglob("*") if path.is_file()
            )
            seen.append(
                (name, (tmp_path / "latest").read_text().split()[0], len(files))
            )
            real(*args)

        return call

    monkeypatch.setattr(module, "sync_disk", look("all", module.sync_disk))
    monkeypatch.setattr(os, "fsync", look("one", os.fsync))
    save_checkpoint(tmp_path, checkpoint(2)).join()
    # Both checkpoints' two files and the old name; then the new name beside the old; then the
    # folder with the new one.
    assert seen == [
        ("all", "checkpoint-1", 5),
        ("one", "checkpoint-1", 6),
        ("one", "checkpoint-2", 5),
    ]
    assert not (tmp_path / "checkpoint-1").exists()


def test_what_an_interrupted_write_left_behind_does_no_harm(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1))
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "state.safetensors").write_text('{"task": ')
    assert load_checkpoint(tmp_path).server_round == 1
    save_checkpoint(tmp_path, checkpoint(2))
    assert_same(load_checkpoint(tmp_path), checkpoint(2))


@pytest.mark.parametrize("writes", range(5))
def test_a_full_disk_at_any_moment_leaves_the_last_one(
    tmp_path, monkeypatch, writes
):
    save_checkpoint(tmp_path, checkpoint(1))
    done = []

    def full(real):
        def call(*args):
            if len(done) == writes:
                raise OSError(errno.ENOSPC, "No space left on device")
            done.append(args)
            real(*args)

        return call

    monkeypatch.setattr(os, "fsync", full(os.fsync))
    monkeypatch.setattr(os, "replace", full(os.replace))
    monkeypatch.setattr(module, "sync_disk", full(module.sync_disk))
    with pytest.raises(Exception, match="No space left"):
        save_checkpoint(tmp_path, checkpoint(2))
    monkeypatch.undo()
    assert_same(load_checkpoint(tmp_path), checkpoint(1))
    save_checkpoint(tmp_path, checkpoint(2))
    assert_same(load_checkpoint(tmp_path), checkpoint(2))


@pytest.mark.parametrize("name", ["arrays.safetensors", "state.safetensors"])
def test_a_damaged_checkpoint_is_named(tmp_path, name):
    save_checkpoint(tmp_path, checkpoint())
    path = tmp_path / "checkpoint-1" / name
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(
        RunError, match="checkpoint-1: the checkpoint cannot be read"
    ):
        load_checkpoint(tmp_path)
    shutil.rmtree(path.parent)
    with pytest.raises(RunError, match="checkpoint-1"):
        load_checkpoint(tmp_path)


class Everything(FedAvg):
    """Remembers one value of every kind."""

    def __init__(self):
        super().__init__()
        self.nothing = None
        self.number, self.whole, self.flag, self.word = (
            0.1 + 0.2,
            2**70,
            True,
            "x",
        )
        self.infinite = float("inf")
        self.array = np.arange(6.0).reshape(2, 3).T
        self.scalar, self.zero_d = np.float64(1 / 3), np.array(7, np.int16)
        self.tensor = torch.tensor([1.5, -0.0])
        self.pair = (1, (2.5, "three"))
        self.table = {3: np.ones(2), (1, 2): [None, b"\x00\xff"], "is": "dict"}
        self.arrays = ArrayRecord(
            {"b": Array(np.array([1.0, 2.0])), "a": Array(np.array(3))}
        )
        self.metrics, self.config = (
            MetricRecord({"m": [1, 2]}),
            ConfigRecord({"b": b"raw", "s": "t"}),
        )
        self.single = Array(np.array([4, 5], np.uint8))
        self.numpy_generator, self.python_generator = (
            np.random.default_rng(3),
            random.Random(4),
        )
        self.function = lambda: 1


def round_trip(strategy, fresh, folder):
    """Through the disk, as a resumed run does it."""
    state, lost = strategy_state(strategy)
    save_checkpoint(folder, checkpoint(strategy=state))
    restore_strategy(fresh, load_checkpoint(folder).strategy)
    return lost


def test_everything_a_strategy_may_remember_comes_back(tmp_path):
    old, new = Everything(), Everything()
    draws = [old.numpy_generator.normal(), old.python_generator.random()]
    for name in vars(new):
        if name != "function" and not name.endswith(("_generator", "_fn")):
            setattr(new, name, None)
    assert round_trip(old, new, tmp_path) == []
    for name in (
        "number",
        "whole",
        "flag",
        "word",
        "infinite",
        "pair",
        "nothing",
        "fraction_train",
        "weighted_by_key",
    ):
        assert getattr(new, name) == getattr(old, name)
        assert type(getattr(new, name)) is type(getattr(old, name))
    for name in ("array", "zero_d", "scalar", "tensor"):
        np.testing.assert_array_equal(getattr(new, name), getattr(old, name))
        assert type(getattr(new, name)) is type(getattr(old, name))
        assert getattr(new, name).dtype == getattr(old, name).dtype
    np.testing.assert_array_equal(new.table.pop(3), old.table.pop(3))
    assert new.table == old.table
    assert list(new.arrays) == ["b", "a"]
    np.testing.assert_array_equal(new.arrays["b"].numpy(), [1.0, 2.0])
    assert (new.metrics, new.config) == (old.metrics, old.config)
    np.testing.assert_array_equal(new.single.numpy(), old.single.numpy())
    assert new.function() == 1
    assert (
        new.numpy_generator.normal() == old.numpy_generator.normal() != draws[0]
    )
    assert (
        new.python_generator.random() == old.python_generator.random() != draws[1]
    )


def test_what_cannot_be_stored_is_named(tmp_path):
    strategy, fresh = FedAvg(), FedAvg()
    strategy.odd, strategy.names = object(), np.array(["a"], object)
    strategy.fine = 3
    lost = round_trip(strategy, fresh, tmp_path)
    assert lost == ["odd (a object)", "names (an array of object)"]
    assert fresh.fine == 3
    assert not hasattr(fresh, "odd")


def test_a_strategy_with_a_state_of_its_own_is_asked(tmp_path):
    class Own(FedAvg):
        def __init__(self):
            super().__init__()
            self.secret, self.cache = 0, object()

        def state_dict(self):
            return {"secret": self.secret, 5: np.ones(2)}

        def load_state_dict(self, state):
            self.secret, self.five = state["secret"], state[5]

    strategy, fresh = Own(), Own()
    strategy.secret = 42
    assert round_trip(strategy, fresh, tmp_path) == []
    assert fresh.secret == 42
    np.testing.assert_array_equal(fresh.five, np.ones(2))


def test_wrapped_strategies_are_filled_in_where_they_stand(tmp_path):
    options = {
        "noise_multiplier": 0.5,
        "clipping_norm": 1.0,
        "num_sampled_clients": 4,
    }
    old, new = (
        build_strategy(StrategyConfig(name="dp-fixed-clipping", **options))
        for _ in range(2)
    )
    old.strategy.seen = np.arange(3)
    inner = new.strategy
    assert round_trip(old, new, tmp_path) == []
    assert new.strategy is inner
    np.testing.assert_array_equal(inner.seen, np.arange(3))
    np.testing.assert_array_equal(inner.fraction_train, 1.0)


@pytest.mark.parametrize("kind", [FedAdam, FedAvgM])
def test_moments_and_momentum_are_bit_identical(kind, tmp_path):
    values = {"w": np.random.default_rng(0).normal(size=5).astype(np.float32)}
    options = {"server_momentum": 0.9} if kind is FedAvgM else {}
    old, new = kind(**options), kind(**options)
    old.m_t = old.v_t = values
    old.momentum_vector = [values["w"], np.float64(0.1)]
    old.current_arrays = to_record(values)
    assert round_trip(old, new, tmp_path) == []
    assert (
        new.m_t["w"].tobytes() == new.v_t["w"].tobytes() == values["w"].tobytes()
    )
    assert new.momentum_vector[0].tobytes() == values["w"].tobytes()
    assert new.momentum_vector[1] == np.float64(0.1)
    assert new.current_arrays["w"].data == old.current_arrays["w"].data
