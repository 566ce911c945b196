"""The ways of making a FedKNOW step that ``fedknow_step.py`` times."""

from __future__ import annotations

import copy
import time
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedknow.client.compute.device import DeviceTransfer, find_device
from fedknow.client.data import TaskData
from fedknow.client.data.benchmark import Benchmark
from fedknow.client.learners import build_learner
from fedknow.client.learners.fedknow.flat import (
    flatten,
    flatten_present,
    free_parameters,
    set_gradients,
    views,
)
from fedknow.client.learners.fedknow.learner import FedKnow
from fedknow.client.learners.fedknow.settings import FedKnowSettings
from fedknow.client.learners.frames.learner import (
    Batch,
    HeadSlice,
    Learner,
    Round,
    batches,
    widen,
)
from fedknow.client.learners.frames.projection import integrate
from fedknow.protocols.config import ExperimentConfig

EVERY = {
    "fedavg": 2,
    "exact": 2,
    "surrogate": 4,
    "surrogate/2": 4,
    "online": 4,
    "quarter": 4,
    "bounded": 2,
    "tight": 2,
    "full": 12,
    "naive": 12,
}
"""Which of the batches each way is timed on: one in so many. A quarter of a batch is what
gradients are restored from; an online dual begins each of its steps with the multipliers of the
last one that was timed."""


LONG = ("exact", "full", "bounded", "tight", "surrogate", "online")
"""The ways that are timed in long streams, where teachers of many tasks make each dear."""


class Naive(FedKnow):
    """One forward, one teacher's and one backward pass for each past task."""

    def begin(self, task: TaskData, round: Round) -> None:
        """Get the teachers ready."""
        super().begin(task, round)
        self._teachers = {}
        for past_task, knowledge in self._restorer.knowledge.items():
            self._teachers[past_task] = copy.deepcopy(self._scratch.body).eval()
            knowledge.restore_into(self._teachers[past_task])

    def _backward(self, loss: Tensor) -> Tensor:
        parameters = free_parameters(self.body)
        return flatten(torch.autograd.grad(loss, parameters), parameters)

    def gradient(self, batch: Batch) -> tuple[float, int]:
        """See :meth:`Learner.gradient`."""
        report = Learner.gradient(self, batch)
        parameters = free_parameters(self.body)
        g, reached = flatten_present([p.grad for p in parameters], parameters)
        rows = []
        for past_task, teacher in self._teachers.items():
            knowledge = self._restorer.knowledge[past_task]
            with torch.no_grad(), self.autocast():
                answer = F.linear(teacher(batch.x), *knowledge.head)
            with self.autocast():
                logits = self.model(batch.x)
            z = (
                widen(logits)[:, list(knowledge.classes)]
                / self.settings.temperature
            )
            target = (widen(answer) / self.settings.temperature).softmax(1)
            rows.append(
                self._backward(-(target * z.log_softmax(1)).sum(1).mean())
            )
        if rows:
            restored = torch.stack(rows)
            g = integrate(
                g + self.settings.margin * restored.sum(0), restored
            ).gradient
        set_gradients(parameters, views(g, parameters), reached)
        return report


def settings_of_ways(
    exact: FedKnowSettings, model: nn.Module
) -> dict[str, FedKnowSettings]:
    """Return the settings of each way of FedKNOW, in the order of timing."""
    changes: dict[str, dict[str, object]] = {
        "exact": {},
        "full": {"path": "full"},
        "surrogate": {"integrator": "surrogate"},
        "bounded": {"integrator": "bounded"},
        "tight": {"integrator": "bounded", "tolerance": 0.1},
        "online": {"integrator": "online"},
    }
    # BatchNorm on a part of the batch would see other statistics.
    if not any(isinstance(part, nn.BatchNorm2d) for part in model.modules()):
        changes["quarter"] = {"restore_from": 0.25}
    changes["surrogate/2"] = {"integrator": "surrogate", "every": 2}
    return {
        name: exact.model_copy(update=change) for name, change in changes.items()
    }


class Stopwatch:
    """Times the ways of making a step on the same weights and batches."""

    def __init__(
        self,
        config: ExperimentConfig,
        stream: Benchmark,
        device: str,
        fedknow_settings: FedKnowSettings,
        contenders: Collection[str] = (),
    ) -> None:
        self.device = find_device(device, "--device")
        self._transfer = DeviceTransfer(self.device)
        plain_config = config.model_copy(
            update={"learner": type(config.learner)(name="fedavg")}
        )
        fedavg = build_learner(
            plain_config, stream.shape, stream.classes, self.device
        )
        self.ways: dict[str, Learner] = {"fedavg": fedavg}
        for name, settings in settings_of_ways(
            fedknow_settings, fedavg.model
        ).items():
            if not contenders or name in contenders:
                self.ways[name] = FedKnow(
                    copy.deepcopy(fedavg.model), config.train, settings
                )
        if not contenders:
            self.ways["naive"] = Naive(
                copy.deepcopy(fedavg.model),
                config.train,
                fedknow_settings,
            )
        self._count = 0

    def restart(self) -> None:
        """Have every way timed on the next batch."""
        self._count = 0

    def _read_clock(self) -> float:
        if self.device.type == "cpu":
            return time.thread_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def round(
        self, main: FedKnow, task: TaskData, round: Round
    ) -> tuple[list[dict[str, float]], dict[str, float]]:
        """Train ``main`` for a round as :meth:`Learner.fit` does; time every way.

        Timing takes some of the round's batches.

        Returns
        -------
        tuple
            Seconds of each step, by way; and what ``main`` counted, summed over its steps.
        """
        seconds, violating, active = [], 0, 0
        main.begin(task, round)  # First, so that its teachers' answers serve all.
        state = self._transfer.enter(main.state_dict())
        parameters = self._transfer.enter_task(task)
        for name, contestant in self.ways.items():
            contestant.load_state_dict(state if name != "fedavg" else {})
            contestant.model.load_state_dict(main.model.state_dict())
            contestant.begin(parameters, round)
            contestant.model.train()
        main.model.train()
        head, head_there = (
            HeadSlice(task.head, main.head.out_features, on)
            for on in ("cpu", self.device)
        )
        x, labels = main.images(task.train.x), head.labels(task.train.y)
        generator = torch.Generator().manual_seed(round.seed)
        for _ in range(main.epochs):
            for index in batches(len(labels), main.train.batch_size, generator):
                batch = Batch(x[index], labels[index], index, head)
                batch_there = Batch(
                    *(part.to(self.device) for part in (batch.x, batch.y, index)),
                    head_there,
                )
                seed = 1000 * round.seed + len(seconds)
                step = {}
                for name, contestant in self.ways.items():
                    if self._count % EVERY[name] == 0:
                        contestant.model.load_state_dict(main.model.state_dict())
                        step[name] = self._time(contestant, batch_there, seed)
                seconds.append(step)
                self._count += 1
                torch.manual_seed(seed)
                old_counts = main._counts.violated, main._counts.active
                main.gradient(batch)
                violating += main._counts.violated > old_counts[0]
                active += main._counts.active > old_counts[1]
                main.step()
        main._trained_task, main._local = task.task, main.send()
        sums = {
            name: value * len(seconds) for name, value in main.counts().items()
        }
        of_bounded = self.ways["bounded"].counts()["pushforwards"]
        sums["bounded-pushforwards"] = of_bounded * len(seconds)
        return seconds, sums | {
            "steps-violating": violating,
            "steps-active": active,
        }

    def _time(self, contestant: Learner, batch: Batch, seed: int) -> float:
        torch.manual_seed(seed)
        steps = (
            contestant.settings.every if isinstance(contestant, FedKnow) else 1
        )
        start = self._read_clock()
        for _ in range(steps):
            contestant.gradient(batch)
            contestant.step()
        return (self._read_clock() - start) / steps
