"""Real clients whose own data lie in the forms that simulations read."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fedknow.client.data.local import LocalStream
from fedknow.client.edge.client import EdgeClient
from fedknow.client.learners import resolve
from fedknow.client.node import Node
from fedknow.protocols.config import read_config
from fedknow.server.run.folder import RunFolder
from fedknow.server.serve import serve

pytestmark = pytest.mark.usefixtures("no_report")

BASE = {
    "data": {
        "name": "local",
        "clients": 2,
        "tasks": 2,
        "kind": "table",
        "shape": [3],
        "class_names": ["lie", "run", "sit", "walk"],
        "input": ["x", "y", "z"],
        "label": "activity",
    },
    "model": {"name": "mlp"},
    "train": {"rounds": 1, "epochs": 1, "batch_size": 8, "lr": 1e-2},
    "learner": {"name": "er"},
}


def samples(client):
    """Give 80 rows of numbers and their classes, the fifth of each class for testing."""
    draws = np.random.default_rng(client)
    y = np.arange(80) % 4
    x = (draws.normal(size=(80, 3)) + y[:, None]).astype(np.float32)
    return x, y, np.arange(80) // 4 % 5 == 4


def write_tables(folder, client):
    """Write a Parquet file where the hub's copies have it, without a split."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    x, y, _ = samples(client)
    names = np.array(BASE["data"]["class_names"])[y]
    columns = dict(zip("xyz", x.T, strict=True)) | {"activity": names}
    (folder / "data").mkdir(parents=True)
    parquet.write_table(arrow.table(columns), folder / "data" / "train-0.parquet")


def write_tasks(folder, client):
    """Write the files ``task-000.npz``, ... of the same samples."""
    folder.mkdir(parents=True)
    x, y, is_test = samples(client)
    for task in range(2):
        is_here = y // 2 == task
        np.savez(
            folder / f"task-{task:03d}.npz",
            train_x=x[is_here & ~is_test],
            train_y=y[is_here & ~is_test],
            test_x=x[is_here & is_test],
            test_y=y[is_here & is_test],
        )


def run(path, writers):
    config = resolve(read_config(BASE))
    at_work = threading.Lock()

    class OneAtATime:
        """A node; the clients are threads here, which share torch's generator."""

        def __init__(self, config, place):
            with at_work:
                self.node = Node(config, LocalStream(place, config.data))

        def handle(self, message, state):
            with at_work:
                return self.node.handle(message, state)

    clients = []
    with ThreadPoolExecutor(2) as threads:

        def start(port):
            for client, write in enumerate(writers):
                place = path / f"data{client}"
                write(place, client)
                edge = EdgeClient(
                    f"127.0.0.1:{port}",
                    path / f"state{client}",
                    client=client,
                    node=lambda config, place=place: OneAtATime(config, place),
                )
                clients.append(threads.submit(asyncio.run, edge.run()))

        serve(config, path / "run", "127.0.0.1:0", ready=start)
        for client in clients:
            client.result(120)
    return RunFolder.open(path / "run")


def test_a_table_is_as_good_as_files_of_tasks(tmp_path, numbers):
    tables = run(tmp_path / "tables", [write_tables, write_tasks])
    tasks = run(tmp_path / "tasks", [write_tasks, write_tasks])
    assert numbers(tables.path) == numbers(tasks.path)
    assert np.isfinite(tables.accuracy()["personal"][:, 0]).all()
