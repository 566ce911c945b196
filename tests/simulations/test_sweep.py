"""A search over any setting: what it tries, what it keeps, and how it goes on."""

import json
import math

import pytest
from typer.testing import CliRunner

import fedknow
from fedknow.cli.app import app
from fedknow.protocols.config import ConfigError, read_config
from fedknow.server.run.folder import RunFolder
from fedknow.simulations import sweep as module
from fedknow.simulations.proposals import Trial
from fedknow.simulations.space import read_space
from fedknow.simulations.sweep import SweepRequest, best_trial, sweep

SMALL = {
    "data": {"clients": 2, "tasks": 1},
    "train": {"rounds": 1, "epochs": 1},
    "learner": "fedavg",
    "model": "mlp",
    "engine": {"backend": "inline"},
}
OVER = ["train.lr=log:1e-4..1e-1", "train.epochs=int:1..4", "model=mlp,linear"]


@pytest.fixture
def pretended(monkeypatch):
    """Runs cost nothing: the best learning rate is 0.01, and each epoch costs a little."""

    def score(number, settings, plans, failure):
        distance = abs(math.log10(settings["train.lr"]) + 2)
        accuracy = 0.9 - 0.1 * distance - 0.01 * settings["train.epochs"]
        return Trial(number, settings, accuracy, None, failure)

    monkeypatch.setattr(module, "_run", lambda plans, watch: "")
    monkeypatch.setattr(module, "_score", score)
    monkeypatch.setattr(module, "prepare", lambda config, benchmark: None)


def request(trials, sampler="tpe", over=OVER):
    return SweepRequest(read_space(over), trials, sampler=sampler)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_search_that_was_interrupted_tries_the_same(
    pretended, tmp_path, sampler
):
    config = read_config(SMALL)
    whole = sweep(config, request(10, sampler), tmp_path / "whole")
    sweep(config, request(4, sampler), tmp_path / "parts")
    assert sweep(config, request(10, sampler), tmp_path / "parts") == whole
    other = sweep(
        read_config(SMALL, ["seed=1"]), request(10, sampler), tmp_path / "other"
    )
    assert [trial.settings for trial in other] != [t.settings for t in whole]
    for trial in whole:
        assert 1e-4 <= trial.settings["train.lr"] <= 1e-1
        assert trial.settings["train.epochs"] in (1, 2, 3, 4)
        assert trial.settings["model"] in ("mlp", "linear")


def test_tpe_comes_nearer_than_chance(pretended, tmp_path):
    config = read_config(SMALL)
    found = {
        sampler: sweep(config, request(30, sampler), tmp_path / sampler)
        for sampler in ("tpe", "random")
    }
    means = {
        sampler: sum(trial.accuracy for trial in trials[10:]) / 20
        for sampler, trials in found.items()
    }
    assert means["tpe"] > means["random"] + 0.02


def test_a_grid_is_tried_in_order(pretended, tmp_path):
    over = ["train.lr=log:1e-3..1e-1/3", "train.epochs=1,2"]
    trials = sweep(
        read_config(SMALL), request(6, "grid", over), tmp_path / "grid"
    )
    settings = [tuple(trial.settings.values()) for trial in trials]
    assert settings == [(lr, e) for lr in (1e-3, 1e-2, 1e-1) for e in (1, 2)]
    assert best_trial(trials).settings == {"train.lr": 1e-2, "train.epochs": 1}


@pytest.mark.parametrize(
    ("over", "trials", "sampler", "words"),
    [
        (["train.lr=log:1e-4..1e-1"], 9, "grid", "a grid needs points"),
        (["train.epochs=int:1..9"], 8, "grid", "has 9 points, and --runs = 8"),
        (
            ["train.lr=log:1e-4..100"],
            9,
            "tpe",
            "train.lr is searched at 100.0",
        ),
        (["train.rl=log:1e-4..1"], 9, "tpe", "unknown key; did you|unknown key"),
        (["learner=fedavg,fedavgg"], 9, "tpe", "fedavgg"),
        (["train.lr=1e-3,1e-2"], 9, "annealing", "sampler = 'annealing'"),
    ],
)
def test_what_cannot_be_searched_is_refused_before(
    tmp_path, over, trials, sampler, words
):
    config = read_config(SMALL)
    with pytest.raises(ConfigError, match=words):
        sweep(config, request(trials, sampler, over), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_search_in_the_folder_is_refused(pretended, tmp_path):
    config = read_config(SMALL)
    sweep(config, request(2), tmp_path)
    with pytest.raises(ConfigError, match=r"another search \(space differ"):
        sweep(config, request(2, over=OVER[:1]), tmp_path)
    with pytest.raises(ConfigError, match="experiment differ"):
        sweep(read_config(SMALL, ["train.rounds=2"]), request(2), tmp_path)


def test_settings_that_do_not_fit_together_fail_alone(tmp_path):
    """Momentum is for SGD; each setting fits by itself."""
    over = {"train.optimizer": ["sgd", "adam"], "train.momentum": [0.0, 0.9]}
    with pytest.raises(ConfigError, match=r"train\.momentum is searched at 0\.9"):
        fedknow.search(
            SMALL | {"train": {"optimizer": "adam"}},
            {"train.momentum": [0.0, 0.9]},
            out=tmp_path / "refused",
            sampler="grid",
        )
    found = fedknow.search(SMALL, over, sampler="grid", out=tmp_path / "found")
    failures = [trial.failure for trial in found.trials]
    assert [bool(failure) for failure in failures] == [False, False, False, True]
    assert "train.momentum" in failures[3]
    assert found.best.accuracy == max(
        trial.accuracy for trial in found.trials[:3]
    )
    # Whoever runs it for good trains on all samples.
    assert found.config.data.holdout == 0
    assert found.config.train.optimizer == found.best.settings["train.optimizer"]
    run = RunFolder.open(tmp_path / "found" / "trial-0000-seed0")
    assert run.config.data.holdout == 0.2
    table = found.table()
    assert list(table["train.optimizer"]) == ["sgd", "sgd", "adam", "adam"]
    assert "with" in repr(found)
    assert "found" in found._repr_html_()


def test_the_command_prints_a_table_and_the_best(tmp_path):
    words = ["search", "digits", "--sampler", "grid", "--runs", "2"]
    words += ["--over", "train.lr=1e-7,1e-2", "--out", str(tmp_path / "out")]
    for key, value in {
        "data.clients": 2,
        "data.tasks": 1,
        "train.rounds": 1,
        "learner": "fedavg",
        "engine.backend": "inline",
    }.items():
        words += ["--set", f"{key}={value}"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "Best: --set=train.lr=0.01" in done.output
    lines = (tmp_path / "out" / "sweep.jsonl").read_text().splitlines()
    assert [json.loads(line)["settings"]["train.lr"] for line in lines] == [
        1e-7,
        1e-2,
    ]
    refused = CliRunner().invoke(app, [*words, "--learners", "ewc"])
    assert refused.exit_code == 2
    assert "--set learner=NAME" in refused.output
