"""The command split: a file that a run takes, and a page."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fedknow.cli import app
from fedknow.client.data import make_benchmark
from fedknow.simulations.presets import load_preset

SMALL = ("--set", "data.clients=3", "--set", "data.tasks=2")


def fedknow(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_a_run_has_the_split_that_the_command_wrote(tmp_path):
    file = tmp_path / "mine.npz"
    page = tmp_path / "mine.html"
    done = fedknow(
        "split",
        "digits",
        *SMALL,
        "--set",
        "data.partition=dirichlet",
        "--out",
        file,
        "--html",
        page,
    )
    assert done.exit_code == 0, done.output
    assert f"Split: {file}" in done.stdout
    changes = ["data.clients=3", "data.tasks=2"]
    cut = make_benchmark(
        load_preset("digits", [*changes, "data.partition=dirichlet"])
    )
    changes += ["data.classes_per_task=0", f"data.split='{file}'"]
    loaded = make_benchmark(load_preset("digits", changes))
    assert loaded.partition.digest == cut.partition.digest
    assert cut.partition.digest in page.read_text("utf-8")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--out", "mine.csv"), "must end in .npz; give --out mine.npz"),
        (("--html", "mine.png"), "must end in .html; give --html mine.html"),
        (("--out", "nowhere/mine.npz"), "there is no folder nowhere"),
        (("--set", "data.name=local"), "a simulation needs a data set"),
    ],
)
def test_what_cannot_be_written_is_refused_first(
    tmp_path, monkeypatch, options, reason
):
    monkeypatch.chdir(tmp_path)
    done = fedknow("split", "digits", *SMALL, *options)
    assert done.exit_code == 2
    assert reason in done.stderr
    assert not list(tmp_path.iterdir())
