"""The real libraries, without a network."""

import importlib
import importlib.util
import json
import os
import sqlite3

import pytest

from fedknow.protocols.config import ConfigError, TrackingConfig
from fedknow.server.tracking import describe_tracker, list_trackers, registry
from fedknow.server.tracking.replay import TrackingError, track_run
from fedknow.simulations.simulate import simulate


def needs(package):
    # CI installs all of them with the extra dev, and may not skip one.
    is_skipped = (
        "CI" not in os.environ and importlib.util.find_spec(package) is None
    )
    return pytest.mark.skipif(is_skipped, reason=f"{package} is not installed")


ACCURACIES = "evaluation/accuracy"


@pytest.fixture
def expected(plain):
    """Accuracies by step, as the run's record has them."""
    from fedknow.server.run.events import Evaluated, parse
    from fedknow.server.run.folder import RunFolder
    from fedknow.server.tracking.numbers import RunNumbers

    numbers = RunNumbers()
    found = []
    for line in RunFolder.open(plain).events():
        event = parse(line)
        numbers.read(event)
        if isinstance(event, Evaluated):
            found.append((numbers.step, event.accuracy))
    assert len(found) == 2
    return found


@needs("tensorboard")
def test_tensorboard(config, plain, expected, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import (
        EventAccumulator,
    )

    run = tmp_path / "run"
    asked = TrackingConfig(to=["tensorboard"], wait=120)
    simulate(config.model_copy(update={"tracking": asked}), run, report=False)
    assert (run / "accuracy.npz").read_bytes() == (
        plain / "accuracy.npz"
    ).read_bytes()
    # Sent again: the numbers of the first file are void.
    assert track_run(run, "tensorboard") == 9
    read = EventAccumulator(str(run / "tensorboard")).Reload()
    got = [(point.step, point.value) for point in read.Scalars(ACCURACIES)]
    assert got == [(step, pytest.approx(value)) for step, value in expected]
    assert len(read.Scalars("round/loss")) == 4


@needs("mlflow")
@pytest.mark.parametrize("store", ["sqlite", "file"])
def test_mlflow(plain, expected, tmp_path, monkeypatch, store):
    address = {
        "sqlite": f"sqlite:///{tmp_path}/mlflow.db",
        "file": (tmp_path / "mlruns").as_uri(),
    }[store]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert track_run(plain, "mlflow", "a project") == 9
    from mlflow import MlflowClient

    client = MlflowClient(address)
    experiment = client.get_experiment_by_name("a project")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("plain", "FINISHED")
    assert run.data.params["learner.name"] == "fedavg"
    history = client.get_metric_history(run.info.run_id, ACCURACIES)
    assert [(point.step, point.value) for point in history] == expected


@needs("wandb")
def test_wandb(config, plain, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    asked = TrackingConfig(to=["wandb"], wait=120)
    simulate(config.model_copy(update={"tracking": asked}), run, report=False)
    assert (run / "accuracy.npz").read_bytes() == (
        plain / "accuracy.npz"
    ).read_bytes()
    # Its service writes the file, and has written all once it is gone.
    importlib.import_module("wandb").teardown()
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert b"evaluation/accuracy" in content
    assert b"server_round" in content


@needs("wandb")
def test_wandb_does_not_ask_for_a_key(plain, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(TrackingError, match="not logged in: run `wandb login`"):
        track_run(plain, "wandb")


@needs("trackio")
def test_trackio(plain, expected, tmp_path, monkeypatch):
    from trackio import utils

    monkeypatch.setattr(utils, "TRACKIO_DIR", tmp_path)
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path)
    assert track_run(plain, "trackio") == 9
    (file,) = tmp_path.glob("*.db")
    with sqlite3.connect(file) as store:
        rows = store.execute(
            "select step, metrics from metrics order by id"
        ).fetchall()
    got = []
    for step, text in rows:
        values = json.loads(text)
        if ACCURACIES in values:
            got.append((step, values[ACCURACIES]))
    assert got == expected


def test_one_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[mlflow\]'"):
        registry.check_trackers(["mlflow"])
    assert "not installed: the extra wandb" in list_trackers()["wandb"]


def test_each_is_described():
    for name in ("tensorboard", "mlflow", "wandb", "trackio"):
        assert name in list_trackers()
        assert describe_tracker(name).facts["Needs"] == f"the extra {name}"
