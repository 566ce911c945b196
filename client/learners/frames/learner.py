"""The learner: a method on a client, state in and state out.

A learner is pure PyTorch and owns nothing that cannot be saved: between two messages a client
is its :meth:`Learner.state_dict`. So a virtual client can live on any worker, a device can be
rebooted and a run can be resumed. One learner object serves any number of clients, one after
another.

A method overrides few of its parts:

1. :meth:`Learner.loss` where it changes the loss, or :meth:`Learner.gradient` where it changes
   gradients;
2. :meth:`Learner.begin`, before each round;
3. :meth:`Learner.end_task`, when a task is over;
4. :meth:`Learner.own_state` and
5. :meth:`Learner.load_own_state`: what it keeps of a client.

:class:`~fedknow.client.learners.frames.hooks.Hooks` has the names that few methods need.
"""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedknow.client.compute.cost import Meter
from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners.frames import scoring
from fedknow.client.learners.frames.batch import (
    Batch,
    HeadSlice,
    Samples,
    hits,
    widen,
)
from fedknow.client.learners.frames.batching import batches, smallest_batch
from fedknow.client.learners.frames.checks import (
    check_frozen_body,
    warn_of_slow_bf16,
)
from fedknow.client.learners.frames.exchange import (
    Entries,
    Layout,
    State,
    Tensors,
)
from fedknow.client.learners.frames.hooks import Hooks
from fedknow.client.learners.frames.optimizers import (
    channels_last,
    drop_gradients,
    make_optimizer,
    use_channels_last,
)
from fedknow.client.learners.frames.round import Diverged, Round, run_round
from fedknow.client.learners.frames.scoring import Predictor, Score
from fedknow.client.learners.frames.settings import (
    ContinualSettings,
    Exchange,
    LearnerSettings,
)
from fedknow.protocols.config import TrainConfig

__all__ = [
    "Autocast",
    "Batch",
    "ContinualSettings",
    "Diverged",
    "Exchange",
    "HeadSlice",
    "Layout",
    "Learner",
    "LearnerSettings",
    "Predictor",
    "Round",
    "Samples",
    "State",
    "Tensors",
    "batches",
    "hits",
    "make_optimizer",
    "widen",
]

Autocast = Callable[[], AbstractContextManager[None]]
"""Makes the context that a forward pass runs in: :meth:`Learner.autocast`."""
Loss = Tensor | tuple[Tensor, Tensor]
"""What is minimised; or that, and the loss to report."""


class _StartsFresh(ABCMeta):
    """A class whose objects, once made, are a client that is new.

    Not done in ``__init__``, which a subclass calls before it has set its own attributes.
    Derived from :class:`abc.ABCMeta`, so that a user's class may have abstract bases.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        learner = super().__call__(*args, **kwargs)
        # After the whole constructor: a method's own may need what subclasses set up.
        learner.load_own_state({})
        return learner


class Learner(Hooks, metaclass=_StartsFresh):
    """Plain local training (a FedAvg client); the frame for every method.

    Parameters
    ----------
    model : nn.Module
        With a ``body`` and a ``head`` (:class:`torch.nn.Linear` over all classes).
    train : TrainConfig
        What all learners share: epochs, batch size, optimizer, ...
    settings : LearnerSettings
        The method's own.

    Attributes
    ----------
    device : torch.device
        Where the model is, and all that the learner is given: what it makes belongs there too.
    train : TrainConfig
        What all learners share; in a round, with what the strategy puts in its place.
    trainable : dict of str to Parameter
        The parameters to train, each once, by the first of its names. The others are frozen.
    entries : Entries
        The parts of the model that travel and those that a client keeps.

    Examples
    --------
    >>> import fedknow
    >>> class Halved(fedknow.Learner):
    ...     def loss(self, logits, batch):
    ...         return super().loss(logits, batch) / 2
    """

    overridden: ClassVar[frozenset[str]] = frozenset()
    """Names that subclasses define anew."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        bases = (
            base.overridden for base in cls.__bases__ if issubclass(base, Learner)
        )
        # Once for each class, as every step asks for it.
        cls.overridden = frozenset(vars(cls)).union(*bases)

    def __init__(
        self, model: nn.Module, train: TrainConfig, settings: LearnerSettings
    ) -> None:
        self.exchange = getattr(settings, "exchange", self.exchange)
        if train.channels_last:
            use_channels_last(model)
        self.model = model
        self.train = train
        self.settings = settings
        self.body = cast(nn.Module, model.body)
        self.head = cast(nn.Linear, model.head)
        self.device = self.head.weight.device
        if train.precision == "bf16" and self.device.type == "cpu":
            warn_of_slow_bf16()
        named = model.named_parameters()
        self.trainable = {name: p for name, p in named if p.requires_grad}
        self.all_parameters = list(model.parameters())
        self.entries = Entries(model, self.exchange, self.exchanged_parts)
        if self.needs_frozen_body:
            check_frozen_body(self)
        self.meter = Meter(self.body)
        self._trained_task = -1
        self.batch_minimum: int | None = None
        # All of these are the same for each step, or described apart.
        self.frame_attributes = frozenset((*vars(self), "optimizer"))

    # --- what a method overrides

    def begin(self, task: TaskData, round: Round) -> None:
        """Prepare a round: a fresh optimizer, and what the method needs."""
        # Where backward alone makes the gradients they have their parameters' format.
        is_aligned = "gradient" in self.overridden
        self.optimizer = make_optimizer(
            self.train, self.body.parameters(), self.head.parameters(), is_aligned
        )
        drop_gradients(self.optimizer)

    def loss(self, logits: Tensor, batch: Batch) -> Loss:
        """Loss of a batch, a mean.

        Parameters
        ----------
        logits : Tensor
            The model's answers in the task's slice of the head, float32 [b, classes].
        batch : Batch
            Its labels ``y`` are places in the slice. ``outputs`` are the logits of the whole
            head.

        Returns
        -------
        Tensor or tuple of Tensor
            What to minimise. Or that and the loss to report, where they are not the same.
        """
        return F.cross_entropy(logits, batch.y)

    def gradient(self, batch: Batch) -> tuple[float, int]:
        """Leave one batch's gradients in the parameters, which have none.

        Returns
        -------
        tuple of float and int
            Mean loss, and how many samples were told rightly.
        """
        with self.autocast():
            answer = self.model(batch.x)
        logits = batch.head.logits(widen(answer))
        batch.answer = answer
        loss = self.loss(logits, batch)
        batch.answer = None  # a batch that is kept must not keep the graph alive
        objective, reported = loss if isinstance(loss, tuple) else (loss, loss)
        objective.backward()  # type: ignore[no-untyped-call]
        return reported.item(), hits(logits, batch.y)

    def end_task(self, task: TaskData, round: Round) -> dict[str, float]:
        """End a task.

        A client that keeps something to itself but was never chosen in this task trains once
        now, for itself, so that no method is judged by an untrained head; nothing is sent.

        Returns
        -------
        dict
            ``knowledge-bytes``: what the client keeps about its tasks, in bytes.
        """
        if not self.has_trained(task.task):
            self.fit(task, round)
        return {"knowledge-bytes": 0.0}

    def own_state(self) -> State:
        """Give what the method itself keeps of this client, to be saved."""
        return {}

    def load_own_state(self, state: State) -> None:
        """Take over what :meth:`own_state` gave; ``{}`` for a new client.

        Called with ``{}`` when the learner is made, after ``__init__``: so attributes that
        belong to a client need be set here alone.
        """

    # --- the frame

    @property
    def ends_task(self) -> bool:
        """Whether clients must be told that a task is over.

        So it is with each method that keeps something to itself or overrides :meth:`end_task`.
        """
        return self.exchange != "all" or "end_task" in self.overridden

    def state_dict(self) -> State:
        """Give all that this client must keep until its next message.

        That is the last task it trained, the parameters that do not travel, and the method's
        :meth:`own_state`. It is empty where all travels and no task is ended.
        """
        if not self.ends_task:
            return self.own_state()
        state: State = {"trained_task": self._trained_task}
        if parameters := self.entries.local_parameters():
            state["kept"] = parameters
        return state | self.own_state()

    def load_state_dict(self, state: State) -> None:
        """Become the client whose state this is; ``{}`` is a client that is new."""
        self.entries.load(
            self.entries.counters | state.get("kept", self.entries.fresh)
        )
        self._trained_task = int(state.get("trained_task", -1))
        self.load_own_state(state)

    def adopt(self, parameters: Tensors, task: int) -> None:
        """Take over parameters that were trained in a task outside of :meth:`fit`."""
        self.entries.load(parameters)
        self._trained_task = task

    def has_trained(self, task: int) -> bool:
        """Whether this client has trained in a task, or a later one."""
        return self._trained_task >= task

    def fit(self, task: TaskData, round: Round) -> dict[str, float]:
        """Train one round.

        Returns
        -------
        dict
            ``loss`` and ``accuracy``: means over the samples of the last epoch; and the
            method's own counts. Every client returns the same keys.

        Raises
        ------
        Diverged
            If the loss is not a number.
        TooFewSamples
            If the model cannot be trained on so few samples.
        """
        try:
            report = run_round(self, task, round)
            self._trained_task = task.task
            report |= self.counts()
            with self.counting("end_round"):
                return report | self.end_round(task, round)
        finally:
            self.release()

    def score(
        self,
        splits: Sequence[Split],
        heads: Sequence[Sequence[int]],
        batch_size: int,
    ) -> list[Score]:
        """Score several test sets (:func:`~.scoring.score`)."""
        return scoring.score(self, splits, heads, batch_size)

    def counting(self, name: str) -> AbstractContextManager[None]:
        """Count a hook that a method has made anew, unless all is counted anyway."""
        if name in self.overridden and not self.meter.is_counting:
            return self.meter.part()
        return nullcontext()

    def autocast(self) -> AbstractContextManager[None]:
        """Give the context of forward passes, by ``train.precision``.

        With ``bf16`` the products of layers are taken in bfloat16, from weights that stay
        float32. What comes out is bfloat16: :func:`widen` it before a loss. A context of its
        own for each pass, left before the weights move: weights are cast once a context.
        """
        if self.train.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        """Logits over the whole head, by ``train.precision``: float32 [n, c]."""
        with self.autocast():
            return widen(self.model(x))

    def images(self, x: Tensor) -> Tensor:
        """Put samples in the format that ``train.channels_last`` asks for."""
        return channels_last(x) if self.train.channels_last else x

    def smallest_batch(self, x: Tensor) -> int:
        """Tell the fewest samples such as ``x`` that the model can train on."""
        if self.batch_minimum is None:
            # A property of the model and the size of an image, so it is nobody's work.
            with self.meter.free():
                self.batch_minimum = smallest_batch(
                    self.model, self.images(x[:1])
                )
        return self.batch_minimum
