"""Certificates in place of those that are about to expire."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from fedknow.server.authority import SKEW, Authority

__all__ = ["Renewer", "expiry_of"]

SHARE = 3
"""A certificate is renewed in the last of so many parts of its time."""


def expiry_of(pem: bytes) -> float:
    """Give when a certificate expires, in seconds since 1970."""
    return x509.load_pem_x509_certificate(pem).not_valid_after_utc.timestamp()


class Renewer:
    """Signs certificates anew, for the same key and names.

    The key of the authority must be at hand, which makes this machine worth more to a thief. A
    short validity is worth it where machines are lost more often than servers are broken into.

    Parameters
    ----------
    folder : Path
        The folder that ``fedknow certs`` made, with ``ca.key``.

    Raises
    ------
    ConfigError
        If it holds no authority.
    """

    def __init__(self, folder: Path) -> None:
        self._authority = Authority.open(folder, dt.datetime.now(dt.UTC))

    def __call__(self, pem: bytes, moment: dt.datetime | None = None) -> bytes:
        """Make a new certificate in place of one.

        Parameters
        ----------
        pem : bytes
            A certificate of this authority, proved by a handshake.
        moment : datetime, optional
            The time of issue, with its zone; by default the present.

        Returns
        -------
        bytes
            PEM; empty where the old one is good for long enough.
        """
        old = x509.load_pem_x509_certificate(pem)
        start = moment or dt.datetime.now(dt.UTC)
        length = old.not_valid_after_utc - old.not_valid_before_utc - SKEW
        if old.not_valid_after_utc - start > length / SHARE:
            return b""
        authority = self._authority
        builder = (
            x509.CertificateBuilder()
            .subject_name(old.subject)
            .issuer_name(authority.certificate.subject)
            .public_key(old.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start - SKEW)
            .not_valid_after(
                min(start + length, authority.certificate.not_valid_after_utc)
            )
        )
        for extension in old.extensions:
            builder = builder.add_extension(extension.value, extension.critical)
        new = builder.sign(authority.key, hashes.SHA256())
        return new.public_bytes(Encoding.PEM)
