"""The certificates of a run.

A run has a CA of its own, one certificate for the server and one for each client.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import secrets
import shutil
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
# Ten years: a new CA means new files on every machine, some of them out of reach.
_CA_DAYS = 3650
_SKEW = dt.timedelta(hours=1)
"""How far a client's clock may be behind.

Small computers without a battery start with an old time.
"""


def make_certificates(
    folder: Path,
    clients: int,
    hosts: Sequence[str] = (),
    days: int = 365,
    issued: dt.datetime | None = None,
) -> list[Path]:
    """Make the missing files in a folder of certificates.

    Files that are there are never changed.

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
    issued : datetime, optional
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
    check_between(
        "--days", days, 1, _CA_DAYS, "the CA itself is valid for ten years"
    )
    validity = _Validity(
        issued or dt.datetime.now(dt.UTC), dt.timedelta(days=days)
    )
    # Before anything is written: a bad name must leave no half-made folder.
    names = [_host(host) for host in (*LOCAL, *hosts)]
    try:
        authority = _Authority.open(folder, validity.start)
        new_folders = []
        server = folder / "server"
        if server.exists():
            _check_hosts(server / CERTIFICATE, hosts)
        else:
            _make_server(server, authority, names, validity)
            new_folders.append(server)
        tokens = Tokens.load(server)
        new_folders += _make_clients(
            folder / "clients", clients, authority, tokens, validity
        )
        # Last: a client's folder without a digest here is mended by the next call, a digest
        # without a folder is not.
        write_atomic(server / TOKENS, tokens.to_json())
        return new_folders
    except OSError as error:
        raise ConfigError(
            f"{error.filename or folder}: {error.strerror}; choose another folder"
        ) from None


@dataclass(frozen=True)
class _Validity:
    """The time of issue of certificates, and how long they are valid."""

    start: dt.datetime
    length: dt.timedelta


def _make_server(
    folder: Path,
    authority: _Authority,
    names: Sequence[x509.GeneralName],
    validity: _Validity,
) -> None:
    uri = x509.UniformResourceIdentifier(SERVER_URI)
    # A host may be given twice, or be one of the local ones.
    unique = list(dict.fromkeys(names))
    # The server may also ask itself for its state (`fedknow status`), which is a client's
    # part.
    usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    files = authority.issue("fedknow server", [*unique, uri], usage, validity)
    _write_folder(folder, files | {TOKENS: Tokens({}).to_json()})


def _make_clients(
    folder: Path,
    clients: int,
    authority: _Authority,
    tokens: Tokens,
    validity: _Validity,
) -> list[Path]:
    """Make the folders of clients that have none, and add their tokens.

    Returns
    -------
    list of Path
        The new folders.
    """
    new_folders = []
    for client in range(clients):
        place = folder / f"{client:03d}"
        # Its folder may be on the client's machine by now, and is not made again.
        if client in tokens.digests:
            continue
        if place.exists():
            # The server's folder was made anew, or the previous call ended here.
            tokens.add((place / TOKEN).read_text("ascii").strip())
            continue
        token = new_token(client)
        uri = x509.UniformResourceIdentifier(client_uri(client))
        usage = [ExtendedKeyUsageOID.CLIENT_AUTH]
        files = authority.issue(
            f"fedknow client {client}", [uri], usage, validity
        )
        _write_folder(place, files | {TOKEN: token.encode() + b"\n"})
        tokens.add(token)
        new_folders.append(place)
    return new_folders


class _Authority:
    """A certificate authority, which signs certificates."""

    def __init__(
        self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
    ) -> None:
        self.certificate = certificate
        self.key = key

    @classmethod
    def open(cls, folder: Path, time: dt.datetime) -> _Authority:
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
    def _load(cls, folder: Path) -> _Authority:
        try:
            key_file = (folder / _CA_KEY).read_bytes()
            key = load_pem_private_key(key_file, password=None)
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
    def _new(cls, folder: Path, time: dt.datetime) -> _Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        # A random part, so that the CAs of two runs are told apart on a machine.
        name = _common_name(f"fedknow CA {secrets.token_hex(4)}")
        serial = x509.random_serial_number()
        own_key = key.public_key()
        certificate = (
            x509.CertificateBuilder(name, name, own_key, serial)
            .not_valid_before(time - _SKEW)
            .not_valid_after(time + dt.timedelta(days=_CA_DAYS))
            # No CA below this one.
            .add_extension(
                x509.BasicConstraints(ca=True, path_length=0), critical=True
            )
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(_subject_id(own_key), critical=False)
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
        validity: _Validity,
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
        validity : _Validity
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
            .not_valid_before(validity.start - _SKEW)
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


def _host(host: str) -> x509.GeneralName:
    try:
        checked = check_host(host, wildcard=True)
    except ValueError as error:
        raise ConfigError(f"--host {host!r}: {error}") from None
    try:
        address = ipaddress.ip_address(checked)
    except ValueError:
        return x509.DNSName(checked)
    # Users give what the server listens at, such as 0.0.0.0.
    if address.is_unspecified or address.is_multicast:
        raise ConfigError(
            f"--host {host!r}: nobody can connect to this address; "
            "give the name or the address that clients connect to"
        )
    return x509.IPAddress(address)


def _check_hosts(certificate: Path, hosts: Sequence[str]) -> None:
    content = x509.load_pem_x509_certificate(certificate.read_bytes())
    kind = x509.SubjectAlternativeName
    names = set(content.extensions.get_extension_for_class(kind).value)
    missing = [host for host in hosts if _host(host) not in names]
    if missing:
        raise ConfigError(
            f"{certificate} was made without --host {' --host '.join(missing)}; remove "
            f"{certificate.parent} and run this again: the server gets a new certificate, "
            "clients keep theirs"
        )


def _write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Write a folder that only its owner can enter, complete or not at all."""
    folder.parent.mkdir(exist_ok=True)
    draft = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700)
    for name, data in files.items():
        _write(draft / name, data)
    # A folder that exists is complete, so that a call that was cut short can be repeated.
    draft.rename(folder)


def _write(path: Path, data: bytes) -> None:
    # Readable by its owner alone from the start, so that no moment is left to read a key.
    # Never over a file that is there.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
