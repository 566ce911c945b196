import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import fedknow
from fedknow.api.projects import write_project
from fedknow.cli import app


def run(folder, *words):
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_a_new_project_runs_and_its_test_passes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["new", "mymethod"])
    assert done.exit_code == 0, done.output
    project = tmp_path / "mymethod"
    assert (project / "mymethod" / "learner.py").is_file()
    assert "$" not in (project / "pyproject.toml").read_text()

    done = run(project, "pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout

    done = run(
        project, "fedknow", "simulate", "experiment.toml", "--out", "runs/one"
    )
    assert done.returncode == 0, done.stderr
    assert fedknow.load_run(project / "runs" / "one").status == "complete"

    done = CliRunner().invoke(app, ["new", "mymethod"])
    assert done.exit_code == 2
    assert "exists already" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("my-method", "cannot be a module's name"),
        ("2fast", "cannot be a module's name"),
        ("../up", "cannot be a module's name"),
        ("", "cannot be a module's name"),
        ("class", "cannot be a module's name"),
        ("json", "a module of this name exists"),
        ("fedknow", "a module of this name exists"),
        ("numpy", "a module of this name exists"),
        ("tests", "a module of this name exists"),
    ],
)
def test_other_names_are_refused(tmp_path, name, text):
    with pytest.raises(fedknow.ConfigError, match=text):
        write_project(name, tmp_path)
    assert not list(tmp_path.iterdir())
