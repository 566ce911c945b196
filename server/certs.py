"""The certificates of a run.

A run has a CA of its own, one certificate for the server and one for each client.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import shutil
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedknow.protocols.address import check_host
from fedknow.protocols.bounds import check_between
from fedknow.protocols.config import MOST_CLIENTS, ConfigError
from fedknow.protocols.files import write_atomic
from fedknow.protocols.security import (
    CERTIFICATE,
    SERVER_URI,
    TOKEN,
    TOKENS,
    Tokens,
    client_uri,
    new_token,
)
from fedknow.protocols.security.fingerprints import Fingerprints, fingerprint_of
from fedknow.server.authority import CA_DAYS, Authority, Validity, write_new

__all__ = ["make_certificates", "revoke"]

LOCAL = ("localhost", "127.0.0.1", "::1")
"""Names that every server's certificate has."""


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
        "--days", days, 1, CA_DAYS, "the CA itself is valid for ten years"
    )
    validity = Validity(
        issued or dt.datetime.now(dt.UTC), dt.timedelta(days=days)
    )
    # Before anything is written: a bad name must leave no half-made folder.
    names = [_host(host) for host in (*LOCAL, *hosts)]
    try:
        authority = Authority.open(folder, validity.start)
        new_folders = []
        server = folder / "server"
        # Its certificate is left alone, so that it must hold the hosts already.
        if server.exists():
            _check_hosts(server / CERTIFICATE, hosts)
        else:
            _make_server(server, authority, names, validity)
            new_folders.append(server)
        tokens = Tokens.load(server)
        new_clients = _make_clients(
            folder / "clients", clients, authority, tokens, validity
        )
        _list_certificates(folder, new_clients)
        new_folders += new_clients
        # Last: a client's folder without a digest here is mended by the next call, a digest
        # without a folder is not.
        write_atomic(server / TOKENS, tokens.to_json())
        return new_folders
    except OSError as error:
        raise ConfigError(
            f"{error.filename or folder}: {error.strerror}; choose another folder"
        ) from None


def _make_server(
    folder: Path,
    authority: Authority,
    names: Sequence[x509.GeneralName],
    validity: Validity,
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
    authority: Authority,
    tokens: Tokens,
    validity: Validity,
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


def _list_certificates(folder: Path, clients: Sequence[Path]) -> None:
    """Let the certificates of new folders count, in place of older ones."""
    # The authority's own list: the server's folder may be removed to be made anew.
    fingerprints = Fingerprints.load(folder)
    for client in clients:
        pem = (client / CERTIFICATE).read_bytes()
        fingerprints.by_client[int(client.name)] = [fingerprint_of(pem)]
    fingerprints.save(folder)
    fingerprints.save(folder / "server")


def revoke(folder: Path, client: int) -> None:
    """Let no credential of a client count any more.

    A server that reads this folder ends its streams within seconds. ``fedknow certs`` then makes
    the client new credentials.

    Parameters
    ----------
    folder : Path
        The folder that ``fedknow certs`` made, or the server's part of it.
    client : int
        Which.

    Raises
    ------
    ConfigError
        If there is no such client.
    """
    server = folder if (folder / TOKENS).exists() else folder / "server"
    tokens = Tokens.load(server)
    fingerprints = Fingerprints.load(server)
    if client not in tokens.digests and client not in fingerprints.by_client:
        raise ConfigError(
            f"--client {client}: {server} lists no credential of it"
        )
    tokens.digests.pop(client, None)
    # Empty and not gone: a client that is not listed may show any certificate.
    fingerprints.by_client[client] = []
    fingerprints.save(server)
    if server != folder:
        fingerprints.save(folder)
    write_atomic(server / TOKENS, tokens.to_json())
    # Its old files must not count again when new ones are made.
    shutil.rmtree(folder / "clients" / f"{client:03d}", ignore_errors=True)


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
    # Left by a call that was cut short.
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700)
    for name, data in files.items():
        write_new(draft / name, data)
    # A folder that exists is complete, so that a call that was cut short can be repeated.
    draft.rename(folder)
