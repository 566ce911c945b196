"""Two that hold one identity: which of them has the client's place."""

from __future__ import annotations

import time
from enum import Enum, auto
from typing import Any

from fedknow.protocols.messages import client_of
from fedknow.protocols.wire import Code, WireError, goodbye, refusal
from fedknow.server.grids.grpc_gate import address_of
from fedknow.server.grids.grpc_link import Link, Peer
from fedknow.server.grids.grpc_membership import Guest, Membership

__all__ = ["Arbiter", "Standing", "judge"]


class Standing(Enum):
    """How a newcomer stands to the stream that its client has now."""

    ALONE = auto()
    """The client has no stream."""
    SAME = auto()
    """It is the same holder, back before its old stream was given up."""
    STRONGER = auto()
    """It was here before, and the other one cannot show that."""
    WEAKER = auto()
    """It cannot show that it is the one that was here before."""


def judge(link: Link | None, guest: Guest) -> Standing:
    """Say how a newcomer stands to the stream that its client has.

    Parameters
    ----------
    link : Link or None
        That stream.
    guest : Guest
        The newcomer, whose credential is right.
    """
    if link is None:
        return Standing.ALONE
    # Clients of earlier versions know no fences: the newest one counts, as it did then.
    if link.guest.fence is None:
        return Standing.SAME
    # The second: the welcome of the open stream was lost on its way.
    fences = [link.fence, link.guest.fence]
    if guest.fence and guest.fence in fences:
        return Standing.SAME
    if guest.has_returned and not link.guest.has_returned:
        return Standing.STRONGER
    return Standing.WEAKER


class Arbiter:
    """Decides whose stream is a client's, and whose may go on.

    Parameters
    ----------
    membership : Membership
        Who may take part now.
    """

    def __init__(self, membership: Membership) -> None:
        self._membership = membership

    def arbitrate(
        self,
        peer: Peer,
        guest: Guest,
        context: Any,
    ) -> WireError | None:
        """Decide between a newcomer and the stream that its client has.

        Returns
        -------
        WireError or None
            Why the open stream ends; None without one.

        Raises
        ------
        WireError
            ``DUPLICATE`` if the newcomer is the one to go.
        """
        standing = judge(peer.link, guest)
        if peer.link is None:
            return None
        name = f"client {client_of(peer.node)}"
        if standing is Standing.WEAKER:
            outcome = "the second did not prove that it was here before"
            self._tell_conflict(peer, peer.link, context, outcome)
            raise WireError(
                Code.DUPLICATE,
                f"another holder of the identity of {name} is connected; if it is not "
                "yours, have its credential revoked",
            )
        if standing is Standing.STRONGER:
            outcome = "the second proved that it was here before"
            self._tell_conflict(peer, peer.link, context, outcome)
        reason = f"{name} has connected anew, from {context.peer()}"
        return WireError(Code.REPLACED, reason)

    def judge_anew(self, client: int, link: Link) -> None:
        """End a stream whose client may not be here any more."""
        ejected = self._membership.ejected
        if client in ejected:
            reason = f"client {client} is out of the run: {ejected[client]}"
            link.end(refusal(WireError(Code.EJECTED, reason)))
        elif not self._membership.counts(link.guest.proof):
            reason = f"the credential of client {client} was renewed or revoked"
            self._membership.tell("revoked", client, reason)
            link.end(refusal(WireError(Code.CREDENTIAL, reason)))
        elif time.time() >= link.expires:
            # No fault: the client may have a newer certificate, and comes back with it.
            link.end(goodbye(False, "the certificate has expired"))

    def _tell_conflict(
        self,
        peer: Peer,
        link: Link,
        context: Any,
        outcome: str,
    ) -> None:
        """Put on record that two hold one identity, once for each pair."""
        client = client_of(peer.node)
        places = [address_of(link.context), address_of(context)]
        # Told once, as a refused client soon tries again.
        if peer.conflict == [*places, outcome]:
            return
        peer.conflict = [*places, outcome]
        self._membership.tell(
            "conflict",
            client,
            f"two hold the identity of client {client}, at {places[0]} and at {places[1]}; "
            f"{outcome}",
        )
