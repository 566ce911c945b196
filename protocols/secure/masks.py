"""Keys, masks and sealed shares of secure aggregation.

X25519 (RFC 7748) agrees on a secret, HKDF with SHA-256 (RFC 5869) makes keys of it, ChaCha20 (RFC
8439) stretches a key to a mask, and ChaCha20-Poly1305 seals shares.
"""

from __future__ import annotations

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import (
    X25519PrivateKey,
    X25519PublicKey,
)
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

__all__ = [
    "KEY_BYTES",
    "SEAL_BYTES",
    "agree",
    "mask",
    "new_key",
    "open_shares",
    "pair_mask",
    "public_key",
    "seal_shares",
]

Masks = NDArray[np.uint64]

KEY_BYTES = 32
SEAL_BYTES = 16
"""By how much sealed shares are longer: the code of Poly1305."""


def new_key() -> bytes:
    """Draw a private X25519 key from the system's generator."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_key(private: bytes) -> bytes:
    """Give the public half of a private key."""
    key = X25519PrivateKey.from_private_bytes(private)
    return key.public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, purpose: str, session: bytes) -> bytes:
    """Agree with the owner of a public key on a key for one purpose.

    Parameters
    ----------
    private, public : bytes
        One's own private key, and the other's public one.
    purpose : str
        ``"mask"`` or ``"share"``: each has a key of its own.
    session : bytes
        Identifies the round, so that no key serves twice.

    Returns
    -------
    bytes
        The same on both sides.

    Raises
    ------
    ValueError
        If the public key is none.
    """
    key = X25519PrivateKey.from_private_bytes(private)
    shared = key.exchange(X25519PublicKey.from_public_bytes(public))
    info = f"fedknow secure aggregation: {purpose}".encode()
    return HKDF(SHA256(), KEY_BYTES, session, info).derive(shared)


def mask(key: bytes, size: int) -> Masks:
    """Stretch a key to numbers of 64 bits.

    Parameters
    ----------
    key : bytes
        Of one use.
    size : int
        How many.

    Returns
    -------
    uint64 [size]
    """
    # The nonce may be 0, as no key is used twice.
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    numbers = np.frombuffer(stream.update(bytes(8 * size)), "<u8")
    return numbers.astype(np.uint64, copy=False)


def pair_mask(key: bytes, size: int, is_first: bool) -> Masks:
    """Give a pair's mask with its sign: the two of a pair add up to 0.

    Parameters
    ----------
    key : bytes
        What the two agreed on.
    size : int
    is_first : bool
        Whether this client's number is the lower one of the two.
    """
    numbers = mask(key, size)
    # Numbers without a sign wrap around, which is the ring of 2**64 elements.
    return numbers if is_first else np.negative(numbers)


def seal_shares(key: bytes, sender: int, receiver: int, shares: bytes) -> bytes:
    """Seal shares for one receiver; both ends are part of what is sealed."""
    route = _route(sender, receiver)
    # Both directions have one key, so their nonces must differ.
    return ChaCha20Poly1305(key).encrypt(route, shares, route)


def open_shares(key: bytes, sender: int, receiver: int, sealed: bytes) -> bytes:
    """Open sealed shares.

    Raises
    ------
    ValueError
        If they were not sealed by this sender for this receiver and key.
    """
    route = _route(sender, receiver)
    try:
        return ChaCha20Poly1305(key).decrypt(route, sealed, route)
    except InvalidTag:
        raise ValueError(
            f"the shares of node {sender} were not sealed for node {receiver} in this round"
        ) from None


def _route(sender: int, receiver: int) -> bytes:
    """Name sender and receiver in the 12 bytes of a nonce."""
    return sender.to_bytes(6, "big") + receiver.to_bytes(6, "big")
