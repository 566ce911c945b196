"""Partly trained networks: the same bits inline, on Ray and with real clients."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from fedknow.client.data import make_benchmark
from fedknow.client.edge.client import EdgeClient
from fedknow.client.learners import resolve
from fedknow.client.node import Node
from fedknow.protocols.config import read_config
from fedknow.server.serve import serve
from fedknow.simulations.simulate import simulate

pytestmark = pytest.mark.usefixtures("no_report")

CLIENTS = 2
BASE = {
    "data": {"clients": CLIENTS, "tasks": 2, "partition": "iid"},
    "model": {"name": "cnn6"},
    "train": {"rounds": 1, "epochs": 1, "batch_size": 64, "lr": 1e-2},
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


def run_real_clients(config, folder):
    at_work = threading.Lock()
    clients = []

    class OneAtATime:
        """A node; the clients are threads here, which share torch's generator."""

        def __init__(self, config):
            with at_work:
                self.node = Node(config, make_benchmark(config))

        def handle(self, message, state):
            with at_work:
                return self.node.handle(message, state)

    with ThreadPoolExecutor(CLIENTS) as threads:

        def start(port):
            for client in range(CLIENTS):
                edge = EdgeClient(
                    f"127.0.0.1:{port}",
                    folder.with_name(f"state{client}"),
                    client=client,
                    node=OneAtATime,
                )
                clients.append(threads.submit(asyncio.run, edge.run()))

        serve(config, folder, "127.0.0.1:0", ready=start)
        for client in clients:
            client.result(120)


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
