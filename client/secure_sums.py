"""Sums that a client shares under masks, kept until the task ends.

A learner shares sums in the first round that it is chosen for. Were they added up in rounds, the
server would know the sums of those rounds' clients, and then those of all: of a client that alone
was in no round, it would see the difference. So a client keeps what its learner shares, and all
clients' sums are added up once, when the task ends.
"""

from __future__ import annotations

import numpy as np

from fedknow.client.host import Answerer
from fedknow.client.learners.frames.learner import Learner, Tensors
from fedknow.client.state import State
from fedknow.client.tensors import as_tensors
from fedknow.protocols.messages import EXTRA, Arrays, Message
from fedknow.protocols.secure.fixed import SumLayout, encode_sums

__all__ = ["UNSENT", "SharedSums"]

UNSENT = "secure_sums"
"""The entry of a client's state that holds sums which the server has not had."""


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

    @property
    def layout(self) -> SumLayout:
        """How sums are added up; empty: there are none."""
        return {} if self._learner is None else self._learner.sum_layout()

    def ask(self, message: Message, state: State) -> tuple[Message, State]:
        """Have the node answer, which knows nothing of sums that are kept.

        What it shares is kept with them, and is not in the answer. Shares that are no sums stay
        in it.
        """
        own_state = state
        if UNSENT in state:
            own_state = {n: value for n, value in state.items() if n != UNSENT}
        reply, new = self._node.handle(message, own_state)
        record = reply.content.get(EXTRA)
        if isinstance(record, Arrays) and self.layout:
            sums = self._add(as_tensors(record), state.get(UNSENT, {}))
            records = {n: r for n, r in reply.content.items() if n != EXTRA}
            return message.reply(records), {**new, UNSENT: sums}
        if UNSENT not in state:
            return reply, new
        # The very object where nothing is new: such a state is not saved again.
        is_same = new is own_state
        return reply, state if is_same else {**new, UNSENT: state[UNSENT]}

    def encode(self, state: State, clients: int) -> tuple[np.ndarray, State]:
        """Encode what is kept, zeros where nothing is.

        Returns
        -------
        uint64 [n]
        State
            Without them.

        Raises
        ------
        ValueError
            If a number is too large for the sum of so many clients.
        """
        sums = self._add({}, state.get(UNSENT, {}))
        arrays = {name: value.numpy() for name, value in sums.items()}
        numbers = encode_sums(arrays, self.layout, clients)
        return numbers, {n: value for n, value in state.items() if n != UNSENT}

    def _add(self, shared: Tensors, unsent: Tensors) -> Tensors:
        assert self._learner is not None  # as there is a layout
        sums = self._learner.as_sums(shared)
        return {
            name: value + unsent[name] if name in unsent else value
            for name, value in sums.items()
        }
