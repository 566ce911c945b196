"""Splits that are written to a file and read again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedknow.client.data import Dataset, make_benchmark
from fedknow.client.data.splits import load_split, save_split
from fedknow.protocols.config import ConfigError, ExperimentConfig, read_config

STREAM = {
    "scenario": "domain-incremental",
    "domain": "season",
    "blur": 0.3,
    "tasks": 3,
    "tasks_min": 2,
    "clients": 3,
    "partition": "iid",
}


def experiment(**data: Any) -> ExperimentConfig:
    return read_config({"seed": 4, "data": data})


@pytest.fixture
def split(tmp_path: Path) -> Path:
    config = experiment(**STREAM)
    made = make_benchmark(config)
    path = tmp_path / "split.npz"
    save_split(path, made.partition, made.dataset, config.data)
    return path


def named(split: Path, **changes: Any) -> ExperimentConfig:
    keys = ("scenario", "domain", "tasks", "clients")
    base = {key: STREAM[key] for key in keys}
    return experiment(**base | changes, split=str(split))


def test_another_run_has_the_same_stream(split: Path) -> None:
    made = make_benchmark(experiment(**STREAM))
    again = make_benchmark(named(split))
    assert again.partition.digest == made.partition.digest
    assert again.partition.summary() == made.partition.summary()
    for client in range(3):
        for task in range(made.length(client)):
            expected = made.task(client, task)
            found = again.task(client, task)
            assert found.train.x.equal(expected.train.x)
            assert found.test.y.equal(expected.test.y)


def test_what_does_not_fit_is_refused(split: Path) -> None:
    with pytest.raises(ConfigError, match=r"set data\.clients = 3"):
        make_benchmark(named(split, clients=4))
    with pytest.raises(ConfigError, match=r"data\.blur = 0\.1 does nothing"):
        named(split, blur=0.1)
    with pytest.raises(ConfigError, match="no such file"):
        make_benchmark(named(split.with_name("other.npz")))


def test_a_changed_file_is_refused(split: Path) -> None:
    with np.load(split) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["train"][0] += 1
    np.savez_compressed(split, **arrays)
    with pytest.raises(ConfigError, match="its digest is wrong"):
        make_benchmark(named(split))
    split.write_bytes(b"no archive")
    with pytest.raises(ConfigError, match="not a file that save_split wrote"):
        make_benchmark(named(split))


def test_other_data_are_refused(split: Path) -> None:
    data = make_benchmark(experiment(**STREAM)).dataset
    other = Dataset.from_arrays(
        "other", data.train_x, data.train_y, data.test_x, np.roll(data.test_y, 1)
    )
    with pytest.raises(ConfigError, match="it is of other data than other"):
        load_split(split, other, named(split).data)
    # Its rows lie beyond the last one of smaller data.
    small = Dataset.from_arrays(
        "small",
        data.train_x[:50],
        data.train_y[:50],
        data.test_x[:50],
        data.test_y[:50],
    )
    with pytest.raises(ConfigError, match="it is of other data than small"):
        load_split(split, small, named(split).data)
