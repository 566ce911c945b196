"""What a hostile command line gets: a sentence that is right, and nothing is written."""

import re
import sys

import pytest
from typer.testing import CliRunner

from fedknow.cli import app

HUGE = str(10**20)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (f"compare digits --out OUT --seeds {HUGE}",
            "--seeds 1" + "0" * 20 + ": must be a whole number from 1 to"),
        (f"search digits --learners ewc --out OUT --seeds {HUGE}", "--seeds 1"),
        (f"search digits --learners ewc --out OUT --runs {HUGE}", "--runs 1"),
        (f"paper 5.1 --out OUT --seeds {HUGE}", "--seeds 1"),
        ("paper 5.1 --out OUT --scale nan", "--scale nan: give a number above 0, at most 1"),
        ("paper 5.1 --out OUT --scale inf", "--scale inf: give a number above 0, at most 1"),
        (f"certs OUT --clients {HUGE}", "--clients 1"),
        (f"certs OUT --clients 1 --days {HUGE}", "--days 1"),
        ("certs OUT --clients 1 --days 3651",
            "--days 3651: must be a whole number from 1 to 3650; the CA itself"),
        ("client --server 127.0.0.1:1 --state OUT --give-up nan",
            "--give-up nan: must be a number from 0 to"),
        ("client --server 127.0.0.1:1 --state OUT --give-up inf",
            "--give-up inf: must be a number from 0 to"),
        (f"client --server 127.0.0.1:1 --state OUT --client {HUGE}", "--client 1"),
        ("calibrate --out OUT --seconds nan", "--seconds nan: must be a number from 0 to 86400"),
        ("calibrate --out OUT --seconds inf", "--seconds inf: must be a number from 0 to 86400"),
        ("calibrate --out OUT --busy-watts nan --idle-watts 1",
            "--busy-watts nan: must be a number from 0 to"),
        ("calibrate --out OUT --busy-watts 3 --idle-watts 1e400",
            "--idle-watts inf: must be a number from 0 to"),
        ("calibrate --out OUT --busy-watts 1 --idle-watts 5",
            "--busy-watts 1 is below --idle-watts 5: .* exchange"),
        ("calibrate --out OUT --name *", r"--name '\*': must be a letter or a digit"),
    ],
)  # fmt: skip
def test_a_number_that_cannot_be_meant_is_refused(tmp_path, command, words):
    out = tmp_path / "out"
    arguments = command.replace("OUT", str(out)).split(" ")
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ")
    assert re.search(words, result.stderr), result.stderr
    assert not out.exists()


def test_a_message_holds_what_was_typed_and_no_emoji():
    result = CliRunner().invoke(
        app, ["simulate", "--set", "model=json:a:b"], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 2
    assert "model.name = 'json:a:b'" in result.stderr


def test_a_run_that_never_aggregates_is_not_told_to_go_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "stands_still.py").write_text(
        "from flwr.serverapp.strategy import FedAvg\n"
        "class Still(FedAvg):\n"
        "    def aggregate_train(self, server_round, replies):\n"
        "        return None, None\n"
    )
    changes = ("strategy=stands_still:Still", "engine.backend=inline", "model=linear",
        "learner=finetune",
               "data.clients=2", "data.tasks=1", "train.rounds=1", "train.epochs=1")  # fmt: skip
    arguments = [
        "simulate",
        "-q",
        "--out",
        "run",
        *(part for change in changes for part in ("--set", change)),
    ]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "aggregated nothing" in result.stderr
    assert "another --out" in result.stderr
    assert "--resume" not in result.stderr
