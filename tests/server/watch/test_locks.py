"""Whether a run goes on, found out without touching its lock."""

import fcntl

import pytest

from fedknow.server.watch.locks import LOCKS, is_locked


@pytest.mark.skipif(not LOCKS.exists(), reason="only Linux lists locks")
def test_a_lock_is_seen_and_not_taken(tmp_path):
    path = tmp_path / ".lock"
    assert not is_locked(path)
    with path.open("wb") as file:
        assert not is_locked(path)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert is_locked(path)
    assert not is_locked(path)


def test_without_a_list_no_lock_is_known(tmp_path):
    (tmp_path / ".lock").touch()
    assert not is_locked(tmp_path / ".lock", tmp_path / "absent")
