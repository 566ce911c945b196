"""The server's half of :mod:`fedknow.protocols.secure`."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from flwr.app import Message as FlowerMessage

from fedknow.protocols.flower import from_flower, to_flower
from fedknow.protocols.messages import (
    ARRAYS,
    CONFIG,
    METRICS,
    Arrays,
    Config,
    Message,
    Metrics,
    client_of,
)
from fedknow.protocols.secure import rounds
from fedknow.protocols.secure.fixed import decode, size_of
from fedknow.protocols.secure.masks import (
    KEY_BYTES,
    agree,
    mask,
    new_key,
    pair_mask,
    public_key,
)
from fedknow.protocols.secure.shamir import recover, weights_at_zero
from fedknow.protocols.work import NUM_EXAMPLES
from fedknow.server.checks.arrays import longest_noise, norm
from fedknow.server.checks.faults import RunError
from fedknow.server.grids.running_mean import mean_metrics
from fedknow.server.run.context import RunContext

__all__ = ["SecureRounds", "read_keys", "read_texts"]

T = TypeVar("T")


class _TooFew(Exception):
    """Too few clients are left to open a sum."""


@dataclass
class _Session:
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


class SecureRounds:
    """Exchanges a round's messages so that only the sum of updates is seen.

    Parameters
    ----------
    run : RunContext
    """

    def __init__(self, run: RunContext) -> None:
        self._run = run

    def exchange(self, messages: Sequence[FlowerMessage]) -> list[FlowerMessage]:
        """Send work, and give one answer for all: the weighted mean.

        Parameters
        ----------
        messages : sequence of flwr.app.Message
            A strategy's work for a round.

        Returns
        -------
        list of flwr.app.Message
            One, in the name of the earliest client. Empty where too few clients of a fleet
            stayed, which a warning says.

        Raises
        ------
        RunError
            If too few real clients stayed, or what they sent does not add up.
        """
        if not messages:
            return []
        try:
            session = self._prepare(messages)
            replies = self._train(session, messages)
            total = self._open(session, replies)
        except _TooFew as problem:
            # Devices drop out by chance, so a round without a sum is no fault of the run.
            if self._run.parts.config.fleet.devices:
                self._run.incidents.warn(str(problem))
                return []
            task, round = self._run.incidents.inspector.position
            raise RunError(f"task {task + 1}, round {round}: {problem}") from None
        return [self._answer(total, replies, messages)]

    # --- the waves

    def _prepare(self, messages: Sequence[FlowerMessage]) -> _Session:
        """Waves 1 and 2: keys and shares."""
        nodes = sorted({each.metadata.dst_node_id for each in messages})
        # From the system and not from the seed, which clients know.
        id = secrets.token_bytes(KEY_BYTES)
        work = {node: Config({rounds.SESSION: id}) for node in nodes}
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
        _require(len(members), rounds.MINIMUM, len(nodes), "made keys")
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
            lambda record: read_texts(record, rounds.SEALED, len(members)),
        )
        sealed = {
            node: dict(zip(members, packages, strict=True))
            for node, packages in answers.items()
        }
        _require(len(sealed), threshold, len(members), "dealt shares")
        return _Session(id, threshold, share_keys, mask_keys, sealed)

    def _train(
        self, session: _Session, messages: Sequence[FlowerMessage]
    ) -> dict[int, Message]:
        """Wave 3: masked updates, by node."""
        record = ConfigRecord(
            {rounds.SESSION: session.id, rounds.NODES: session.peers}
        )
        chosen = [
            message
            for message in messages
            if message.metadata.dst_node_id in session.sealed
        ]
        for message in chosen:
            message.content = RecordDict(
                {**message.content, rounds.SECURE: record}
            )
        size = size_of(self._run.state.arrays)
        # Masked numbers have another name and type than the update that is expected.
        self._run.incidents.inspector.expect_masked(
            Arrays({rounds.MASKED: np.zeros(size, np.uint64)})
        )
        replies = {
            reply.metadata.src_node_id: from_flower(reply, {})
            for reply in self._run.strategy_grid.send_and_receive(chosen)
            if not reply.has_error()
        }
        _require(
            len(replies), session.threshold, len(session.peers), "sent updates"
        )
        return dict(sorted(replies.items()))

    def _open(
        self, session: _Session, replies: Mapping[int, Message]
    ) -> np.ndarray:
        """Wave 4: take the masks off the sum."""
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
            lambda record: read_texts(record, rounds.SHARES, len(session.peers)),
        )
        _require(
            len(answers), session.threshold, len(survivors), "opened the sum"
        )
        # As many as needed, the same for all secrets, so that the weights are computed once.
        points = sorted(answers)[: session.threshold]
        weights = weights_at_zero(points)
        # Unsigned numbers wrap around, as masks do: all sums are modulo 2**64.
        total = np.zeros(size_of(self._run.state.arrays), np.uint64)
        for reply in replies.values():
            total = total + reply.arrays()[rounds.MASKED]
        for place, node in enumerate(session.peers):
            parts = {point: answers[point][place] for point in points}
            secret = _recover(parts, weights, node)
            # Of a client that answered the mask was opened, of one that dropped out the key.
            if node in replies:
                total = total - mask(secret, total.size)
            else:
                total = total - self._left_over(session, node, secret, survivors)
        return total

    def _left_over(
        self,
        session: _Session,
        node: int,
        private: bytes,
        survivors: Sequence[int],
    ) -> np.ndarray:
        """Add up the masks that others made for a client that dropped out."""
        # Wrong shares recover to something, too; the public key tells.
        if public_key(private) != session.mask_keys[node]:
            raise _unopened(node)
        size = size_of(self._run.state.arrays)
        total = np.zeros(size, np.uint64)
        for survivor in survivors:
            public = session.mask_keys[survivor]
            key = agree(private, public, "mask", session.id)
            total = total + pair_mask(key, size, survivor < node)
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

    # --- the result

    def _answer(
        self,
        total: np.ndarray,
        replies: Mapping[int, Message],
        messages: Sequence[FlowerMessage],
    ) -> FlowerMessage:
        """Make one answer of the opened sum."""
        answers = list(replies.values())
        metrics = mean_metrics(answers)
        weight = sum(_weight(reply) for reply in answers)
        sent = self._run.state.arrays
        mean = decode(total, sent, weight)
        self._check_size(mean, sent)
        earliest = answers[0]
        requests = {each.metadata.message_id: each for each in messages}
        reply = replace(earliest, content={ARRAYS: mean, METRICS: metrics})
        return to_flower(reply, requests[earliest.reply_to])

    def _check_size(self, mean: Arrays, sent: Arrays) -> None:
        """Refuse a mean that no honest clients could have.

        A wrong share leaves a mask on the sum, which is then as large as the ring.
        """
        factor = self._run.parts.config.engine.max_update_norm
        privacy = self._run.parts.config.privacy
        # The clients' own, which in their mean is shorter.
        noise = longest_noise(privacy.noise * privacy.clip, sent)
        limit = factor and factor * max(norm(sent.values()), 1.0) + noise
        # Single updates are hidden, so that only their mean can be measured.
        length = norm(mean[name] - array for name, array in sent.items())
        if limit and length > limit:
            raise RunError(
                f"secure aggregation: the mean update's norm is {length:.4g}, and "
                f"engine.max_update_norm = {factor:g} allows {limit:.4g}; a client sent wrong "
                "shares, or a wrong update, and the sum does not tell which"
            )


def _require(count: int, minimum: int, clients: int, deed: str) -> None:
    """Refuse to go on with fewer clients than are needed."""
    if count < minimum:
        raise _TooFew(
            f"secure aggregation: {count} of {clients} clients {deed}, and {minimum} are "
            "needed; lower privacy.threshold, or have more clients in a round"
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


def _weight(reply: Message) -> float:
    metrics = reply.content[METRICS]
    assert isinstance(metrics, Metrics)  # the inspector saw to it
    weight = metrics[NUM_EXAMPLES]
    assert isinstance(weight, int | float)
    return float(weight)


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


def read_texts(record: Config, name: str, count: int) -> list[bytes]:
    """Read a list of so many texts of bytes."""
    values = record.get(name)
    texts = values if isinstance(values, list) else []
    right = [value for value in texts if isinstance(value, bytes)]
    if len(right) != count or len(texts) != count:
        raise ValueError(f"its {name} are not {count} texts of bytes")
    return right
