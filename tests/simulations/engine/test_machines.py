"""A cluster whose machines die and come, with disks of their own, and two runs on it."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from fedknow.client.host import Host
from fedknow.client.state import State, StateStore
from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.messages import (
    TRAIN,
    Arrays,
    Config,
    Message,
    Metrics,
    client_of,
    node_of,
)
from fedknow.server.grids.inline import InlineGrid
from fedknow.simulations.engine import pool
from fedknow.simulations.engine.ray_grid import RayGrid

ray.cloudpickle.register_pickle_by_value(
    sys.modules[__name__]
)  # workers cannot import a test module

KILLS = Path(__file__).parents[3] / "benchmarks" / "cluster_kills.py"
CLIENTS = 6
START = Arrays({"w": np.linspace(-1, 1, 64, dtype=np.float32)})
WAIT = 120
"""Seconds that nothing takes, not even on a busy machine."""


@dataclass
class Stream:
    """Stands for the data."""

    clients: int = CLIENTS


class Trainer:
    """Adds what it receives to what it keeps.

    A message's config may name a Ray node on which no machine dies (``spares``): any other one
    dies once, where the file ``marker`` does not exist yet.
    """

    def __init__(self, config: ExperimentConfig, stream: Stream) -> None:
        self.has_machine = ray.is_initialized()

    def handle(self, message: Message, state: State) -> tuple[Message, State]:
        client, config = client_of(message.node), message.config()
        spares = config.get("spares", "")
        marker = Path(config.get("marker", "/"))
        if spares and spares != node_id() and not marker.exists():
            marker.touch()
            # The machine's other processes end when their raylet is gone; so does this one.
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(WAIT)
        received = torch.from_numpy(message.arrays()["w"].copy())
        kept = state.get("kept", torch.full((64,), 1.0 + client)) + received
        metrics = {
            "num-examples": client + 1,
            "process": os.getpid(),
            "machine": node_id() if self.has_machine else "",
        }
        content = {
            "arrays": Arrays({"w": torch.tanh(kept).numpy()}),
            "metrics": Metrics(metrics),
        }
        return message.reply(content), {"kept": kept}


def node_id() -> str:
    return ray.get_runtime_context().get_node_id()


def can_hide_folders():
    """Whether a process may have a disk of its own here."""
    if shutil.which("unshare") is None:
        return False
    line = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(line, capture_output=True).returncode == 0


def load_kills():
    spec = importlib.util.spec_from_file_location("cluster_kills", KILLS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cluster():
    """A head and one further machine, of a core each; deaths are noticed at once."""
    # A short name, as Ray's sockets are in it.
    place = Path(tempfile.mkdtemp(prefix="m"))
    (place / "runs").mkdir()
    hidden = place / "runs" if can_hide_folders() else None
    cluster = load_kills().Cluster(place, hidden, nodes=1, notice=1.5)
    cluster.place = place
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(place))
        patch.delenv("RAY_ADDRESS", raising=False)
        yield cluster
        ray.shutdown()
    cluster.close()
    shutil.rmtree(place, ignore_errors=True)


def config(cluster):
    return ExperimentConfig(engine={"address": cluster.address})


@pytest.fixture(scope="module")
def grid(cluster):
    folder = cluster.place / "runs" / "clients"
    with RayGrid(config(cluster), Stream(), folder, node=Trainer) as grid:
        yield grid


def work(**settings):
    content = {"arrays": START, "config": Config({"task": 0, **settings})}
    return [
        Message(TRAIN, node_of(client), "", content=content)
        for client in range(CLIENTS)
    ]


def numbers(replies):
    return [(reply.node, reply.arrays()["w"].tobytes()) for reply in replies]


def metric(replies, name):
    return {reply.content["metrics"][name] for reply in replies}


def until_on(grid, machines):
    """Repeat a wave until so many machines have worked on it."""
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        if len(metric(grid.exchange(work()), "machine")) == machines:
            return
    raise AssertionError(f"no work on {machines} machines")


def test_a_machine_that_dies_amid_a_wave_changes_nothing(cluster, grid, tmp_path):
    host = Host(
        config(cluster),
        None,
        StateStore(tmp_path, 0),
        Trainer(config(cluster), Stream()),
    )
    inline = InlineGrid(CLIENTS, host)
    assert grid.workers == 2
    head = next(node for node in ray.nodes() if is_head(node))
    settings = {
        "spares": head["NodeID"],
        "marker": str(cluster.place / "died"),
    }
    found = [grid.exchange(work(**kind)) for kind in ({}, settings, {})]
    expected = [numbers(inline.exchange(work())) for _ in range(3)]
    assert [numbers(replies) for replies in found] == expected
    assert (cluster.place / "died").exists()


def is_head(node):
    return "node:__internal_head__" in node["Resources"]


def test_machines_that_come_are_used(cluster, grid):
    (dead,) = cluster.nodes[1:]
    dead.kill()
    dead.restart()
    # In the place of the worker that died.
    until_on(grid, 2)
    assert grid.workers == 2
    cluster.add_node()
    until_on(grid, 3)
    assert grid.workers == 3


def test_a_second_run_waits_for_places_and_says_so(
    cluster, grid, monkeypatch, caplog
):
    """The first holds all cores; the second gets them when it ends."""
    monkeypatch.setattr(pool, "TELL_SECONDS", 0.2)
    second = []

    def run():
        folder = cluster.place / "runs" / "second"
        with RayGrid(config(cluster), Stream(), folder, node=Trainer) as other:
            second.append(numbers(other.exchange(work())))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    deadline = time.monotonic() + WAIT
    while "wait for a place" not in caplog.text:
        assert time.monotonic() < deadline
        # The first one is not held up.
        assert len(grid.exchange(work())) == CLIENTS
    assert not second
    grid.pool.close()
    thread.join(WAIT)
    assert len(second[0]) == CLIENTS
