"""Cost of work: counted floating point operations, and peak memory.

Counting goes through every operation of PyTorch and is as slow as that sounds, so it is done
once for each kind of work. A :class:`Meter` is told where a *part* of the work begins and ends,
and by what *key* parts of equal cost can be told; the first part of a key is counted, and later
ones are charged the same. Work without a key is always counted. What is charged therefore
depends on the work alone, not on the process that does it or on what was done before.

Counted are the operations PyTorch has formulas for (:mod:`torch.utils.flop_counter`: products
of matrices, convolutions and attention, forward and backward) and products of vectors; a
multiply-add is two operations. Not counted are operations entry by entry (activations,
normalisation, the optimizer's step), a few percent of a network's, and what NumPy does. Memory
is that of tensors, not of a library's workspaces.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from fedknow.client.compute.operations import Counting
from fedknow.client.compute.sizes import tensor_bytes
from fedknow.protocols.work import COSTS

__all__ = [
    "Cost",
    "Meter",
    "add",
    "costs",
    "declared",
    "free",
    "part",
]


class Cost(NamedTuple):
    """What a piece of work cost.

    Attributes
    ----------
    flops : int
        Floating point operations; a multiply-add is two.
    peak : int
        Most bytes of tensors made during the work that were there at once: gradients too, but
        not what optimizers make.
    gradients, moments : int
        Bytes of the gradients that optimizers were given, and of what they keep themselves.
    samples : int
        How many samples were learned from, each as often as it was: those that went through the
        network the meter watches while gradients were taken, and those that a method tells of
        (:meth:`Meter.add`). Extra epochs and replayed samples count too, and when a task ends
        those that a copy is fine-tuned on or whose gradients are measured.
    """

    flops: int = 0
    peak: int = 0
    gradients: int = 0
    moments: int = 0
    samples: int = 0

    def plus(self, cost: Cost) -> Cost:
        """Of this work and other work before or after it."""
        return Cost(
            self.flops + cost.flops,
            # One after the other, so that they never need their memory at once.
            max(self.peak, cost.peak),
            max(self.gradients, cost.gradients),
            max(self.moments, cost.moments),
            self.samples + cost.samples,
        )

    def enclosing(self, inner: Cost) -> Cost:
        """Add the cost of work within this work.

        The inner work needs its memory while that of this work is still there.
        """
        return (
            self
            if inner is _NOTHING
            else self.plus(inner)._replace(peak=self.peak + inner.peak)
        )


_NOTHING = Cost()


class _Part:
    """Work under way: its cost, and apart from it that of parts within."""

    __slots__ = (
        "__weakref__", "_hooks", "_meter", "_optimizers", "charged", "counted", "flops", "inner",
        "key", "live", "peak", "samples", "steps",
    )  # fmt: skip

    def __init__(
        self,
        meter: Meter,
        key: Hashable | None,
        counted: bool,
        charged: bool = True,
    ) -> None:
        self._meter = meter
        self.key = key
        self.counted = counted
        self.charged = charged
        self.flops = self.live = self.peak = self.samples = 0
        self.steps = (0, 0)
        self.inner = _NOTHING
        self._hooks: Sequence[RemovableHandle] = ()
        # Weak keys: an optimizer that is gone holds no memory, and must not be counted.
        self._optimizers: (
            weakref.WeakKeyDictionary[Optimizer, tuple[int, int]] | None
        ) = None

    def __enter__(self) -> None:
        self._meter.parts.append(self)
        self._meter.counting.set(self.counted)
        if self.counted:  # only then, as each hook slows each step
            self._hooks = self._meter.watch_steps()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop()
        self._meter.close(self, failed=kind is not None)

    def stop(self) -> None:
        """See no more steps of optimizers."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()

    @property
    def own_cost(self) -> Cost:
        """Its cost without that of the parts within."""
        return Cost(self.flops, self.peak, *self.steps, self.samples)

    def book(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.hold(storage.nbytes())
        # The storage and not the tensor: views share it, and it lives as long as any of them.
        # At exit nobody reads the count.
        weakref.finalize(storage, self._gone, storage.nbytes()).atexit = False

    def hold(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)

    def _gone(self, size: int) -> None:
        self.live -= size

    def stepped(self, optimizer: Optimizer) -> None:
        parameters = chain.from_iterable(
            g["params"] for g in optimizer.param_groups
        )
        gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
        if self._optimizers is None:
            self._optimizers = weakref.WeakKeyDictionary()
        self._optimizers[optimizer] = (
            gradients,
            sum(map(tensor_bytes, optimizer.state.values())),
        )
        gradients, moments = (
            sum(sizes) for sizes in zip(*self._optimizers.values(), strict=True)
        )
        self.steps = max(self.steps[0], gradients), max(self.steps[1], moments)


class Meter:
    """Counts what one learner's work costs, for one client after the other.

    Parameters
    ----------
    network : Module, optional
        What samples go through to be learned from.

    Attributes
    ----------
    cost : Cost
        Of the last :meth:`message`.
    """

    def __init__(self, network: nn.Module | None = None) -> None:
        self.cost = Cost()
        self.parts: list[_Part] = []
        self.counting = Counting(self.parts, network)
        self._known: dict[Hashable, Cost] = {}

    @contextmanager
    def message(self) -> Iterator[None]:
        """Count all work for one message.

        Afterwards :attr:`cost` is what its parts cost.
        """
        message_part = _Part(self, None, counted=False)
        outer = _METER.set(self)
        try:
            with message_part:
                yield
        finally:
            _METER.reset(outer)
        self.cost = message_part.inner

    @property
    def is_counting(self) -> bool:
        """Whether the work under way is counted operation by operation."""
        return bool(self.parts) and self.parts[-1].counted

    @property
    def samples(self) -> int:
        """Samples that the message under way has learned from so far.

        Only parts that are over are in it.
        """
        return self.parts[-1].inner.samples if self.parts else 0

    def part(self, key: Hashable | None = None) -> AbstractContextManager[None]:
        """Open a part of the work, which costs what others of its key do.

        Parts within are counted apart from it.

        Parameters
        ----------
        key : hashable, optional
            What the cost depends on; None: on more than can be told beforehand, so it is
            counted each time.
        """
        return _Part(self, key, counted=key is None or key not in self._known)

    def charge(self, key: Hashable) -> bool:
        """Charge a part without doing it; False where its cost is not known yet."""
        if (cost := self._known.get(key)) is not None and self.parts:
            self.parts[-1].inner = self.parts[-1].inner.plus(cost)
        return cost is not None

    def free(self) -> AbstractContextManager[None]:
        """Open work that no client is charged with.

        For example finding something out once for all clients of a process.
        """
        return _Part(self, None, counted=False, charged=False)

    def declared(self) -> AbstractContextManager[None]:
        """Open a part that is not counted; its cost is declared by :meth:`add`.

        Parts within are counted.
        """
        return _Part(self, None, counted=False)

    def add(self, flops: int = 0, memory: int = 0, samples: int = 0) -> None:
        """Charge the innermost part with operations, memory and samples.

        Memory is in bytes, and there until the part's end.

        ``samples`` are those learned from in another network than the one watched.
        """
        if self.parts:
            self.parts[-1].flops += flops
            self.parts[-1].samples += samples
            self.parts[-1].hold(memory)

    def close(self, part: _Part, failed: bool) -> None:
        """End a part, and with it parts within that an error has left open."""
        if part not in self.parts:
            return
        # A generator of parts that an error leaves ends its part late, or never.
        while (inner := self.parts.pop()) is not part:
            inner.stop()
            failed = True
        outer = self.parts[-1] if self.parts else None
        self.counting.set(outer is not None and outer.counted)
        # The cost of half a step must not be taken for that of its key.
        if failed or not part.charged:
            return
        own_cost = None if part.key is None else self._known.get(part.key)
        if own_cost is None:
            own_cost = part.own_cost
            if part.key is not None:
                self._known[part.key] = own_cost
        if outer is not None:
            outer.inner = outer.inner.plus(own_cost.enclosing(part.inner))

    def watch_steps(self) -> Sequence[RemovableHandle]:
        """See optimizers' steps from now on, until the handles are removed."""
        return register_optimizer_step_pre_hook(
            self._begin_step
        ), register_optimizer_step_post_hook(self._end_step)

    def _begin_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self.parts[-1].counted:
            # A step's operations have no formula, and watching them takes time.
            self.counting.set(False)

    def _end_step(self, optimizer: Optimizer, *_: Any) -> None:
        if (part := self.parts[-1]).counted:
            part.stepped(optimizer)
            self.counting.set(True)


_METER: ContextVar[Meter | None] = ContextVar("meter", default=None)
"""Of the message under way. A context of its own for each thread, which may have a node each."""


def part(key: Hashable | None = None) -> AbstractContextManager[None]:
    """Open a part of the message under way (:meth:`Meter.part`).

    Without a message nothing is counted.
    """
    meter = _METER.get()
    return nullcontext() if meter is None else meter.part(key)


def free() -> AbstractContextManager[None]:
    """Open work that nobody is charged with (:meth:`Meter.free`)."""
    meter = _METER.get()
    return nullcontext() if meter is None else meter.free()


def declared() -> AbstractContextManager[None]:
    """Open a part whose cost :func:`add` declares (:meth:`Meter.declared`)."""
    meter = _METER.get()
    return nullcontext() if meter is None else meter.declared()


def add(flops: int = 0, memory: int = 0, samples: int = 0) -> None:
    """Charge the innermost part of the message under way (:meth:`Meter.add`)."""
    if (meter := _METER.get()) is not None:
        meter.add(flops, memory, samples)


def costs(
    cost: Cost,
    weights: int,
    knowledge: int,
    replay: int,
) -> dict[str, float]:
    """Give the metrics :data:`~fedknow.protocols.work.COSTS` of one answer.

    Parameters
    ----------
    cost : Cost
        Of the work.
    weights, knowledge, replay : int
        Bytes of the models a learner works with, of the samples a client keeps for replay, and
        of all else it keeps.

    Returns
    -------
    dict
        Bytes as floats. ``memory-gradients`` includes what the optimizer keeps;
        ``memory-activations`` is all else that the work had to make, of which most is kept for
        the backward pass. The parts need not be largest at the same moment, so their sum may be
        somewhat above what is needed at any one.
    """
    parts = (
        weights,
        cost.gradients + cost.moments,
        # Gradients are made while counting, and are named apart.
        max(0, cost.peak - cost.gradients),
        knowledge,
        replay,
    )
    return dict(
        zip(COSTS, map(float, (cost.flops, sum(parts), *parts)), strict=True)
    )
