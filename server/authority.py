"""The certificate authority of a run, which signs its certificates."""

from __future__ import annotations

import datetime as dt
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from fedknow.protocols.config import ConfigError
from fedknow.protocols.security import CA, CERTIFICATE, KEY

__all__ = ["CA_DAYS", "SKEW", "Authority", "Validity", "write_new"]


_CA_KEY = "ca.key"


# Ten years: a new CA means new files on every machine, some of them out of reach.
CA_DAYS = 3650


SKEW = dt.timedelta(hours=1)
"""How far a client's clock may be behind.

Small computers without a battery start with an old time.
"""


@dataclass(frozen=True)
class Validity:
    """The time of issue of certificates, and how long they are valid."""

    start: dt.datetime
    length: dt.timedelta


class Authority:
    """A certificate authority, which signs certificates."""

    def __init__(
        self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
    ) -> None:
        self.certificate = certificate
        self.key = key

    @classmethod
    def open(cls, folder: Path, time: dt.datetime) -> Authority:
        """Open the CA of a folder, and make it if the folder is new."""
        certificate = folder / CA
        key = folder / _CA_KEY
        if not certificate.exists() and not key.exists():
            if folder.exists() and any(folder.iterdir()):
                raise ConfigError(
                    f"{folder} holds something, but no CA; "
                    "give a new folder or one made before"
                )
            return cls._new(folder, time)
        authority = cls._load(folder)
        if authority.certificate.public_key() != authority.key.public_key():
            raise ConfigError(
                f"{folder}: {_CA_KEY} is not the key of {CA}; "
                "bring back the two that belong together"
            )
        if authority.certificate.not_valid_after_utc <= time:
            raise ConfigError(
                f"{certificate} has expired; "
                "start a new folder and give every machine its new files"
            )
        return authority

    @classmethod
    def _load(cls, folder: Path) -> Authority:
        try:
            key_file = (folder / _CA_KEY).read_bytes()
            key = load_pem_private_key(key_file, password=None)
            # A file of the right name may hold any key.
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise TypeError("the key is of another kind")
            certificate_file = (folder / CA).read_bytes()
            return cls(x509.load_pem_x509_certificate(certificate_file), key)
        except FileNotFoundError as error:
            raise ConfigError(
                f"{error.filename}: missing, so that nothing can be signed; bring it back, "
                "or start a new folder (and give every machine its new files)"
            ) from None
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{folder}: {CA} or {_CA_KEY} is damaged ({error}); start a new folder"
            ) from None

    @classmethod
    def _new(cls, folder: Path, time: dt.datetime) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        # A random part, so that the CAs of two runs are told apart on a machine.
        name = _common_name(f"fedknow CA {secrets.token_hex(4)}")
        serial = x509.random_serial_number()
        own_key = key.public_key()
        certificate = (
            x509.CertificateBuilder(name, name, own_key, serial)
            .not_valid_before(time - SKEW)
            .not_valid_after(time + dt.timedelta(days=CA_DAYS))
            # No CA below this one.
            .add_extension(
                x509.BasicConstraints(ca=True, path_length=0), critical=True
            )
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(_subject_id(own_key), critical=False)
            .sign(key, hashes.SHA256())
        )
        folder.mkdir(parents=True, exist_ok=True)
        # The key first: a certificate without it would be half a CA.
        write_new(folder / _CA_KEY, _pem(key))
        write_new(folder / CA, certificate.public_bytes(Encoding.PEM))
        return cls(certificate, key)

    def issue(
        self,
        name: str,
        names: Sequence[x509.GeneralName],
        usage: Sequence[x509.ObjectIdentifier],
        validity: Validity,
    ) -> dict[str, bytes]:
        """Issue the three files of one side.

        Parameters
        ----------
        name : str
            Common name, for people.
        names : sequence of GeneralName
            Names that the other side checks.
        usage : sequence of ObjectIdentifier
            Whether it is a server's, a client's, or both.
        validity : Validity
            From when and how long; no longer than the CA.

        Returns
        -------
        dict
            Content by file name.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        own_key = key.public_key()
        issuer = self.certificate.subject
        serial = x509.random_serial_number()
        # A certificate that outlives its CA would look valid and be refused.
        end = min(
            validity.start + validity.length, self.certificate.not_valid_after_utc
        )
        constraints = x509.BasicConstraints(ca=False, path_length=None)
        issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(
            self.key.public_key()
        )
        certificate = (
            x509.CertificateBuilder(issuer, _common_name(name), own_key, serial)
            .not_valid_before(validity.start - SKEW)
            .not_valid_after(end)
            .add_extension(constraints, critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            # So that no client can pass its certificate off as the server's.
            .add_extension(x509.ExtendedKeyUsage(usage), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(_subject_id(own_key), critical=False)
            .add_extension(issuer_id, critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return {
            CA: self.certificate.public_bytes(Encoding.PEM),
            CERTIFICATE: certificate.public_bytes(Encoding.PEM),
            KEY: _pem(key),
        }


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _subject_id(key: ec.EllipticCurvePublicKey) -> x509.SubjectKeyIdentifier:
    return x509.SubjectKeyIdentifier.from_public_key(key)


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def write_new(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read, and that is not there yet."""
    # Readable by its owner alone from the start, so that no moment is left to read a key.
    # Never over a file that is there.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
