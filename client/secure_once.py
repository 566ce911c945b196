"""Each secret of a round answers once, whatever a server asks.

A server says from which of a client's states work starts, so it can have work done twice. Two
updates under one mask tell their difference. Both shares of one client tell its update.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from threading import Lock

__all__ = ["answer_once"]

_MOST = 20_000
"""Answers remembered: about 6 MB. A server must have as many rounds done to have one forgotten."""

# Of the process and not of a node: a server can have a new node made by another experiment.
_answered: OrderedDict[bytes, bytes] = OrderedDict()
_lock = Lock()


def answer_once(secret: bytes, step: str, *parts: bytes) -> None:
    """Refuse to answer again and otherwise.

    The same again is no other answer: one that was lost on the way is asked for twice.

    Parameters
    ----------
    secret : bytes
        What the answer is made with.
    step : str
        Which use of the secret this is.
    *parts : bytes
        What an answer is known by.

    Raises
    ------
    ValueError
        If the secret has answered something else.
    """
    use = _digest(secret, step.encode())
    answer = _digest(*parts)
    with _lock:
        remembered = _answered.setdefault(use, answer)
        _answered.move_to_end(use)
        if len(_answered) > _MOST:
            _answered.popitem(last=False)
    if remembered != answer:
        raise ValueError(
            f"the server asks for a second {step} of one round that differs from the first, and "
            "the two together would show this client's own numbers"
        )


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=32)
    for part in parts:
        # With lengths, so that no two lists of parts are one text.
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()
