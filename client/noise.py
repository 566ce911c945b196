"""Differential privacy on clients: they clip updates and add noise.

The server sees the sum of both alone. It is the Gaussian mechanism on each client (local
differential privacy; Dwork and Roth 2014, section 3.5.3; clipping as in Abadi et al., CCS 2016).
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from fedknow.client.host import Answerer
from fedknow.client.state import State
from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.messages import (
    ARRAYS,
    CLIENT_FAILED,
    TRAIN,
    Arrays,
    Message,
    client_of,
)
from fedknow.protocols.seeds import generator
from fedknow.protocols.work import TrainWork

__all__ = ["NoisyNode", "clip", "gaussian"]

Floats = NDArray[np.float64]

STATE = "noise"
"""The entry of a client's state that holds its secret, in hexadecimal digits."""
_SECRET_BYTES = 32


class NoisyNode:
    """Clips the updates of a node and adds noise.

    The noise is a function of a secret and of the update. Work that is done again, after the
    power was lost, gives the same noise, and a second answer tells nothing more.

    Parameters
    ----------
    node : Answerer
        Does the work.
    config : ExperimentConfig
        With the section ``privacy``.
    is_real : bool
        Draw a secret from the system's generator. Otherwise it comes from the run's seed, so
        that a simulation can be repeated.
    """

    def __init__(
        self,
        node: Answerer,
        config: ExperimentConfig,
        is_real: bool,
    ) -> None:
        self._node = node
        self._privacy = config.privacy
        self._seed = config.seed
        self._is_real = is_real
        self.learner = getattr(node, "learner", None)

    def handle(self, message: Message, state: State) -> tuple[Message, State]:
        """Answer a message; see :meth:`fedknow.client.node.Node.handle`."""
        if not self._is_real:
            # Virtual clients must repeat, so their secrets come from the run's seed.
            bits = generator(self._seed, "noise", client_of(message.node))
            reply, new = self._node.handle(message, state)
            return self._protect(message, reply, bits.bytes(_SECRET_BYTES)), new
        secret = state.get(STATE) or secrets.token_hex(_SECRET_BYTES)
        inner = {key: value for key, value in state.items() if key != STATE}
        reply, new = self._node.handle(message, inner)
        reply = self._protect(message, reply, bytes.fromhex(secret))
        # The very object where nothing is new: a state that stays is not saved again.
        if reply.failure is not None or (new is inner and STATE in state):
            return reply, state
        return reply, {**new, STATE: secret}

    def _protect(
        self,
        message: Message,
        reply: Message,
        secret: bytes,
    ) -> Message:
        """Put the noisy update into an answer to training."""
        if message.kind != TRAIN or reply.failure is not None:
            return reply
        sent = TrainWork.from_content(message.content).parameters
        try:
            noisy = self._add_noise(sent, reply.arrays(), secret)
        except ValueError as error:
            return message.fail(CLIENT_FAILED, str(error))
        return replace(reply, content={**reply.content, ARRAYS: noisy})

    def _add_noise(self, sent: Arrays, trained: Arrays, secret: bytes) -> Arrays:
        if set(sent) != set(trained):
            raise ValueError(
                "privacy.clip: the update has other arrays than the model that was sent"
            )
        start = np.concatenate([_flat(sent[name]) for name in sent])
        update = np.concatenate([_flat(trained[name]) for name in sent]) - start
        # No clipping bounds what is not a number.
        if not np.isfinite(update).all():
            raise ValueError(
                "privacy.clip: the update is not finite; lower train.lr"
            )
        # Of the update too: one noise on two updates would show their difference.
        digest = hashlib.blake2b(start.tobytes() + update.tobytes()).digest()
        noise = gaussian(secret + digest, update.size)
        deviation = self._privacy.noise * self._privacy.clip
        total = start + clip(update, self._privacy.clip) + deviation * noise
        return _shaped(total, sent)


def clip(update: Floats, bound: float) -> Floats:
    """Scale an update down to a norm.

    Parameters
    ----------
    update : float64 [d]
    bound : float
        Largest Euclidean norm.

    Returns
    -------
    float64 [d]

    Examples
    --------
    >>> clip(np.array([3.0, 4.0]), 1.0).tolist()
    [0.6000000000000001, 0.8]
    """
    norm = float(np.linalg.norm(update))
    return update * (bound / norm) if norm > bound else update


def gaussian(secret: bytes, count: int) -> Floats:
    """Stretch a secret to standard normal numbers.

    SHAKE-256 (FIPS 202) gives uniform numbers of 53 bits, and the inverse of the distribution
    function makes them normal. Who does not know the secret cannot tell them from random ones.

    Parameters
    ----------
    secret : bytes
    count : int

    Returns
    -------
    float64 [count]
    """
    bits = np.frombuffer(hashlib.shake_256(secret).digest(8 * count), "<u8")
    # In the middle of each interval, as the inverse is infinite at 0 and 1.
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    normal: Floats = torch.special.ndtri(torch.from_numpy(uniform)).numpy()
    return normal


def _flat(array: np.ndarray) -> Floats:
    return array.astype(np.float64).ravel()


def _shaped(numbers: Floats, like: Arrays) -> Arrays:
    """Give numbers the names, shapes and types of some arrays."""
    arrays = Arrays()
    position = 0
    for name, array in like.items():
        piece = numbers[position : position + array.size].reshape(array.shape)
        position += array.size
        # Counters of batch normalisation are whole numbers. Rounding reveals nothing.
        if not np.issubdtype(array.dtype, np.floating):
            piece = np.rint(piece)
        arrays[name] = piece.astype(array.dtype)
    return arrays
