"""Central differential privacy: the server clips updates and adds noise.

It is the Gaussian mechanism on the sum of a round's updates (McMahan, Ramage, Talwar and Zhang,
"Learning Differentially Private Recurrent Language Models", ICLR 2018, algorithm 1, with one
bound for all arrays together). Each client counts alike, so that the bound of one update is the
bound of what a client can change.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower

from fedknow.client.noise import clip, gaussian
from fedknow.protocols.flower import to_arrays
from fedknow.protocols.messages import Arrays
from fedknow.strategies.points import Taken, flatten, lay_out, unflatten

__all__ = ["GaussianMean"]

LEAST_NOISE = 0.01
_SECRET_BYTES = 32


class GaussianMean(flower.FedAvg):
    """The mean of clipped changes, with noise of the server's.

    Of n answers, each change is scaled down to the norm ``clip``. The mean gets Gaussian noise
    of the deviation ``noise * clip / n``. The record of each round says epsilon for ``delta``.

    Parameters
    ----------
    clip : float
        Largest L2 norm of a client's change, all arrays together; above 0.
    noise : float
        Noise multiplier, 0.01 or more.
    delta : float
        Probability for which epsilon is said; above 0 and below 1.
    fraction_train : float
        Share of the clients that train in a round.
    min_train_nodes, min_available_nodes : int
        As Flower's FedAvg has them.

    Attributes
    ----------
    is_secret : bool
        Draw noise that nobody can repeat. Otherwise it comes from the run's seed, as a
        simulation must be repeatable; whoever knows the seed can take it off again.
    """

    def __init__(  # noqa: PLR0913  # the strategy's settings
        self,
        clip: float = 1.0,
        noise: float = 1.0,
        delta: float = 1e-5,
        fraction_train: float = 1.0,
        min_train_nodes: int = 1,
        min_available_nodes: int = 1,
    ) -> None:
        super().__init__(
            fraction_train=fraction_train,
            fraction_evaluate=0.0,
            min_train_nodes=min_train_nodes,
            min_evaluate_nodes=1,
            min_available_nodes=min_available_nodes,
        )
        if clip <= 0:
            raise ValueError(f"clip = {clip!r}: must be above 0")
        if noise < LEAST_NOISE:
            raise ValueError(
                f"noise = {noise!r}: must be {LEAST_NOISE:g} or more; less protects nobody"
            )
        if not 0 < delta < 1:
            raise ValueError(f"delta = {delta!r}: must be above 0 and below 1")
        self.clip = clip
        self.noise = noise
        self.delta = delta
        self.is_secret = False
        self._model = Arrays()

    def configure_train(
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
    ) -> Iterable[Message]:
        """Remember the model that changes are counted from."""
        # The hook for answers is not given the model that was sent.
        self._model = to_arrays(arrays)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> Taken:
        """Add the mean of the clipped changes, and noise, to the model."""
        valid, _ = self._check_and_log_replies(replies, is_train=True)
        contents = [message.content for message in valid]
        if not contents:
            return None, None
        names = list(self._model)
        model = flatten(self._model, names)
        changes = lay_out(contents, names) - model
        clipped = np.stack([clip(change, self.clip) for change in changes])
        deviation = self.noise * self.clip / len(contents)
        step = clipped.mean(axis=0) + deviation * gaussian(
            self._draw(), model.size
        )
        metrics = self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        norms = np.linalg.norm(changes, axis=1)
        # A user sees by it whether the bound suits the clients.
        metrics["clipped-share"] = float((norms > self.clip).mean())
        return unflatten(model + step, self._model), metrics

    def _draw(self) -> bytes:
        """Draw the secret that a round's noise is made of."""
        if self.is_secret:
            return secrets.token_bytes(_SECRET_BYTES)
        # The experiment seeds this generator before each hook.
        return random.randbytes(_SECRET_BYTES)
