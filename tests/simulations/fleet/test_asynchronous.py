"""Asynchronous strategies in virtual time, with real learners on imagined devices."""

import numpy as np
import pytest

from fedknow.protocols.config import read_config
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.simulate import simulate

BASE = {
    "data": {"clients": 4, "tasks": 2, "classes_max": 2, "test_samples": 0.5},
    "train": {"rounds": 2, "epochs": 1, "batch_size": 8, "lr": 3e-3},
    "learner": {"name": "finetune"},
    "engine": {"backend": "inline"},
}
MIXED = {"devices": {"jetson-tx2": 2, "jetson-nano": 2}, "up": 1e5, "down": 1e5}
ASYNCHRONOUS = [
    ("fedasync", {}),
    ("fedbuff", {"buffer": 2}),
    ("semisync", {"deadline": 1.0}),
]


def run(out, strategy, fleet, *changes, **options):
    tree = {**BASE, "strategy": {"name": strategy, **options}} | (
        {"fleet": fleet} if fleet else {}
    )
    return simulate(read_config(tree, changes), out, report=False)


def rounds(out):
    return [
        event
        for event in RunFolder.open(out).events()
        if event["event"] == "round"
    ]


def assert_same(a, b):
    for name, array in a.arrays.items():
        np.testing.assert_array_equal(array, b.arrays[name])
    for name, array in a.accuracy.items():
        np.testing.assert_array_equal(array, b.accuracy[name])


@pytest.mark.parametrize(("name", "options"), ASYNCHRONOUS)
def test_devices_that_take_no_time_change_nothing(tmp_path, name, options):
    with_fleet = run(tmp_path / "a", name, {"devices": "infinite"}, **options)
    assert_same(with_fleet, run(tmp_path / "b", name, None, **options))
    assert rounds(tmp_path / "a")[-1]["virtual_seconds"] == 0


def test_a_deadline_without_a_clock_is_warned_of(tmp_path):
    def warned(out, *arguments, **options):
        run(out, *arguments, **options)
        return [
            event["reason"]
            for event in RunFolder.open(out).events()
            if event["event"] == "warning"
        ]

    (reason,) = warned(tmp_path / "a", "semisync", None)
    assert (
        "strategy semisync goes by the clock, which stands still here" in reason
    )
    assert "set fleet.devices" in reason
    assert warned(tmp_path / "b", "semisync", MIXED) == []
    assert warned(tmp_path / "c", "fedbuff", None, buffer=2) == []
    same = [run(tmp_path / name, name, None) for name in ("semisync", "fedavg")]
    assert_same(*same)


def test_with_everybody_in_the_buffer_fedbuff_is_fedavg_and_takes_as_long(
    tmp_path,
):
    a, b = (
        run(tmp_path / "a", "fedavg", MIXED),
        run(tmp_path / "b", "fedbuff", MIXED, buffer=4),
    )
    assert_same(a, b)
    ours, theirs = (
        [event["virtual_seconds"] for event in rounds(tmp_path / folder)]
        for folder in "ab"
    )
    assert ours == pytest.approx(theirs)
    assert ours[0] > 0


def test_with_everybody_in_the_buffer_fedbuff_is_fedavg_on_ray_too(tmp_path):
    workers = ["engine.backend=ray", "engine.workers=2"]
    a = run(tmp_path / "a", "fedavg", None)
    b = run(tmp_path / "b", "fedbuff", None, *workers, buffer=4, concurrency=4)
    assert_same(a, b)


def test_whoever_is_quick_does_not_wait_for_the_slow(tmp_path):
    run(tmp_path / "a", "fedavg", MIXED)
    run(tmp_path / "b", "fedbuff", MIXED, "train.rounds=4", buffer=2)
    a, b = rounds(tmp_path / "a"), rounds(tmp_path / "b")
    assert (
        a[-1]["traffic"]["train"]["messages"]
        == b[-1]["traffic"]["train"]["messages"]
        == 16
    )
    assert b[0]["virtual_seconds"] < a[0]["virtual_seconds"]
    assert max(event["metrics"]["staleness-max"] for event in b) >= 1


@pytest.mark.parametrize(("name", "options"), ASYNCHRONOUS)
def test_numbers_and_times_do_not_depend_on_workers(tmp_path, name, options):
    workers = ["engine.backend=ray", "engine.workers=2"]
    fleet = {**MIXED, "compute_sigma": 0.5, "dropout": 0.2}
    a, b = (
        run(tmp_path / "a", name, fleet, **options),
        run(tmp_path / "b", name, fleet, *workers, **options),
    )
    assert_same(a, b)
    ours, theirs = (
        [event["virtual_seconds"] for event in rounds(tmp_path / folder)]
        for folder in "ab"
    )
    assert ours == theirs


def test_scoring_on_the_way_takes_no_time_and_changes_nothing(tmp_path):
    a = run(tmp_path / "a", "fedbuff", MIXED, "train.rounds=4", buffer=2)
    b = run(
        tmp_path / "b",
        "fedbuff",
        MIXED,
        "train.rounds=4",
        "evaluation.every=1",
        buffer=2,
    )
    for name, array in a.arrays.items():
        np.testing.assert_array_equal(array, b.arrays[name])
    evaluations = [
        e["virtual_seconds"]
        for e in RunFolder.open(tmp_path / "b").events()
        if e["event"] == "evaluation"
    ]
    assert len(evaluations) == 8
    assert evaluations == [
        event["virtual_seconds"] for event in rounds(tmp_path / "a")
    ]


def test_tasks_that_arrive_one_client_after_the_other(tmp_path):
    staggered = ["data.arrival=staggered", "data.arrival_lag=3"]
    result = run(tmp_path / "a", "fedavg", MIXED, *staggered)
    times = [event["virtual_seconds"] for event in rounds(tmp_path / "a")]
    assert len(times) == 2 * 2 + 3
    assert times == sorted(times)
    assert times[0] > 0
    assert np.isfinite(result.accuracy["personal"][:, :, -1]).all()
