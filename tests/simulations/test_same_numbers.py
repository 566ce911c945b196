"""The same seed gives the same numbers, bit for bit, on any number of workers, in one process, and if a worker dies."""

import os
import signal

import numpy as np
import psutil
import pytest
import ray

from fedknow.client.state import StateStore
from fedknow.protocols.config import read_config
from fedknow.simulations import simulate as module

SMALL = {
    "seed": 5,
    "data": {"tasks": 3, "clients": 7, "classes_max": 2, "samples": 0.1, "test_samples": 0.5},
    "train": {"rounds": 2, "epochs": 2, "batch_size": 8},
    "learner": "fedknow",
    "strategy": {"name": "fedadam", "fraction": 0.5},
}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture(scope="module", autouse=True)
def no_report():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "write_report", lambda *_: None)  # it takes longer than the run
        yield


def run(folder, observers=(), **engine):
    result = module.simulate(read_config({**SMALL, "engine": engine}), folder, observers=observers)
    return result.accuracy, result.arrays


@pytest.fixture(scope="module")
def inline(tmp_path_factory):
    return run(tmp_path_factory.mktemp("inline") / "run", backend="inline")


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):  # accuracies, then the final global parameters
        assert list(x) == list(y)
        for name in x:
            assert x[name].dtype == y[name].dtype
            np.testing.assert_array_equal(x[name], y[name], err_msg=name)


def test_the_run_says_something(inline):
    personal = inline[0]["personal"]
    trained, seen = np.tril_indices(3)
    assert np.isfinite(personal[:, seen, trained]).all()
    assert len(np.unique(personal[:, seen, trained])) > 5


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_do_not_matter(tmp_path, inline, workers):
    assert_same(run(tmp_path / "run", workers=workers), inline)


def test_whether_states_are_at_hand_or_read_back_does_not_matter(tmp_path, inline, monkeypatch):
    monkeypatch.setattr(module, "StateStore", lambda folder, memory: StateStore(folder, 0))
    assert_same(run(tmp_path / "run", backend="inline"), inline)


def test_a_worker_that_is_killed_does_not_matter(tmp_path, inline):
    killed = []

    def kill_one(event):
        if event["event"] == "round" and event["server_round"] in (2, 4):
            family = psutil.Process().children(recursive=True)
            workers = [process for process in family if process.name().startswith("ray::Worker")]
            os.kill(workers[0].pid, signal.SIGKILL)
            killed.append(workers[0].pid)

    assert_same(run(tmp_path / "run", [kill_one], workers=2), inline)
    assert len(killed) == 2
