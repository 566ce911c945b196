import json

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAvg

import fedknow
from fedknow.client.data import make_benchmark
from fedknow.client.learners.baselines import FedRep

SMALL = {
    "data": {"clients": 3, "tasks": 2},
    "train": {"rounds": 2, "epochs": 1},
    "engine": {"backend": "inline"},
}


class Mine(fedknow.Learner):
    """A learner like plain training."""

    def gradient(self, batch):
        return super().gradient(batch)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    return fedknow.simulate(
        "digits", learner="fedrep", out=out, report=True, **SMALL
    )


def test_its_numbers_are_those_of_the_folder(run):
    assert run.status == "complete"
    assert run.accuracy.shape == run.global_accuracy.shape == (3, 2, 2)
    with np.load(run.path / "accuracy.npz") as file:
        np.testing.assert_array_equal(run.accuracy, file["personal"])
    again = fedknow.load_run(run.path)
    assert again.measures == pytest.approx(run.measures, nan_ok=True)
    assert (run.path / "report.html").is_file()


def test_an_objects_run_is_that_of_the_named_parts(tmp_path):
    named = "flwr.serverapp.strategy:FedAvg"
    expected = fedknow.simulate(
        "digits", learner="fedrep", strategy=named, out=tmp_path / "a", **SMALL
    )
    same = fedknow.simulate(
        "digits", learner=FedRep, strategy=FedAvg(), out=tmp_path / "b", **SMALL
    )
    np.testing.assert_array_equal(same.accuracy, expected.accuracy)


def test_a_model_scores_as_the_run_says(run):
    benchmark = make_benchmark(run.config)
    model = run.model(client=1)
    data = benchmark.task(1, 1)
    with torch.no_grad():
        answers = model(data.test.x)[:, list(data.head)].argmax(1)
    labels = torch.tensor([data.head.index(int(label)) for label in data.test.y])
    assert (answers == labels).double().mean().item() == run.accuracy[1, 1, 1]


def test_the_global_model_has_the_mean_head(run):
    benchmark = make_benchmark(run.config)
    model = run.model()
    for client in range(3):
        data = benchmark.task(client, 1)
        with torch.no_grad():
            answers = model(data.test.x)[:, list(data.head)].argmax(1)
        labels = torch.tensor(
            [data.head.index(int(label)) for label in data.test.y]
        )
        score = (answers == labels).double().mean().item()
        assert score == run.global_accuracy[client, 1, 1]


def test_tables_and_plots(run):
    pandas = pytest.importorskip("pandas")
    table = run.table("evaluation")
    assert isinstance(table, pandas.DataFrame)
    assert list(table["task"]) == [0, 1]
    assert len(run.plot("matrix").axes) >= 1
    with pytest.raises(fedknow.ConfigError, match="matrix"):
        run.plot("nothing")
    assert "digits with fedrep (complete)" in run._repr_html_()
    assert "fedrep" in repr(run)


def test_no_such_client(run):
    with pytest.raises(
        fedknow.ConfigError, match="client = 3: the run has 3 clients"
    ):
        run.model(client=3)


def test_callbacks_see_the_run_and_can_stop_it(tmp_path):
    class Stop(fedknow.Callback):
        def __init__(self):
            self.rounds = []

        def on_round_end(self, event):
            self.rounds.append(event.server_round)
            if event.server_round == 3:
                raise fedknow.StopRun("enough")

    stop = Stop()
    out = tmp_path / "run"
    stopped = fedknow.simulate(
        "digits", learner="fedrep", out=out, callbacks=[stop], **SMALL
    )
    assert stopped.status == "interrupted"
    assert stop.rounds == [1, 2, 3]
    resumed = fedknow.simulate(
        "digits", learner="fedrep", out=out, resume=True, **SMALL
    )
    whole = fedknow.simulate(
        "digits", learner="fedrep", out=tmp_path / "whole", **SMALL
    )
    np.testing.assert_array_equal(resumed.accuracy, whole.accuracy)


def test_early_stopping_waits_for_its_patience(tmp_path):
    early = fedknow.EarlyStopping("accuracy", patience=2, min_delta=2.0)
    run = fedknow.simulate(
        "digits",
        evaluation={"every": 1},
        out=tmp_path / "run",
        callbacks=[early],
        **SMALL | {"train": {"rounds": 5, "epochs": 1}},
    )
    # The first evaluation of a task is the best so far; the next two are no gain of 2.
    assert [
        event["round"] for event in run.events if event["event"] == "evaluation"
    ] == [1, 2, 3]
    assert run.status == "interrupted"


def test_the_best_model_is_that_of_the_best_evaluation(tmp_path):
    best = fedknow.KeepBest("accuracy_global")
    run = fedknow.simulate(
        "digits",
        learner="fedavg",
        evaluation={"every": 1},
        out=tmp_path / "run",
        callbacks=[best],
        **SMALL,
    )
    scores = [
        event["accuracy_global"]
        for event in run.events
        if event["event"] == "evaluation"
    ]
    assert best.best == max(scores)
    task = [e["task"] for e in run.events if e["event"] == "evaluation"][
        int(np.argmax(scores))
    ]
    benchmark = make_benchmark(run.config)
    model = run.model(best=True)
    right = total = 0
    for client in range(3):
        for seen in range(task + 1):
            data = benchmark.task(client, seen)
            with torch.no_grad():
                answers = model(data.test.x)[:, list(data.head)].argmax(1)
            labels = torch.tensor(
                [data.head.index(int(label)) for label in data.test.y]
            )
            right += int((answers == labels).sum())
            total += len(labels)
    assert right / total == pytest.approx(max(scores), abs=0.02)


def test_the_source_of_a_learner_of_ones_own_is_recorded(tmp_path):
    class Local(Mine):
        """Of this test."""

    run = fedknow.simulate("digits", learner=Local, out=tmp_path / "run", **SMALL)
    recorded = json.loads((run.path / "parts.json").read_text())
    assert recorded["learner.name"]["name"] == run.config.learner.name
    assert "class Local(Mine)" in recorded["learner.name"]["sources"][0]


def test_an_object_runs_on_ray_as_inline(tmp_path):
    class Local(Mine):
        """Of this test."""

    inline = fedknow.simulate(
        "digits", learner=Local, out=tmp_path / "inline", **SMALL
    )
    on_ray = SMALL | {"engine": {"backend": "ray", "workers": 2}}
    ray = fedknow.simulate(
        "digits", learner=Local, out=tmp_path / "ray", **on_ray
    )
    np.testing.assert_array_equal(ray.accuracy, inline.accuracy)


def test_a_comparison(tmp_path):
    result = fedknow.compare(
        "digits", ["fedavg", Mine], 1, out=tmp_path / "c", **SMALL
    )
    assert len(result.groups) == 2
    assert not result.failures
    runs = list(result.runs.values())
    np.testing.assert_array_equal(runs[0].accuracy, runs[1].accuracy)
    assert "<table>" in result._repr_html_()
    assert len(result.plot("accuracy").axes) >= 1
