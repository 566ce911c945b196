import fcntl
import shutil
import sys
import threading
from pathlib import Path

import pytest

from fedknow.protocols.config import ConfigError
from fedknow.server.run.folder import RunFolder
from fedknow.server.tracking import replay
from fedknow.server.tracking.replay import TrackingError, track_run


@pytest.fixture(autouse=True)
def pretended(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    sys.modules.pop("pretended", None)
    import pretended

    pretended.Keeping.told = []
    return pretended


def test_a_run_that_is_going_on_is_followed(
    plain, pretended, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    shutil.copytree(plain, run)
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:3]))
    looked = threading.Event()

    def pause(seconds):
        looked.set()
        threading.Event().wait(0.01)

    monkeypatch.setattr(replay.time, "sleep", pause)
    with (run / ".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert RunFolder.open(run).is_in_use
        thread = threading.Thread(
            target=track_run, args=(run, "pretended:Keeping")
        )
        thread.start()
        assert looked.wait(60)
        assert len(pretended.Keeping.told) == 1 + 2
        with (run / "metrics.jsonl").open("ab") as file:
            file.write(b"".join(lines[3:]))
    thread.join(60)
    assert not RunFolder.open(run).is_in_use
    assert len(pretended.Keeping.told) == 1 + 9 + 1
    assert pretended.Keeping.told[-1] == ("finish", "complete")


def test_an_unfinished_run_is_sent_as_one_that_failed(plain, pretended, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(plain, run)
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:3]))
    assert track_run(run, "pretended:Keeping", "project") == 2
    assert pretended.Keeping.told[0][1].project == "project"
    assert pretended.Keeping.told[-1] == ("finish", "failed")


def test_failures_are_sentences(plain, tmp_path):
    with pytest.raises(TrackingError, match="the tracker's machine is down"):
        track_run(plain, "pretended:Raising")
    with pytest.raises(ConfigError, match="holds no run"):
        track_run(tmp_path, "pretended:Keeping")
