"""Every example and notebook runs, as a reader would start it."""

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
NOTEBOOKS = sorted(path.stem for path in (EXAMPLES / "notebooks").glob("*.ipynb"))
MOST_LINES = 60


def test_there_are_six_scripts_and_two_notebooks():
    assert SCRIPTS == [
        "first_run",
        "fleet",
        "own_data",
        "own_learner",
        "own_strategy",
        "real_clients",
    ]
    assert NOTEBOOKS == ["compare_methods", "first_run"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_from_anywhere(name, tmp_path):
    script = EXAMPLES / f"{name}.py"
    assert len(script.read_text().splitlines()) <= MOST_LINES
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(script), str(out)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert out.is_dir()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    book = nbformat.read(EXAMPLES / "notebooks" / f"{name}.ipynb", 4)
    assert all(not cell.get("outputs") for cell in book.cells), (
        "commit notebooks without outputs"
    )
    env = dict(os.environ)
    client = nbclient.NotebookClient(
        book,
        timeout=240,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute(env=env)
    outputs = [cell.get("outputs", []) for cell in book.cells]
    shown = json.dumps(outputs)
    assert "image/png" in shown, "its figures are shown"
    assert "text/html" in shown, "its tables are shown"
    said = [each.text for each in chain(*outputs) if each.get("name") == "stderr"]
    assert said == [], "no warning stands between a reader and the numbers"
