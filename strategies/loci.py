"""The server's half of Loci: like tasks' knowledge mixed.

Luopan et al., "Loci: Federated Continual Learning of Heterogeneous Tasks at Edge", IEEE TPDS
36(4), 2025. Equations are those of :mod:`fedknow.client.learners.loci`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from fedknow.client.host import one_thread
from fedknow.client.learners.frames.learner import Tensors
from fedknow.client.learners.frames.sparse import pack, unpack
from fedknow.client.learners.loci import CLASSES, only_rows
from fedknow.client.learners.loci import Loci as LociLearner
from fedknow.protocols.config import ConfigError
from fedknow.protocols.messages import EXTRA, Arrays, Message
from fedknow.strategies.fedweit import mean_of_sent
from fedknow.strategies.paired import PairedStrategy, Setup, to_tensors

__all__ = ["Loci", "distance", "mix", "nearest"]


class Loci(PairedStrategy):
    """Mixes each client's task knowledge with the likest of others.

    There is no global model. The server stores the pruned knowledge of all clients' past tasks,
    and of the current one what goes to each client next.

    Parameters
    ----------
    peers : int
        k of Eq. (3).
    candidates : int
        Past tasks' knowledge that is looked at in a round, for each client in it; a random choice.
    probes : int
        Samples of noise that Eq. (2) is a mean over, drawn anew in each round.
    fraction_train, min_train_nodes, min_available_nodes
        See :class:`~fedknow.strategies.paired.PairedStrategy`.
    """

    def __init__(  # noqa: PLR0913  # the strategy's settings
        self,
        peers: int = 3,
        candidates: int = 4,
        probes: int = 5,
        fraction_train: float = 1.0,
        min_train_nodes: int = 1,
        min_available_nodes: int = 1,
    ) -> None:
        super().__init__(fraction_train, min_train_nodes, min_available_nodes)
        self.peers = peers
        self.candidates = candidates
        self.probes = probes
        self._past: list[Tensors] = []
        self._mixed: dict[int, Arrays] = {}

    def prepare(self, setup: Setup) -> None:
        """Take a model to answer with.

        Raises
        ------
        ConfigError
            If the learner is another one.
        """
        if not isinstance(setup.learner, LociLearner):
            raise ConfigError(
                "strategy.name = 'loci' is one half of a method; set learner.name = 'loci'"
            )
        self._learner = setup.learner

    # --- hooks

    def extra(self, task: int, client: int) -> Arrays | None:
        """Return a client's v as mixed after its last round in this task."""
        return self._mixed.get(client)

    def collect(self, task: int, extras: Mapping[int, Arrays]) -> None:
        """Mix what a round's clients sent, Eq. (2) and (3)."""
        # In the order of clients, whatever order the answers came in.
        clients = sorted(extras)
        current = [to_tensors(extras[client]) for client in clients]
        candidates = current + self._draw(self.candidates * len(clients))
        # One thread, so that sums do not depend on the machine's number of cores.
        with one_thread(), torch.no_grad():
            x = self._draw_probes()
            features = [self._features(entries, x) for entries in candidates]
            for place, client in enumerate(clients):
                chosen = self._choose(place, candidates, features)
                peers = [candidates[peer] for peer in chosen]
                self._mixed[client] = mix(candidates[place], peers)

    def aggregate_end_task(
        self, task: int, arrays: Arrays, replies: Sequence[Message]
    ) -> None:
        """Store the task's knowledge; the next task's v begin anew."""
        for reply in replies:
            extra = reply.content.get(EXTRA)
            if isinstance(extra, Arrays):
                self._past.append(to_tensors(extra))
        self._mixed = {}

    def state_dict(self) -> dict[str, Any]:
        """Return past knowledge, and what goes to clients next."""
        return {
            # Packed, because most of its weights are zero.
            "past": [pack(entries) for entries in self._past],
            "mixed": {
                str(client): dict(arrays)
                for client, arrays in self._mixed.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self._past = [unpack(entry) for entry in state["past"]]
        self._mixed = {
            int(client): Arrays(arrays)
            for client, arrays in state["mixed"].items()
        }

    # --- choice and mean

    def _draw(self, count: int) -> list[Tensors]:
        """Draw past tasks' knowledge, in the order in which it came."""
        everything = range(len(self._past))
        # Python's generator is seeded by the experiment before each hook.
        places = random.sample(everything, min(count, len(everything)))
        return [self._past[place] for place in sorted(places)]

    def _draw_probes(self) -> Tensor:
        """Draw x of Eq. (2)."""
        spec = self._learner.spec
        # An experiment's learner was built for its samples.
        assert spec is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random.getrandbits(63))
            return self._learner.images(spec.random(self.probes))

    def _features(self, entries: Tensors, x: Tensor) -> Tensor:
        """Let a candidate's body answer, float [n, f]."""
        body = self._learner.body.eval()
        prefix = "body."
        of_body = {
            name.removeprefix(prefix): value
            for name, value in entries.items()
            if name.startswith(prefix)
        }
        return cast(Tensor, functional_call(body, of_body, (x,)))

    def _choose(
        self,
        place: int,
        candidates: Sequence[Tensors],
        features: Sequence[Tensor],
    ) -> list[int]:
        """Choose a client's peers, by their places among all candidates."""
        centre = candidates[place]
        answers = self._answers(features[place], centre, centre)
        distances = {
            peer: distance(
                answers, self._answers(features[peer], entries, centre)
            )
            for peer, entries in enumerate(candidates)
            if peer != place
        }
        return nearest(distances, self.peers)

    def _answers(
        self, features: Tensor, entries: Tensors, centre: Tensors
    ) -> Tensor:
        """Let a candidate answer among a client's classes, float [n, c].

        Where it has no row of a class, the client's is taken.
        """
        classes = centre[CLASSES]
        is_held = torch.isin(classes, entries[CLASSES])
        weight, bias = self._head(entries)
        centre_weight, centre_bias = self._head(centre)
        return F.linear(
            features,
            torch.where(
                is_held[:, None], weight[classes], centre_weight[classes]
            ),
            torch.where(is_held, bias[classes], centre_bias[classes]),
        )

    def _head(self, entries: Tensors) -> tuple[Tensor, Tensor]:
        # What is frozen of the head did not travel, and is the same everywhere.
        head = self._learner.head
        return (
            entries.get("head.weight", head.weight),
            entries.get("head.bias", head.bias),
        )


def distance(u: Tensor, u_j: Tensor) -> float:
    """Take Eq. (2): how far a candidate's answers are from a client's.

    Parameters
    ----------
    u, u_j : Tensor
        Logits of the client's classes, float [n, c].

    Examples
    --------
    >>> surely, equally = torch.tensor([[8.0, 0.0]]), torch.zeros(1, 2)
    >>> distance(surely, surely) < distance(surely, equally)
    True
    """
    return float(F.cross_entropy(u, u_j.softmax(1)))


def nearest(distances: Mapping[int, float], count: int) -> list[int]:
    """Choose the places with the smallest distances; of equal ones the first."""
    # Answers that overflow are like nobody's; a NaN would spoil the order.
    ordered = sorted(
        (value if math.isfinite(value) else math.inf, place)
        for place, value in distances.items()
    )
    return [place for _, place in ordered[:count]]


def mix(centre: Tensors, peers: Sequence[Tensors]) -> Arrays:
    """Take Eq. (3): each entry's mean over those that hold it.

    Parameters
    ----------
    centre : dict of str to Tensor
        A client's v and its classes. Of the head, the rows of these are mixed.
    peers : sequence of dict of str to Tensor
        Knowledge to mix it with. A zero stands for what was pruned, or was no class of theirs.

    Returns
    -------
    Arrays
        By the model's names.
    """
    mixed: Tensors = {}
    for name, value in centre.items():
        if name != CLASSES:
            arrays = [entries[name].numpy() for entries in (centre, *peers)]
            mixed[name] = torch.from_numpy(mean_of_sent(value.numpy(), arrays))
    reduced = only_rows(mixed, centre[CLASSES].tolist())
    return Arrays((name, value.numpy()) for name, value in reduced.items())
