"""A secret answers once: the same again, and nothing else."""

import secrets

import pytest

from fedknow.client import secure_once
from fedknow.client.secure_once import answer_once


def test_the_same_again_is_no_other_answer():
    secret = secrets.token_bytes(32)
    for _ in range(3):
        answer_once(secret, "opening", b"ab", b"c")
    # Another use, or another secret, is free.
    answer_once(secret, "masked answer", b"other")
    answer_once(secrets.token_bytes(32), "opening", b"other")


@pytest.mark.parametrize(
    "parts", [(b"abc",), (b"a", b"bc"), (b"ab", b"c", b""), ()]
)
def test_another_answer_is_refused_each_time(parts):
    secret = secrets.token_bytes(32)
    answer_once(secret, "opening", b"ab", b"c")
    for _ in range(2):
        with pytest.raises(ValueError, match="a second opening of one round"):
            answer_once(secret, "opening", *parts)
    answer_once(secret, "opening", b"ab", b"c")


def test_memory_is_bounded_and_the_latest_stay(monkeypatch):
    monkeypatch.setattr(secure_once, "_MOST", 10)
    monkeypatch.setattr(secure_once, "_answered", type(secure_once._answered)())
    drawn = [secrets.token_bytes(32) for _ in range(30)]
    for secret in drawn:
        answer_once(secret, "opening", b"a")
    assert len(secure_once._answered) == 10
    for secret in drawn[-10:]:
        with pytest.raises(ValueError, match="second"):
            answer_once(secret, "opening", b"b")
