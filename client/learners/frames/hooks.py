"""Hooks of a learner that few methods need.

Each does what plain training does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from fedknow.client.data.samples import Kind, SampleSpec
from fedknow.client.data.stream import TaskData
from fedknow.client.learners.frames.batch import HeadSlice, Samples
from fedknow.client.learners.frames.exchange import Entries, Layout, Tensors
from fedknow.client.learners.frames.round import Round
from fedknow.client.learners.frames.scoring import Predictor
from fedknow.client.learners.frames.settings import Exchange, LearnerSettings
from fedknow.protocols.config import TrainConfig
from fedknow.protocols.secure.fixed import SumLayout

__all__ = ["Hooks"]


class Hooks:
    """Properties of a method, and the hooks that few methods override.

    :class:`~fedknow.client.learners.frames.learner.Learner` has the five that most do.
    """

    Settings: ClassVar[type[LearnerSettings]] = LearnerSettings
    exchange: Exchange = "all"
    """Which parameters are averaged over clients; a setting of that name, where the method has
    one, decides."""
    exchanged_parts: ClassVar[Sequence[str]] = ("body",)
    """The model's modules that travel where its body does."""
    scenarios: ClassVar[tuple[str, ...]] = (
        "task-incremental",
        "class-incremental",
        "domain-incremental",
    )
    """Values of ``data.scenario`` that the method is made for; others are refused."""
    kinds: ClassVar[tuple[Kind, ...]] = ()
    """Kinds of samples that the method works with; others are refused. Empty: any."""
    heads: ClassVar[frozenset[str]] = frozenset({"linear"})
    """Values of ``model.head`` that the method can work with; others are refused."""
    needs_frozen_body: ClassVar[bool] = False
    """Whether the method computes with the features of a network that never changes, as after
    ``model.train = "head"``; a model with a trained body is refused."""
    model_train: ClassVar[str] = "all"
    """The value of ``model.train`` that the method cannot do without; ``all``: any will do."""
    strategy: ClassVar[str] = ""
    """Name of the strategy that is this method's half on the server, which then takes the place of
    plain FedAvg."""
    sparse: ClassVar[bool] = False
    """Whether what travels holds many zeros by design: then zeros are left out on the way."""
    search: ClassVar[Mapping[str, Sequence[float | str]]] = {}
    """Settings worth searching, and the values to try of each: those of the paper, where it gives
    any."""
    reads: ClassVar[Sequence[str]] = ()
    """Keys of :attr:`Round.settings` that the method reads; the server warns of others. All
    clients train by ``lr``, ``epochs``, ``batch-size`` and ``proximal-mu``
    (:mod:`fedknow.protocols.instructions`)."""
    replay: ClassVar[Sequence[str]] = ()
    """Entries of the state that hold samples."""
    remedy: str = ""
    """What else than ``train.lr`` can be lowered where a loss is not finite, for the error."""

    spec: SampleSpec | None = None
    """What a sample is, where the learner was built for an experiment."""

    model: nn.Module
    head: nn.Linear
    device: torch.device
    train: TrainConfig
    optimizer: torch.optim.Optimizer
    entries: Entries
    frame_attributes: frozenset[str]

    def work_on(self, spec: SampleSpec) -> None:
        """Note what the samples are (:attr:`spec`)."""
        self.spec = spec
        # The same for each step, so that no step's cost depends on it.
        self.frame_attributes |= {"spec"}

    def training_data(self, task: TaskData, round: Round) -> Samples:
        """Give what a round is to train on. It is laid out, and nothing computed."""
        head = HeadSlice(task.head, self.head.out_features, self.device)
        return Samples(task.train.x, head.labels(task.train.y), head)

    @property
    def epochs(self) -> int:
        """Epochs of one round."""
        return self.train.epochs

    def begin_epoch(self, epoch: int) -> None:
        """Prepare an epoch (from 0)."""

    def step(self) -> None:
        """Move the parameters along their gradients."""
        self.optimizer.step()

    def counts(self) -> dict[str, float]:
        """Give the method's own numbers of a round; all clients' have equal keys."""
        return {}

    def end_round(self, task: TaskData, round: Round) -> dict[str, float]:
        """End a round; gives what its report has anew."""
        return {}

    def release(self) -> None:
        """Undo what a round has set on parameters, even where it failed."""

    def predictors(self, count: int) -> Iterable[Predictor]:
        """Give what answers to test samples of each of the first ``count`` tasks."""
        # The same object, so that scoring can put tasks together in one pass.
        return [self.model] * count

    # --- what travels

    def send(self) -> Tensors:
        """Copy the parameters that travel, in the state dict's order."""
        return self.entries.send()

    def receive(self, arrays: Tensors) -> None:
        """Put received parameters into the model (:meth:`Entries.receive`)."""
        self.entries.receive(arrays)

    def local_parameters(self) -> Tensors:
        """Copy the parameters that this client keeps to itself."""
        return self.entries.local_parameters()

    def load_local_parameters(self, arrays: Tensors) -> None:
        """Replace the parameters that stay, to score the purely global model."""
        self.entries.load(arrays)

    @classmethod
    def strategy_options(cls, settings: LearnerSettings) -> dict[str, Any]:
        """Give the settings that its :attr:`strategy` is made with, by name."""
        return {}

    def share(self, task: TaskData, round: Round, ended: bool) -> Tensors:
        """Give what goes to the strategy beside the parameters.

        After :meth:`fit` or, with ``ended``, :meth:`end_task`. Nothing, or just the tensors
        that :meth:`shares` lists.
        """
        return {}

    def shares(self, ended: bool) -> Layout:
        """Say what :meth:`share` may give: the server refuses anything else."""
        return {}

    def check_share(self, shared: Mapping[str, np.ndarray]) -> None:
        """Refuse, on the server, what no client of this method would share.

        Names, dtypes and shapes are those of :meth:`shares`, and numbers are finite.

        Raises
        ------
        ValueError
            If the server's half could not work with it.
        """

    @property
    def no_sums(self) -> str:
        """How a user has shares be sums, where a setting alone keeps them from it."""
        return ""

    def sum_layout(self) -> SumLayout:
        """Say how shares are added up under masks; empty: they are no sums.

        Both sides must give the same from the settings alone. All clients' shares of a task are
        added up when it ends, and the strategy takes the sum as one client's (``takes_sums``).
        """
        return {}

    def as_sums(self, shared: Tensors) -> Tensors:
        """Lay out what :meth:`share` gave as :meth:`sum_layout` says.

        Nothing becomes zeros. Tensors are float64, on the CPU.
        """
        return dict(shared)

    def check_sum(self, total: Mapping[str, np.ndarray], clients: int) -> None:
        """Refuse, on the server, what so many clients' shares cannot add up to.

        Names and shapes are those of :meth:`sum_layout`, float64.

        Raises
        ------
        ValueError
            If the server's half could not work with it.
        """

    def receive_extra(self, extra: Tensors) -> None:
        """Take what the strategy sends beside the parameters; not in every round.

        Raises
        ------
        ValueError
            If it is not what this method's strategy would send.
        """
        raise ValueError(
            f"{type(self).__name__} takes nothing but parameters, "
            f"and was sent {', '.join(list(extra)[:5])}; "
            "choose the strategy that fits the learner"
        )
