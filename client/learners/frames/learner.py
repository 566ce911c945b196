"""What every learner has in common: plain local training of one client, state in and state out.

A learner is the method on a client. It is pure PyTorch and owns nothing that cannot be saved:
between two messages a client is its :meth:`Learner.state_dict`, so a virtual client can live on
any worker, a device can be rebooted and a run can be resumed. One learner object serves any
number of clients, one after another.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from abc import ABCMeta
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from fedknow.client.compute.cost import Meter, module_bytes
from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners.frames.batching import (
    batches,
    check_batches,
    smallest_batch,
)
from fedknow.protocols.config import ConfigError, TrainConfig

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
    "Round",
    "State",
    "Tensors",
    "batches",
    "widen",
]

log = logging.getLogger(__name__)

Autocast = Callable[[], AbstractContextManager[None]]
"""Makes the context that a forward pass runs in: :meth:`Learner.autocast`."""
Exchange = Literal["all", "body", "none"]
Tensors = dict[str, Tensor]
Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape of tensors by name; -1 stands for any size."""
State = dict[str, Any]
"""Nested dict of tensors, JSON scalars and lists: what :func:`fedknow.client.state.save_state` can
store."""


class LearnerSettings(BaseModel):
    """A learner's own settings; unknown keys are refused, and so is what is infinite or NaN.

    A number that may be infinite says so: ``Field(allow_inf_nan=True)``.
    """

    # The docstrings of settings are what `fedknow list learners NAME` says of them.
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ContinualSettings(LearnerSettings):
    """Settings of a method made for one machine, which is federated by averaging."""

    exchange: Exchange = "body"
    """What is averaged over clients. ``body`` gives each client a head of its own, as FedKNOW and
    FedRep have, so that methods are compared on equal terms; ``all`` is plain FedAvg around the
    method, ``none`` the method on its own."""


class Diverged(RuntimeError):
    """Training produced a loss that is not a number."""

    @classmethod
    def in_epoch(cls, loss: float, epoch: int, train: TrainConfig) -> Self:
        """Say in which epoch (from 0), and what to do about it."""
        return cls(
            f"loss is {loss} in epoch {epoch + 1}; lower train.lr = {train.lr} or set train.clip_norm"
        )


@dataclass(frozen=True)
class Round:
    """Which round of local training this is.

    Attributes
    ----------
    number : int
        Round within the task, from 1; 0 where a client trains for itself at the end of a task.
    seed : int
        Seeds the order of batches and dropout; depends on run, client, task and round only.
    proximal_mu : float
        Weight of FedProx's term ``mu / 2 * ||w - w_global||^2`` (Li et al., MLSys 2020); 0 without.
    client : int
        Which client this is, from 0: its place in what the server sends of all clients.
    settings : mapping
        What else the strategy tells this client: keys of its config record that the learner
        names in :attr:`Learner.reads`, and all others; records of other kinds as mappings under
        their own names.
    """

    number: int
    seed: int
    proximal_mu: float = 0.0
    client: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)


class HeadSlice:
    """The columns of the head in use, and where each label stands among them.

    Parameters
    ----------
    classes : sequence of int
        Labels in use, in the order of the slice.
    width : int
        Number of classes of the whole head.
    device : torch.device or str
        Where logits and labels are.
    """

    def __init__(
        self, classes: Sequence[int], width: int, device: torch.device | str = "cpu"
    ) -> None:
        index = torch.tensor(classes, dtype=torch.int64)
        position = torch.full((width,), -1, dtype=torch.int64)
        position[index] = torch.arange(len(classes))
        self.index, self._position = index.to(device), position.to(device)
        self._whole = list(classes) == list(range(width))

    def logits(self, z: Tensor) -> Tensor:
        """Slice of the logits: float [n, width] -> [n, len(classes)]; the very tensor where the
        head is whole."""
        return z if self._whole else z.index_select(1, self.index)

    def labels(self, y: Tensor) -> Tensor:
        """Labels as positions in the slice: int64 [n] -> int64 [n]."""
        return self._position[y]


@dataclass(frozen=True)
class Batch:
    """Samples of one step: ``x`` [b, C, H, W], labels ``y`` [b] in the slice, their ``index`` [b]
    in the task."""

    x: Tensor
    y: Tensor
    index: Tensor
    head: HeadSlice


def seed_torch(seed: int) -> None:
    """Seed PyTorch's generators of the devices in use, from which dropout draws.

    ``torch.manual_seed`` does the same, and formats a stack trace for each kind of device that
    is not in use: 0.3 ms, a tenth of a small client's round.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


def hits(z: Tensor, y: Tensor) -> int:
    """How many of the logits [n, classes] are largest at their labels [n]; by NumPy, whose calls
    take less time."""
    return int(
        np.count_nonzero(z.detach().numpy(force=True).argmax(1) == y.numpy(force=True))
    )


def widen(z: Tensor) -> Tensor:
    """What a forward pass gave, in a dtype that losses can be taken in: bfloat16 becomes float32,
    others stay."""
    return z.float() if z.dtype is torch.bfloat16 else z


class _StartsFresh(ABCMeta):
    """A class whose objects, once made, are a client that is new.

    Not done in ``__init__``, which a subclass calls before it has set its own attributes.
    Derived from :class:`abc.ABCMeta`, so that a user's class may have abstract bases.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        learner = super().__call__(*args, **kwargs)
        learner.load_own_state({})
        return learner


class Learner(metaclass=_StartsFresh):
    """Plain local training (a FedAvg client), and the frame for every other method.

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
        The parameters to train, each once, by the first of its names. The others are frozen:
        they are the same everywhere and for ever, so they neither travel nor are kept.
    """

    Settings: ClassVar[type[LearnerSettings]] = LearnerSettings
    exchange: Exchange = "all"
    """Which parameters are averaged over clients; a setting of that name, where the method has
    one, decides."""
    scenarios: ClassVar[tuple[str, ...]] = ("task-incremental", "class-incremental")
    """Values of ``data.scenario`` that the method is made for; others are refused."""
    strategy: ClassVar[str] = ""
    """Name of the strategy that is this method's half on the server, which then takes the place of
    plain FedAvg."""
    sparse: ClassVar[bool] = False
    """Whether what travels holds many zeros by design: then zeros are left out on the way."""
    search: ClassVar[Mapping[str, Sequence[float | str]]] = {}
    """Settings worth searching, and the values to try of each: those of the paper, where it gives any.
    """
    reads: ClassVar[Sequence[str]] = ()
    """Keys of :attr:`Round.settings` that the method reads; the server warns of others. All
    clients train by ``lr``, ``epochs``, ``batch-size`` and ``proximal-mu``
    (:mod:`fedknow.protocols.instructions`)."""
    replay: ClassVar[Sequence[str]] = ()
    """Entries of the state that hold samples."""
    metered: ClassVar[Sequence[str]] = ()
    """Which of ``fit``, ``begin_epoch``, ``logits`` and ``score``, of those that the class itself
    defines, do their work in parts of :attr:`meter`, or none that counts."""
    unmetered: ClassVar[frozenset[str]] = frozenset()
    """Which do not, so that all of training or scoring is counted operation by operation."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls).keys()
        # A step or scoring of another kind costs something else: it is counted each time unless
        # the class knows better.
        if own & {"gradient", "step"} and "cost_key" not in own:
            cls.cost_key = _unknown  # type: ignore[method-assign, assignment]
        here = own & {"fit", "begin_epoch", "logits", "score"}
        cls.unmetered = cls.unmetered - here | here.difference(
            cls.metered if "metered" in own else ()
        )

    def __init__(
        self, model: nn.Module, train: TrainConfig, settings: LearnerSettings
    ) -> None:
        self.exchange = getattr(settings, "exchange", self.exchange)
        if train.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # in place; not in torch's types
            for module in model.modules():
                if isinstance(module, nn.Flatten):
                    module.register_forward_pre_hook(_flatten_both_ways)
        self.model = model
        self.train = train
        self.settings = settings
        self.body = cast(nn.Module, model.body)
        self.head = cast(nn.Linear, model.head)
        self.device = self.head.weight.device
        if train.precision == "bf16" and self.device.type == "cpu":
            _warn_of_slow_bf16()
        parameters = dict(model.named_parameters())
        self.trainable = {name: p for name, p in parameters.items() if p.requires_grad}
        self._frozen = {
            name: p for name, p in parameters.items() if not p.requires_grad
        }
        # Integer buffers (BatchNorm's counters) would come back from an average as fractions:
        # they do not travel, and start anew with each message, as they steer BatchNorm without
        # momentum and must not tell who came before. A tensor with several names (tied weights)
        # goes by the first.
        own = self.trainable.keys() | dict(model.named_buffers()).keys()
        initial = {
            name: value for name, value in model.state_dict().items() if name in own
        }
        self._names = [
            name for name, value in initial.items() if value.is_floating_point()
        ]
        self._counters = {
            n: value.clone() for n, value in initial.items() if n not in self._names
        }
        self._fresh = {
            name: value.clone()
            for name, value in initial.items()
            if not self.travels(name)
        }
        # Where each entry lies; state_dict() walks through all modules, a tenth of a small
        # client's round.
        self._all_parameters = list(model.parameters())
        self._places = {
            name: (
                model.get_submodule(name.rpartition(".")[0]),
                name.rpartition(".")[2],
            )
            for name in initial
        }
        self._trained_task = -1
        self._smallest_batch: int | None = None
        self.meter = Meter(self.body)

    # --- what travels
    # ---------------------------------------------------------------------------------------------

    @property
    def ends_task(self) -> bool:
        """Whether clients must be told that a task is over.

        So it is with each method that keeps something to itself or overrides :meth:`end_task`.
        """
        return self.exchange != "all" or type(self).end_task is not Learner.end_task

    def travels(self, name: str) -> bool:
        """Whether an entry of the model's state dict is averaged over clients."""
        return self.exchange == "all" or (
            self.exchange == "body" and name.startswith("body.")
        )

    def send(self) -> Tensors:
        """Copies of the parameters that travel, in the order of the state dict."""
        return self._copies(travelling=True)

    def receive(self, arrays: Tensors) -> None:
        """Put received parameters into the model; others stay.

        Raises
        ------
        ValueError
            If a name is unknown or missing, or a shape is another one.
        """
        wanted = {name for name in self._names if self.travels(name)}
        if arrays.keys() != wanted:
            odd = sorted(arrays.keys() ^ wanted)
            raise ValueError(
                f"received parameters do not fit the model: {', '.join(odd[:5])} are missing or unknown"
            )
        self._load(arrays)

    @functools.cached_property
    def frozen_digest(self) -> str:
        """Digest of the frozen parameters, which all clients must share without being sent them;
        "" without any."""
        if not self._frozen:
            return ""
        digest = hashlib.sha256()
        for name, parameter in self._frozen.items():
            value = parameter.detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def strategy_options(cls, settings: LearnerSettings) -> dict[str, Any]:
        """The method's settings that its :attr:`strategy` is made with, by the names of the
        latter's arguments."""
        return {}

    def share(self, task: TaskData, round: Round, ended: bool) -> Tensors:
        """What goes to the strategy beside the parameters, after :meth:`fit` or, with ``ended``,
        :meth:`end_task`.

        Nothing, or just the tensors that :meth:`shares` lists.
        """
        return {}

    def shares(self, ended: bool) -> Layout:
        """What :meth:`share` may give: the server refuses anything else."""
        return {}

    def receive_extra(self, extra: Tensors) -> None:
        """What the strategy sends beside the parameters, before :meth:`fit`; not in every round.

        Raises
        ------
        ValueError
            If it is not what this method's strategy would send.
        """
        raise ValueError(
            f"{type(self).__name__} takes nothing but parameters, and was sent {', '.join(list(extra)[:5])}; "
            "choose the strategy that fits the learner"
        )

    def kept(self) -> Tensors:
        """Copies of the parameters this client keeps to itself."""
        return self._copies(travelling=False)

    def load_kept(self, arrays: Tensors) -> None:
        """Replace the parameters that do not travel (for scoring the purely global model)."""
        self._load(arrays)

    def _copies(self, travelling: bool) -> Tensors:
        with torch.no_grad():
            return {
                name: self._entry(name).clone(memory_format=torch.contiguous_format)
                for name in self._names
                if self.travels(name) is travelling
            }

    def _load(self, arrays: Tensors) -> None:
        with torch.no_grad():
            for name, value in arrays.items():
                entry = self._entry(name)
                if entry.shape != value.shape:
                    raise ValueError(
                        f"{name} has shape {tuple(value.shape)}, the model's is {tuple(entry.shape)}"
                    )
                entry.copy_(value)

    def _entry(self, name: str) -> Tensor:
        """An entry of the model's state dict: a parameter or buffer itself."""
        module, attribute = self._places[name]
        return cast(Tensor, getattr(module, attribute))

    # --- state
    # ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """Give all that this client must keep until its next message.

        That is the last task it trained, the parameters that do not travel, and the method's
        :meth:`own_state`. It is empty where all travels and no task is ended.
        """
        if not self.ends_task:
            return self.own_state()
        parameters = self._copies(travelling=False)
        state: State = {"trained_task": self._trained_task}
        if parameters:
            state["kept"] = parameters
        return state | self.own_state()

    def load_state_dict(self, state: State) -> None:
        """Become the client whose state this is; ``{}`` is a client that is new."""
        self._load(self._counters | state.get("kept", self._fresh))
        self._trained_task = int(state.get("trained_task", -1))
        self.load_own_state(state)

    def own_state(self) -> State:
        """Give what the method itself keeps of this client; it is saved with the rest."""
        return {}

    def load_own_state(self, state: State) -> None:
        """Take over what :meth:`own_state` gave; nothing of it is there for a new client.

        Called with ``{}`` when the learner is made, after ``__init__``: so attributes that
        belong to a client need be set here alone.
        """

    def adopt(self, parameters: Tensors, task: int) -> None:
        """Take over parameters that were trained in a task outside of :meth:`fit`."""
        self._load(parameters)
        self._trained_task = task

    def has_trained(self, task: int) -> bool:
        """Whether this client has trained in a task, or a later one."""
        return self._trained_task >= task

    # --- training
    # -------------------------------------------------------------------------------------------------

    def fit(self, task: TaskData, round: Round) -> dict[str, float]:
        """One round of local training.

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
        smallest = self.smallest_batch(task.train.x)
        check_batches(len(task.train), self.train.batch_size, smallest)
        generator = torch.Generator().manual_seed(round.seed)
        seed_torch(round.seed)
        head = HeadSlice(task.head, self.head.out_features, self.device)
        labels = head.labels(task.train.y)
        x = self.images(task.train.x)
        anchor = (
            {n: p.detach().clone() for n, p in self.trainable.items()}
            if round.proximal_mu
            else {}
        )
        self.model.train()
        with self.meter.part():
            self.begin(task, round)
        total, correct = 0.0, 0
        for epoch in range(self.epochs):
            self.begin_epoch(epoch)
            total, correct = 0.0, 0
            for index in batches(
                len(labels), self.train.batch_size, generator, self.device, smallest
            ):
                with self.meter.part(self.step_key(len(index), head, bool(anchor))):
                    batch = Batch(x[index], labels[index], index, head)
                    loss, right = self.gradient(batch)
                    if not loss < float("inf"):
                        raise Diverged.in_epoch(loss, epoch, self.train)
                    if anchor:
                        self._proximal(anchor, round.proximal_mu)
                    if self.train.clip_norm:
                        nn.utils.clip_grad_norm_(
                            self.model.parameters(), self.train.clip_norm
                        )
                    self.step()
                total += loss * len(index)
                correct += right
        self._trained_task = task.task
        return {
            "loss": total / len(labels),
            "accuracy": correct / len(labels),
            **self.counts(),
        }

    def check_free(self, name: str, part: str, why: str) -> None:
        """Refuse a model of which a part is frozen as a whole.

        Parameters
        ----------
        name : str
            ``learner.name``.
        part : str
            ``body`` or ``head``.
        why : str
            What the method does with it.

        Raises
        ------
        ConfigError
            If there is nothing to train in it.
        """
        if any(place.startswith(f"{part}.") for place in self.trainable):
            return
        parameters = [
            place
            for place, _ in self.model.named_parameters()
            if place.startswith(f"{part}.")
        ]
        fault = (
            f"all parameters of its {part} are frozen"
            if parameters
            else f"its {part} has no parameters"
        )
        remedy = "leave some of them free" if parameters else "choose another model"
        raise ConfigError(
            f"learner.name = {name!r} cannot train this model: {fault}, and the method {why}; {remedy}, or choose "
            "another learner, for example 'fedper'"
        )

    def smallest_batch(self, x: Tensor) -> int:
        """The fewest samples that the model can be trained on at once; ``x``: samples, of which
        one is looked at."""
        if (
            self._smallest_batch is None
        ):  # a property of the model and the size of an image
            with self.meter.free():
                self._smallest_batch = smallest_batch(self.model, self.images(x[:1]))
        return self._smallest_batch

    @property
    def needed(self) -> int:
        """The fewest samples a batch may have, as far as it is known yet."""
        return self._smallest_batch or 1

    @property
    def epochs(self) -> int:
        """Epochs of one round."""
        return self.train.epochs

    def begin(self, task: TaskData, round: Round) -> None:
        """Before the first epoch of a round: a fresh optimizer, and whatever the method prepares."""
        align = type(self).gradient is not Learner.gradient
        self.optimizer = make_optimizer(
            self.train, self.body.parameters(), self.head.parameters(), align
        )

    def begin_epoch(self, epoch: int) -> None:
        """Before each epoch (from 0)."""

    def gradient(self, batch: Batch) -> tuple[float, int]:
        """Leave the gradients of one batch in the parameters; return (mean loss, number classified
        rightly)."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            logits = self.model(batch.x)
        z = batch.head.logits(widen(logits))
        loss = F.cross_entropy(z, batch.y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item(), hits(z, batch.y)

    def step(self) -> None:
        """Move the parameters along the gradients that :meth:`gradient` left in them."""
        self.optimizer.step()

    def cost_key(self, count: int, head: HeadSlice) -> Hashable | None:
        """What the cost of a step on ``count`` samples depends on; None: on more than is known
        before it.

        Of a learner's steps with the same key the first is counted
        (:class:`~fedknow.client.compute.cost.Meter`), so whatever changes from step to step
        belongs in here. A method that overrides :meth:`gradient` or :meth:`step` must override
        this too; otherwise each of its steps is counted, which is slow.
        """
        return (
            count,
            len(head.index),
            tuple(p.requires_grad for p in self._all_parameters),
        )

    def step_key(self, count: int, head: HeadSlice, proximal: bool) -> Hashable | None:
        """:meth:`cost_key`, and whether FedProx's term is added."""
        key = self.cost_key(count, head)
        return None if key is None else ("step", key, proximal)

    @functools.cached_property
    def weight_bytes(self) -> int:
        """Size of the models that the method works with, its scratch copies included."""
        return module_bytes(
            *(part for part in vars(self).values() if isinstance(part, nn.Module))
        )

    def counts(self) -> dict[str, float]:
        """The method's own numbers of the round just trained, the same keys from every client."""
        return {}

    def end_task(self, task: TaskData, round: Round) -> dict[str, float]:
        """The task is over.

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

    def autocast(self) -> AbstractContextManager[None]:
        """The context that forward passes run in, as ``train.precision`` asks for.

        With ``bf16`` the products of layers are taken in bfloat16, from weights that stay
        float32. What comes out is bfloat16: :func:`widen` it before a loss. A context of its
        own for each pass, left before the weights move: weights are cast once a context.
        """
        if self.train.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def images(self, x: Tensor) -> Tensor:
        """The same samples in the memory format that ``train.channels_last`` asks for."""
        return _channels_last(x) if self.train.channels_last else x

    def _proximal(self, anchor: Tensors, mu: float) -> None:
        for name, parameter in self.trainable.items():
            if name in anchor and parameter.grad is not None and self.travels(name):
                parameter.grad.add_(parameter.detach() - anchor[name], alpha=mu)

    # --- scoring
    # --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def logits(self, x: Tensor, batch_size: int) -> Tensor:
        """Logits over the whole head, in evaluation mode: float [n, C, H, W] -> [n, classes]."""
        self.model.eval()
        with self.autocast():
            return torch.cat(
                [
                    self.counted(self.model, part)
                    for part in torch.split(self.images(x), batch_size)
                ]
            )

    def counted(
        self, model: Callable[[Tensor], Tensor], x: Tensor, key: Hashable = "logits"
    ) -> Tensor:
        """A forward pass in the present mode and without gradients, counted once for each size:
        for long loops.

        Parameters
        ----------
        model : callable
            Images, float [n, C, H, W], to logits or features [n, m].
        x : Tensor
            Samples.
        key : hashable
            Which model it is, of those that differ in what they do.
        """
        with self.meter.part(("forward", key, len(x))):
            return widen(model(x))

    def score(
        self, splits: Sequence[Split], heads: Sequence[Sequence[int]], batch_size: int
    ) -> list[tuple[int, int, float]]:
        """Score several test sets with one pass over their samples.

        Parameters
        ----------
        splits : sequence of Split
            Test samples of each task.
        heads : sequence of sequences of int
            The classes a prediction may name, for each.

        Returns
        -------
        list of (right, total, mean loss), one for each test set
        """
        z = self.logits(torch.cat([split.x for split in splits]), batch_size)
        results = []
        for part, split, classes in zip(
            torch.split(z, [len(s.y) for s in splits]), splits, heads, strict=True
        ):
            head = HeadSlice(classes, self.head.out_features, self.device)
            sliced, labels = head.logits(part), head.labels(split.y)
            loss = F.cross_entropy(sliced, labels).item()
            results.append((int((sliced.argmax(1) == labels).sum()), len(labels), loss))
        return results


_LARGE = 1 << 15
"""Features of a batch from which on their gradient's format matters more than what it takes to see
to it."""


def _flatten_both_ways(module: nn.Module, inputs: tuple[Tensor]) -> None:
    """Have the gradient of flat features come back channels-last: max-pooling takes five times as
    long with another."""
    (x,) = inputs
    if x.dim() != 4 or x.numel() < _LARGE:
        return
    if x.requires_grad and not torch._C._functorch.is_functorch_wrapped_tensor(
        x
    ):  # no hooks there
        x.register_hook(_channels_last)  # type: ignore[no-untyped-call]


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _unknown(learner: Learner, count: int, head: HeadSlice) -> None:
    """A key (:meth:`Learner.cost_key`) for steps of which nothing is known."""


@functools.cache
def _warn_of_slow_bf16() -> None:
    """Say once a process that this machine has no instructions for bfloat16."""
    mkldnn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not (mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        log.warning(
            "train.precision = 'bf16': this processor computes bfloat16 by emulation; 'fp32' will be faster"
        )


def make_optimizer(
    train: TrainConfig,
    body: Iterator[Tensor],
    head: Iterator[Tensor],
    align: bool = True,
) -> torch.optim.Optimizer:
    """The optimizer of one round. The L2 term acts on the body alone: in the head it would shrink
    old tasks' rows.

    Gradients need no ``align`` where ``backward`` alone makes them. Frozen parameters are left out.
    """
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in body if parameter.requires_grad]},
        {
            "params": [parameter for parameter in head if parameter.requires_grad],
            "weight_decay": 0.0,
        },
    ]
    if (
        not train.weight_decay
    ):  # one group: a fused step of each would be a call of its own
        groups = [
            {"params": [parameter for group in groups for parameter in group["params"]]}
        ]
    settings: dict[str, Any] = {
        "lr": train.lr,
        "weight_decay": train.weight_decay,
        "fused": True,
    }
    optimizer: torch.optim.Optimizer
    if train.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=train.momentum, **settings)
    else:
        optimizer = (
            torch.optim.AdamW if train.optimizer == "adamw" else torch.optim.Adam
        )(groups, **settings)
    if align:
        optimizer.register_step_pre_hook(_align_gradients)
    return optimizer


def _align_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Put gradients that a method has set itself into their parameters' memory format, which fused
    steps rely on."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None and gradient.stride() != parameter.stride():
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
