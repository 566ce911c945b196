"""A certificate renewed by the client itself, before it expires."""

from __future__ import annotations

import asyncio
import logging
import ssl
import tempfile
from pathlib import Path
from typing import NoReturn

import grpc
import grpc.aio

from fedknow.client.edge.threads import forever
from fedknow.protocols.config import ConfigError
from fedknow.protocols.files import write_atomic
from fedknow.protocols.security import CERTIFICATE, KEY
from fedknow.protocols.texts import counted, printable
from fedknow.protocols.wire import RENEW, RenewReply, RenewRequest

__all__ = ["RENEW_SECONDS", "keep_valid", "replace_certificate"]

log = logging.getLogger(__name__)

RENEW_SECONDS = 600.0
"""How often to ask; the server says whether it is time."""
LARGEST = 1 << 16
"""Bytes of a certificate; real ones take one or two thousand."""


async def keep_valid(
    channel: grpc.aio.Channel, folder: Path | None, server: str
) -> NoReturn:
    """Ask a server for a new certificate, now and then, as long as it runs.

    Parameters
    ----------
    channel : grpc.aio.Channel
        A connection that has shown the certificate of the folder.
    folder : Path or None
        The client's certificates; without one there is nothing to ask for.
    server : str
        For texts.
    """
    ask = channel.unary_unary(
        RENEW, RenewRequest.SerializeToString, RenewReply.FromString
    )
    has_certificate = folder is not None and (folder / CERTIFICATE).exists()
    while folder is not None and has_certificate:
        try:
            reply = await ask(RenewRequest(), timeout=60.0)
        except grpc.aio.AioRpcError as error:
            # An older server, or one that is about to go: the stream tells more.
            log.debug("no renewal: %s", printable(error.details() or ""))
            break
        if reply.certificate:
            try:
                replace_certificate(folder, reply.certificate)
                log.info("%s gave a new certificate", server)
            except (ConfigError, OSError) as error:
                log.warning("the new certificate is not taken: %s", error)
        await asyncio.sleep(RENEW_SECONDS)
    await forever()


def replace_certificate(folder: Path, pem: bytes) -> None:
    """Put a new certificate in the place of the old one.

    Raises
    ------
    ConfigError
        If it is none, or another key's.
    OSError
        If it cannot be written; the old one is intact.
    """
    if len(pem) > LARGEST:
        raise ConfigError(f"a certificate of {counted(len(pem), 'byte')} is none")
    with tempfile.TemporaryDirectory() as name:
        draft = Path(name) / CERTIFICATE
        draft.write_bytes(pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            # It reads both, and refuses a certificate of another key.
            context.load_cert_chain(draft, folder / KEY)
        except ssl.SSLError as error:
            raise ConfigError(
                f"what the server sent does not go with {folder / KEY}: {error.reason}"
            ) from None
    write_atomic(folder / CERTIFICATE, pem)
    (folder / CERTIFICATE).chmod(0o600)
