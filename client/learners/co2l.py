"""Co2L: contrastive continual learning.

Cha, Lee and Shin, ICCV 2021, arXiv 2106.14413. A representation is learned and kept by
contrasts, a classifier is fitted on top of it, in two stages. With z_i the projected,
normalised representation of view i of 2N (two views of each of N samples, new and remembered):

*asymmetric supervised contrast* (Eq. 2)
    ``sum_{i in S} -1/|p_i| sum_{j in p_i} log(exp(z_i.z_j / tau) / sum_{k != i} exp(z_i.z_k /
    tau))`` with S the views of the *current* task's samples and p_i the other views of i's
    class: remembered samples are negatives, never anchors;
*instance-wise relation distillation* (Eqs. 3 and 4)
    ``sum_i -p_i(past model, kappa*) . log p_i(model, kappa)`` with p_ij = exp(z_i.z_j / kappa)
    / sum_{k != i} exp(z_i.z_k / kappa), which keeps how views relate to one another as the
    model at the end of the last task had it;
*the classifier* (Sec. 4.1)
    a linear layer on the frozen representation, by cross-entropy on samples of the current task
    and of the memory, drawn so that all classes are equally likely.

Here the stages follow one another in each round: the body is trained through ``train.epochs``
epochs, then the head is fitted. A personal head is fitted once more on the shared body with
which a task ends. As many remembered samples join a batch as it has; the paper shuffles both
kinds together. Both losses are means over their anchors. The views are those of
:func:`~fedknow.client.learners.frames.augment.view`, which has neither hue nor grey.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedknow.client.data.stream import TaskData
from fedknow.client.learners.frames.augment import view
from fedknow.client.learners.frames.batch import columns
from fedknow.client.learners.frames.checks import check_free
from fedknow.client.learners.frames.extra_work import (
    extra_steps,
)
from fedknow.client.learners.frames.learner import (
    Batch,
    Round,
    State,
    make_optimizer,
    widen,
)
from fedknow.client.learners.frames.rehearsal import (
    MemorySettings,
    Rehearsal,
    Replay,
)
from fedknow.client.learners.frames.scoring import predict
from fedknow.client.models.draws import own_draws
from fedknow.protocols.config import TrainConfig
from fedknow.protocols.seeds import integer

__all__ = [
    "Co2L",
    "Co2LSettings",
    "asymmetric_contrast",
    "relation",
    "relation_distillation",
]


class Co2LSettings(MemorySettings):
    """Settings of :class:`Co2L`; temperatures are the paper's."""

    temperature: float = Field(0.5, gt=0)
    """tau of the contrast."""
    ratio: float = Field(1.0, gt=0)
    """Factor of the contrast. The paper's Eq. (2) has none. The authors' code multiplies by
    tau / 0.07, which is 7.14 at their tau."""
    current_temperature: float = Field(0.2, gt=0)
    """kappa, of the model's relations."""
    past_temperature: float = Field(0.01, gt=0)
    """kappa*, of the past model's relations."""
    distill: float = Field(1.0, ge=0)
    """Weight of the distillation."""
    projection: int = Field(128, ge=1, le=65_536)
    """Width of the projection that contrasts are taken in."""
    head_epochs: int = Field(20, ge=1, le=10_000)
    """Passes over the samples' representations in which the head is fitted; no pass through the
    body but one."""
    head_lr: float = Field(1e-2, gt=0, le=1)
    """Adam's learning rate for the head, whatever optimizer and rate the training has."""
    crop: float = Field(0.4, gt=0, le=1)
    """Views: smallest part of the image's area that is seen."""
    flip: bool = True
    """Views: whether half of them are mirrored; wrong for digits and letters, where it is to be
    set false."""
    jitter: float = Field(0.4, ge=0, lt=1)
    """Views: how far contrast and brightness vary."""


def relation(z: Tensor, temperature: float) -> Tensor:
    """Log of how each view relates to the others (Eq. 3).

    Normalised float [m, d] -> [m, m], with -inf for a view and itself.
    """
    similarity = z @ z.T / temperature
    # A view's likeness to itself would outweigh all others.
    return similarity.fill_diagonal_(-torch.inf).log_softmax(1)


def asymmetric_contrast(
    z: Tensor,
    y: Tensor,
    anchor: Tensor,
    temperature: float,
) -> Tensor:
    """Supervised contrast in which only some views are anchors (Eq. 2).

    Parameters
    ----------
    z : Tensor
        Normalised projections, float [m, d].
    y : Tensor
        Labels, int64 [m].
    anchor : Tensor
        Which are of the current task, bool [m]; each has another view of its class.
    temperature : float
        tau.
    """
    positive = (y[:, None] == y).fill_diagonal_(False)[anchor]
    logs = relation(z, temperature)[anchor].masked_fill(~positive, 0)
    return -(logs.sum(1) / positive.sum(1)).mean()


def relation_distillation(
    z: Tensor,
    past_z: Tensor,
    temperature: float,
    past_temperature: float,
) -> Tensor:
    """How far relations between views have moved (Eq. 4).

    The past model's are the measure: float [m, d] each -> mean.
    """
    # The diagonal is -inf in both; there 0 * -inf would be no number.
    logs = relation(z, temperature).masked_fill(
        torch.eye(len(z), dtype=torch.bool, device=z.device),
        0,
    )
    return -(relation(past_z, past_temperature).exp() * logs).sum(1).mean()


class Co2L(Rehearsal):
    """Contrasts of views, relations distilled, a linear head (ICCV 2021).

    Cha et al.

    Keeps: its samples of each task (setting ``memory``), and body and projection as they were
    at the end of the last task. Sends: what ``exchange`` says, and with the body the
    projection, which is trained as a part of it; its initial weights are the same in every run.
    Needs: four views' worth of passes for each sample of a batch, and a forward pass of the
    past model over them. Valid: images, any model, task- or class-incremental.
    """

    Settings = Co2LSettings
    settings: Co2LSettings
    exchanged_parts = ("body", "projection")
    kinds = ("image",)
    search: ClassVar[Mapping[str, Sequence[float | str]]] = {
        "memory": [0.1, 0.25, 0.5],
        "distill": [0.1, 1.0],
        "temperature": [0.1, 0.5, 1.0],
        "ratio": [1.0, 7.14],
        "head_epochs": [20, 100],
        "crop": [0.4, 0.8],
        "flip": [True, False],
    }

    def __init__(
        self,
        model: nn.Module,
        train: TrainConfig,
        settings: Co2LSettings,
    ) -> None:
        features = cast(nn.Linear, model.head).in_features
        # A fixed seed, as all clients and the server must begin with the same projection; the
        # fork leaves other draws alone.
        with own_draws(0):
            layers = (
                nn.Linear(features, features),
                nn.ReLU(),
                nn.Linear(features, settings.projection),
            )
        self.projection = nn.Sequential(*layers)
        self.projection.to(cast(nn.Linear, model.head).weight.device)
        model.add_module(
            "projection", self.projection
        )  # a part of what is sent, saved and loaded
        super().__init__(model, train, settings)
        check_free(model, "co2l", "head", "fits the head by itself")
        self._encoder = nn.Sequential(self.body, self.projection)
        # One copy for all clients; each one's past weights are loaded into it.
        self._past = copy.deepcopy(self._encoder).requires_grad_(False).eval()

    # --- state

    def load_own_state(self, state: State) -> None:
        """Take over the memory and the past model."""
        super().load_own_state(state)
        self._past_state: State = dict(state.get("past", {}))

    def own_state(self) -> State:
        """Give the memory and the past model."""
        return super().own_state() | {"past": self._past_state}

    # --- the representation

    def begin(self, task: TaskData, round: Round) -> None:
        """Train the projection with the body; bring back the past model."""
        super().begin(task, round)
        self.optimizer = make_optimizer(
            self.train,
            self._encoder.parameters(),
            self.head.parameters(),
        )
        if self._past_state:
            self._past.load_state_dict(self._past_state)

    def gradient(self, batch: Batch) -> tuple[float, int]:
        """Gradients of contrast and distillation on two views of each sample.

        The samples are those of the batch, and as many remembered ones.
        """
        count = len(batch.y)
        no_head = torch.zeros(
            0,
            self.head.out_features,
            dtype=torch.bool,
            device=self.device,
        )
        none = Replay(batch.x[:0], batch.y[:0], no_head)
        joined = self.join(
            batch,
            none if self.past is None else self.draw(self.past, count),
        )
        views = self.images(
            torch.cat([self._view(joined.x), self._view(joined.x)])
        )
        current = (torch.arange(len(joined), device=self.device) < count).repeat(
            2
        )
        with self.autocast():
            z = self._project(self._encoder, views)
        loss = self.settings.ratio * asymmetric_contrast(
            z,
            joined.y.repeat(2),
            current,
            self.settings.temperature,
        )
        if self._past_state:
            with torch.no_grad(), self.autocast():
                past_z = self._project(self._past, views)
            loss = loss + self.settings.distill * relation_distillation(
                z,
                past_z,
                self.settings.current_temperature,
                self.settings.past_temperature,
            )
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item(), 0

    def _view(self, x: Tensor) -> Tensor:
        return view(
            x,
            self.draws,
            self.settings.crop,
            self.settings.flip,
            self.settings.jitter,
        )

    @staticmethod
    def _project(encoder: nn.Module, x: Tensor) -> Tensor:
        return F.normalize(widen(encoder(x)), dim=1)

    # --- the head

    def end_round(self, task: TaskData, round: Round) -> dict[str, float]:
        """Fit the head: the round's accuracy is its own."""
        return {"accuracy": self._fit_head(task, round)}

    def _fit_head(self, task: TaskData, round: Round) -> float:
        """Fit the head on the frozen body.

        The result is its accuracy on the task's training samples.
        """
        width = self.head.out_features
        x = task.train.x
        y = task.train.y
        current = Replay(
            x,
            y,
            columns(task.head, width, self.device).expand(len(y), -1),
        )
        remembered = [
            self.memory.replay_of(number, task, width)
            for number in sorted(self.memory.tasks)
            if number != task.task
        ]
        replays = [current, *remembered]
        y = torch.cat([replay.y for replay in replays])
        head = torch.cat([replay.head for replay in replays])
        # Once for all epochs: the body is frozen, so that they do not change.
        features = torch.cat([self._features(replay.x) for replay in replays])
        generator = torch.Generator().manual_seed(integer(round.seed, "head"))
        share = (
            1 / torch.bincount(y, minlength=width)[y].double().cpu()
        )  # all classes are equally likely
        free = [
            parameter
            for parameter in self.head.parameters()
            if parameter.requires_grad
        ]
        optimizer = torch.optim.Adam(free, lr=self.settings.head_lr)
        for _ in range(self.settings.head_epochs):
            # On the CPU, as a GPU would draw other samples.
            drawn = torch.multinomial(
                share,
                len(y),
                replacement=True,
                generator=generator,
            )
            parts = torch.split(drawn.to(self.device), self.train.batch_size)
            for index in extra_steps(parts, "head"):
                optimizer.zero_grad(set_to_none=True)
                batch = Replay(features[index], y[index], head[index])
                loss = batch.loss(self.head(features[index]))
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        with torch.no_grad():
            z = self.head(features).masked_fill(~head, -torch.inf)[: len(current)]
        return float((z.argmax(1) == current.y).float().mean())

    def _features(self, x: Tensor) -> Tensor:
        self.body.eval()
        return predict(self, self.body, x, 256)

    # --- the end of a task

    def end_task(self, task: TaskData, round: Round) -> dict[str, float]:
        """Keep samples and the shared representation.

        A personal head is fitted on it once more.
        """
        shared = self.send()
        report = super().end_task(task, round)
        self.entries.load(shared)
        if self.exchange != "all":
            self._fit_head(task, round)
        self._past_state = {
            name: value.clone()
            for name, value in self._encoder.state_dict().items()
        }
        bytes_kept = sum(value.nbytes for value in self._past_state.values())
        return {"knowledge-bytes": report["knowledge-bytes"] + bytes_kept}
