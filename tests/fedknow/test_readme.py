"""Commands and code that documents tell users to write are run as they stand.

A block below ``<!-- run -->`` is run, with a small experiment. A block of Python that begins with
a file's name and a command is saved under this name, and the command is run.
"""

import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import fedknow
from fedknow.cli import app
from fedknow.protocols import parts
from fedknow.server.run.folder import RunFolder
from fedknow.simulations import compare, simulate

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PARTS = [
    pytest.param(name, command, block, id=f"{page.stem}-{name}")
    for page in PAGES
    for block in re.findall(
        r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL
    )
    for name, command in re.findall(r"\A# (\S+\.py) +(fedknow .*)", block)
]
MARKED = re.compile(r"<!-- run -->\n```(sh|python)\n(.*?)```", re.DOTALL)
TALKING = re.compile(r"<!-- run: clients -->\n```sh\n(.*?)```", re.DOTALL)
RUN = [page for page in PAGES if MARKED.search(page.read_text("utf-8"))]
SMALL = (
    "data.tasks=2",
    "train.rounds=1",
    "train.epochs=1",
    "engine.backend=inline",
)
TINY = ("data.clients=2", *SMALL)
LONGEST = 110
"""Lines of the README: a newcomer reads it in five minutes."""


def settings(changes):
    return [word for change in changes for word in ("--set", change)]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder of a user's, with images, from which modules are imported."""
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(400, 1, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", np.arange(400) % 10)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    # Reports take longer than such runs.
    monkeypatch.setattr(simulate, "write_report", lambda *_: None)
    monkeypatch.setattr(compare, "write_report", lambda *_: None)
    return tmp_path


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert len(lines) <= LONGEST
    assert lines[3].startswith("make demo")
    assert lines[4].startswith("make test")


def test_there_are_parts_of_ones_own():
    names = {part.values[0] for part in PARTS}
    assert names == {"my_learner.py", "my_anchor.py", "my_model.py", "my_data.py"}


@pytest.mark.parametrize(("name", "command", "block"), PARTS)
def test_a_part_of_ones_own(workplace, monkeypatch, name, command, block):
    monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    (workplace / name).write_text(block)
    words = [
        *shlex.split(command)[1:],
        *settings(TINY),
        "--out",
        "run",
        "--quiet",
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    run = RunFolder.open(workplace / "run")
    assert run.complete
    named = {run.config.learner.name, run.config.model.name, run.config.data.name}
    prefix = name.removesuffix("py").replace(".", ":")
    assert any(part.startswith(prefix) for part in named)


@pytest.mark.parametrize("page", RUN, ids=[page.stem for page in RUN])
def test_marked_blocks(workplace, monkeypatch, page):
    small = {
        "data": {"clients": 2},
        "train": {"rounds": 1, "epochs": 1},
        "engine": {"backend": "inline"},
    }
    for name in ("simulate", "compare"):
        monkeypatch.setattr(
            fedknow, name, partial(getattr(fedknow, name), **small)
        )
    for number, (kind, block) in enumerate(
        MARKED.findall(page.read_text("utf-8"))
    ):
        if kind == "sh":
            run_commands(block)
        else:
            # No later block has the objects of an earlier one.
            monkeypatch.setattr(parts, "_registered", {})
            run_python(workplace / f"block_{number}.py", block)


def run_commands(block):
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        assert words[0] == "fedknow"
        tiny = settings(TINY) if words[1] in ("simulate", "compare") else []
        done = CliRunner().invoke(app, [*words[1:], *tiny])
        assert done.exit_code == 0, done.output


def run_python(path, block):
    """Run a block as a script or a notebook that has just been started."""
    path.write_text(block)
    runpy.run_path(str(path), run_name="__main__")


def test_two_real_clients(workplace):
    page = ROOT / "docs/tutorials/two-real-clients.md"
    script = "\n".join(TALKING.findall(page.read_text("utf-8")))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    small = shlex.join(settings(SMALL))
    script = script.replace("8700", port).replace(" digits ", f" digits {small} ")
    commands = f'fedknow() {{ "{sys.executable}" -m fedknow "$@"; }}\n'
    done = subprocess.run(
        ["bash", "-e", "-c", f"{commands}{script}\nwait"],
        cwd=workplace,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    real = RunFolder.open(workplace / "runs/first").accuracy()["personal"]
    virtual = RunFolder.open(workplace / "runs/virtual").accuracy()["personal"]
    np.testing.assert_array_equal(real, virtual)
