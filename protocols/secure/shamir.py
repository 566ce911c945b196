"""Sharing of a secret: enough shares tell it, fewer tell nothing.

Shamir, "How to Share a Secret", Communications of the ACM 22 (1979). Numbers are those of the
field modulo the Mersenne prime ``2**521 - 1``, which holds any secret of 64 bytes.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from fedknow.protocols.texts import counted

__all__ = ["PRIME", "SHARE_BYTES", "deal", "recover", "weights_at_zero"]

# A Mersenne prime above all secrets of 64 bytes.
PRIME = 2**521 - 1
SHARE_BYTES = 66
"""Length of a share."""


def deal(
    secret: bytes, points: Sequence[int], threshold: int
) -> dict[int, bytes]:
    """Deal shares of a secret.

    Parameters
    ----------
    secret : bytes
        At most 64.
    points : sequence of int
        Where the polynomial is evaluated, one a holder: all different, and none 0.
    threshold : int
        How many shares tell the secret.

    Returns
    -------
    dict of int to bytes
        :data:`SHARE_BYTES` for each point.

    Raises
    ------
    ValueError
        If the secret is too long, or there are fewer points than the threshold.

    Examples
    --------
    >>> shares = deal(b"secret", [1, 2, 3], threshold=2)
    >>> recover({1: shares[1], 3: shares[3]}, size=6)
    b'secret'
    """
    if len(secret) > 64 or not 1 <= threshold <= len(points):
        raise ValueError(
            f"a secret of {counted(len(secret), 'byte')} cannot be dealt to {len(points)} with "
            f"threshold {threshold}"
        )
    coefficients = [int.from_bytes(secret, "big")]
    # From the system: shares from a seed could be computed by whoever has it.
    coefficients += [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    return {
        point: _evaluate(coefficients, point).to_bytes(SHARE_BYTES, "big")
        for point in points
    }


def recover(
    shares: Mapping[int, bytes],
    size: int,
    weights: Mapping[int, int] | None = None,
) -> bytes:
    """Recover a secret from as many shares as its threshold.

    Parameters
    ----------
    shares : mapping of int to bytes
        By point. Fewer than the threshold give a wrong secret, or an error.
    size : int
        Bytes of the secret.
    weights : mapping of int to int, optional
        :func:`weights_at_zero` of these points, where many secrets have the same.

    Raises
    ------
    ValueError
        If they are no shares of one secret of that size.
    """
    factors = weights_at_zero(list(shares)) if weights is None else weights
    total = sum(
        int.from_bytes(share, "big") * factors[point]
        for point, share in shares.items()
    )
    # Wrong shares give a number of the whole field, which is rarely that small.
    secret = total % PRIME
    if secret >= 2 ** (8 * size):
        raise ValueError("these are no shares of one secret")
    return secret.to_bytes(size, "big")


def weights_at_zero(points: Sequence[int]) -> dict[int, int]:
    """Give Lagrange's weights of some points for the value at 0."""
    weights = {}
    for point in points:
        numerator = denominator = 1
        for rival in points:
            if rival != point:
                numerator = numerator * rival % PRIME
                denominator = denominator * (rival - point) % PRIME
        # Division modulo a prime is a product with the inverse.
        weights[point] = numerator * pow(denominator, -1, PRIME) % PRIME
    return weights


def _evaluate(coefficients: Sequence[int], point: int) -> int:
    """Evaluate a polynomial by Horner's rule."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % PRIME
    return value
