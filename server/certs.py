"""The certificates of a run: a CA of its own, one certificate for the server and one for each client."""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import secrets
import shutil
from collections.abc import Sequence
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
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedknow.protocols.address import check_host
from fedknow.protocols.bounds import check_between
from fedknow.protocols.config import MOST_CLIENTS, ConfigError
from fedknow.protocols.files import write_atomic
from fedknow.protocols.security import (
    CA,
    CERTIFICATE,
    KEY,
    SERVER_URI,
    TOKEN,
    TOKENS,
    Tokens,
    client_uri,
    new_token,
)

__all__ = ["make_certificates"]

LOCAL = ("localhost", "127.0.0.1", "::1")
"""Names that every server's certificate has."""

_CA_KEY = "ca.key"
_CA_DAYS = 3650
_SKEW = dt.timedelta(hours=1)
"""How far a client's clock may be behind."""


def make_certificates(
    folder: Path,
    clients: int,
    hosts: Sequence[str] = (),
    days: int = 365,
    now: dt.datetime | None = None,
) -> list[Path]:
    """Make what is missing in a folder of certificates; what is there is never changed.

    ::

        ca.pem  ca.key     the run's CA (EC P-256, ten years); the key stays here
        server/            ca.pem  cert.pem  key.pem  tokens.json
        clients/000/ ...   ca.pem  cert.pem  key.pem  token

    Each sub-folder is what one machine gets. Keys and tokens are readable by their owner alone.
    A client that ``tokens.json`` knows and whose folder is gone was moved to its machine, and
    is not made again.

    Parameters
    ----------
    folder : Path
        A new folder, or one made before: clients and a removed ``server/`` are added under its CA.
    clients : int
        How many clients there shall be, from 0.
    hosts : sequence of str
        Names and addresses under which clients reach the server, besides the local ones.
    days : int
        How long the certificates are valid; no longer than the CA is.
    now : datetime, optional
        The time of issue, with its zone; by default the present.

    Returns
    -------
    list of Path
        The folders made.

    Raises
    ------
    ConfigError
        If a number is out of range, the folder holds something else, half a CA, or a server's
        certificate without one of the hosts.
    """
    check_between("--clients", clients, 1, MOST_CLIENTS)
    check_between("--days", days, 1, _CA_DAYS, "the CA itself is valid for ten years")
    now = now or dt.datetime.now(dt.UTC)
    try:
        return _make(folder, clients, hosts, dt.timedelta(days=days), now)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or folder}: {error.strerror}; choose another folder"
        ) from None


def _make(
    folder: Path,
    clients: int,
    hosts: Sequence[str],
    life: dt.timedelta,
    now: dt.datetime,
) -> list[Path]:
    for host in hosts:  # before anything is written
        _host(host)
    authority = _Authority.open(folder, now)
    made = []
    server = folder / "server"
    if server.exists():
        _check_hosts(server / CERTIFICATE, hosts)
        tokens = Tokens.load(server)
    else:
        names = list(dict.fromkeys(_host(host) for host in (*LOCAL, *hosts)))
        names.append(x509.UniformResourceIdentifier(SERVER_URI))
        tokens = Tokens({})
        # It may also ask the server it is for how it stands (`fedknow status`), which is a
        # client's part.
        usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        files = authority.issue("fedknow server", names, usage, now, life)
        _write_folder(server, files | {TOKENS: tokens.to_json()})
        made.append(server)
    for client in range(clients):
        place = folder / "clients" / f"{client:03d}"
        if place.exists():
            if (
                client not in tokens.digests
            ):  # server/ was made anew, or the last run ended here
                tokens.add((place / TOKEN).read_text("ascii").strip())
        elif client not in tokens.digests:
            token = new_token(client)
            name = x509.UniformResourceIdentifier(client_uri(client))
            files = authority.issue(
                f"fedknow client {client}",
                [name],
                [ExtendedKeyUsageOID.CLIENT_AUTH],
                now,
                life,
            )
            _write_folder(place, files | {TOKEN: token.encode() + b"\n"})
            tokens.add(token)
            made.append(place)
    write_atomic(server / TOKENS, tokens.to_json())
    return made


class _Authority:
    """A certificate authority: what signs."""

    def __init__(
        self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
    ) -> None:
        self.certificate = certificate
        self.key = key

    @classmethod
    def open(cls, folder: Path, now: dt.datetime) -> _Authority:
        """The CA of a folder, made if the folder is new."""
        certificate, key = folder / CA, folder / _CA_KEY
        if not certificate.exists() and not key.exists():
            if folder.exists() and any(folder.iterdir()):
                raise ConfigError(
                    f"{folder} holds something, but no CA; give a new folder or one made before"
                )
            return cls._new(folder, now)
        try:
            secret = load_pem_private_key(key.read_bytes(), password=None)
            if not isinstance(secret, ec.EllipticCurvePrivateKey):
                raise TypeError("the key is of another kind")
            authority = cls(
                x509.load_pem_x509_certificate(certificate.read_bytes()), secret
            )
        except FileNotFoundError as error:
            raise ConfigError(
                f"{error.filename}: missing, so that nothing can be signed; bring it back, or start a new folder "
                "(and give every machine its new files)"
            ) from None
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{folder}: {CA} or {_CA_KEY} is damaged ({error}); start a new folder"
            ) from None
        if authority.certificate.public_key() != secret.public_key():
            raise ConfigError(
                f"{folder}: {_CA_KEY} is not the key of {CA}; bring back the two that belong together"
            )
        if authority.certificate.not_valid_after_utc <= now:
            raise ConfigError(
                f"{folder / CA} has expired; start a new folder and give every machine its new files"
            )
        return authority

    @classmethod
    def _new(cls, folder: Path, now: dt.datetime) -> _Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name(
            [
                x509.NameAttribute(
                    NameOID.COMMON_NAME, f"fedknow CA {secrets.token_hex(4)}"
                )
            ]
        )
        certificate = (
            x509.CertificateBuilder(
                name, name, key.public_key(), x509.random_serial_number()
            )
            .not_valid_before(now - _SKEW)
            .not_valid_after(now + dt.timedelta(days=_CA_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()),
                critical=False,
            )
            .sign(key, hashes.SHA256())
        )
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / _CA_KEY, _pem(key))
        _write(folder / CA, certificate.public_bytes(Encoding.PEM))
        return cls(certificate, key)

    def issue(
        self,
        name: str,
        names: Sequence[x509.GeneralName],
        usage: Sequence[x509.ObjectIdentifier],
        now: dt.datetime,
        life: dt.timedelta,
    ) -> dict[str, bytes]:
        """The three files of one side."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer = self.certificate.subject
        certificate = (
            x509.CertificateBuilder(
                issuer, subject, key.public_key(), x509.random_serial_number()
            )
            .not_valid_before(now - _SKEW)
            .not_valid_after(min(now + life, self.certificate.not_valid_after_utc))
            .add_extension(
                x509.BasicConstraints(ca=False, path_length=None), critical=True
            )
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usage), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()),
                critical=False,
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(
                    self.key.public_key()
                ),
                critical=False,
            )
            .sign(self.key, hashes.SHA256())
        )
        return {
            CA: self.certificate.public_bytes(Encoding.PEM),
            CERTIFICATE: certificate.public_bytes(Encoding.PEM),
            KEY: _pem(key),
        }


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


def _host(host: str) -> x509.GeneralName:
    try:
        checked = check_host(host, wildcard=True)
    except ValueError as error:
        raise ConfigError(f"--host {host!r}: {error}") from None
    try:
        address = ipaddress.ip_address(checked)
    except ValueError:
        return x509.DNSName(checked)
    if address.is_unspecified or address.is_multicast:
        raise ConfigError(
            f"--host {host!r}: nobody can connect to this address; give the name or the address that clients connect to"
        )
    return x509.IPAddress(address)


def _check_hosts(certificate: Path, hosts: Sequence[str]) -> None:
    found = x509.load_pem_x509_certificate(certificate.read_bytes())
    names = set(
        found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    )
    missing = [host for host in hosts if _host(host) not in names]
    if missing:
        raise ConfigError(
            f"{certificate} was made without --host {' --host '.join(missing)}; remove {certificate.parent} and run "
            "this again: the server gets a new certificate, clients keep theirs"
        )


def _write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Write a folder that only its owner can enter, whole or not at all."""
    folder.parent.mkdir(exist_ok=True)
    draft = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700)
    for name, data in files.items():
        _write(draft / name, data)
    draft.rename(folder)


def _write(path: Path, data: bytes) -> None:
    with os.fdopen(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb"
    ) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
