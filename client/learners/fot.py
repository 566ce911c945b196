"""FOT: updates orthogonal to what past tasks feed into each layer.

Bakman, Yaldiz, Ezzeldin and Avestimehr, "Federated Orthogonal Training: Mitigating Global
Catastrophic Forgetting in Continual Federated Learning", ICLR 2024, arXiv 2309.01289. The
client's half; the server's, which extracts the subspace and projects the updates, is
:class:`fedknow.strategies.fot.Fot`.

When a task is over, a client sends of each layer what the server needs to know of its inputs X,
float [d, n]: their second moment X X^T. Added up over clients it is that of everybody's inputs,
whose eigenvectors are the principal subspace, with the very share of energy that each of them
holds.

The paper's clients send a sketch X Omega instead, with a Gaussian Omega [n, m] that they keep
to themselves, so that the server sees nobody's inputs. Given X, the columns of X Omega are
independent draws from N(0, X X^T): a sketch is m noisy looks at the second moment, and tells
nothing else. Few columns distort it: with singular values ~ i^-0.5, d = 145 and epsilon = 0.95,
what seems to hold 0.95 of the energy holds 0.80 of it at m = d, and 0.92 at m = 5 d (the
authors' program has the one or the other, by the layer). The exact moment, of which one
triangle is enough, takes d (d + 1) / 2 numbers, half of the traffic of m = d and a tenth of
that of m = 5 d. In turn it tells without noise what a sketch tells with it: X but for a
rotation Q that mixes the samples, X Q. Both give away the span of a client's inputs (where n <
d; of a client with one, that input itself). Both are sums, so that secure aggregation could
hide clients among each other, as the paper has it; here this method is without it, and the server
sees what each client sends.

For layers so large that the triangle is more than a sketch of :attr:`FotSettings.columns`
columns, the sketch is sent, and with it |X|^2.
:func:`fedknow.strategies.subspaces.extend_from_sketch` says what is made of it. With 1280 columns a
layer of d = 1153 or 2049 sends its moment (2.7 and 8.4 MB), one of d = 4097 a sketch (21 MB;
its moment has 34). Here Omega follows from the round's seed, so that runs can be repeated. The
server knows that seed: it could draw Omega too and, where n <= m, solve for X. Where this
matters, let ``columns`` be above d / 2, and no layer is sketched.

(The paper's equations are stated from memory, hence without their numbers; the program meant is
github.com/duygunuryldz/Federated_Orthogonal_Training at f343e36.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fedknow.client.data.stream import TaskData
from fedknow.client.learners.frames.checks import check_plain
from fedknow.client.learners.frames.learner import (
    Layout,
    Learner,
    LearnerSettings,
    Round,
    Tensors,
)
from fedknow.client.learners.frames.shared import check_large
from fedknow.protocols.config import ConfigError, TrainConfig
from fedknow.protocols.seeds import integer

__all__ = [
    "Fot",
    "FotSettings",
    "check_triangle",
    "dimension",
    "inputs",
    "layers",
    "triangle",
]


class FotSettings(LearnerSettings):
    """Settings of :class:`Fot`."""

    exchange: Literal["all", "body"] = "body"
    """What is averaged; with ``body`` each client has a head of its own."""
    threshold: float = Field(0.95, gt=0, le=1)
    """epsilon: the share of the inputs' energy that the subspace of past tasks has to hold."""
    increase: float = Field(0.0, ge=0, lt=1)
    """What is added to epsilon after each task, up to 1. The authors' commands have 0.001, and 0
    for permuted MNIST."""
    columns: int = Field(1280, ge=16, le=1_000_000)
    """m, the columns of the sketches that layers of more than 2 m - 1 inputs send; the others send
    second moments."""
    patches: int = Field(64, ge=0, le=1_000_000)
    """Places of an image, drawn at random, whose patches count as inputs of a convolution; 0:
    all."""


class Fot(Learner):
    """Plain clients, and a server that projects updates (ICLR 2024).

    Bakman et al. call it federated orthogonal training.

    Keeps: nothing about past tasks; the subspaces are the server's. Sends: the model, and once
    a task the second moment of each layer's inputs, one triangle, float [d (d + 1) / 2] with d
    the layer's inputs (and one for its bias); of layers with d >= 2 m a sketch, float [d, m],
    and its inputs' energy. Needs: a forward pass over the task's samples when it is over, d
    multiplications for each number in X (m with a sketch), and room for [d, d] or [d, m] of
    each layer. Valid: task-incremental, for the head's rows are left to their own task; models
    whose body has no parameters but those of convolutions and linear layers.

    The paper's networks have no biases; here a bias is the weight of an input that is always 1,
    and is projected with the others. Two things save work and are settings: m, and the places
    that patches are taken from.
    """

    Settings = FotSettings
    settings: FotSettings
    strategy = "fot"
    scenarios: ClassVar[tuple[str, ...]] = ("task-incremental",)
    search: ClassVar[Mapping[str, Sequence[float | str]]] = {
        "threshold": [0.8, 0.9, 0.95, 0.99]
    }

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        settings: FotSettings,
    ) -> None:
        super().__init__(model, train, settings)
        self.layers = layers(self.body, self.strategy)

    @classmethod
    def strategy_options(cls, settings: LearnerSettings) -> dict[str, Any]:
        """Give the subspaces' share of energy, and how it grows."""
        assert isinstance(settings, FotSettings)
        return {"threshold": settings.threshold, "increase": settings.increase}

    def end_task(self, task: TaskData, round: Round) -> dict[str, float]:
        """End a task on the shared body.

        A client that was never chosen trains its head; its inputs are those of the shared body
        too.
        """
        shared = self.send()
        report = super().end_task(task, round)
        # The end of a task must not change what all clients share.
        self.entries.load(shared)
        return report

    def shares(self, ended: bool) -> Layout:
        """Each layer's second moment, by its name.

        Of a large layer it is the sketch, and its inputs' energy.
        """
        layout: Layout = {}
        for name, layer in self.layers.items() if ended else ():
            d = dimension(layer)
            if self.sketched(layer):
                layout |= {
                    name: ("float32", (d, self.settings.columns)),
                    f"{name}.energy": ("float32", (1,)),
                }
            else:
                # One triangle, as a moment is symmetric.
                layout[name] = "float32", (d * (d + 1) // 2,)
        return layout

    def check_share(self, shared: Mapping[str, np.ndarray]) -> None:
        """Refuse moments that no inputs have."""
        for name, array in shared.items():
            check_large(name, array)
            # The diagonal of a moment, and an energy, are sums of squares.
            if name.endswith(".energy") and array[0] < 0:
                raise ValueError(f"{name}: {array[0]:g} is no sum of squares")
            if array.ndim == 1 and not name.endswith(".energy"):
                check_triangle(name, array, dimension(self.layers[name]))

    @torch.no_grad()
    def share(self, task: TaskData, round: Round, ended: bool) -> Tensors:
        """Give X X^T of each layer, or X Omega and |X|^2.

        That is what :meth:`shares` lists. There is nothing after a round.
        """
        if not ended:
            return {}
        draws = torch.Generator().manual_seed(integer(round.seed, "sketch"))
        sums = {
            name: torch.zeros(self._moment_shape(layer), device=self.device)
            for name, layer in self.layers.items()
        }
        energy = {
            name: torch.zeros(1, device=self.device)
            for name, layer in self.layers.items()
            if self.sketched(layer)
        }
        # Dropout would make random inputs of what the subspace is to hold.
        self.body.eval()
        # Unfolded patches take many times the memory of images, so few at a time.
        for part in torch.split(self.images(task.train.x), 64):
            with inputs(self.layers, self.settings.patches, draws) as seen:
                self.note(self.body(part))
            for name, x in seen.items():
                if name in energy:
                    # Drawn on the CPU, so that every device draws the same sketch.
                    columns = x.shape[1], self.settings.columns
                    sums[name].addmm_(
                        x, torch.randn(columns, generator=draws).to(x.device)
                    )
                    energy[name] += x.square().sum()
                else:
                    sums[name].addmm_(x, x.T)
        shared: Tensors = {}
        for name, total in sums.items():
            shared |= (
                {name: total, f"{name}.energy": energy[name]}
                if name in energy
                else {name: triangle(total)}
            )
        return shared

    def note(self, features: Tensor) -> None:
        """Take note of what the body gives, float [n, f]. FOT needs nothing of it."""

    def _moment_shape(self, layer: nn.Conv2d | nn.Linear) -> tuple[int, int]:
        """Give the shape of what is summed for a layer: X X^T or X Omega."""
        d = dimension(layer)
        return (d, self.settings.columns if self.sketched(layer) else d)

    def sketched(self, layer: nn.Conv2d | nn.Linear) -> bool:
        """Whether a triangle of the layer's second moment is more than a sketch."""
        return dimension(layer) >= 2 * self.settings.columns


def dimension(layer: nn.Conv2d | nn.Linear) -> int:
    """d: what goes into a node of the layer, and one for its bias."""
    return layer.weight[0].numel() + (layer.bias is not None)


def triangle(moment: Tensor) -> Tensor:
    """Half of a symmetric matrix by rows: float [d, d] -> [d (d + 1) / 2]."""
    return moment[torch.ones_like(moment, dtype=torch.bool).triu()]


def check_triangle(name: str, half: np.ndarray, size: int) -> None:
    """Refuse half of a second moment [size, size] that no inputs have.

    Raises
    ------
    ValueError
        If a number is too large, or one on the diagonal is below 0.
    """
    check_large(name, half)
    # Rows of a triangle become shorter by one each.
    starts = np.cumsum([0, *range(size, 1, -1)])
    if half[starts].min() < 0:
        raise ValueError(f"{name}: below 0 on its diagonal")


def layers(
    body: nn.Module, learner: str = "fot"
) -> dict[str, nn.Conv2d | nn.Linear]:
    """Find the body's convolutions and linear layers, by name.

    They are in the order of its modules, without those frozen as a whole.

    Raises
    ------
    ConfigError
        If the body has parameters or statistics in anything else: no projection of inputs would
        hold those in place.
    """
    trainable: dict[str, nn.Conv2d | nn.Linear] = {}
    for name, module in body.named_modules():
        learns = any(
            parameter.requires_grad
            for parameter in module.parameters(recurse=False)
        )
        if isinstance(module, nn.Linear) or (
            isinstance(module, nn.Conv2d) and module.groups == 1
        ):
            check_plain({name: module}, learner)
            if learns:
                trainable[name] = module
        # BatchNorm's statistics move with every task, whatever is projected.
        elif isinstance(module, _BatchNorm) or learns:
            raise ConfigError(
                f"learner.name = {learner!r} cannot train this model: its body has "
                f"{type(module).__name__}; it must have "
                "nothing to learn but convolutions and linear layers, as in model.name = "
                "'cnn', 'cnn6' or 'mlp'"
            )
    if not trainable:
        raise ConfigError(
            f"learner.name = {learner!r} cannot train this model: "
            "its body has no layers to project"
        )
    check_plain(trainable, learner)
    return trainable


def _unfolded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Give the patches that a convolution sees: float [images, d, places]."""
    # PyTorch's own padding, for "same" and for other modes than zeros, which unfold lacks.
    padding = layer._reversed_padding_repeated_twice
    is_zeros = layer.padding_mode == "zeros"
    padded = F.pad(x, padding, "constant" if is_zeros else layer.padding_mode)
    return F.unfold(
        padded, layer.kernel_size, layer.dilation, padding=0, stride=layer.stride
    )


def _drawn(x: Tensor, count: int, draws: torch.Generator) -> Tensor:
    """Draw some of the patches: float [images, d, places]."""
    # One draw of places for all images of the batch, so that indexing stays a single call.
    places = torch.randperm(x.shape[2], generator=draws)
    return x[:, :, places[:count]]


@contextmanager
def inputs(
    layers: dict[str, nn.Conv2d | nn.Linear], patches: int, draws: torch.Generator
) -> Iterator[Tensors]:
    """Collect what goes into each layer, as columns: float [d, n].

    Columns of a convolution are its patches. For a bias the last row is 1.
    """
    seen: Tensors = {}

    def hook(name: str, layer: nn.Conv2d | nn.Linear) -> Any:
        def collect(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if isinstance(layer, nn.Conv2d):
                x = _unfolded(layer, x)
                if patches:
                    x = _drawn(x, patches, draws)
                x = x.transpose(0, 1)  # [d, images, places]
            else:
                # Of steps in time each one is an input of its own.
                x = x.movedim(-1, 0)
            x = x.reshape(len(x), -1)
            seen[name] = (
                # A bias is a weight of an input that is always one.
                x
                if layer.bias is None
                else torch.cat([x, x.new_ones(1, x.shape[1])])
            )

        return layer.register_forward_pre_hook(collect)

    handles = [hook(name, layer) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        # Also after an error, else the hooks would collect in the next round.
        for handle in handles:
            handle.remove()
