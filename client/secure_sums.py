"""Sums that a client shares under masks, until the server could open them.

A learner forgets sums once it shared them. The sum of a round may come to nothing, if too few
clients stay to open it. So a client keeps what it gave until the server begins the next round,
and adds it again if the server says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fedknow.client.host import Answerer
from fedknow.client.learners.frames.learner import Learner, Tensors
from fedknow.client.state import State
from fedknow.client.tensors import as_tensors
from fedknow.protocols.messages import END_TASK, EXTRA, Arrays, Message
from fedknow.protocols.secure.fixed import SumLayout, encode_sums
from fedknow.protocols.secure.rounds import SESSION

__all__ = ["GIVEN", "SharedSums", "encode_for", "note_given"]

GIVEN = "secure_sums"
"""The entry of a client's state that holds what it gave last: ``session`` and ``sums``."""


class SharedSums:
    """A learner's sums, on their way to the server.

    Parameters
    ----------
    node : Answerer
        Does the work.
    learner : Learner or None
        Its learner; ``None``: one that shares nothing.
    """

    def __init__(self, node: Answerer, learner: Learner | None) -> None:
        self._node = node
        self._learner = learner

    def layout(self, kind: str) -> SumLayout:
        """Say what a client adds to answers of a kind; empty: nothing."""
        if self._learner is None:
            return {}
        return self._learner.sum_layout(ended=kind == END_TASK)

    def ask(self, message: Message, state: State) -> tuple[Message, State]:
        """Have the node answer, which knows nothing of sums that were given."""
        if GIVEN not in state:
            return self._node.handle(message, state)
        own_state = _without_given(state)
        reply, new = self._node.handle(message, own_state)
        # The very object where nothing is new: such a state is not saved again.
        is_same = new is own_state
        return reply, state if is_same else {**new, GIVEN: state[GIVEN]}

    def settle(self, state: State, unopened: object) -> State:
        """Forget sums that the server could open.

        Parameters
        ----------
        state : State
        unopened : object
            The session that could not be opened, bytes; anything else: all could.
        """
        session = state.get(GIVEN, {}).get(SESSION, "")
        if bytes.fromhex(session) == unopened:
            return state
        return _without_given(state)

    def gather(self, reply: Message, state: State) -> Tensors:
        """Add what an answer shares to sums that came to nothing."""
        assert self._learner is not None  # as there is a layout
        record = reply.content.get(EXTRA)
        shared = as_tensors(record) if isinstance(record, Arrays) else {}
        sums = self._learner.as_sums(shared)
        earlier = state.get(GIVEN, {}).get("sums", {})
        return {
            name: value + earlier[name] if name in earlier else value
            for name, value in sums.items()
        }


def encode_for(
    sums: Tensors, layout: SumLayout, peers: Sequence[int]
) -> np.ndarray:
    """Encode sums for as many clients."""
    arrays = {name: value.numpy() for name, value in sums.items()}
    return encode_sums(arrays, layout, len(peers))


def note_given(state: State, session: Mapping[str, Any], sums: Tensors) -> State:
    """Note in a state what a client gave in a session."""
    own_state = _without_given(state)
    # Zeros are as well not given again.
    if not any(bool(torch.any(value)) for value in sums.values()):
        return own_state
    return {**own_state, GIVEN: {SESSION: session[SESSION], "sums": sums}}


def _without_given(state: State) -> State:
    return {name: value for name, value in state.items() if name != GIVEN}
