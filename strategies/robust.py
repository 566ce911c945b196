"""Aggregation that a minority of hostile clients cannot steer.

Flower's Krum takes distances in float32 by ``|x|^2 + |y|^2 - 2 x y``. Updates are much smaller
than the model, so most digits cancel. It also weighs the chosen answers by ``num-examples``,
a number that clients claim. Here distances are taken from differences in float64, and the
chosen answers count alike, as in the papers (:mod:`fedknow.strategies.robust_rules`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import numpy as np
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower

from fedknow.protocols.flower import to_arrays
from fedknow.protocols.messages import Arrays
from fedknow.strategies.flower_log import LOGGER
from fedknow.strategies.points import (
    Taken,
    arrays_of,
    flatten,
    lay_out,
    unflatten,
)
from fedknow.strategies.robust_rules import (
    clip_around,
    krum_order,
    middle_mean,
    squared_distances,
)

__all__ = [
    "Bulyan",
    "CentredClipping",
    "Krum",
    "MultiKrum",
    "select_repeatedly",
]

log = logging.getLogger(LOGGER)


class MultiKrum(flower.MultiKrum):
    """The mean of the answers nearest to the others.

    Parameters
    ----------
    num_malicious_nodes : int
        How many answers of a round may be hostile, f. A round needs 2 f + 3 answers.
    num_nodes_to_select : int
        How many answers to average.
    fraction_train, fraction_evaluate, min_train_nodes, min_evaluate_nodes
        As Flower's FedAvg has them.
    """

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> Taken:
        """Choose answers, and average them with equal weights."""
        valid, _ = self._check_and_log_replies(replies, is_train=True)
        contents = [message.content for message in valid]
        if not _are_enough(contents, self.num_malicious_nodes, 2, "Krum"):
            return None, None
        points = lay_out(contents)
        order = krum_order(squared_distances(points), self.num_malicious_nodes)
        # In the order of clients: a sum of floats depends on its order.
        chosen = sorted(order[: self.num_nodes_to_select])
        mean = points[chosen].mean(axis=0)
        metrics = self.train_metrics_aggr_fn(
            [contents[place] for place in chosen], self.weighted_by_key
        )
        return unflatten(mean, arrays_of(contents[0])), metrics


class Krum(MultiKrum, flower.Krum):
    """The one answer nearest to the others.

    Parameters
    ----------
    num_malicious_nodes : int
        How many answers of a round may be hostile, f. A round needs 2 f + 3 answers.
    fraction_train, fraction_evaluate, min_train_nodes, min_evaluate_nodes
        As Flower's FedAvg has them.
    """


def select_repeatedly(
    contents: list[RecordDict], malicious: int, selected: int
) -> list[RecordDict]:
    """Choose answers one by one, each by Krum among those that remain.

    This is the first step of Bulyan (El Mhamdi et al. 2018, section 4); Flower's Bulyan takes
    it as its ``selection_rule``.

    Parameters
    ----------
    contents : list of RecordDict
        Answers, with one record of arrays each.
    malicious : int
        How many of them may be hostile.
    selected : int
        How many to choose.

    Returns
    -------
    list of RecordDict
        The chosen answers, in the order given.
    """
    distances = squared_distances(lay_out(contents))
    remaining = list(range(len(contents)))
    chosen: list[int] = []
    while len(chosen) < selected:
        part = distances[np.ix_(remaining, remaining)]
        chosen.append(remaining.pop(krum_order(part, malicious)[0]))
    # In the order of clients: a sum of floats depends on its order.
    return [contents[place] for place in sorted(chosen)]


class Bulyan(flower.Bulyan):
    """Krum's choice, then the mean of the values nearest to the median.

    Of n answers ``n - 2 f`` are chosen, and of their values ``n - 4 f`` count. Flower's own
    Bulyan runs Python's collector for each array.

    Parameters
    ----------
    num_malicious_nodes : int
        How many answers of a round may be hostile, f. A round needs 4 f + 3 answers.
    fraction_train, fraction_evaluate, min_train_nodes, min_evaluate_nodes
        As Flower's FedAvg has them.
    """

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> Taken:
        """Choose answers, and average their middle values."""
        valid, _ = self._check_and_log_replies(replies, is_train=True)
        contents = [message.content for message in valid]
        malicious = self.num_malicious_nodes
        if not _are_enough(contents, malicious, 4, "Bulyan"):
            return None, None
        selected = len(contents) - 2 * malicious
        chosen = self.selection_rule(contents, malicious, selected)
        # Krum bounds the whole distance; single numbers may still be far out.
        mean = middle_mean(lay_out(chosen), selected - 2 * malicious)
        metrics = self.train_metrics_aggr_fn(chosen, self.weighted_by_key)
        return unflatten(mean, arrays_of(chosen[0])), metrics


class CentredClipping(flower.FedAvg):
    """The mean of the clients' changes, each clipped to a radius.

    No client moves the model by more than ``radius / n`` in an iteration, whatever it sends.
    Clients count alike, as ``num-examples`` is what a client claims.

    Parameters
    ----------
    radius : float
        Largest L2 norm of a change, tau; 0: the median of the round's.
    iterations : int
        How often the centre is computed anew.
    fraction_train : float
        Share of the clients that train in a round.
    min_train_nodes, min_available_nodes : int
        As Flower's FedAvg has them.
    """

    def __init__(
        self,
        radius: float = 0.0,
        iterations: int = 1,
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
        self.radius = radius
        self.iterations = iterations
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
        """Add the mean of the clipped changes to the model."""
        valid, _ = self._check_and_log_replies(replies, is_train=True)
        contents = [message.content for message in valid]
        if not contents:
            return None, None
        model = flatten(self._model, list(self._model))
        changes = lay_out(contents, list(self._model)) - model
        step, clipped = clip_around(changes, self.radius, self.iterations)
        metrics = self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        # A user sees by it whether the radius suits honest clients.
        metrics["clipped-share"] = clipped
        return unflatten(model + step, self._model), metrics


def _are_enough(
    contents: Sequence[RecordDict],
    malicious: int,
    factor: int,
    name: str,
) -> bool:
    """Say whether a round has enough answers; warn if it has not."""
    # Without hostile clients one answer is enough, as for a mean.
    minimum = factor * malicious + 3 if malicious else 1
    if len(contents) >= minimum:
        return True
    log.warning(
        "%s needs %d x %d + 3 = %d answers for num_malicious_nodes = %d, and got %d",
        name,
        factor,
        malicious,
        minimum,
        malicious,
        len(contents),
    )
    return False
