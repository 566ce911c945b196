"""The waves of :mod:`fedknow.protocols.secure`, on the server.

They end with the sum of what clients sent under masks, as whole numbers.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from fedknow.protocols.messages import (
    CONFIG,
    Config,
    Message,
    client_of,
)
from fedknow.protocols.secure import rounds
from fedknow.protocols.secure.masks import (
    KEY_BYTES,
    SEAL_BYTES,
    agree,
    mask,
    new_key,
    pair_mask,
    public_key,
)
from fedknow.protocols.secure.shamir import (
    SHARE_BYTES,
    recover,
    weights_at_zero,
)
from fedknow.protocols.texts import counted
from fedknow.server.checks.faults import RunError
from fedknow.server.run.context import RunContext

__all__ = [
    "SecureWaves",
    "Session",
    "TooFew",
    "read_keys",
    "read_texts",
    "require",
]

T = TypeVar("T")


class TooFew(Exception):
    """Too few clients are left to open a sum."""


@dataclass
class Session:
    """What the server learns in a round.

    Attributes
    ----------
    id : bytes
        Of this round and no other.
    threshold : int
        How many clients must stay.
    share_keys, mask_keys : dict of int to bytes
        Public keys by node.
    sealed : dict of int to dict of int to bytes
        Sealed shares by sender and receiver.
    """

    id: bytes
    threshold: int
    share_keys: dict[int, bytes]
    mask_keys: dict[int, bytes]
    sealed: dict[int, dict[int, bytes]]

    def sealed_for(self, node: int) -> list[bytes]:
        """Give what each peer sealed for a node, in the order of peers."""
        return [self.sealed[sender][node] for sender in self.peers]

    @property
    def peers(self) -> list[int]:
        """The nodes that dealt shares, ascending."""
        return sorted(self.sealed)

    def left_over(
        self, node: int, private: bytes, survivors: Sequence[int], size: int
    ) -> np.ndarray:
        """Add up the masks that others made for a client that dropped out.

        Parameters
        ----------
        node : int
            Which client.
        private : bytes
            Its key.
        survivors : sequence of int
            The others.
        size : int
            Numbers of a mask.
        """
        total = np.zeros(size, np.uint64)
        for survivor in survivors:
            public = self.mask_keys[survivor]
            key = agree(private, public, "mask", self.id)
            total = total + pair_mask(key, size, survivor < node)
        return total


class SecureWaves:
    """Sends the waves around the work of a round.

    Parameters
    ----------
    run : RunContext
    """

    def __init__(self, run: RunContext) -> None:
        self._run = run

    def prepare(self, nodes: Sequence[int]) -> Session:
        """Waves 1 and 2: keys and shares.

        Parameters
        ----------
        nodes : sequence of int
            Who is to answer.

        Raises
        ------
        TooFew
            If too few clients answered.
        """
        # From the system and not from the seed, which clients know.
        id = secrets.token_bytes(KEY_BYTES)
        work = {node: Config({rounds.SESSION: id}) for node in sorted(nodes)}
        keys = self._wave(rounds.KEYS, work, read_keys)
        share_keys: dict[int, bytes] = {}
        mask_keys: dict[int, bytes] = {}
        for node, (share_key, mask_key) in sorted(keys.items()):
            # Two clients with one key would share masks that only a pair may know.
            if mask_key in mask_keys.values():
                self._leave_out(node, "it shows another client's key")
                continue
            share_keys[node] = share_key
            mask_keys[node] = mask_key
        members = sorted(mask_keys)
        require(len(members), rounds.MINIMUM, len(nodes), "made keys")
        share = self._run.parts.config.privacy.threshold
        threshold = rounds.threshold_of(share, len(members))
        request = Config(
            {
                rounds.SESSION: id,
                rounds.NODES: members,
                rounds.SHARE_KEYS: [share_keys[node] for node in members],
                rounds.MASK_KEYS: [mask_keys[node] for node in members],
            }
        )
        answers = self._wave(
            rounds.SHARES,
            dict.fromkeys(members, request),
            # Of the right length: others carry them, and each has room for so much.
            lambda record: read_texts(
                record, rounds.SEALED, len(members), 2 * SHARE_BYTES + SEAL_BYTES
            ),
        )
        sealed = {
            node: dict(zip(members, packages, strict=True))
            for node, packages in answers.items()
        }
        require(len(sealed), threshold, len(members), "dealt shares")
        return Session(id, threshold, share_keys, mask_keys, sealed)

    def open(
        self, session: Session, replies: Mapping[int, Message]
    ) -> np.ndarray:
        """Wave 4: take the masks off the sum.

        Returns
        -------
        uint64 [n]

        Raises
        ------
        TooFew
            If too few clients answered.
        RunError
            If what they answered does not fit together.
        """
        survivors = list(replies)
        work = {
            node: Config(
                {
                    rounds.SESSION: session.id,
                    rounds.SURVIVORS: survivors,
                    rounds.SEALED: session.sealed_for(node),
                }
            )
            for node in survivors
        }
        answers = self._wave(
            rounds.UNMASK,
            work,
            lambda record: read_texts(
                record, rounds.SHARES, len(session.peers), SHARE_BYTES
            ),
        )
        require(len(answers), session.threshold, len(survivors), "opened the sum")
        # As many as needed, the same for all secrets, so that the weights are computed once.
        points = sorted(answers)[: session.threshold]
        weights = weights_at_zero(points)
        # Unsigned numbers wrap around, as masks do: all sums are modulo 2**64.
        total = np.zeros((), np.uint64)
        for reply in replies.values():
            total = total + reply.arrays()[rounds.MASKED]
        for place, node in enumerate(session.peers):
            parts = {point: answers[point][place] for point in points}
            secret = _recover(parts, weights, node)
            # Of a client that answered the mask was opened, of one that dropped out the key.
            if node in replies:
                total = total - mask(secret, total.size)
            else:
                # Wrong shares recover to something, too; the public key tells.
                if public_key(secret) != session.mask_keys[node]:
                    raise _unopened(node)
                total = total - session.left_over(
                    node, secret, survivors, total.size
                )
        return total

    def _wave(
        self,
        kind: str,
        work: Mapping[int, Config],
        read: Callable[[Config], T],
    ) -> dict[int, T]:
        """Send a record to each node; give what is read from the answers.

        A client whose answer cannot be read is left out, and a warning says so.
        """
        messages = [
            Message(kind, node, "", content={CONFIG: record})
            for node, record in work.items()
        ]
        answers: dict[int, T] = {}
        for reply in self._run.grid.exchange(messages, self._run.options):
            # A failure was recorded when it arrived.
            if reply.failure is not None:
                continue
            record = reply.content.get(rounds.SECURE)
            try:
                if not isinstance(record, Config):
                    raise ValueError(
                        f"its answer has no record {rounds.SECURE!r}"
                    )
                answers[reply.node] = read(record)
            except ValueError as error:
                self._leave_out(reply.node, str(error))
        return answers

    def _leave_out(self, node: int, reason: str) -> None:
        self._run.incidents.warn(
            f"secure aggregation: client {client_of(node)} is left out: {reason}"
        )


def require(count: int, minimum: int, clients: int, deed: str) -> None:
    """Refuse to go on with fewer clients than are needed."""
    if count < minimum:
        raise TooFew(
            f"secure aggregation: {count} of {clients} clients {deed}, and {minimum} are "
            "needed; where failures name a client whose shares do not open, eject it; else lower "
            "privacy.threshold, or have more clients in a round"
        )


def _recover(
    shares: Mapping[int, bytes], weights: Mapping[int, int], node: int
) -> bytes:
    try:
        return recover(shares, KEY_BYTES, weights)
    except ValueError:
        raise _unopened(node) from None


def _unopened(node: int) -> RunError:
    return RunError(
        f"secure aggregation: the shares of client {client_of(node)}'s secret do not fit "
        "together, as a client sent wrong ones; the round cannot be opened"
    )


def read_keys(record: Config) -> tuple[bytes, bytes]:
    """Read the public keys that a client shows: for shares, and for masks."""
    keys = []
    for name in (rounds.SHARE_KEY, rounds.MASK_KEY):
        value = record.get(name)
        if not isinstance(value, bytes) or len(value) != KEY_BYTES:
            raise ValueError(f"its {name} is not of {KEY_BYTES} bytes")
        # Some texts are no keys, and every other client would stumble over them.
        agree(new_key(), value, "test", bytes(KEY_BYTES))
        keys.append(value)
    return keys[0], keys[1]


def read_texts(record: Config, name: str, count: int, size: int) -> list[bytes]:
    """Read a list of so many texts of so many bytes."""
    values = record.get(name)
    texts = values if isinstance(values, list) else []
    right = [
        value
        for value in texts
        if isinstance(value, bytes) and len(value) == size
    ]
    if len(right) != count or len(texts) != count:
        raise ValueError(
            f"its {name} are not {count} texts of {counted(size, 'byte')}"
        )
    return right
