"""What a FedKNOW step costs, in FedAvg steps, while really training on CIFAR-100.

``FEDKNOW_DATA=... python benchmarks/fedknow_step.py`` trains two clients of the paper's
protocol (10 tasks, 2 to 5 of 10 classes each, batch 40) whose bodies are averaged after each
round, with the exact integrator. Many batches of the first client are also given, at the very
same weights and with the same dropout mask, to the other ways of making a step; each step
(gradient and optimizer) is timed on its own:

``fedavg``     plain local training ``exact``      the default: restored gradients as far as
they are needed ``full``       all restored gradients, one forward pass (``path = "full"``)
``surrogate``  violated constraints as one (``integrator = "surrogate"``) ``surrogate/2``  the
same for one batch in two (``every = 2``): half the time of two steps ``naive``      the same
arithmetic as ``full`` with a forward pass of the model and of its teacher for each past task

``--past 19 39 79`` goes on to longer streams, where the classes of CIFAR-100 are met again: the
first client lives through the shares of one client after another, and only steps at the places
asked for are integrated and timed (k = 100; without ``naive``). Ratios are taken batch by
batch; ``mean`` is the ratio of sums.

Times are CPU time of one thread on a CPU (the wall clock of a core that is not shared),
wall-clock time on a GPU. Results are put into ``--out`` under the model, precision and device.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _common import machine
from torch import Tensor, nn
from torch.nn import functional as F

from fedknow.client.compute.device import Border, find_device
from fedknow.client.data import TaskData
from fedknow.client.data.benchmark import Benchmark, make_benchmark
from fedknow.client.learners import build_learner
from fedknow.client.learners.fedknow.flat import flatten, views
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
from fedknow.simulations.presets import load_preset

ROOT = Path(__file__).parent
CLIENTS = 2
EVERY = {
    "fedavg": 2,
    "exact": 2,
    "surrogate": 4,
    "surrogate/2": 4,
    "online": 4,
    "quarter": 4,
    "full": 12,
    "naive": 12,
}
"""Which of the batches each way is timed on: one in so many. A quarter of a batch is what
gradients are restored from; an online dual begins each of its steps with the multipliers of the
last one that was timed."""


class Naive(FedKnow):
    """One forward pass of the model, one of the teacher and one backward pass for each past task."""

    def begin(self, task: TaskData, round: Round) -> None:
        """Get the teachers ready."""
        super().begin(task, round)
        self._teachers = {}
        for past, knowledge in self._knowledge.items():
            self._teachers[past] = copy.deepcopy(self._scratch_body).eval()
            knowledge.restore_into(self._teachers[past])

    def _plain(self, loss: Tensor) -> Tensor:
        return flatten(torch.autograd.grad(loss, self._parameters), self._parameters)

    def gradient(self, batch: Batch) -> tuple[float, int]:
        """See :meth:`Learner.gradient`."""
        report = Learner.gradient(self, batch)
        g = flatten(
            [p.grad for p in self._parameters if p.grad is not None], self._parameters
        )
        rows = []
        for past, teacher in self._teachers.items():
            knowledge = self._knowledge[past]
            with torch.no_grad(), self.autocast():
                answer = F.linear(teacher(batch.x), *knowledge.head)
            with self.autocast():
                logits = self.model(batch.x)
            z = widen(logits)[:, list(knowledge.classes)] / self.settings.temperature
            target = (widen(answer) / self.settings.temperature).softmax(1)
            rows.append(self._plain(-(target * z.log_softmax(1)).sum(1).mean()))
        if rows:
            restored = torch.stack(rows)
            g = integrate(g + self.settings.margin * restored.sum(0), restored).gradient
        self._set_body_gradient(views(g, self._parameters))
        return report


class Stopwatch:
    """Times the ways of making a step on the same weights and batches."""

    def __init__(
        self,
        config: ExperimentConfig,
        stream: Benchmark,
        device: str,
        known: FedKnowSettings,
        naive: bool,
    ) -> None:
        self.device = find_device(device, "--device")
        self._border = Border(self.device)
        plain = config.model_copy(
            update={"learner": type(config.learner)(name="fedavg")}
        )
        self.ways: dict[str, Learner] = {
            "fedavg": build_learner(plain, stream.shape, stream.classes, self.device)
        }
        kinds = {"exact": known, "full": known.model_copy(update={"path": "full"})}
        kinds |= {"surrogate": known.model_copy(update={"integrator": "surrogate"})}
        kinds |= {"online": known.model_copy(update={"integrator": "online"})}
        if not any(
            isinstance(module, nn.BatchNorm2d)
            for module in self.ways["fedavg"].model.modules()
        ):
            kinds |= {"quarter": known.model_copy(update={"restore_from": 0.25})}
        kinds |= {"surrogate/2": kinds["surrogate"].model_copy(update={"every": 2})}
        for name, settings in kinds.items():
            self.ways[name] = FedKnow(
                copy.deepcopy(self.ways["fedavg"].model), config.train, settings
            )
        if naive:
            self.ways["naive"] = Naive(
                copy.deepcopy(self.ways["fedavg"].model), config.train, known
            )
        self._count = 0

    def restart(self) -> None:
        """Have every way timed on the next batch."""
        self._count = 0

    def _now(self) -> float:
        if self.device.type == "cpu":
            return time.thread_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def round(
        self, main: FedKnow, task: TaskData, round: Round
    ) -> tuple[list[dict[str, float]], dict[str, float]]:
        """Train ``main`` for a round as :meth:`Learner.fit` does, and time every way on some of
        its batches.

        Returns
        -------
        tuple
            Seconds of each step, by way; and what ``main`` counted, summed over its steps.
        """
        seconds, violating, active = [], 0, 0
        state, there = (
            self._border.enter(main.state_dict()),
            self._border.enter_task(task),
        )
        for name, way in self.ways.items():
            way.load_state_dict(state if name != "fedavg" else {})
            way.model.load_state_dict(main.model.state_dict())
            way.begin(there, round)
            way.model.train()
        main.model.train()
        main.begin(task, round)
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
                for name, way in self.ways.items():
                    if self._count % EVERY[name] == 0:
                        way.model.load_state_dict(main.model.state_dict())
                        step[name] = self._time(way, batch_there, seed)
                seconds.append(step)
                self._count += 1
                torch.manual_seed(seed)
                before = main._violated, main._active
                main.gradient(batch)
                violating += main._violated > before[0]
                active += main._active > before[1]
                main.step()
        main._trained_task, main._local = task.task, main.send()
        sums = {name: value * len(seconds) for name, value in main.counts().items()}
        return seconds, sums | {"steps-violating": violating, "steps-active": active}

    def _time(self, way: Learner, batch: Batch, seed: int) -> float:
        torch.manual_seed(seed)
        steps = way.settings.every if isinstance(way, FedKnow) else 1
        start = self._now()
        for _ in range(steps):
            way.gradient(batch)
            way.step()
        return (self._now() - start) / steps


Rounds = list[tuple[list[dict[str, float]], dict[str, float]]]


def row(past: int, rounds: Rounds) -> dict[str, object]:
    """Figures of one number of past tasks."""
    seconds = [step for steps, _ in rounds for step in steps]
    ms, ratio = {}, {}
    for name in seconds[0]:
        pairs = [(step[name], step["fedavg"]) for step in seconds if name in step]
        ms[name] = round(1e3 * statistics.median(mine for mine, _ in pairs), 2)
        if name != "fedavg":
            ratio[name] = {
                "median": round(
                    statistics.median(mine / plain for mine, plain in pairs), 3
                ),
                "mean": round(
                    sum(mine for mine, _ in pairs) / sum(plain for _, plain in pairs), 3
                ),
                "steps": len(pairs),
            }
    counts = {
        name: round(sum(sums[name] for _, sums in rounds) / len(seconds), 3)
        for name in rounds[0][1]
    }
    return {"past": past, "steps": len(seconds), **counts, "ratio": ratio, "ms": ms}


def paper(
    config: ExperimentConfig,
    stream: Benchmark,
    watch: Stopwatch,
    last: int,
    note: Callable[[dict[str, object]], None],
) -> None:
    """Two clients live through their own tasks together; client 0 is timed."""
    learner = build_learner(config, stream.shape, stream.classes)
    assert isinstance(learner, FedKnow)
    states: list[dict[str, object]] = [{} for _ in range(CLIENTS)]
    body = learner.send()
    for task in range(last + 1):
        rounds: Rounds = []
        watch.restart()
        for number in range(1, config.train.rounds + 1):
            sent = []
            for client in range(CLIENTS):
                learner.load_state_dict(states[client])
                learner.receive(body)
                share, round = (
                    stream.task(client, task),
                    Round(number, 1000 * task + 10 * number + client),
                )
                if client == 0:
                    rounds.append(watch.round(learner, share, round))
                else:
                    learner.fit(share, round)
                sent.append(learner.send())
                states[client] = learner.state_dict()
            body = {name: sum(part[name] for part in sent) / CLIENTS for name in body}
        note(row(task, rounds))
        for client in range(CLIENTS):
            learner.load_state_dict(states[client])
            learner.receive(body)
            learner.end_task(stream.task(client, task), Round(0, 77 + task))
            states[client] = learner.state_dict()


def longer(
    config: ExperimentConfig,
    stream: Benchmark,
    watch: Stopwatch,
    known: FedKnowSettings,
    places: list[int],
    note: Callable[[dict[str, object]], None],
) -> None:
    """One client lives through the shares of all; timed at the places asked for, plainly trained
    between them."""
    model = copy.deepcopy(watch.ways["fedavg"].model).cpu()
    main = FedKnow(model, config.train, FedKnowSettings(k=100, integrator="off"))
    for place in range(max(places) + 1):
        share = stream.task(place // stream.tasks, place % stream.tasks)
        share = TaskData(
            place, share.classes, share.seen, share.train, share.test, share.incremental
        )
        if place in places:
            exact = FedKnow(copy.deepcopy(main.model), config.train, known)
            exact.load_state_dict(main.state_dict())
            watch.restart()
            note(
                row(
                    place,
                    [
                        watch.round(exact, share, Round(n, 500 + place + n))
                        for n in range(1, 1 + config.train.rounds)
                    ],
                )
            )
        main.fit(share, Round(1, place))
        main.end_task(share, Round(0, 77 + place))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", choices=("cnn6", "resnet18"), default="cnn6")
    options.add_argument("--width", type=float, default=1.0)
    options.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    options.add_argument("--device", default="cpu")
    options.add_argument(
        "--last", type=int, default=9, help="number of past tasks to end with"
    )
    options.add_argument(
        "--past",
        type=int,
        nargs="*",
        default=[],
        help="longer streams instead, timed at these places",
    )
    options.add_argument(
        "--margin", type=float, help="FedKNOW's setting, where not its default"
    )
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument(
        "--out", type=Path, default=ROOT / "results" / "fedknow_step.json"
    )
    chosen = options.parse_args()
    torch.set_num_threads(1)
    changes = [
        f"model.name={chosen.model}",
        f"train.precision={chosen.precision}",
        "learner.k=100",
    ]
    changes += [f"train.rounds={chosen.rounds}", f"train.epochs={chosen.epochs}"]
    changes += [f"model.width={chosen.width}"]
    known = FedKnowSettings(
        k=100, **({} if chosen.margin is None else {"margin": chosen.margin})
    )
    changes += [f"learner.margin={known.margin}"]
    config = load_preset(
        "paper-cifar100-small" if chosen.model == "cnn6" else "paper-cifar100", changes
    )
    stream = make_benchmark(config)
    watch = Stopwatch(config, stream, chosen.device, known, naive=not chosen.past)
    rows: list[dict[str, object]] = []
    key = f"{chosen.model}-{chosen.precision}-{chosen.device}" + (
        "-longer" if chosen.past else ""
    )
    key += "" if chosen.margin is None else f"-margin-{chosen.margin:g}"
    about = machine() | {
        "settings": {
            "width": chosen.width,
            "rounds": chosen.rounds,
            "epochs": chosen.epochs,
            "batch": 40,
        },
    }

    def note(row: dict[str, object]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        about["load_at_end"] = os.getloadavg()[0]
        results = json.loads(chosen.out.read_text()) if chosen.out.exists() else {}
        chosen.out.parent.mkdir(exist_ok=True)
        chosen.out.write_text(
            json.dumps(results | {key: about | {"rows": rows}}, indent=1) + "\n"
        )

    if chosen.past:
        longer(config, stream, watch, known, chosen.past, note)
    else:
        paper(config, stream, watch, chosen.last, note)


if __name__ == "__main__":
    main()
