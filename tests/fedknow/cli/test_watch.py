"""``fedknow watch``, and ``--watch`` of a run."""

import re
import signal
import subprocess
import sys
from urllib.request import urlopen

import pytest
from typer.testing import CliRunner

from fedknow.cli.app import app
from fedknow.protocols.errors import INTERRUPTED, REFUSED
from fedknow.server.watch import http

SMALL = [
    *("simulate", "digits", "--set", "data.clients=2", "--set", "data.tasks=1"),
    *(
        "--set",
        "train.rounds=1",
        "--set",
        "train.epochs=1",
        "--set",
        "learner=fedavg",
    ),
    *("--set", "engine.backend=inline"),
]


def test_a_watched_run_has_the_same_numbers(tmp_path, monkeypatch):
    looks = []

    class Looking(http.Follower):
        def look(self):
            super().look()
            looks.append(self._hub.wait(0, 0)[0])

    monkeypatch.setattr(http, "Follower", Looking)
    runner = CliRunner()
    for name, options in (("plain", []), ("watched", ["--watch"])):
        result = runner.invoke(
            app, [*SMALL, "--out", str(tmp_path / name), *options]
        )
        assert result.exit_code == 0, result.output
        said = re.findall(r"Live page: (http://127\.0\.0\.1:\d+/)", result.output)
        assert len(said) == len(options)
    plain, watched = (
        (tmp_path / name / "accuracy.npz").read_bytes()
        for name in ("plain", "watched")
    )
    assert plain == watched
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == sorted(
        path.name for path in (tmp_path / "watched").iterdir()
    )
    assert any('"type":"end"' in line for line in looks[-1])
    with pytest.raises(OSError):  # the page is gone with the command
        urlopen(said[0], timeout=5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_page_lasts_until_a_signal(tmp_path, number):
    command = [sys.executable, "-m", "fedknow", "watch", str(tmp_path / "later")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        line = process.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+/", line)[0]
        with urlopen(url, timeout=30) as response:
            assert response.status == 200
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == INTERRUPTED
        assert errors == "Interrupted.\n"


def test_a_file_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.touch()
    result = CliRunner().invoke(app, ["watch", str(path)])
    assert result.exit_code == REFUSED
