"""The server's half of FLCN: the importance of parameters on proxy data.

Yao and Sun, "Continual Local Training for Better Initialization of Federated Models", ICIP
2020. The server sends, with the global model w, the diagonal of its Fisher information on proxy
data D:

    Omega_j = mean over (x, y) in D of (d log p(y | x, w) / d w_j)^2
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedknow.client.host import one_thread
from fedknow.client.learners.frames.learner import HeadSlice, Learner
from fedknow.protocols.messages import Arrays
from fedknow.strategies.paired import PairedStrategy, Setup, to_tensors

__all__ = ["Flcn", "Sample", "importance"]


class Sample(NamedTuple):
    """A proxy sample: an image, its label, and the classes of its task.

    Attributes
    ----------
    x : Tensor
        Float [C, H, W].
    y : int
    classes : tuple of int
        The classes that the model chooses from.
    """

    x: Tensor
    y: int
    classes: tuple[int, ...]


class Flcn(PairedStrategy):
    """FedAvg that sends the importance of each parameter on proxy data.

    The importance is the diagonal Fisher information of the global model. The server stores the
    proxy data of all tasks that clients of :class:`fedknow.client.learners.flcn.Flcn` send.

    Parameters
    ----------
    proxy_samples : int
        Upper limit of the proxy samples used in a round, a random choice.
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
        """Compute Omega at the global model, as soon as there are proxy data."""
        samples = self._draw()
        if not samples:
            self._importance = None
            return
        self._learner.receive(to_tensors(arrays))
        # One thread, so that sums do not depend on the machine's number of cores.
        with one_thread():
            omega = importance(self._learner, samples)
        self._importance = Arrays(
            (name, tensor.numpy()) for name, tensor in omega.items()
        )

    def extra(self, task: int, client: int) -> Arrays | None:
        """Return Omega, the same for all clients."""
        return self._importance

    def collect(self, task: int, extras: Mapping[int, Arrays]) -> None:
        """Store the proxy data of clients that are new in this task."""
        # In the order of clients, whatever order the answers came in.
        self._proxy += [extras[client] for client in sorted(extras)]

    def state_dict(self) -> dict[str, Any]:
        """Return the proxy data."""
        return {"proxy": [dict(part) for part in self._proxy]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self._proxy = [Arrays(part) for part in state["proxy"]]

    def _draw(self) -> list[Sample]:
        """Draw proxy samples, in the order in which they arrived."""
        positions: list[tuple[int, int]] = []
        for part, proxy in enumerate(self._proxy):
            positions += [(part, row) for row in range(len(proxy["y"]))]
        count = min(self.proxy_samples, len(positions))
        # Python's generator is seeded by the experiment before each hook.
        drawn = sorted(random.sample(positions, count))
        return [self._sample(part, row) for part, row in drawn]

    def _sample(self, part: int, row: int) -> Sample:
        proxy = self._proxy[part]
        classes = tuple(int(label) for label in proxy["classes"])
        return Sample(
            torch.tensor(proxy["x"][row]), int(proxy["y"][row]), classes
        )


def importance(learner: Learner, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Compute the diagonal of the Fisher information at the data's labels.

    It is the mean over samples of ``(d log p(y | x, w) / d w_j)^2``.

    Parameters
    ----------
    learner : Learner
        Holds the model; it is put into evaluation mode.
    samples : sequence of Sample
        Proxy data.

    Returns
    -------
    dict of str to Tensor
        For each parameter to train, its shape; zero where a parameter takes no part.
    """
    parameters = learner.trainable
    omega = {
        name: torch.zeros_like(parameter, memory_format=torch.contiguous_format)
        for name, parameter in parameters.items()
    }
    # Dropout and batch statistics would add noise to the importance.
    learner.model.eval()
    # One sample at a time: the square of a batch's mean gradient would be something else.
    for x, y, classes in samples:
        # Only the classes of the sample's task compete, as in its training.
        head = HeadSlice(classes, learner.head.out_features)
        output = learner.model(learner.images(x[None]))
        log_p = head.logits(output).log_softmax(1)[0, classes.index(y)]
        gradients = torch.autograd.grad(
            log_p, list(parameters.values()), allow_unused=True
        )
        for name, gradient in zip(parameters, gradients, strict=True):
            # A parameter that takes no part in this task's classes has none.
            if gradient is not None:
                omega[name].addcmul_(gradient, gradient, value=1 / len(samples))
    return omega
