"""The server's half of FLCN (Yao and Sun, ICIP 2020): proxy data, and the importance of parameters
on them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedknow.client.host import one_thread
from fedknow.client.learners.frames.learner import HeadSlice, Learner
from fedknow.protocols.messages import Arrays
from fedknow.strategies.paired import PairedStrategy, Setup

__all__ = ["Flcn", "Sample", "importance"]


class Sample(NamedTuple):
    """A proxy sample: image float [C, H, W], label, and the classes that the label is told from."""

    x: Tensor
    y: int
    classes: tuple[int, ...]


class Flcn(PairedStrategy):
    """FedAvg that sends the diagonal Fisher information of the global model on proxy data with it.

    Keeps the proxy data that clients of :class:`fedknow.client.learners.flcn.Flcn` give it, of
    all tasks.

    Parameters
    ----------
    proxy_samples : int
        Most of them that are looked at in a round, a random choice.
    fraction_train, min_train_nodes, min_available_nodes
        See :class:`~fedknow.strategies.paired.PairedStrategy`.
    """

    def __init__(
        self,
        proxy_samples: int = 256,
        fraction_train: float = 1.0,
        min_train_nodes: int = 1,
        min_available_nodes: int = 1,
    ) -> None:
        super().__init__(fraction_train, min_train_nodes, min_available_nodes)
        self.proxy_samples = proxy_samples
        self._proxy: list[Arrays] = []
        self._importance: Arrays | None = None

    def prepare(self, setup: Setup) -> None:
        """Take a model to work with."""
        self._learner = setup.learner

    def begin_round(self, task: int, arrays: Arrays) -> None:
        """Omega at the global model, as soon as there are proxy data."""
        places = [
            (part, row)
            for part, proxy in enumerate(self._proxy)
            for row in range(len(proxy["y"]))
        ]
        if not places:
            self._importance = None
            return
        # Python's generator is seeded by the experiment before each hook.
        chosen = sorted(random.sample(places, min(self.proxy_samples, len(places))))
        samples = [
            Sample(
                torch.tensor(self._proxy[part]["x"][row]),
                int(self._proxy[part]["y"][row]),
                self._classes(part),
            )
            for part, row in chosen
        ]
        self._learner.receive(
            {name: torch.tensor(array) for name, array in arrays.items()}
        )
        with one_thread():
            omega = importance(self._learner, samples)
        self._importance = Arrays(
            (name, value.numpy()) for name, value in omega.items()
        )

    def _classes(self, part: int) -> tuple[int, ...]:
        return tuple(int(label) for label in self._proxy[part]["classes"])

    def extra(self, task: int, client: int) -> Arrays | None:
        """Omega, the same for all."""
        return self._importance

    def collect(self, task: int, extras: Mapping[int, Arrays]) -> None:
        """Proxy data of clients that took part in this task for the first time."""
        self._proxy += [extras[client] for client in sorted(extras)]

    def state_dict(self) -> dict[str, Any]:
        """The proxy data."""
        return {"proxy": [dict(part) for part in self._proxy]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self._proxy = [Arrays(part) for part in state["proxy"]]


def importance(learner: Learner, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """The diagonal of the Fisher information, mean over samples of (d log p(y | x, w) / d w_j)^2,
    at the data's labels.

    Parameters
    ----------
    learner : Learner
        With the model to look at; it is put into evaluation mode.
    samples : sequence of Sample
        Proxy data.

    Returns
    -------
    dict of str to Tensor
        For each parameter to train, its shape; zero where a parameter takes no part.
    """
    parameters = learner.trainable
    omega = {
        name: torch.zeros_like(p, memory_format=torch.contiguous_format)
        for name, p in parameters.items()
    }
    learner.model.eval()
    for x, y, classes in samples:
        head = HeadSlice(classes, learner.head.out_features)
        log_p = head.logits(learner.model(learner.images(x[None]))).log_softmax(1)[
            0, classes.index(y)
        ]
        gradients = torch.autograd.grad(
            log_p, list(parameters.values()), allow_unused=True
        )
        for name, g in zip(parameters, gradients, strict=True):
            if g is not None:
                omega[name].addcmul_(g, g, value=1 / len(samples))
    return omega
