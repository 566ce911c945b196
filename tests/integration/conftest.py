"""What experiments of a second need, run as a user would run them."""

import hashlib
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedknow.cli import app
from fedknow.server import serve as serving
from fedknow.server.run.folder import RunFolder
from fedknow.simulations import simulate as simulations

# For `real_clients`, which several tests share.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="module")
def no_report():
    """Runs in this process write no reports, which take longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (simulations, serving):
            patch.setattr(module, "write_report", lambda *_: None)
        yield


@pytest.fixture(scope="session")
def parts():
    """The folder of ``odd_parts``, which the experiments here take parts from."""
    return Path(__file__).parent / "parts"


@pytest.fixture
def folder(tmp_path, parts, monkeypatch):
    """The current folder: empty, with ``odd_parts`` at hand."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(parts)
    return tmp_path


@pytest.fixture(scope="session")
def fedknow():
    """The command, in this process: arguments, then changes of settings."""

    def run(*arguments, changes=()):
        line = [
            *map(str, arguments),
            *(part for change in changes for part in ("--set", change)),
        ]
        return CliRunner().invoke(app, line, env={"COLUMNS": "200"})

    return run


@pytest.fixture(scope="session")
def numbers():
    """Digests of all that a finished run came to: raw accuracies and the final global parameters.

    Pytest takes minutes to show how the bytes themselves differ.
    """

    def read(path):
        [arrays] = Path(path).glob("checkpoint/checkpoint-*/arrays.safetensors")
        accuracy = {
            name: _digest(array.tobytes())
            for name, array in RunFolder.open(path).accuracy().items()
        }
        return {**accuracy, "parameters": _digest(arrays.read_bytes())}

    return read


def _digest(data):
    return hashlib.sha256(data).hexdigest()
