import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from fedknow import __version__
from fedknow.cli import app
from fedknow.cli.output import ray_in_words
from fedknow.client.learners import list_learners
from fedknow.protocols.config import read_config
from fedknow.server.run.folder import RunFolder

TINY = [
    part
    for change in (
        "data.tasks=2", "data.clients=3", "train.rounds=2", "train.epochs=1",
        "model=mlp", "model.hidden=16", "engine.backend=inline",
    )
    for part in ("--set", change)
]  # fmt: skip

CTRL_C = """
import os
import signal

from flwr.serverapp.strategy import FedAvg

class CtrlC(FedAvg):
    def aggregate_train(self, server_round, replies):
        if server_round == 3 and "CTRL_C" in os.environ:
            os.kill(os.getpid(), signal.SIGINT)
        return super().aggregate_train(server_round, replies)
"""

OWN_LEARNER = """
from fedknow.client.learners import Learner

class Broken(Learner):
    def fit(self, data, round):
        raise ValueError("out of ideas")
"""


def fedknow(*arguments: str | Path) -> Result:
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], env={"COLUMNS": "200"}
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "run"
    result = fedknow("simulate", "digits", *TINY, "--out", path)
    assert result.exit_code == 0, result.output
    return path, result


def test_version():
    result = fedknow("--version")
    assert (result.exit_code, result.stdout) == (0, f"fedknow {__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("client", "--server", "127.0.0.1:1", "--device", "tpu"),
        ("simulate", "digits", *TINY, "--set", "engine.device=tpu"),
    ],
)
def test_a_device_that_is_none_is_refused(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    result = fedknow(*arguments)
    assert result.exit_code == 2
    assert re.search(
        r"(--|engine\.)device = 'tpu': must be 'cpu', 'cuda', 'cuda:1'",
        result.output,
    )
    assert not list(tmp_path.iterdir())


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "fedknow", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"fedknow {__version__}\n"


@pytest.mark.parametrize(
    "command", ["simulate", "compare", "search", "report", "show", "list"]
)
def test_help_teaches(command):
    result = fedknow(command, "--help")
    assert result.exit_code == 0
    assert len(result.stdout) > 300
    assert command in fedknow("--help").stdout
    if command in ("simulate", "compare", "search", "show"):
        assert f"fedknow {command} " in result.stdout  # an example
        assert "fedknow list presets" in result.stdout


def test_simulate_shows_progress_results_and_the_report(run):
    path, result = run
    assert len(re.findall(r"^\[ .*round \d/2: loss", result.stdout, re.M)) == 4
    assert "accuracy on each task" in result.stdout
    assert f"Report: {path / 'report.html'}" in result.stdout
    assert (path / "report.html").is_file()
    assert (path / "plots" / "accuracy.png").is_file()
    assert RunFolder.open(path).complete


def test_a_finished_run_is_refused_with_what_to_do(run):
    path, _ = run
    result = fedknow("simulate", "digits", *TINY, "--out", path)
    assert result.exit_code == 2
    assert "holds a finished run" in result.stderr
    assert "--out" in result.stderr
    assert "Traceback" not in result.output


def test_report_again(run, tmp_path):
    path, _ = run
    (path / "report.html").unlink()
    assert fedknow("report", path).exit_code == 0
    assert (path / "report.html").is_file()
    result = fedknow("report", path, "--out", tmp_path / "elsewhere")
    assert result.exit_code == 0
    assert (tmp_path / "elsewhere" / "report.html").is_file()


def test_report_without_a_run(tmp_path):
    result = fedknow("report", tmp_path)
    assert result.exit_code == 2
    assert "no run here" in result.stderr


def test_compare(tmp_path, run):
    arguments = [
        "compare",
        "digits",
        *TINY,
        "--learners",
        "fedavg, fedknow",
        "--seeds",
        "1",
        "--out",
        tmp_path / "c",
    ]
    result = fedknow(*arguments)
    assert result.exit_code == 0, result.output
    assert "fedknow seed 0 (2/2)" in result.stdout
    assert "one seed: no interval" in result.stdout
    for name in (
        "report.html",
        "compare.json",
        "compare.csv",
        "fedavg-seed0/report.html",
        "plots/accuracy.png",
    ):
        assert (tmp_path / "c" / name).is_file(), name
    quiet = fedknow(*arguments, "--quiet")
    assert (quiet.exit_code, quiet.stdout) == (
        0,
        f"Report: {tmp_path / 'c' / 'report.html'}\n",
    )
    written = [
        (tmp_path / "c" / name).read_bytes()
        for name in ("compare.json", "compare.csv")
    ]
    for name in ("report.html", "compare.json", "compare.csv"):
        (tmp_path / "c" / name).unlink()
    assert fedknow("report", tmp_path / "c").exit_code == 0
    again = [
        (tmp_path / "c" / name).read_bytes()
        for name in ("compare.json", "compare.csv")
    ]
    assert again == written
    assert "fedknow" in (tmp_path / "c" / "report.html").read_text("utf-8")


def test_search(tmp_path):
    arguments = [
        "search",
        "digits",
        *TINY,
        "--set",
        "train.epochs=2",
        "--learners",
        "fedrep",
        "--out",
        tmp_path,
    ]
    result = fedknow(*arguments, "--runs", "2")
    assert result.exit_code == 0, result.output
    assert "fedrep@head_epochs=1" not in result.stdout
    assert re.search(r"fedrep +\d+\.\d +\d+\.\d ", result.stdout)
    assert "fedrep: head_epochs=" in result.stdout
    best = tomllib.loads((tmp_path / "best.toml").read_text())["fedrep"]
    changes = [part for part in TINY if part != "--set"]
    expected = [
        "fedknow search digits --learners fedrep --runs 2 --seeds 1",
        *changes,
        "train.epochs=2",
    ]
    assert best["command"] == " --set ".join(expected)
    refused = fedknow(
        "search", "digits", "--learners", "fedrp", "--out", tmp_path / "none"
    )
    assert refused.exit_code == 2
    assert "did you mean 'fedrep'" in refused.stderr


def test_the_numbers_of_a_comparison_are_those_of_single_runs(tmp_path, run):
    path, _ = run
    assert (
        fedknow(
            "compare",
            "digits",
            *TINY,
            "--learners",
            "fedknow",
            "--seeds",
            "1",
            "--out",
            tmp_path,
        ).exit_code
        == 0
    )
    np.testing.assert_array_equal(
        RunFolder.open(tmp_path / "fedknow-seed0").accuracy()["personal"],
        RunFolder.open(path).accuracy()["personal"],
    )


def test_a_failing_learner(tmp_path, monkeypatch):
    (tmp_path / "own_learner.py").write_text(OWN_LEARNER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    result = fedknow(
        "simulate", "digits", *TINY, "--set", "learner=own_learner:Broken"
    )
    path = Path("runs/digits-own_learner-Broken-seed0")
    assert result.exit_code == 1
    assert "out of ideas" in result.stderr
    assert (
        f"fedknow simulate {path}/config.toml --out {path} --resume"
        in result.stderr
    )
    assert "Traceback" not in result.output
    assert "Traceback" in (path / "error.log").read_text()

    result = fedknow(
        "compare",
        "digits",
        *TINY,
        "--learners",
        "own_learner:Broken,fedavg",
        "--seeds",
        "1",
    )
    assert result.exit_code == 1
    assert "own_learner-Broken-seed0 failed" in result.stderr
    assert "Report: runs/digits-compare/report.html" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "digit"], "did you mean 'digits'"),
        (["show", "nowhere.toml"], "no such file"),
        (["show", "digits", "--set", "train.lrr=1"], "did you mean 'lr'"),
        (["show", "digits", "--set", "train.lr=1000"], "train.lr = 1000"),
        (["show", "digits", "--set", "learner.rhoo=1"], "did you mean 'rho'"),
        (["show", "digits", "--set", "train.lr"], "write key=value"),
        (["simulate", "digits", "--see", "train.lr=1"], "No such option"),
        (["simulate", "digits", "--se", "train.lr=1"], "No such option"),
        (["compare", "digits", "--learners", "fedavg,nobody"], "nobody"),
        (["compare", "digits", "--seeds", "0"], "0"),
        (["simulate", "paper-cifar100", "--data-dir", "/nowhere"], "/nowhere"),
        (["list", "planets"], "planets"),
        (["nothing"], "No such command"),
    ],
)
def test_refused_with_a_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = fedknow(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_show_prints_a_file_that_can_be_run(tmp_path):
    result = fedknow(
        "show", "digits", "--set", "learner.k=3", "--data-dir", "0123"
    )
    assert result.exit_code == 0
    tree = tomllib.loads(result.stdout)
    assert tree["learner"]["k"] == 3
    assert tree["data"]["dir"] == "0123"
    assert "temperature" in tree["learner"]  # every setting, not only those given
    file = tmp_path / "mine.toml"
    file.write_text(result.stdout)
    assert fedknow("show", file).stdout == result.stdout
    assert read_config(file).learner.options["k"] == 3


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("learners", "fedknow"),
        ("strategies", "fedadam"),
        ("models", "cnn6"),
        ("datasets", "omniglot"),
        ("presets", "paper-cifar100-small"),
    ],
)
def test_list(what, name):
    result = fedknow("list", what)
    assert result.exit_code == 0
    assert re.search(rf"^{name} +\S", result.stdout, re.M)


def test_what_is_missing_on_an_edge_box_is_named(monkeypatch):
    def missing(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'flwr'", name="flwr")

    monkeypatch.setattr("fedknow.cli.inspect._function", missing)
    result = fedknow("list", "strategies")
    assert result.exit_code == 2
    assert "pip install '.[server]'" in result.stderr


def test_interrupted_and_resumed(tmp_path, monkeypatch):
    (tmp_path / "interrupting.py").write_text(CTRL_C)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = [
        "simulate",
        "digits",
        *TINY,
        "--set",
        "strategy=interrupting:CtrlC",
        "--set",
        "strategy.fraction_evaluate=0",
    ]
    assert fedknow(*arguments, "--out", "undisturbed").exit_code == 0
    done = subprocess.run(
        [sys.executable, "-m", "fedknow", *arguments, "--out", "run"],
        capture_output=True, text=True, env={**os.environ, "CTRL_C": "1"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert "interrupted" in done.stdout
    hint = re.search(r"fedknow (simulate .*--resume)", done.stderr)
    assert hint is not None, done.stderr
    assert RunFolder.open("run").events()[-1]["event"] == "interrupted"
    result = fedknow(*hint[1].split())
    assert result.exit_code == 0, result.output
    assert "resumed after round 2" in result.stdout
    expected = RunFolder.open("undisturbed").accuracy()
    for name, array in RunFolder.open("run").accuracy().items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize(
    ("what", "name", "words"),
    [
        (
            "learners",
            "ewc",
            [
                "Keeps",
                "Sends",
                "Needs",
                "strength = 1000.0",
                "at least 0",
                "Searched: 1.0",
            ],
        ),
        ("strategies", "fedadam", ["eta = 0.1", "above 0", "learning rate"]),
        ("models", "cnn6", ["width = 1.0", "at most 8"]),
        ("datasets", "omniglot", ["omniglot/", "28x28"]),
        ("presets", "digits", ["[data]", "clients = 20", "fedknow show digits"]),
        ("devices", "jetson-nano", ["GB"]),
    ],
)
def test_list_explains_a_name(what, name, words):
    result = fedknow("list", what, name)
    assert result.exit_code == 0, result.output
    assert all(word in result.stdout for word in words)


@pytest.mark.parametrize(
    "what", ["learners", "strategies", "models", "datasets", "presets", "devices"]
)
def test_list_refuses_a_name_that_is_none(what):
    result = fedknow("list", what, "no-such-thing")
    assert result.exit_code == 2
    assert "no-such-thing" in result.stderr


@pytest.mark.parametrize("width", [40, 60, 80])
def test_names_of_lists_do_not_wrap(width):
    result = CliRunner().invoke(
        app, ["list", "learners"], env={"COLUMNS": str(width)}
    )
    starts = [
        line.split()[0]
        for line in result.stdout.splitlines()
        if not line.startswith(" ")
    ]
    assert starts == list(list_learners())


def test_says_at_once_what_is_started(tmp_path):
    missing = ["--data-dir", tmp_path / "nowhere", "--out", tmp_path / "run"]
    result = fedknow(
        "simulate", "paper-cifar100", "--set", "engine.backend=inline", *missing
    )
    assert result.exit_code == 2
    assert (
        result.stdout
        == f"Starting paper-cifar100 with fedknow in {tmp_path / 'run'} ...\n"
    )
    quiet = fedknow(
        "simulate",
        "paper-cifar100",
        "--set",
        "engine.backend=inline",
        *missing,
        "-q",
    )
    assert (quiet.exit_code, quiet.stdout) == (2, "")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["engine.workers=1"], "Starting Ray with 1 worker"),
        (["engine.workers=2"], "Starting Ray with 2 workers"),
        ([], "Starting Ray with a worker for each core"),
        (["engine.device=cuda"], "Starting Ray with a worker for each GPU"),
        (
            ["engine.address=lab:6379"],
            "Joining the Ray cluster at lab:6379 with a worker for each core",
        ),
    ],
)
def testray_in_words(changes, words):
    assert ray_in_words(read_config({}, changes)) == words


def completed(shell, typed):
    """What a shell is told to offer after what was typed."""
    words = ["fedknow", *typed]
    line = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    environment = {**os.environ, **line, "_FEDKNOW_COMPLETE": f"complete_{shell}"}
    done = subprocess.run(
        [sys.executable, "-m", "fedknow"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_completion():
    assert completed("bash", ["sim"]) == ["simulate"]
    assert completed("bash", ["simulate", "paper-cifar100-s"]) == [
        "paper-cifar100-small"
    ]
    assert completed("bash", ["list", "dev"]) == ["devices"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell):
    environment = {**os.environ, "_FEDKNOW_COMPLETE": f"source_{shell}"}
    done = subprocess.run(
        [sys.executable, "-m", "fedknow"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert f"_FEDKNOW_COMPLETE=complete_{shell}" in done.stdout
