"""FedAsync: the server mixes each answer into the model as it arrives (Xie, Koyejo and Gupta 2019)."""

from __future__ import annotations

import numpy as np
from flwr.app import MetricRecord

from fedknow.strategies.asynchronous import Asynchronous, Crew, combine

__all__ = ["FedAsync"]


class FedAsync(Asynchronous):
    """``x = (1 - alpha s(d)) x + alpha s(d) y`` for each client's model ``y``, which is ``d``
    steps late (algorithm 1).

    A step is one answer. A round, of which ``train.rounds`` make a task, is as many answers as
    clients work at a time, so that as many answers are asked for as in synchronous rounds.

    Parameters
    ----------
    alpha : float
        Mixing weight of an answer that is not late; above 0 and at most 1.
    proximal_mu : float
        Pulls local training towards the model that it began with (the paper's rho).
    concurrency, staleness, staleness_a, staleness_b
        See :class:`~fedknow.strategies.asynchronous.Asynchronous`; the paper's hinge has ``a =
        10`` and ``b = 4``.
    """

    def __init__(
        self,
        alpha: float = 0.6,
        proximal_mu: float = 0.0,
        concurrency: int = 0,
        staleness: str = "polynomial",
        staleness_a: float = 0.5,
        staleness_b: float = 4.0,
    ) -> None:
        super().__init__(concurrency, staleness, staleness_a, staleness_b)
        if not 0 < alpha <= 1:
            raise ValueError(f"alpha = {alpha!r}: must be above 0 and at most 1")
        if proximal_mu < 0:
            raise ValueError(f"proximal_mu = {proximal_mu!r}: must not be below 0")
        self.alpha = alpha
        self.proximal_mu = proximal_mu

    def settings(self) -> dict[str, float]:
        """The pull towards the model sent, where there is one."""
        return {"proximal-mu": float(self.proximal_mu)} if self.proximal_mu else {}

    def round(self, crew: Crew, left: int) -> MetricRecord | None:
        """One answer after the other, each a step."""
        answers = self.concurrency or len(list(crew.grid.get_node_ids()))
        crew.wanted = left * answers
        late = []
        for _ in range(answers):
            update = crew.next()
            if update is None:
                break
            weight = self.alpha * self.discount(update.staleness)
            late.append(update.staleness)
            model = next(iter(update.reply.content.array_records.values()))
            crew.step(
                combine(
                    lambda x, y, w=np.float32(weight): x + w * (y - x),
                    crew.arrays,
                    model,
                )
            )
        return (
            MetricRecord(
                {"staleness": float(np.mean(late)), "staleness-max": max(late)}
            )
            if late
            else None
        )
