"""The state of a client: what it keeps between messages.

A state lies on disk, versioned and without pickle. :mod:`~fedknow.client.state.tree` takes it
apart into JSON and tensors, :mod:`~fedknow.client.state.codec` writes these to a file and reads
them, and :mod:`~fedknow.client.state.store` keeps the states of many clients.
"""

from fedknow.client.state.codec import load_state, save_state
from fedknow.client.state.errors import StateError, StateLost
from fedknow.client.state.store import StateStore
from fedknow.client.state.tree import State

__all__ = [
    "State",
    "StateError",
    "StateLost",
    "StateStore",
    "load_state",
    "save_state",
]
