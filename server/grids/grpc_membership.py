"""Membership: who may take part now, and who has proved to be whom.

What an operator changes counts within seconds: the lists of credentials and of members are read
again when their files change, and open streams are judged anew.
"""

from __future__ import annotations

import logging
import queue
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedknow.protocols.config import ConfigError
from fedknow.protocols.messages import client_of
from fedknow.protocols.security import (
    TOKENS,
    CredentialError,
    Tokens,
    authenticate,
)
from fedknow.protocols.security.fingerprints import (
    CERTIFICATES,
    Fingerprints,
    fingerprint_of,
    pem_of_peer,
)
from fedknow.protocols.texts import printable
from fedknow.protocols.wire import Code, WireError
from fedknow.server.grids.activity import Change
from fedknow.server.grids.fences import Fences

__all__ = ["Guest", "Issuer", "Membership", "Proof"]

log = logging.getLogger(__name__)

Issuer = Callable[[bytes], bytes]
"""Makes a certificate in place of one (PEM); gives nothing where that is good for long enough."""


class Audit(Protocol):
    """Where it is written down (:class:`fedknow.server.run.audit.AuditLog`)."""

    def write(self, event: str, **values: Any) -> None:
        """Append a line."""
        ...


@dataclass(frozen=True)
class Proof:
    """What a call has proved.

    Attributes
    ----------
    client : int or None
        The client; None in the clear, where nothing can be proved.
    mark : str
        Tells the credential from others of the client; empty in the clear.
    pem : bytes
        The certificate, where it is one.
    """

    client: int | None
    mark: str = ""
    pem: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class Guest:
    """A client that was let in, before it has a stream.

    Attributes
    ----------
    proof : Proof
    fence : bytes or None
        The secret of an earlier stream that it said; None: it knows no fences.
    has_returned : bool
        That secret is one of this run's.
    """

    proof: Proof
    fence: bytes | None
    has_returned: bool


class Membership:
    """Judges credentials and members by lists that may change.

    Parameters
    ----------
    tls : Path, optional
        The server's folder of certificates, with its lists.
    tokens : Tokens, optional
        Clients prove who they are by these.
    ejections : callable, optional
        Reads which clients are out, and why; called when ``members`` changes.
    members : Path, optional
        The file that the operator's words are in.
    audit : Audit, optional
        Where changes are written down.
    fence_key : bytes, optional
        The run's secret; by default one for this process.
    issuer : callable, optional
        Makes certificates anew.

    Attributes
    ----------
    ejected : dict of int to str
        Clients that are out, and why.
    fences : Fences
    news : SimpleQueue of Change
        What the run's record is still to tell.
    """

    def __init__(  # noqa: PLR0913  # each is one source of what is known
        self,
        *,
        tls: Path | None = None,
        tokens: Tokens | None = None,
        ejections: Callable[[], dict[int, str]] = dict,
        members: Path | None = None,
        audit: Audit | None = None,
        fence_key: bytes = b"",
        issuer: Issuer | None = None,
    ) -> None:
        self.ejected: dict[int, str] = {}
        self.fences = Fences(fence_key or secrets.token_bytes(32))
        self.news: queue.SimpleQueue[Change] = queue.SimpleQueue()
        self._tls = tls
        self._tokens = tokens
        self._fingerprints = Fingerprints({})
        self._read_ejections = ejections
        self._audit = audit
        self._issuer = issuer
        names = [] if tls is None else [tls / CERTIFICATES, tls / TOKENS]
        self._files = [*names, *([members] if members else [])]
        self._stamps: list[tuple[int, int]] = []
        self.refresh()

    # --- lists

    def refresh(self) -> bool:
        """Read the lists again if a file has changed; return whether one has.

        A file that cannot be read changes nothing, and the log says so.
        """
        stamps = [_stamp(path) for path in self._files]
        if stamps == self._stamps:
            return False
        self._stamps = stamps
        try:
            if self._tls is not None:
                self._fingerprints = Fingerprints.load(self._tls)
                if self._tokens is not None:
                    self._tokens = Tokens.load(self._tls)
            self._take_ejections(self._read_ejections())
        except ConfigError as error:
            log.warning("the members stay as they were: %s", error)
            return False
        return True

    def _take_ejections(self, ejected: dict[int, str]) -> None:
        for client in sorted(ejected.keys() - self.ejected.keys()):
            reason = f"client {client} is out of the run: {ejected[client]}"
            self.tell("ejected", client, reason)
        for client in sorted(self.ejected.keys() - ejected.keys()):
            self.tell("admitted", client, f"client {client} may come in again")
        # One assignment: other threads look at it.
        self.ejected = ejected

    def pick_members(self, nodes: Iterable[int]) -> list[int]:
        """Pick the nodes of clients that are not out of the run."""
        return [node for node in nodes if client_of(node) not in self.ejected]

    # --- credentials

    def prove(self, context: Any, claimed: int | None) -> Proof:
        """Find who a call is from, by its credential.

        Raises
        ------
        WireError
            ``CREDENTIAL`` if it proves nothing, or nothing that counts any more.
        """
        peer = context.auth_context()
        metadata = context.invocation_metadata() or ()
        try:
            client = authenticate(peer, metadata, self._tokens, claimed)
        except CredentialError as error:
            raise WireError(Code.CREDENTIAL, error.reason) from None
        if self._tokens is not None:
            return Proof(client, self._tokens.mark(client))
        pem = pem_of_peer(peer)
        proof = Proof(client, fingerprint_of(pem), pem)
        if not self.counts(proof):
            raise WireError(
                Code.CREDENTIAL,
                f"this certificate of client {client} was renewed or revoked; use the "
                "newest one",
            )
        return proof

    def counts(self, proof: Proof) -> bool:
        """Say whether what was proved once counts still."""
        if proof.client is None or not proof.mark:
            return True
        if self._tokens is not None:
            return proof.mark == self._tokens.mark(proof.client)
        return self._fingerprints.counts(proof.client, proof.mark)

    def renew(self, proof: Proof) -> bytes:
        """Make a new certificate for a client that shows one.

        Returns
        -------
        bytes
            PEM; empty where the old one is good for long enough, or none is made here.
        """
        if self._issuer is None or self._tls is None or proof.client is None:
            return b""
        new = self._issuer(proof.pem) if proof.pem else b""
        if new:
            # The old one counts until the new one is shown: the answer may be lost.
            self._list(proof.client, [proof.mark, fingerprint_of(new)])
            reason = f"client {proof.client} has a new certificate"
            self.tell("renewed", proof.client, reason)
        return new

    def settle(self, proof: Proof) -> None:
        """Let a certificate count alone, if it is the client's newest."""
        client = proof.client
        if client is None or not proof.pem:
            return
        listed = self._fingerprints.by_client.get(client, [])
        if len(listed) > 1 and proof.mark == listed[-1]:
            self._list(client, [proof.mark])

    def _list(self, client: int, prints: list[str]) -> None:
        assert self._tls is not None  # certificates are shown under TLS alone
        self._fingerprints.by_client[client] = prints
        self._fingerprints.save(self._tls)

    # --- the record

    def tell(self, kind: str, client: int, reason: str) -> None:
        """Put a change on record: in the log, the audit log and the run's events."""
        text = printable(reason)
        log.warning("%s: %s", kind, text)
        self.note(kind, client=client, reason=text)
        self.news.put(Change(kind, client, text))

    def take_news(self) -> list[Change]:
        """Take the changes that the run's record is still to tell."""
        changes = []
        while not self.news.empty():
            changes.append(self.news.get())
        return changes

    def note(self, event: str, **values: Any) -> None:
        """Write something down in the audit log alone."""
        if self._audit is not None:
            self._audit.write(event, **values)


def _stamp(path: Path) -> tuple[int, int]:
    """Give what changes with a file: written whole, it is another one."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    # The inode too: a file may be replaced twice within one tick of the clock.
    return status.st_mtime_ns, status.st_ino
