"""The presets of sensors, speech and sentences, in short form."""

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fedknow.client.data import make_benchmark
from fedknow.client.edge.client import EdgeClient
from fedknow.client.learners import resolve
from fedknow.client.node import Node
from fedknow.server.run.folder import RunFolder
from fedknow.server.serve import serve
from fedknow.simulations.presets import load_preset
from fedknow.simulations.simulate import simulate

pytestmark = pytest.mark.usefixtures("no_report")

CHANCE = {"har-wharf": 1 / 2, "speech-digits": 1 / 2, "clinc150": 1 / 15}
"""Share of right answers by a guess among the classes of a task."""
PRESETS = list(CHANCE)
SHORT = [
    "train.rounds=1",
    "train.epochs=1",
    "data.tasks=2",
    # Real clients keep their heads at home unless told otherwise.
    "evaluation.global_model=true",
]


def experiment(preset, *changes):
    inline = "engine.backend=inline"
    return resolve(load_preset(preset, [inline, *SHORT, *changes]))


@pytest.fixture
def generated(tmp_path, monkeypatch, parts):
    """Generated files in the place of the published ones."""
    monkeypatch.syspath_prepend(parts)
    pytest.importorskip("pyarrow")
    public_files = pytest.importorskip("public_files")
    folder = tmp_path / "data"
    folder.mkdir()
    public_files.write_all(folder)
    monkeypatch.setenv("FEDKNOW_DATA", str(folder))


def run_real_clients(config, folder):
    """Run with real clients over real sockets."""
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

    with ThreadPoolExecutor(config.data.clients) as threads:

        def start(port):
            for client in range(config.data.clients):
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


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.usefixtures("generated")
def test_real_clients_come_to_the_same(tmp_path, numbers, preset):
    config = experiment(preset)
    expected = simulate(config, tmp_path / "inline").folder
    accuracy = RunFolder.open(expected).accuracy()["personal"]
    assert np.isfinite(accuracy[:, 0, 0]).all()
    run_real_clients(config, tmp_path / "real")
    assert numbers(tmp_path / "real") == numbers(expected)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.usefixtures("generated")
def test_workers_come_to_the_same(tmp_path, numbers, preset):
    expected = simulate(experiment(preset), tmp_path / "inline").folder
    on_ray = experiment(preset, "engine.backend=ray", "engine.workers=2")
    simulate(on_ray, tmp_path / "ray")
    assert numbers(tmp_path / "ray") == numbers(expected)


@pytest.mark.data
@pytest.mark.skipif(
    "FEDKNOW_DATA" not in os.environ, reason="FEDKNOW_DATA is not set"
)
@pytest.mark.parametrize("preset", PRESETS)
def test_published_files(tmp_path, preset):
    """Better than a guess, on samples held out."""
    changes = ["data.holdout=0.25", "learner=fedavg", "train.rounds=3"]
    config = experiment(preset, *changes)
    run = RunFolder.open(simulate(config, tmp_path / "run").folder)
    accuracy = np.nanmean(run.accuracy()["global"][:, 0, 0])
    assert accuracy > 1.2 * CHANCE[preset]
