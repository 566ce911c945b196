"""Secure aggregation over real connections gives the numbers of a simulation, bit for bit."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from fedknow.client.data import make_benchmark
from fedknow.client.edge.client import EdgeClient
from fedknow.client.host import secured
from fedknow.client.node import Node
from fedknow.protocols.config import read_config
from fedknow.server.run.accounting import epsilon_of
from fedknow.server.run.folder import RunFolder
from fedknow.server.serve import serve
from fedknow.simulations.simulate import simulate

WAIT = 120
CONFIG = {
    "data": {
        "clients": 3,
        "tasks": 2,
        "classes_per_task": 2,
        "classes_max": 2,
        "test_samples": 0.5,
    },
    "model": "mlp",
    "train": {"rounds": 2, "epochs": 1},
    "learner": "fedrep",
    "evaluation": {"global_model": False},
    "engine": {"backend": "inline"},
    "privacy": {"secure": True},
}


NOISE = {"clip": 1.0, "noise": 0.5}


@pytest.mark.parametrize("privacy", [{"secure": True}, NOISE])
def test_real_clients_and_simulated_ones_agree(tmp_path, numbers, privacy):
    """With noise, too, where its secrets come from the seed; a real client draws its own."""
    config = read_config(CONFIG | {"privacy": privacy})
    at_work = threading.Lock()

    class OneAtATime:
        """A node; all clients are threads that share torch's generator."""

        def __init__(self, config):
            with at_work:
                self.node = secured(Node(config, make_benchmark(config)), config)

        def handle(self, message, state):
            with at_work:
                return self.node.handle(message, state)

    with ThreadPoolExecutor(3) as threads:
        running = []

        def start(port):
            for client in range(3):
                edge = EdgeClient(
                    f"127.0.0.1:{port}",
                    tmp_path / f"state{client}",
                    client=client,
                    node=OneAtATime,
                )
                running.append(threads.submit(asyncio.run, edge.run()))

        serve(config, tmp_path / "real", "127.0.0.1:0", ready=start)
        for client in running:
            client.result(WAIT)
    simulate(config, tmp_path / "virtual", report=False)
    assert numbers(tmp_path / "real") == numbers(tmp_path / "virtual")
    events = RunFolder.open(tmp_path / "real").events()
    traffic = events[-1]["traffic"]
    assert "evaluate.global" not in traffic
    said = [event.get("epsilon") for event in events if event["event"] == "round"]
    if privacy is NOISE:
        assert said == [
            pytest.approx(epsilon_of(0.5, rounds, 1e-5))
            for rounds in (1, 2, 3, 4)
        ]
        return
    assert said == [None] * 4
    # Twice the bytes of an update, as its numbers have 64 bits. No head has left a device.
    assert traffic["train"]["up"] == pytest.approx(
        2 * traffic["train"]["down"], rel=0.05
    )
