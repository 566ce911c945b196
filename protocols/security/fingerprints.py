"""The credentials that count now: reread while a server runs.

``fedknow certs`` lists the fingerprint of each client's newest certificate in
``certificates.json`` beside ``tokens.json``. A certificate that is not listed any more was
renewed or revoked, and a token that is gone was removed.
"""

from __future__ import annotations

import hashlib
import json
import ssl
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

from fedknow.protocols.config import ConfigError
from fedknow.protocols.files import write_atomic

__all__ = ["CERTIFICATES", "Fingerprints", "fingerprint_of", "pem_of_peer"]

CERTIFICATES = "certificates.json"
_PEM = "x509_pem_cert"
"""Where gRPC gives a verified certificate."""


def pem_of_peer(peer: Mapping[str, Iterable[bytes]]) -> bytes:
    """Give the certificate that a peer has shown, as PEM; empty without one."""
    return next(iter(peer.get(_PEM, ())), b"")


def fingerprint_of(pem: bytes) -> str:
    """Give the SHA-256 of a certificate (DER), as hexadecimal text."""
    # Of DER: one certificate can be wrapped in several texts of PEM.
    der = ssl.PEM_cert_to_DER_cert(pem.decode("ascii"))
    return hashlib.sha256(der).hexdigest()


class Fingerprints:
    """The certificates of each client that count.

    Parameters
    ----------
    by_client : mapping
        Fingerprints by client. A client that is not in it may show any certificate of the CA:
        folders of earlier versions have no list.
    """

    def __init__(self, by_client: Mapping[int, Iterable[str]]) -> None:
        self.by_client = {
            client: list(prints) for client, prints in by_client.items()
        }

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the list of a server's folder; empty without one.

        Raises
        ------
        ConfigError
            If it is not what ``fedknow certs`` wrote.
        """
        path = folder / CERTIFICATES
        try:
            entries = json.loads(path.read_bytes())["clients"]
            return cls(
                {
                    int(client): map(str, prints)
                    for client, prints in entries.items()
                }
            )
        except FileNotFoundError:
            return cls({})
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OSError,
        ) as error:
            raise ConfigError(
                f"{path}: not a list of certificates ({error!r}); `fedknow certs` makes one"
            ) from None

    def save(self, folder: Path) -> None:
        """Write what :meth:`load` reads."""
        entries = {
            str(client): prints
            for client, prints in sorted(self.by_client.items())
        }
        text = json.dumps({"clients": entries}, indent=1) + "\n"
        write_atomic(folder / CERTIFICATES, text.encode())

    def counts(self, client: int, fingerprint: str) -> bool:
        """Say whether a certificate of a client counts."""
        # A client without a list may show any certificate of the run's CA.
        listed = self.by_client.get(client)
        return listed is None or fingerprint in listed
