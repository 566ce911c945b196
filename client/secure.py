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
from fedknow.client.state import State
from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.messages import (
    ARRAYS,
    CLIENT_FAILED,
    EVALUATE,
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


class SecureNode:
    """Masks the updates of a node.

    Parameters
    ----------
    node : Answerer
        Does the work.
    config : ExperimentConfig
        With the section ``privacy``.
    """

    def __init__(self, node: Answerer, config: ExperimentConfig) -> None:
        self._node = node
        self._privacy = config.privacy
        self.learner: Learner | None = getattr(node, "learner", None)

    def handle(self, message: Message, state: State) -> Reply:
        """Answer a message; see :meth:`fedknow.client.node.Node.handle`."""
        steps = {
            rounds.KEYS: self._make_keys,
            rounds.SHARES: self._deal_shares,
            TRAIN: self._train,
            rounds.UNMASK: self._unmask,
        }
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
        return self._node.handle(message, stripped)

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
            rounds.SESSION: _text(request, rounds.SESSION).hex(),
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
        _check_session(request, session)
        nodes = _nodes(request, rounds.NODES)
        share_keys = _texts(request, rounds.SHARE_KEYS, len(nodes))
        mask_keys = _texts(request, rounds.MASK_KEYS, len(nodes))
        if message.node not in nodes or len(nodes) < rounds.MINIMUM:
            raise ValueError(
                f"secure aggregation among nodes {nodes}: it takes {rounds.MINIMUM} or more, "
                f"and this client, node {message.node}, among them"
            )
        own_key = mask_keys[nodes.index(message.node)]
        # Two with one key would have masks that are no secret of a pair.
        if own_key != public_key(_secret(session, rounds.MASK_KEY)) or len(
            set(mask_keys)
        ) < len(nodes):
            raise ValueError(
                "the server handed out keys that are not those of the clients"
            )
        threshold = rounds.threshold_of(self._privacy.threshold, len(nodes))
        # Both secrets are dealt, and of each client only one is ever opened; see `_unmask`.
        of_mask = deal(_secret(session, "mask"), nodes, threshold)
        of_key = deal(_secret(session, rounds.MASK_KEY), nodes, threshold)
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

    def _train(
        self,
        message: Message,
        state: State,
        session: Mapping[str, Any],
    ) -> Reply:
        """Wave 3: train, and send the update under masks."""
        request = message.content.get(rounds.SECURE)
        if not isinstance(request, Config):
            raise ValueError(
                "the server asks for an update in the clear, but the experiment says "
                "privacy.secure = true"
            )
        _check_session(request, session)
        peers = _nodes(request, rounds.NODES)
        threshold = self._check_peers(peers, message.node, session)
        # The node sees an ordinary message: training knows nothing of masks.
        content = {
            name: record
            for name, record in message.content.items()
            if name != rounds.SECURE
        }
        reply, new = self._node.handle(replace(message, content=content), state)
        if reply.failure is not None:
            return reply, new
        sent = TrainWork.from_content(content).parameters
        metrics = reply.content[METRICS]
        weight = metrics[NUM_EXAMPLES] if isinstance(metrics, Metrics) else 0
        if not isinstance(weight, int | float):
            raise ValueError(f"{NUM_EXAMPLES} is no number: {weight!r}")
        numbers = encode(reply.arrays(), sent, weight, len(peers))
        numbers = numbers + self._masks(
            peers, message.node, session, numbers.size
        )
        masked: Arrays = Arrays({rounds.MASKED: numbers})
        # The clients of this sum, so that no other set of them can be opened.
        trained = {**session, rounds.SURVIVORS: peers, "threshold": threshold}
        answer = replace(reply, content={**reply.content, ARRAYS: masked})
        return answer, {**new, STATE: trained}

    def _masks(
        self,
        peers: Sequence[int],
        node: int,
        session: Mapping[str, Any],
        size: int,
    ) -> np.ndarray:
        """Add up this client's own mask and those of its pairs."""
        total = mask(_secret(session, "mask"), size)
        public_keys = dict(
            zip(session[rounds.NODES], session[rounds.MASK_KEYS], strict=True)
        )
        private = _secret(session, rounds.MASK_KEY)
        session_id = _secret(session, rounds.SESSION)
        for peer in peers:
            if peer != node:
                public = bytes.fromhex(public_keys[peer])
                key = agree(private, public, "mask", session_id)
                # One of a pair adds the mask and the other subtracts it, so that it leaves the sum.
                total = total + pair_mask(key, size, node < peer)
        return total

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
        _check_session(request, session)
        if rounds.SURVIVORS not in session:
            raise ValueError("the sum is to be opened before updates were sent")
        survivors = _nodes(request, rounds.SURVIVORS)
        peers = session[rounds.SURVIVORS]
        # The sum of a few updates would tell much of each of them.
        if not set(survivors) <= set(peers) or (
            len(survivors) < session["threshold"]
        ):
            raise ValueError(
                f"the sum of nodes {survivors} is to be opened: they must be "
                f"{session['threshold']} or more of {peers}"
            )
        sealed = _texts(request, rounds.SEALED, len(peers))
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
        private = _secret(session, rounds.SHARE_KEY)
        return agree(private, public, "share", _secret(session, rounds.SESSION))

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


def _check_session(request: Config, session: Mapping[str, Any]) -> None:
    """Refuse messages of another round, or after a restart in between."""
    if _text(request, rounds.SESSION).hex() != session.get(rounds.SESSION):
        raise ValueError(
            "this client has no secrets of this round; it can take part in the next one"
        )


def _secret(session: Mapping[str, Any], name: str) -> bytes:
    return bytes.fromhex(session[name])


def _text(request: Config, name: str) -> bytes:
    value = request.get(name)
    if not isinstance(value, bytes) or len(value) != KEY_BYTES:
        raise ValueError(f"{name} must be {KEY_BYTES} bytes, got {value!r}")
    return value


def _texts(request: Config, name: str, count: int) -> list[bytes]:
    values = request.get(name)
    if (
        not isinstance(values, list)
        or len(values) != count
        or not all(isinstance(value, bytes) for value in values)
    ):
        raise ValueError(f"{name} must be a list of {count} texts of bytes")
    return [value for value in values if isinstance(value, bytes)]


def _nodes(request: Config, name: str) -> list[int]:
    values = request.get(name)
    if not isinstance(values, list) or not all(
        isinstance(value, int) and 0 < value < 2**48 for value in values
    ):
        raise ValueError(f"{name} must be a list of node ids, got {values!r}")
    nodes = [value for value in values if isinstance(value, int)]
    if len(set(nodes)) < len(nodes):
        raise ValueError(f"{name} names a node twice: {nodes}")
    return nodes
