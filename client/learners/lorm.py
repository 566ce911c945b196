"""LoRM: one factor of each adapter at a time, merged in closed form.

Salami, Buzzega, Mosconi, Bonato, Sabetta and Calderara, "Closed-Form Merging of
Parameter-Efficient Modules for Federated Continual Learning", ICLR 2025, arXiv 2410.17961. A
merged layer W is to answer inputs X_i as each client's own layer W_i does (RegMean):

    W = argmin sum_i |(W - W_i) X_i|^2 = (sum_i W_i G_i) (sum_i G_i)^-1,   G_i = X_i X_i'  (1)

With low-rank updates B_i A_i both factors are unknown, and many solutions fit. So clients train
one factor while the other is the same for all, B first, and change over after each round:

    B = (sum_i B_i A G_i A') (A sum_i G_i A')^-1     A is everybody's           (2)
    A = (sum_i A_i G_i) (sum_i G_i)^-1               B is everybody's           (3)

Each task begins with factors of its own. Over tasks, with sums G_t over all clients,

    W = W_0 + (sum_t B_t A_t G_t) (sum_t G_t)^-1                                (4)

which is an adapter again, of rank T r. The head is merged by Eq. (1). This is the client's half;
the server's is :class:`fedknow.strategies.lorm.Lorm`. Equations are numbered here, as the paper's
were not at hand; the program meant is github.com/aimagelab/fed-mammoth.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from fedknow.client.data.stream import TaskData
from fedknow.client.learners.fot import (
    check_triangle,
    dimension,
    inputs,
    triangle,
)
from fedknow.client.learners.frames.batch import Samples
from fedknow.client.learners.frames.learner import (
    HeadSlice,
    Layout,
    Learner,
    LearnerSettings,
    Predictor,
    Round,
    State,
    Tensors,
)
from fedknow.client.learners.frames.shared import check_large
from fedknow.client.models.lora import Adapted
from fedknow.protocols.config import ConfigError, TrainConfig
from fedknow.protocols.seeds import integer

__all__ = ["FEATURES", "Lorm", "LormSettings", "trains_b"]

FEATURES = ".features"
"""Name of what goes into the head; no module's name begins with a dot."""
_PASS = 64
"""Samples of one forward pass: unfolded patches take many times the memory of images."""


class LormSettings(LearnerSettings):
    """Settings of :class:`Lorm`."""

    gram: Literal["diagonal", "full"] = "diagonal"
    """What is sent of G: its diagonal, as in the paper, for privacy and traffic, or its upper
    half."""
    patches: int = Field(64, ge=0, le=1_000_000)
    """Places of an image, drawn at random, whose patches count as inputs of a convolution; 0:
    all."""


def trains_b(number: int) -> bool:
    """Tell whether a round, counted from 1 in its task, trains B."""
    return number % 2 == 1


class Lorm(Learner):
    """Low-rank adapters, merged so that answers agree (ICLR 2025).

    Salami et al.; a task is trained among its own classes alone, so its rows of the head are
    left alone later. Answers to test samples are those of Eq. (4), whose factors the server
    sends. A run's saved model has the factors of the present task alone.

    Keeps: nothing about past tasks; their factors are the server's. Sends: the adapters and the
    head, and G of each adapted layer and of the head, float [d] or [d (d + 1) / 2]. Gets: with
    each scoring the factors of all tasks, float [T r, d] and [out, T r] a layer. Needs: a
    forward pass over the task's samples after each round and when the task is over. Valid:
    class- or task-incremental; models with ``model.train = "lora"`` and no ``model.neck``.

    Raises
    ------
    ConfigError
        If the body has no adapters, or learns anything besides.
    """

    Settings = LormSettings
    settings: LormSettings
    strategy = "lorm"
    scenarios = ("class-incremental", "task-incremental")
    model_train = "lora"
    search: ClassVar[Mapping[str, Sequence[float | str]]] = {
        "gram": ["diagonal", "full"]
    }

    def __init__(
        self, model: nn.Module, train: TrainConfig, settings: LormSettings
    ) -> None:
        super().__init__(model, train, settings)
        self.adapters = {
            name: module
            for name, module in self.body.named_modules()
            if isinstance(module, Adapted)
        }
        names = self.adapters
        factors = {f"body.{name}.a.weight" for name in names}
        factors |= {f"body.{name}.b.weight" for name in names}
        trained = {name for name in self.trainable if name.startswith("body.")}
        if not self.adapters or trained != factors:
            raise ConfigError(
                "learner.name = 'lorm' cannot train this model: it trains low-rank adapters "
                "and nothing else in the body; set model.train = 'lora' and leave model.neck out"
            )

    # --- state, and what travels

    def load_own_state(self, state: State) -> None:
        """Begin without past tasks' factors, which come with each scoring."""
        self._factors: Tensors = {}

    def receive_extra(self, extra: Tensors) -> None:
        """Take the factors of all tasks, ``NAME.a`` and ``NAME.b``, for scoring.

        Raises
        ------
        ValueError
            If they do not fit the adapters.
        """
        names = {f"{name}.a" for name in self.adapters}
        names |= {f"{name}.b" for name in self.adapters}
        if extra.keys() != names:
            raise ValueError(f"factors of {', '.join(extra)} are not the model's")
        factors = {}
        for name, adapter in self.adapters.items():
            a, b = extra[f"{name}.a"], extra[f"{name}.b"]
            # The rank grows with the tasks; all else is as in the adapter.
            shape_a = (len(a), *adapter.a.weight.shape[1:])
            shape_b = (len(adapter.b.weight), len(a), *adapter.b.weight.shape[2:])
            if a.shape != shape_a or b.shape != shape_b:
                raise ValueError(f"factors of {name} do not fit its adapter")
            # Copies, as received arrays are views of a message's buffer.
            factors[f"body.{name}.a.weight"] = a.clone()
            factors[f"body.{name}.b.weight"] = b.clone()
        self._factors = factors

    def shares(self, ended: bool) -> Layout:
        """List G of each adapted layer, and of the head."""
        layout: Layout = {}
        for name in (*self.adapters, FEATURES):
            d = self._width_of(name)
            is_full = self.settings.gram == "full"
            size = d * (d + 1) // 2 if is_full else d
            layout[name] = ("float32", (size,))
        return layout

    def check_share(self, shared: Mapping[str, np.ndarray]) -> None:
        """Refuse G that no inputs have."""
        for name, array in shared.items():
            check_large(name, array)
            if self.settings.gram == "full":
                check_triangle(name, array, self._width_of(name))
            elif array.min() < 0:
                raise ValueError(f"{name}: below 0, as no sum of squares is")

    def _width_of(self, name: str) -> int:
        """Tell d of an adapted layer, or of the head."""
        if name == FEATURES:
            return self.head.in_features
        return dimension(self.adapters[name].a)

    @torch.no_grad()
    def share(self, task: TaskData, round: Round, ended: bool) -> Tensors:
        """Give what :meth:`shares` lists, over the task's samples."""
        draws = torch.Generator().manual_seed(integer(round.seed, "gram"))
        layers = {name: adapter.a for name, adapter in self.adapters.items()}
        sums: Tensors = {}
        # Without dropout, whose inputs are a matter of chance.
        self.model.eval()
        for part in torch.split(self.images(task.train.x), _PASS):
            with inputs(layers, self.settings.patches, draws) as seen:
                seen[FEATURES] = self.body(part).T
            for name, x in seen.items():
                gram = self._gram(x)
                sums[name] = sums[name] + gram if name in sums else gram
        if self.settings.gram == "full":
            return {name: triangle(total) for name, total in sums.items()}
        return sums

    def _gram(self, x: Tensor) -> Tensor:
        """Take G of inputs, float [d, n], or its diagonal."""
        return x @ x.T if self.settings.gram == "full" else x.square().sum(1)

    # --- training, and answers

    def training_data(self, task: TaskData, round: Round) -> Samples:
        """Give the task's samples, told from its own classes alone."""
        head = HeadSlice(task.classes, self.head.out_features, self.device)
        return Samples(task.train.x, head.labels(task.train.y), head)

    def begin(self, task: TaskData, round: Round) -> None:
        """Hold the factor that is everybody's in this round."""
        super().begin(task, round)
        held = "a" if trains_b(round.number) else "b"
        for adapter in self.adapters.values():
            getattr(adapter, held).requires_grad_(False)

    def release(self) -> None:
        """Let both factors be trained again."""
        for parameter in self.trainable.values():
            parameter.requires_grad_(True)

    def end_task(self, task: TaskData, round: Round) -> dict[str, float]:
        """Do nothing: nothing is personal."""
        return {"knowledge-bytes": 0.0}

    def predictors(self, count: int) -> Iterable[Predictor]:
        """Give the model with the factors of all tasks, Eq. (4)."""
        if not self._factors:
            return super().predictors(count)
        # Arguments and not attributes: a pass costs by their shapes.
        predictor = functools.partial(_answer, self.model, dict(self._factors))
        return [predictor] * count

    @classmethod
    def strategy_options(cls, settings: LearnerSettings) -> dict[str, Any]:
        """Tell which G clients send."""
        assert isinstance(settings, LormSettings)
        return {"gram": settings.gram}


def _answer(model: nn.Module, factors: Tensors, x: Tensor) -> Tensor:
    """Answer with other factors in the adapters' places."""
    logits: Tensor = functional_call(model, factors, (x,))
    return logits
