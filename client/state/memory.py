"""The latest states of clients, in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from fedknow.client.state.tree import State, tensors_in

__all__ = ["StateMemory"]


class StateMemory:
    """The latest states of clients, as far as they fit.

    Parameters
    ----------
    budget : int
        Bytes of tensors; 0: it keeps nothing.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._used = 0
        self._states: OrderedDict[int, tuple[int, State, int]] = OrderedDict()

    def __contains__(self, client: int) -> bool:
        return client in self._states

    def get(self, client: int, version: int) -> State | None:
        """Give a client's state, if it is here in this version."""
        stored_version, state, _ = self._states.get(client, (0, {}, 0))
        # After a resume the server may ask for an older version than the one at hand.
        if stored_version != version:
            return None
        self._states.move_to_end(client)
        return state

    def put(self, client: int, version: int, state: State) -> Iterator[int]:
        """Keep a state, if it fits; give the clients that had to go for it."""
        if client in self._states:
            self._used -= self._states.pop(client)[2]
        size = sum(array.nbytes for array in tensors_in(state))
        # A state that alone is too large would drive out all others first.
        if size > self._budget or self._budget == 0:
            return
        self._states[client] = version, state, size
        self._used += size
        while self._used > self._budget:
            oldest, (_, _, dropped) = self._states.popitem(last=False)
            self._used -= dropped
            yield oldest
