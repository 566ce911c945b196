"""AGS-CL: continual learning with adaptive group sparse regularization.

Jung, Ahn, Cha, Moon, NeurIPS 2020, arXiv 2003.13726. A *node* is a filter of a convolution or a
unit of a linear layer, theta_n its incoming weights, Omega_n >= 0 its importance to past tasks:
its mean activation after ReLU, decayed by eta from task to task, so that Omega_n = 0 says that
past tasks do not use it. A task is learned by proximal gradient steps on

    L(theta) + mu sum_{n: Omega_n = 0} |theta_n|
             + lambda sum_{n: Omega_n > 0} Omega_n |theta_n - theta_n_old|        (Eq. 2)

whose first penalty leaves nodes at exactly zero, for later tasks, and whose second freezes
important ones exactly. Against negative transfer, what an unimportant node gives to an
important one is held at zero, and before a task the weights out of unimportant nodes are zeroed
and a fraction of those nodes starts anew.

The optimizer minimises L batch by batch and the proximal step follows each epoch with step size
``train.lr``, as in the authors' experiments. Around it FedAvg (``exchange``) undoes a part of
the sparsity in each round; the anchor theta_old is the model all clients had at the task's end,
so that they pull towards the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fedknow.client.compute.sizes import tensor_bytes
from fedknow.client.data.stream import TaskData
from fedknow.client.learners.frames.checks import check_plain
from fedknow.client.learners.frames.learner import (
    ContinualSettings,
    Learner,
    Round,
    State,
)
from fedknow.protocols.config import ConfigError, TrainConfig

__all__ = ["AgsCl", "AgsClSettings", "shrink"]

_PASSIVE = (
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Dropout,
    nn.Flatten,
    nn.Identity,
)


class AgsClSettings(ContinualSettings):
    """Settings of :class:`AgsCl`.

    Defaults are the paper's for CIFAR-100, as far as they are known.
    """

    mu: float = Field(10.0, ge=0)
    """Weight of the penalty that empties unimportant nodes."""
    lam: float = Field(400.0, ge=0)
    """lambda, weight of the penalty that holds important nodes where they were."""
    eta: float = Field(0.9, gt=0, le=1)
    """Decay of importance from task to task."""
    rho: float = Field(0.3, ge=0, le=1)
    """Fraction of the unimportant nodes that starts anew before a task."""


def shrink(rows: Tensor, target: Tensor, threshold: Tensor) -> Tensor:
    """Proximal operator of a penalty by rows (Eqs. 3 and 4).

    The penalty of row n is ``threshold_n |row_n - target_n|``.

    Parameters
    ----------
    rows, target : Tensor
        Float [n, p].
    threshold : Tensor
        Float [n], not negative; a row at most so far away lands on its target exactly.
    """
    offset = rows - target
    # By rows: a node's weights shrink together, or the node would never vanish.
    norm = offset.norm(dim=1)
    scale = 1 - threshold / torch.maximum(norm, threshold).clamp_min(
        torch.finfo(rows.dtype).tiny
    )
    return target + scale[:, None] * offset


class AgsCl(Learner):
    """Group-sparse nodes, the important ones frozen (NeurIPS 2020).

    Jung et al., Eqs. 2 to 5.

    Where authors' code and paper leave a choice: the bias belongs to a node's incoming weights,
    as in the code; nodes that start anew get the weights the run began with, a draw of the
    model's own initialiser that clients share.

    Keeps: one number a node and the weights of important nodes, at most one copy of the body.
    Sends: what ``exchange`` says, nothing more. Needs: no stored sample; after each epoch a
    proximal step, and one forward pass over a task's samples at its end. Valid:
    task-incremental, as in the paper; models whose body is a chain of convolutions and linear
    layers, each followed by ReLU.

    Raises
    ------
    ConfigError
        If the body is another kind of network.
    """

    Settings = AgsClSettings
    settings: AgsClSettings
    scenarios = ("task-incremental",)
    search: ClassVar[Mapping[str, Sequence[float | str]]] = {
        "lam": [1.0, 8.0, 100.0, 400.0],
        "mu": [0.1, 1.0, 10.0],
    }

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        settings: AgsClSettings,
    ) -> None:
        super().__init__(model, train, settings)
        self._layers = _layers(self.body)
        # Nodes that start anew get these back, the same for every client.
        self._initial = [_rows(layer) for layer in self._layers]

    # --- state

    def load_own_state(self, state: State) -> None:
        """Take over importance and anchor of each layer."""
        self._importance = [rows.new_zeros(len(rows)) for rows in self._initial]
        self._anchor = [torch.zeros_like(rows) for rows in self._initial]
        for i, layer in state.get("nodes", {}).items():
            self._importance[int(i)] = omega = layer["importance"]
            # Only important nodes are kept, the others' anchor being zero.
            self._anchor[int(i)][omega > 0] = layer["anchor"]
        self._prepared = int(state.get("prepared", 0))

    def own_state(self) -> State:
        """Give importance and anchor of each layer."""
        nodes = enumerate(zip(self._importance, self._anchor, strict=True))
        return {
            "nodes": {
                str(i): {"importance": omega, "anchor": rows[omega > 0]}
                for i, (omega, rows) in nodes
            },
            "prepared": self._prepared,
        }

    # --- training

    def begin(self, task: TaskData, round: Round) -> None:
        """Before a later task, cut off unimportant nodes and renew some."""
        super().begin(task, round)
        # Once a task: later rounds would undo what was learned.
        if task.task > self._prepared:
            self._start_anew(round.seed)
            self._prepared = task.task

    def step(self) -> None:
        """Step, and hold at zero what unimportant nodes give to important ones."""
        super().step()
        with torch.no_grad():
            for (_, below), (layer, above) in pairwise(
                zip(self._layers, self._importance, strict=True)
            ):
                if layer.weight.requires_grad:
                    _by_node(layer.weight, below)[
                        (above > 0)[:, None] & (below == 0)
                    ] = 0

    def begin_epoch(self, epoch: int) -> None:
        """Return the proximal step of the epoch before."""
        # The round's last epoch is followed by end_round.
        if epoch:
            self._proximal_step()

    def end_round(self, task: TaskData, round: Round) -> dict[str, float]:
        """Return the proximal step of the last epoch."""
        self._proximal_step()
        return {}

    def counts(self) -> dict[str, float]:
        """Report ``important``: the share of nodes that past tasks use."""
        nodes = torch.cat(self._importance)
        return {"important": float((nodes > 0).float().mean())}

    def _proximal_step(self) -> None:
        """Empty unimportant nodes and hold important ones (Eqs. 3 and 4).

        Each node has a threshold of its own.
        """
        for layer, omega, anchor in zip(
            self._layers, self._importance, self._anchor, strict=True
        ):
            # One operator for both penalties: an unimportant node is pulled to an anchor of
            # zero.
            weight = torch.where(
                omega > 0, self.settings.lam * omega, self.settings.mu
            )
            _set_rows(layer, shrink(_rows(layer), anchor, self.train.lr * weight))

    def _start_anew(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._cut_off(self._importance)
        for layer, omega, initial in zip(
            self._layers, self._importance, self._initial, strict=True
        ):
            # Only nodes that no task needs may begin anew.
            unused = torch.nonzero(omega == 0).flatten()
            chosen = unused[
                torch.randperm(len(unused), generator=generator)[
                    : int(self.settings.rho * len(unused))
                ]
            ]
            _set_rows(layer, _rows(layer).index_copy(0, chosen, initial[chosen]))

    def _cut_off(self, importance: list[Tensor]) -> None:
        """Zero the weights out of unimportant nodes, within the body."""
        with torch.no_grad():
            for below, layer in zip(
                importance[:-1], self._layers[1:], strict=True
            ):
                if layer.weight.requires_grad:
                    _by_node(layer.weight, below)[:, below == 0] = 0

    # --- the end of a task

    def end_task(self, task: TaskData, round: Round) -> dict[str, float]:
        """Update the importance of nodes, and keep important weights (Eq. 5).

        The task's mean activations are added to the importance.
        """
        shared = self.send()
        super().end_task(task, round)
        self.entries.load(
            shared
        )  # a client that had to train first: its anchor is the shared model like everybody's
        active = self._mean_activations(self.images(task.train.x))
        self._importance = [
            self.settings.eta * old + new
            for old, new in zip(self._importance, active, strict=True)
        ]
        body = {
            name: value.clone() for name, value in self.body.state_dict().items()
        }
        self._cut_off(self._importance)
        self._anchor = [
            torch.where((omega > 0)[:, None], _rows(layer), 0.0)
            for layer, omega in zip(self._layers, self._importance, strict=True)
        ]
        self.body.load_state_dict(
            body
        )  # scored as it was trained; the next task begins with the cut
        with torch.no_grad():
            rows = torch.tensor(task.classes, device=self.device)[:, None]
            if self.head.weight.requires_grad:
                self.head.weight[
                    rows, torch.nonzero(self._importance[-1] == 0).T
                ] = 0
        return {"knowledge-bytes": float(tensor_bytes(self.own_state()["nodes"]))}

    @torch.no_grad()
    def _mean_activations(self, x: Tensor) -> list[Tensor]:
        """Take the mean output of each node after ReLU.

        The mean is over samples and places: a list of float [nodes], layer by layer.
        """
        self.body.eval()
        totals = [torch.zeros_like(omega) for omega in self._importance]
        for part in torch.split(x, 256):
            nodes = iter(totals)
            for module in _chain(self.body):
                part = module(part)
                if isinstance(module, nn.ReLU):
                    next(nodes).add_(
                        part.flatten(2).mean(2).sum(0)
                        if part.dim() > 2
                        else part.sum(0)
                    )
        return [total / len(x) for total in totals]


def _chain(body: nn.Module) -> Iterator[nn.Module]:
    """Return the modules of nested sequences, in order."""
    if isinstance(body, nn.Sequential):
        for child in body:
            yield from _chain(child)
    else:
        yield body


def _layers(body: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    """Return the body's layers of nodes.

    Raises
    ------
    ConfigError
        If they are not a chain of convolutions and linear layers with a ReLU after each.
    """
    layers: list[nn.Conv2d | nn.Linear] = []
    rectified = True
    for module in _chain(body):
        is_allowed = isinstance(module, _PASSIVE)
        if isinstance(module, nn.Linear) or (
            isinstance(module, nn.Conv2d) and module.groups == 1
        ):
            is_allowed, rectified = rectified, False
            layers.append(module)
        # Importance is a mean activation, which says nothing where it can be negative.
        elif isinstance(module, nn.ReLU):
            is_allowed, rectified = not rectified, True
        if not is_allowed:
            raise ConfigError(
                f"learner.name = 'agscl' cannot train this model: it has no use for "
                f"{type(module).__name__} in its "
                "place; the body must be a chain of convolutions and linear layers with "
                "a ReLU after each, as in "
                "model.name = 'cnn', 'cnn6' or 'mlp'"
            )
    if not (layers and rectified):
        raise ConfigError(
            "learner.name = 'agscl' cannot train this model: its body must end in a ReLU "
            "after a convolution or a "
            "linear layer"
        )
    # Errors name a layer as the user's model does.
    names = {module: name for name, module in body.named_modules()}
    check_plain({names[layer]: layer for layer in layers}, "agscl")
    return layers


def _rows(layer: nn.Conv2d | nn.Linear) -> Tensor:
    """Copy the incoming weights of nodes, bias last: float [nodes, p]."""
    parts = [
        layer.weight.detach().flatten(1),
        *([] if layer.bias is None else [layer.bias.detach()[:, None]]),
    ]
    return torch.cat(parts, 1)


@torch.no_grad()
def _set_rows(layer: nn.Conv2d | nn.Linear, rows: Tensor) -> None:
    """Undo :func:`_rows`; what is frozen stays."""
    if layer.bias is not None:
        if layer.bias.requires_grad:
            layer.bias.copy_(rows[:, -1])
        rows = rows[:, :-1]
    if layer.weight.requires_grad:
        layer.weight.copy_(rows.view(layer.weight.shape))


def _by_node(weight: Tensor, below: Tensor) -> Tensor:
    """View a layer's weights as [nodes, nodes below, places].

    Places are those of the kernel, or of a flattened image.
    """
    return weight.view(len(weight), len(below), -1)
