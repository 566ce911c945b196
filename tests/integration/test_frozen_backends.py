"""Partly trained networks: the same bits inline, on Ray and with real clients."""

import pytest
from real_clients import run_real_clients

from fedknow.client.learners import resolve
from fedknow.protocols.config import read_config
from fedknow.simulations.simulate import simulate

pytestmark = pytest.mark.usefixtures("no_report")

CLIENTS = 2
BASE = {
    "data": {
        "clients": CLIENTS,
        "tasks": 2,
        "partition": "iid",
        "samples": 0.2,
        "test_samples": 0.2,
    },
    "model": {"name": "cnn6"},
    "train": {"rounds": 1, "epochs": 1, "batch_size": 16, "lr": 1e-2},
    "learner": {"name": "er"},
    "engine": {"backend": "inline"},
    # Real clients keep their heads at home unless this is asked for.
    "evaluation": {"global_model": True},
}
WAYS = {
    "frozen": ["model.train=head", "model.neck=8", "model.cache_features=true"],
    "last": ["model.train=last:1"],
    "lora": ["model.train=lora", "model.lora_rank=2"],
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKNOW_CACHE", str(tmp_path / "cache"))


def experiment(way, *changes):
    return resolve(read_config(BASE, [*WAYS[way], *changes]))


@pytest.mark.parametrize("way", WAYS)
def test_real_clients_come_to_the_same(tmp_path, numbers, way):
    expected = simulate(experiment(way), tmp_path / "inline").folder
    run_real_clients(experiment(way), tmp_path / "real")
    assert numbers(tmp_path / "real") == numbers(expected)


def test_workers_come_to_the_same(tmp_path, numbers):
    # One cluster for all ways, as starting it takes longer than they do.
    for way in WAYS:
        expected = simulate(experiment(way), tmp_path / f"{way}-inline").folder
        on_ray = experiment(way, "engine.backend=ray", "engine.workers=2")
        simulate(on_ray, tmp_path / f"{way}-ray")
        assert numbers(tmp_path / f"{way}-ray") == numbers(expected)
