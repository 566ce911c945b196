"""FedAsync: the server mixes each answer into the model as it arrives.

Xie, Koyejo and Gupta, "Asynchronous Federated Optimization", 2019 (arXiv:1903.03934),
algorithm 1. A client's model ``y`` that is ``d`` steps late changes the global model ``x`` to

    x <- (1 - alpha s(d)) x + alpha s(d) y

where ``s`` is the discount of its staleness (section 5.2).
"""

from __future__ import annotations

from functools import partial

import numpy as np
from flwr.app import MetricRecord

from fedknow.strategies.asynchronous import (
    Asynchronous,
    Dispatcher,
    combine,
    staleness_metrics,
)

__all__ = ["FedAsync"]


class FedAsync(Asynchronous):
    """The server mixes each client's model into its own as it arrives.

    ``x <- (1 - alpha s(d)) x + alpha s(d) y`` for a client's model ``y`` that is ``d`` steps
    late (algorithm 1). A step is one answer. A round has as many answers as clients work at a
    time, so a task asks for as many answers as synchronous rounds do.

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

    def __init__(  # noqa: PLR0913  # the strategy's settings
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
            raise ValueError(
                f"proximal_mu = {proximal_mu!r}: must not be below 0"
            )
        self.alpha = alpha
        self.proximal_mu = proximal_mu

    def settings(self) -> dict[str, float]:
        """Return the weight of the proximal term, if there is one."""
        if not self.proximal_mu:
            return {}
        return {"proximal-mu": float(self.proximal_mu)}

    def round(
        self, dispatcher: Dispatcher, rounds_remaining: int
    ) -> MetricRecord | None:
        """Take one answer after the other, each a step."""
        answers = self.concurrency or len(list(dispatcher.grid.get_node_ids()))
        dispatcher.remaining = rounds_remaining * answers
        staleness = []
        for _ in range(answers):
            update = dispatcher.next_update()
            if update is None:
                break
            staleness.append(update.staleness)
            # float32, so that the arrays are not widened to float64.
            weight = np.float32(self.alpha * self.discount(update.staleness))
            # A good reply has just one record of arrays, whatever its name.
            model = next(iter(update.reply.content.array_records.values()))
            dispatcher.step(
                combine(partial(_mix, weight), dispatcher.arrays, model)
            )
        if not staleness:
            return None
        return MetricRecord(staleness_metrics(staleness))


def _mix(weight: np.float32, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return ``(1 - weight) x + weight y``."""
    mixed: np.ndarray = x + weight * (y - x)
    return mixed
