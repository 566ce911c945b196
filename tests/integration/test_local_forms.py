"""Real clients whose own data lie in the forms that simulations read."""

import numpy as np
import pytest
from real_clients import run_real_clients

from fedknow.client.data.local import LocalStream
from fedknow.client.learners import resolve
from fedknow.client.node import Node
from fedknow.protocols.config import read_config
from fedknow.server.run.folder import RunFolder

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
    for client, write in enumerate(writers):
        write(path / f"data{client}", client)

    def make_node(config, client):
        return Node(config, LocalStream(path / f"data{client}", config.data))

    run_real_clients(config, path / "run", make_node)
    return RunFolder.open(path / "run")


def test_a_table_is_as_good_as_files_of_tasks(tmp_path, numbers):
    tables = run(tmp_path / "tables", [write_tables, write_tasks])
    tasks = run(tmp_path / "tasks", [write_tasks, write_tasks])
    assert numbers(tables.path) == numbers(tasks.path)
    assert np.isfinite(tables.accuracy()["personal"][:, 0]).all()
