"""People held out, through whole runs: their scores are those of the global model."""

import numpy as np
import pytest
import torch

import fedknow
from fedknow.client.data import Column, Dataset, load_dataset
from fedknow.protocols.config import ConfigError, DataConfig
from fedknow.server.reports.page import write_report
from fedknow.server.run.folder import RunFolder
from fedknow.server.run.held_out import person_accuracy
from fedknow.simulations.simulate import simulate

PERSON = [3, 5]
"""People who are held out."""


def drawers(config):
    """Give digits with a drawer for each sample; drawer 3 drew no 0."""
    digits = load_dataset(DataConfig())
    values = []
    for y in (digits.train_y, digits.test_y):
        drawer = np.arange(len(y)) % 7
        drawer[(y == 0) & (drawer == 3)] = 4
        values.append(drawer)
    return Dataset.from_arrays(
        "drawn digits",
        digits.train_x,
        digits.train_y,
        digits.test_x,
        digits.test_y,
        columns={"drawer": Column.from_values(*values)},
    )


def experiment(**changes):
    data = {
        "name": drawers,
        "clients": 3,
        "tasks": 2,
        "partition": "natural",
        "client_column": "drawer",
        "held_out": [str(person) for person in PERSON],
        "classes_per_task": 1,
    }
    return fedknow.experiment(
        "digits",
        data=data | changes.pop("data", {}),
        model={"name": "mlp"},
        train={"rounds": 1, "batch_size": 32, "lr": 1e-2},
        engine={"backend": "inline"},
        **changes,
    )


def accuracy_by_hand(run, label):
    """Tell the samples of one class of each person among all classes so far."""
    data = drawers(None)
    rows = {}
    for person in PERSON:
        parts = []
        for part in ("train", "test"):
            y = getattr(data, f"{part}_y")
            is_theirs = getattr(data.columns["drawer"], part) == person
            parts.append(getattr(data, f"{part}_x")[is_theirs & (y == label)])
        rows[person] = np.concatenate(parts)
    model = run.model()
    scores = []
    for x in rows.values():
        mean, std = data.mean[0], data.std[0]
        with torch.no_grad():
            z = model((torch.from_numpy(x) / 255 - mean) / std)[:, :2]
        scores.append((z.argmax(1) == label).double().mean().item())
    return scores


@pytest.mark.parametrize("learner", ["fedavg", "fedrep"])
def test_the_global_model_is_scored_on_them(tmp_path, learner):
    config = experiment(learner=learner, data={"scenario": "class-incremental"})
    run = fedknow.simulate(config, out=tmp_path / "run")
    accuracy = np.stack(list(run.held_out_accuracy.values()))
    assert list(run.held_out_accuracy) == ["3", "5"]
    assert accuracy.shape == (2, 2, 2)
    # The one with personal heads is scored with their mean, as `Run.model` has it.
    for label in (0, 1):
        expected = accuracy_by_hand(run, label)
        np.testing.assert_allclose(accuracy[:, label, 1], expected)
    # Drawer 3 has no 0, and nobody is scored on a task to come.
    assert np.isnan(accuracy[0, 0]).all()
    assert np.isnan(accuracy[:, 1, 0]).all()
    events = [event for event in run.events if event["event"] == "people"]
    assert [event["task"] for event in events] == [0, 1]
    assert events[1]["people"] == ["3", "5"]
    assert events[1]["per_person"] == person_accuracy(accuracy)[:, 1].tolist()
    assert run.measures["accuracy_held_out"] == events[1]["accuracy"]
    page = write_report([RunFolder.open(run.path)], tmp_path / "report")
    assert "people held out" in page.read_text()


def test_a_resumed_run_has_all_scores(tmp_path):
    def stop(event):
        if event.event == "people":
            raise fedknow.StopRun

    config = experiment(learner="fedavg")
    whole = fedknow.simulate(config, out=tmp_path / "whole")
    fedknow.simulate(config, out=tmp_path / "cut", callbacks=[stop])
    again = fedknow.simulate(config, out=tmp_path / "cut", resume=True)
    np.testing.assert_array_equal(
        again.arrays["held_out"], whole.arrays["held_out"]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation": {"global_model": False}}, "evaluation.global_model = t"),
        ({"learner": "apfl"}, "choose another learner"),
    ],
)
def test_where_no_global_model_is_scored_it_is_refused(
    tmp_path, changes, message
):
    with pytest.raises(ConfigError, match=message):
        simulate(experiment(**changes), tmp_path / "run")


def test_without_people_nothing_is_said(tmp_path):
    config = experiment(learner="fedavg", data={"held_out": 0.0})
    run = fedknow.simulate(config, out=tmp_path / "run")
    assert run.held_out_accuracy == {}
    assert "held_out" not in run.arrays
    assert np.isnan(run.measures["accuracy_held_out"])
