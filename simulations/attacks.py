"""Updates as hostile clients falsify them, for simulations.

A hostile client does its work honestly, on data that may be falsified
(:mod:`fedknow.client.data.poison`). Here its answer is replaced on the way, before the server
checks it. So each grid is attacked alike, and clients can conspire.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from fedknow.protocols.config import AttackConfig, ExperimentConfig
from fedknow.protocols.hostile import hostile_clients
from fedknow.protocols.messages import ARRAYS, TRAIN, Arrays, Message, client_of
from fedknow.protocols.work import TrainWork

__all__ = ["Attack", "build_attack", "little_factor"]

USUAL = {"signflip": 4.0, "scaling": 10.0, "backdoor": 5.0}
"""Factors of the update where ``attack.scale`` is 0."""

Answer = tuple[Message, int]


@dataclass(frozen=True)
class Attack:
    """What hostile clients do to their answers.

    Attributes
    ----------
    settings : AttackConfig
        The section ``attack``.
    hostile : frozenset of int
        The hostile clients.
    clients : int
        All clients.
    """

    settings: AttackConfig
    hostile: frozenset[int]
    clients: int

    def falsify(
        self, work: Sequence[Message], answers: Iterable[Answer]
    ) -> Iterator[Answer]:
        """Replace the hostile clients' updates.

        Parameters
        ----------
        work : sequence of Message
            What was asked for.
        answers : iterable of tuple of Message and int
            The honest answers, and versions of states.

        Yields
        ------
        tuple of Message and int
            The answers. Those of clients that conspire come last, as they wait for each other.
        """
        # By id: an update is the difference to what the client was sent.
        requests = {message.id: message for message in work}
        waiting: list[Answer] = []
        for reply, version in answers:
            if not self._is_falsified(reply):
                yield reply, version
            elif self.settings.name == "little":
                # Its members agree on one update, for which all of theirs are needed.
                waiting.append((reply, version))
            else:
                yield self._scale(requests[reply.reply_to], reply), version
        yield from self._conspire(waiting)

    def _is_falsified(self, reply: Message) -> bool:
        return (
            reply.kind == TRAIN
            and reply.failure is None
            and client_of(reply.node) in self.hostile
        )

    def _scale(self, request: Message, reply: Message) -> Message:
        """Send a multiple of the update, or of its opposite."""
        name = self.settings.name
        factor = self.settings.scale or USUAL.get(name, 1.0)
        if name == "signflip":
            factor = -factor
        sent = TrainWork.from_content(request.content).parameters
        arrays = reply.arrays()
        changed = {
            key: sent[key] + factor * (array - sent[key])
            for key, array in arrays.items()
            if _is_real(array)
        }
        # Counters stay as they are: a multiple of them would give the attack away.
        return _with_arrays(reply, changed)

    def _conspire(self, answers: Sequence[Answer]) -> Iterator[Answer]:
        """Send one update for all, off the mean of the honest ones."""
        if not answers:
            return
        # By node, so that the sums are the same on each grid.
        ordered = sorted(answers, key=lambda answer: answer[0].node)
        honest = [reply.arrays() for reply, _ in ordered]
        factor = self.settings.scale or little_factor(
            self.clients, len(self.hostile)
        )
        agreed: dict[str, np.ndarray] = {}
        for key, array in honest[0].items():
            if _is_real(array):
                values = np.stack([arrays[key] for arrays in honest])
                # In float64: a deviation is a small difference of large sums.
                values = values.astype(np.float64)
                agreed[key] = values.mean(axis=0) - factor * values.std(axis=0)
        for reply, version in ordered:
            yield _with_arrays(reply, agreed), version


def little_factor(clients: int, hostile: int) -> float:
    """Give the most standard deviations that pass for an honest client's.

    With n clients, m of them hostile, ``s = floor(n / 2 + 1) - m`` honest ones must be further
    off, so that the factor is the standard normal's quantile at ``(n - m - s) / (n - m)``
    (Baruch, Baruch and Goldberg, NeurIPS 2019, section 3).

    Examples
    --------
    >>> round(little_factor(50, 24), 2)
    1.43
    """
    supporters = clients // 2 + 1 - hostile
    honest = clients - hostile
    share = (honest - supporters) / honest
    # Where the hostile ones are the majority, any number passes.
    return NormalDist().inv_cdf(min(max(share, 1e-3), 1 - 1e-3))


def build_attack(config: ExperimentConfig) -> Attack | None:
    """Build the attack of an experiment; ``None`` where nobody attacks."""
    if not config.attack:
        return None
    hostile = frozenset(hostile_clients(config))
    return Attack(config.attack, hostile, config.data.clients)


def _is_real(array: np.ndarray) -> bool:
    return array.dtype.kind == "f"


def _with_arrays(reply: Message, changed: Mapping[str, np.ndarray]) -> Message:
    """Put changed arrays into an answer, in its own names, order and dtypes."""
    arrays = Arrays(
        (key, changed[key].astype(array.dtype) if key in changed else array)
        for key, array in reply.arrays().items()
    )
    return replace(reply, content={**reply.content, ARRAYS: arrays})
