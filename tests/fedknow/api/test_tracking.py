import pytest
from typer.testing import CliRunner

import fedknow
from fedknow.cli import app

SMALL = {
    "data": {"clients": 3, "tasks": 2},
    "train": {"rounds": 1, "epochs": 1},
    "engine": {"backend": "inline"},
}


class Counting:
    """Counts rounds."""

    def __init__(self):
        self.rounds = 0
        self.status = ""

    def start(self, run):
        self.name = run.name

    def log(self, step, numbers, time):
        self.rounds += "round/loss" in numbers

    def finish(self, status):
        self.status = status


class Stopping(fedknow.Callback):
    """Stops at the first evaluation."""

    def on_evaluation_end(self, event):
        raise fedknow.StopRun


def test_trackers_are_objects_names_or_both(tmp_path):
    mine = Counting()
    other = Counting()
    run = fedknow.simulate(
        "digits",
        learner="fedavg",
        out=tmp_path / "run",
        track=["tensorboard", mine],
        callbacks=[other, Stopping()],
        tracking={"wait": 120},
        **SMALL,
    )
    assert run.status == "interrupted"
    for tracker in (mine, other):
        assert (tracker.name, tracker.rounds) == ("run", 1)
        assert tracker.status == "interrupted"
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    # Nobody who reads the folder's configuration is told of them.
    assert "tracking" not in (tmp_path / "run" / "config.toml").read_text()


@pytest.mark.parametrize("track", [Counting, 3, [None], "mlfow"])
def test_what_is_no_tracker_is_refused(track, tmp_path):
    with pytest.raises(fedknow.ConfigError):
        fedknow.simulate("digits", out=tmp_path / "run", track=track, **SMALL)
    assert not (tmp_path / "run").exists()


def test_a_comparison_is_tracked_run_by_run(tmp_path):
    runs = fedknow.compare(
        "digits",
        ["fedavg", "fedper"],
        seeds=1,
        out=tmp_path,
        track="tensorboard",
        tracking={"wait": 120},
        **SMALL,
    )
    assert len(list(tmp_path.glob("*-seed0/tensorboard/events*"))) == 2
    assert not runs.failures


def test_a_comparison_has_callbacks_and_trackers_as_objects(tmp_path):
    class First(fedknow.Callback):
        """Notes where each run lies, and stops those of one method."""

        def __init__(self):
            self.folders = []

        def on_round_end(self, event):
            self.folders.append(self.folder.name)
            if self.folder.name.startswith("fedper"):
                raise fedknow.StopRun

    class Log:
        def __init__(self):
            self.starts, self.ends, self.steps = [], [], []

        def start(self, run):
            self.starts.append(run.name)

        def log(self, step, numbers, time):
            self.steps.append(step)

        def finish(self, status):
            self.ends.append(status)

    notes, log = First(), Log()
    compared = fedknow.compare(
        "digits",
        ["fedper", "fedavg"],
        seeds=1,
        out=tmp_path,
        callbacks=[notes, fedknow.KeepBest()],
        track=log,
        tracking={"wait": 120},
        **SMALL,
    )
    assert not compared.failures
    assert log.starts == ["fedper-seed0", "fedavg-seed0"]
    assert len(log.ends) == 2
    assert log.steps
    assert notes.folders[0] == "fedper-seed0"
    assert set(notes.folders[1:]) == {"fedavg-seed0"}
    runs = compared.runs
    assert runs["fedper-seed0"].status != "complete"
    assert runs["fedavg-seed0"].status == "complete"
    assert runs["fedavg-seed0"].model(best=True) is not None


def test_the_command_line(tmp_path):
    words = ["simulate", "digits", "--out", str(tmp_path / "run"), "--quiet"]
    for key in (
        "data.clients=3",
        "data.tasks=2",
        "train.rounds=1",
        "train.epochs=1",
    ):
        words += ["--set", key]
    words += ["--set", "engine.backend=inline", "--set", "tracking.wait=120"]
    done = CliRunner().invoke(app, [*words, "--track", "tensorboard"])
    assert done.exit_code == 0, done.output
    assert list((tmp_path / "run" / "tensorboard").iterdir())

    run = str(tmp_path / "run")
    done = CliRunner().invoke(app, ["track", run, "--to", "tensorboard"])
    assert done.exit_code == 0, done.output
    assert "7 events sent to tensorboard" in done.output.replace("\n", " ")
    refused = CliRunner().invoke(app, ["track", run, "--to", "tensorbord"])
    assert refused.exit_code == 2
    refused = CliRunner().invoke(app, [*words, "--track", "mlflow,nothing"])
    assert refused.exit_code == 2
    shown = CliRunner().invoke(
        app, ["show", "digits", "--track", "x", "--set", "tracking=mlflow"]
    )
    assert shown.exit_code == 2
    shown = CliRunner().invoke(
        app, ["show", "digits", "--set", "tracking=mlflow"]
    )
    assert '[tracking]\nto = [\n    "mlflow",\n]' in shown.output
    listed = CliRunner().invoke(app, ["list", "trackers"])
    assert "trackio" in listed.output
