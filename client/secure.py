"""A client's half of secure aggregation (:mod:`fedknow.protocols.secure`).

It stands before the node: the learner knows nothing of masks. What a client must remember within
a round is a part of its state, and gone when the round is over.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedknow.client.host import Answerer
from fedknow.client.learners.frames.learner import Learner
from fedknow.client.secure_once import answer_once
from fedknow.client.secure_requests import (
    check_session,
    read_nodes,
    read_text,
    read_texts,
    secret_of,
)
from fedknow.client.secure_sums import SharedSums
from fedknow.client.state import State
from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.messages import (
    ARRAYS,
    CLIENT_FAILED,
    END_TASK,
    EVALUATE,
    EXTRA,
    METRICS,
    TRAIN,
    Arrays,
    Config,
    Message,
    Metrics,
)
from fedknow.protocols.secure import rounds
from fedknow.protocols.secure.fixed import encode
from fedknow.protocols.secure.masks import (
    KEY_BYTES,
    agree,
    mask,
    new_key,
    open_shares,
    pair_mask,
    public_key,
    seal_shares,
)
from fedknow.protocols.secure.shamir import SHARE_BYTES, deal
from fedknow.protocols.work import COSTS, NUM_EXAMPLES, ScoreWork, TrainWork

__all__ = ["SecureNode"]

Reply = tuple[Message, State]

STATE = "secure"
"""The entry of a client's state that holds a round's secrets."""
NO_SUMS = (
    "the learner shares arrays beside the parameters that are no sums, so that no mask would hide "
    "them, but the experiment says privacy.secure = true"
)


class SecureNode:
    """Masks the updates of a node, and the sums that it shares.

    Parameters
    ----------
    node : Answerer
        Does the work.
    config : ExperimentConfig
        With the section ``privacy``.
    """

    def __init__(self, node: Answerer, config: ExperimentConfig) -> None:
        self._privacy = config.privacy
        self.learner: Learner | None = getattr(node, "learner", None)
        self._sums = SharedSums(node, self.learner)

    def handle(self, message: Message, state: State) -> Reply:
        """Answer a message; see :meth:`fedknow.client.node.Node.handle`."""
        steps = {
            rounds.KEYS: self._make_keys,
            rounds.SHARES: self._deal_shares,
            TRAIN: self._work,
            rounds.UNMASK: self._unmask,
        }
        if self._sums.layout:
            steps[END_TASK] = self._work
        # In the client's state: the next wave's work may go to another process.
        session = state.get(STATE, {})
        stripped = state
        # The very object where nothing is taken out: a state that stays is not saved again.
        if session:
            stripped = {
                key: value for key, value in state.items() if key != STATE
            }
        step = steps.get(message.kind)
        try:
            if step is not None:
                return step(message, stripped, session)
            _refuse_collection(message, self.learner)
        except ValueError as error:
            # The round's secrets go, so that no second try can use them.
            return message.fail(CLIENT_FAILED, str(error)), stripped
        reply, new = self._sums.ask(message, stripped)
        if EXTRA in reply.content:
            return message.fail(CLIENT_FAILED, NO_SUMS), stripped
        return reply, new

    def _make_keys(
        self,
        message: Message,
        state: State,
        session: Mapping[str, Any],
    ) -> Reply:
        """Wave 1: make two pairs of keys, and tell their public halves."""
        request = message.config()
        # New in each round, as an opened mask hides nothing a second time.
        secret = {
            rounds.SESSION: read_text(request, rounds.SESSION).hex(),
            rounds.SHARE_KEY: new_key().hex(),
            rounds.MASK_KEY: new_key().hex(),
            # Masks of pairs alone would not do: they are opened of a client that answers late.
            "mask": secrets.token_bytes(KEY_BYTES).hex(),
        }
        answer = Config(
            {
                rounds.SHARE_KEY: public_key(
                    bytes.fromhex(secret[rounds.SHARE_KEY])
                ),
                rounds.MASK_KEY: public_key(
                    bytes.fromhex(secret[rounds.MASK_KEY])
                ),
            }
        )
        return _reply(message, answer), {**state, STATE: secret}

    def _deal_shares(
        self,
        message: Message,
        state: State,
        session: Mapping[str, Any],
    ) -> Reply:
        """Wave 2: deal shares of both secrets, sealed for each client."""
        request = message.config()
        check_session(request, session)
        nodes = read_nodes(request, rounds.NODES)
        share_keys = read_texts(request, rounds.SHARE_KEYS, len(nodes))
        mask_keys = read_texts(request, rounds.MASK_KEYS, len(nodes))
        if message.node not in nodes or len(nodes) < rounds.MINIMUM:
            raise ValueError(
                f"secure aggregation among nodes {nodes}: it takes {rounds.MINIMUM} or more, "
                f"and this client, node {message.node}, among them"
            )
        _check_keys(session, mask_keys[nodes.index(message.node)], mask_keys)
        threshold = rounds.threshold_of(self._privacy.threshold, len(nodes))
        # Shares of two dealings, with a lower threshold in one, would take fewer to open.
        answer_once(
            secret_of(session, "mask"),
            "dealing of shares",
            repr(nodes).encode(),
            *share_keys,
            *mask_keys,
        )
        # Both secrets are dealt, and of each client only one is ever opened; see `_unmask`.
        of_mask = deal(secret_of(session, "mask"), nodes, threshold)
        of_key = deal(secret_of(session, rounds.MASK_KEY), nodes, threshold)
        # The server carries the packages, so each is sealed for the one that may open it.
        sealed = [
            seal_shares(
                self._share_key(session, key),
                message.node,
                node,
                of_mask[node] + of_key[node],
            )
            for node, key in zip(nodes, share_keys, strict=True)
        ]
        # The peers' keys are kept: in the next wave the server could show others.
        dealt = {
            **session,
            rounds.NODES: nodes,
            rounds.SHARE_KEYS: [key.hex() for key in share_keys],
            rounds.MASK_KEYS: [key.hex() for key in mask_keys],
        }
        return _reply(message, Config({rounds.SEALED: sealed})), {
            **state,
            STATE: dealt,
        }

    def _work(
        self,
        message: Message,
        state: State,
        session: Mapping[str, Any],
    ) -> Reply:
        """Wave 3: do the work, and send an update, or sums, under masks."""
        request = message.content.get(rounds.SECURE)
        if not isinstance(request, Config):
            raise ValueError(
                "the server asks for an update in the clear, but the experiment says "
                "privacy.secure = true"
            )
        check_session(request, session)
        peers = read_nodes(request, rounds.NODES)
        threshold = self._check_peers(peers, message.node, session)
        # The node sees an ordinary message: learning knows nothing of masks.
        work = replace(
            message,
            content={
                name: record
                for name, record in message.content.items()
                if name != rounds.SECURE
            },
        )
        reply, new = self._sums.ask(work, state)
        if reply.failure is not None:
            return reply, new
        if EXTRA in reply.content:
            raise ValueError(NO_SUMS)
        if message.kind == TRAIN:
            numbers = _encode_update(work, reply, len(peers))
        else:
            numbers, new = self._sums.encode(new, len(peers))
        numbers = numbers + _masks(peers, message.node, session, numbers.size)
        # An update less another one under the same mask would lie open.
        answer_once(
            secret_of(session, "mask"), "masked answer", numbers.tobytes()
        )
        masked: Arrays = Arrays({rounds.MASKED: numbers})
        # The clients of this sum, so that no other set of them can be opened.
        worked = {**session, rounds.SURVIVORS: peers, "threshold": threshold}
        # These two records and no other: what else there is would be in the clear.
        answer = replace(
            reply, content={ARRAYS: masked, METRICS: reply.content[METRICS]}
        )
        return answer, {**new, STATE: worked}

    def _unmask(
        self,
        message: Message,
        state: State,
        session: Mapping[str, Any],
    ) -> Reply:
        """Wave 4: give one share of each client, of its mask or of its key.

        Never of both, which would open that client's update. The secrets of the round are
        forgotten with the answer, so there is no second one.
        """
        request = message.config()
        check_session(request, session)
        if rounds.SURVIVORS not in session:
            raise ValueError("the sum is to be opened before updates were sent")
        survivors = read_nodes(request, rounds.SURVIVORS)
        peers = session[rounds.SURVIVORS]
        # The sum of a few updates would tell much of each of them.
        if not set(survivors) <= set(peers) or (
            len(survivors) < session["threshold"]
        ):
            raise ValueError(
                f"the sum of nodes {survivors} is to be opened: they must be "
                f"{session['threshold']} or more of {peers}"
            )
        # Also from an older state, which still has the secrets.
        answer_once(
            secret_of(session, "mask"),
            "opening",
            repr(sorted(survivors)).encode(),
        )
        sealed = read_texts(request, rounds.SEALED, len(peers))
        public_keys = dict(
            zip(session[rounds.NODES], session[rounds.SHARE_KEYS], strict=True)
        )
        shares = []
        for peer, package in zip(peers, sealed, strict=True):
            public = bytes.fromhex(public_keys[peer])
            key = self._share_key(session, public)
            pair = open_shares(key, peer, message.node, package)
            # Never both: with mask and key a client's update would lie open.
            is_there = peer in survivors
            shares.append(pair[:SHARE_BYTES] if is_there else pair[SHARE_BYTES:])
        # The secrets go with the answer, so that a round is opened once at most.
        return _reply(message, Config({rounds.SHARES: shares})), state

    def _share_key(self, session: Mapping[str, Any], public: bytes) -> bytes:
        """Agree on the key that seals shares between two clients."""
        private = secret_of(session, rounds.SHARE_KEY)
        return agree(private, public, "share", secret_of(session, rounds.SESSION))

    def _check_peers(
        self,
        peers: Sequence[int],
        node: int,
        session: Mapping[str, Any],
    ) -> int:
        """Check who shares a sum; give how many must stay until it is opened."""
        nodes = session.get(rounds.NODES, [])
        threshold = rounds.threshold_of(self._privacy.threshold, len(nodes))
        if node not in peers or not set(peers) <= set(nodes):
            raise ValueError(
                f"the sum of nodes {list(peers)} is not one of those that dealt shares: {nodes}"
            )
        if len(peers) < threshold:
            raise ValueError(
                f"a sum of {len(peers)} updates is asked for, and privacy.threshold = "
                f"{self._privacy.threshold:g} needs {threshold}"
            )
        return threshold


def _masks(
    peers: Sequence[int],
    node: int,
    session: Mapping[str, Any],
    size: int,
) -> np.ndarray:
    """Add up this client's own mask and those of its pairs."""
    total = mask(secret_of(session, "mask"), size)
    public_keys = dict(
        zip(session[rounds.NODES], session[rounds.MASK_KEYS], strict=True)
    )
    private = secret_of(session, rounds.MASK_KEY)
    session_id = secret_of(session, rounds.SESSION)
    for peer in peers:
        if peer != node:
            public = bytes.fromhex(public_keys[peer])
            key = agree(private, public, "mask", session_id)
            # One of a pair adds the mask and the other subtracts it, so that it leaves the sum.
            total = total + pair_mask(key, size, node < peer)
    return total


def _check_keys(
    session: Mapping[str, Any], own_key: bytes, mask_keys: Sequence[bytes]
) -> None:
    """Refuse keys that are not those of the clients."""
    # Two with one key would have masks that are no secret of a pair.
    if own_key != public_key(secret_of(session, rounds.MASK_KEY)) or len(
        set(mask_keys)
    ) < len(mask_keys):
        raise ValueError(
            "the server handed out keys that are not those of the clients"
        )


def _encode_update(work: Message, reply: Message, clients: int) -> np.ndarray:
    """Encode an update, weighted by the client's samples."""
    sent = TrainWork.from_content(work.content).parameters
    metrics = reply.content[METRICS]
    weight = metrics[NUM_EXAMPLES] if isinstance(metrics, Metrics) else 0
    if not isinstance(weight, int | float):
        raise ValueError(f"{NUM_EXAMPLES} is no number: {weight!r}")
    return encode(reply.arrays(), sent, weight, clients)


def _refuse_collection(message: Message, learner: Learner | None) -> None:
    """Keep what a client keeps to itself."""
    # Scoring may collect personal parameters, which no mask would hide.
    if message.kind != EVALUATE:
        return
    keeps_something = learner is not None and bool(learner.local_parameters())
    work = ScoreWork.from_content(message.content)
    if work.should_collect and keeps_something:
        raise ValueError(
            "the server asks for parameters that this client keeps to itself, but the "
            "experiment says privacy.secure = true"
        )


def _reply(message: Message, record: Config) -> Message:
    """Answer with a record; the work counts as free."""
    costs = Metrics(dict.fromkeys(COSTS, 0))
    return message.reply({rounds.SECURE: record, METRICS: costs})
