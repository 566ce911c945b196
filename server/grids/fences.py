"""Fences: secrets by which a server knows the holder of an identity again.

A certificate or a token can be copied. So each stream begins with a fresh secret, which the
client says when it comes back. Of two that hold one identity, the one that was here before can
prove it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

__all__ = ["FENCE_BYTES", "Fences"]

_NONCE = 16
_MARK = 16
FENCE_BYTES = _NONCE + _MARK
"""Length of a fence."""


class Fences:
    """Issues fences, and knows those that it has issued.

    None is stored: a fence carries a mark that only this server can make. So a server that was
    restarted knows those of its run.

    Parameters
    ----------
    key : bytes
        The run's secret.

    Examples
    --------
    >>> fences = Fences(b"secret")
    >>> fence = fences.issue(2)
    >>> fences.is_known(2, fence), fences.is_known(3, fence)
    (True, False)
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def issue(self, node: int) -> bytes:
        """Make a fence for a node."""
        nonce = secrets.token_bytes(_NONCE)
        return nonce + self._mark(node, nonce)

    def is_known(self, node: int, fence: bytes) -> bool:
        """Say whether a fence was issued for a node in this run."""
        nonce, mark = fence[:_NONCE], fence[_NONCE:]
        return hmac.compare_digest(mark, self._mark(node, nonce))

    def _mark(self, node: int, nonce: bytes) -> bytes:
        text = node.to_bytes(8, "big") + nonce
        return hmac.new(self._key, text, hashlib.sha256).digest()[:_MARK]
