"""What the README tells users to write is run as it stands, by the command it gives."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fedknow.cli import app
from fedknow.server.run.folder import RunFolder
from fedknow.simulations import simulate

README = Path(__file__).parents[2] / "README.md"
BLOCKS = {
    name: (command, block)
    for block in re.findall(
        r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL
    )
    for name, command in re.findall(r"\A# (\S+\.py) +(fedknow .*)", block)
}
TINY = (
    "data.clients=2",
    "data.tasks=2",
    "train.rounds=1",
    "train.epochs=1",
    "engine.backend=inline",
)


def test_there_are_three_parts_of_ones_own():
    assert list(BLOCKS) == ["my_learner.py", "my_model.py", "my_data.py"]


@pytest.mark.parametrize("name", BLOCKS)
def test_a_part_of_ones_own(tmp_path, monkeypatch, name):
    command, block = BLOCKS[name]
    (tmp_path / name).write_text(block)
    rng = np.random.default_rng(0)
    np.save(
        tmp_path / "images.npy", rng.integers(256, size=(400, 1, 8, 8), dtype=np.uint8)
    )
    np.save(tmp_path / "labels.npy", np.arange(400) % 10)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        simulate, "write_report", lambda *_: None
    )  # it takes longer than the run
    changes = [part for change in TINY for part in ("--set", change)]
    done = CliRunner().invoke(
        app, [*shlex.split(command)[1:], *changes, "--out", "run", "--quiet"]
    )
    assert done.exit_code == 0, done.output
    run = RunFolder.open(tmp_path / "run")
    assert run.complete
    named = {run.config.learner.name, run.config.model.name, run.config.data.name}
    assert any(
        part.startswith(name.removesuffix("py").replace(".", ":")) for part in named
    )
