"""SIGTERM ends simulations as Ctrl-C does: saved, one line that says how to go on, nothing left."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fedknow.protocols import interruption
from fedknow.server.run.folder import RunFolder

WAIT = 120
"""Seconds that nothing takes, not even on a busy machine."""

SETTINGS = (
    "data.tasks=2",
    "data.clients=3",
    "train.rounds=200",
    "train.epochs=1",
    "model=mlp",
    "model.hidden=16",
    "engine.workers=2",
)


class Command:
    """``fedknow`` as a process of its own, in a group of its own."""

    def __init__(
        self, place, *arguments, backend="inline", signal_at="", settings=SETTINGS
    ):
        changes = [*settings, f"engine.backend={backend}"]
        self.arguments = [
            *arguments,
            *(part for change in changes for part in ("--set", change)),
        ]
        self.lines = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fedknow", *self.arguments],
            cwd=place,
            env=os.environ
            | {
                "PYTHONPATH": str(Path(__file__).parent / "interrupted"),
                "SIGNAL_AT": signal_at,
                "PYTHONWARNINGS": "ignore",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def read_until(self, text):
        """Read its output up to a line with this text; all processes that it has by then."""
        for line in self.process.stdout:
            self.lines.append(line)
            if text in line:
                return psutil.Process(self.process.pid).children(recursive=True)
        raise AssertionError(f"ended without {text!r}: {self.lines}")

    def end(self):
        """Wait for its end; the exit code and its output."""
        rest = self.process.communicate(timeout=WAIT)[0]
        text = "".join(self.lines) + rest
        assert "Traceback" not in text, text
        assert "SIGTERM" not in text, text
        return self.process.returncode, text


@pytest.fixture
def start(tmp_path):
    started = []

    def make(*arguments, **options):
        started.append(Command(tmp_path, *arguments, **options))
        return started[-1]

    yield make
    for command in started:
        if command.process.poll() is None:
            command.process.kill()
            command.process.communicate(timeout=WAIT)


def interrupted(text):
    """Its last word, after "Interrupted."."""
    found = re.findall(r"^Interrupted\. (.*)$", text, re.M)
    assert len(found) == 1, text
    return found[0]


@pytest.mark.parametrize(
    "arguments",
    [["simulate", "digits"], ["compare", "digits"], ["search", "digits"]],
)
def test_before_anything_is_done(start, arguments):
    command = start(*arguments, signal_at="import torch")
    code, text = command.end()
    assert code == 130, text
    again = shlex.join(["fedknow", *command.arguments])
    assert interrupted(text) == f"Nothing is kept yet. Begin again with: {again}"
    assert text.startswith("Starting ")  # said before anything is loaded


def test_a_paper_experiment_before_anything_is_done(start):
    code, text = start(
        "paper", "5.1", signal_at="import torch", settings=()
    ).end()
    assert code == 130, text
    assert interrupted(text).startswith(
        "Nothing is kept yet. Begin again with: fedknow paper 5.1"
    )
    assert text.startswith("Starting the paper's experiment 5.1 in ")


def test_while_the_report_is_written(start, tmp_path):
    command = start(
        "simulate",
        "digits",
        "--out",
        "run",
        signal_at="import matplotlib.backends.backend_agg",
        settings=(*SETTINGS, "data.tasks=1", "train.rounds=1"),
    )
    code, text = command.end()
    assert code == 130, text
    assert (
        interrupted(text)
        == "The run in run is finished. Write its report with: fedknow report run"
    )
    assert RunFolder.open(tmp_path / "run").complete


@pytest.mark.parametrize("verb", ["compare", "search"])
def test_runs_of_several_go_on_with_the_same_command(start, verb):
    settings = (
        *SETTINGS,
        "train.epochs=2",
    )  # so that fedrep has something to search
    command = start(
        verb, "digits", "--learners", "fedrep", "--out", "runs", settings=settings
    )
    command.read_until("round 2/200")
    command.process.send_signal(signal.SIGTERM)
    code, text = command.end()
    assert code == 130, text
    again = shlex.join(["fedknow", *command.arguments])
    assert (
        interrupted(text) == f"What was done is kept in runs. Go on with: {again}"
    )


def test_a_run_is_resumed_as_the_last_line_says(start, tmp_path):
    command = start("simulate", "digits", "--out", "run")
    command.read_until("round 2/200")
    command.process.send_signal(signal.SIGTERM)
    command.process.send_signal(
        signal.SIGTERM
    )  # who signals a process and its group does it twice
    code, text = command.end()
    assert code == 130, text
    expected = "All up to the last complete round is kept in run. Go on with: "
    hint = "fedknow simulate run/config.toml --out run --resume"
    assert interrupted(text) == expected + hint
    assert RunFolder.open(tmp_path / "run").events()[-1]["event"] == "interrupted"
    resumed = start(*shlex.split(hint)[1:], settings=())
    resumed.read_until("resumed after round")
    resumed.process.send_signal(signal.SIGTERM)
    assert resumed.end()[0] == 130


def test_while_ray_starts(start):
    command = start(
        "simulate", "digits", backend="ray", signal_at="start raylet/raylet"
    )
    code, text = command.end()
    assert code == 130, text
    assert interrupted(text).startswith("Nothing is kept yet.")
    assert "Starting Ray with 2 workers ..." in text


@pytest.mark.parametrize(
    "reached", ["process", pytest.param("group", marks=pytest.mark.slow)]
)
def test_a_run_on_ray(start, tmp_path, reached):
    command = start("simulate", "digits", "--out", "run", backend="ray")
    processes = command.read_until("round 2/200")
    assert any("raylet" in process.name() for process in processes)
    kill = os.kill if reached == "process" else os.killpg
    kill(command.process.pid, signal.SIGTERM)
    code, text = command.end()
    assert code == 130, text
    assert (
        "Go on with: fedknow simulate run/config.toml --out run --resume"
        in interrupted(text)
    )
    assert RunFolder.open(tmp_path / "run").events()[-1]["event"] == "interrupted"
    assert psutil.wait_procs(processes, timeout=WAIT)[1] == []


def test_an_interruption_is_remembered_and_a_repeated_one_does_not_cut_it_short(
    monkeypatch,
):
    monkeypatch.setattr(interruption, "_interrupted_at", None)
    before = [
        (number, signal.getsignal(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    ]
    try:
        interruption.heed_signals()
        assert not interruption.is_interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert interruption.is_interrupted()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(
            KeyboardInterrupt
        ):  # whoever presses Ctrl-C twice means it
            signal.raise_signal(signal.SIGINT)
        long_ago = interruption._interrupted_at - 2 * interruption.REPEAT_SECONDS
        monkeypatch.setattr(interruption, "_interrupted_at", long_ago)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before:
            signal.signal(number, handler)
