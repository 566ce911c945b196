"""Measure a FedKNOW step in FedAvg steps, while training on CIFAR-100.

``FEDKNOW_DATA=... python benchmarks/fedknow_step.py`` trains two clients of the paper's
protocol (10 tasks, 2 to 5 of 10 classes each, batch 40) whose bodies are averaged after each
round, with the exact integrator. Many batches of the first client are also given, at the very
same weights and with the same dropout mask, to the other ways of making a step; each step
(gradient and optimizer) is timed on its own:

- ``fedavg``: plain local training
- ``exact``: the default: restored gradients as far as they are needed
- ``full``: all restored gradients, one forward pass (``path = "full"``)
- ``bounded``: no past task hurt beyond a bound (``integrator = "bounded"``)
- ``tight``: the same with ``tolerance = 0.1``
- ``surrogate``: violated constraints as one (``integrator = "surrogate"``)
- ``surrogate/2``: the same for one batch in two (``every = 2``): half the time of two steps
- ``online``: multipliers that move from step to step (``integrator = "online"``)
- ``quarter``: as ``exact``, restored from a quarter of the batch (``restore_from = 0.25``)
- ``naive``: the arithmetic of ``full``, a forward pass of model and teacher for each past task

``--past 19 39 79`` goes on to longer streams, where the classes of CIFAR-100 are met again: the
first client lives through the shares of one client after another, and only steps at the places
asked for are integrated and timed (k = 100; the ways of ``LONG``). Ratios are taken batch by
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
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch
from _common import machine
from _step_ways import LONG, Stopwatch

from fedknow.client.data import TaskData
from fedknow.client.data.benchmark import Benchmark, make_benchmark
from fedknow.client.learners import build_learner
from fedknow.client.learners.fedknow.learner import FedKnow
from fedknow.client.learners.fedknow.settings import (
    FedKnowPlusSettings,
    FedKnowSettings,
)
from fedknow.client.learners.frames.learner import (
    Round,
)
from fedknow.protocols.config import ExperimentConfig
from fedknow.simulations.presets import load_preset

ROOT = Path(__file__).parent
CLIENTS = 2


Rounds = list[tuple[list[dict[str, float]], dict[str, float]]]
Note = Callable[[dict[str, object]], None]
SETTINGS = {"fedknow": FedKnowSettings, "fedknow-plus": FedKnowPlusSettings}


def row(past_task: int, rounds: Rounds) -> dict[str, object]:
    """Figures of one number of past tasks."""
    seconds = list(chain.from_iterable(steps for steps, _ in rounds))
    ms, ratio = {}, {}
    for name in seconds[0]:
        pairs = [(step[name], step["fedavg"]) for step in seconds if name in step]
        ms[name] = round(
            1e3 * statistics.median(own_ms for own_ms, _ in pairs), 2
        )
        if name != "fedavg":
            ratio[name] = {
                "median": round(
                    statistics.median(
                        own_ms / fedavg_ms for own_ms, fedavg_ms in pairs
                    ),
                    3,
                ),
                "mean": round(
                    sum(own_ms for own_ms, _ in pairs)
                    / sum(fedavg_ms for _, fedavg_ms in pairs),
                    3,
                ),
                "steps": len(pairs),
            }
    totals: Counter[str] = Counter()
    for _, sums in rounds:
        totals.update(sums)
    counts = {
        name: round(total / len(seconds), 3) for name, total in totals.items()
    }
    return {
        "past": past_task,
        "steps": len(seconds),
        **counts,
        "ratio": ratio,
        "ms": ms,
    }


def paper(
    config: ExperimentConfig,
    stream: Benchmark,
    watch: Stopwatch,
    final_task: int,
    note: Note,
) -> None:
    """Two clients live through their own tasks together; client 0 is timed."""
    learner = build_learner(config, stream.shape, stream.classes)
    assert isinstance(learner, FedKnow)
    states: list[dict[str, object]] = [{} for _ in range(CLIENTS)]
    body = learner.send()
    for task in range(final_task + 1):
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
            for name in body:
                body[name] = sum(part[name] for part in sent) / CLIENTS
        note(row(task, rounds))
        for client in range(CLIENTS):
            learner.load_state_dict(states[client])
            learner.receive(body)
            learner.end_task(stream.task(client, task), Round(0, 77 + task))
            states[client] = learner.state_dict()


def longer(
    config: ExperimentConfig,
    stream: Benchmark,
    watches: list[tuple[Stopwatch, FedKnowSettings, Note]],
    places: list[int],
    states: Path | None,
) -> None:
    """Train one client on the shares of all, and time it at the places given."""
    model = copy.deepcopy(watches[0][0].ways["fedavg"].model).cpu()
    main = FedKnow(model, config.train, FedKnowSettings(k=100, integrator="off"))
    reached = 0
    for place in sorted(places):
        file = states / f"state{place}.pt" if states else None
        if file and file.exists():
            weights, own_state = torch.load(file, weights_only=False)
            main.model.load_state_dict(weights)
            main.load_state_dict(own_state)
            reached = place
        for number in range(reached, place):
            share = share_at(stream, number)
            main.fit(share, Round(1, number))
            main.end_task(share, Round(0, 77 + number))
        reached = place
        if file:
            torch.save((main.model.state_dict(), main.state_dict()), file)
        for watch, settings, note in watches:
            exact = FedKnow(copy.deepcopy(main.model), config.train, settings)
            exact.load_state_dict(main.state_dict())
            watch.restart()
            rounds = [
                watch.round(
                    exact, share_at(stream, place), Round(n, 500 + place + n)
                )
                for n in range(1, 1 + config.train.rounds)
            ]
            note(row(place, rounds))


def share_at(stream: Benchmark, place: int) -> TaskData:
    """Give what the client of a long stream learns from at a place."""
    share = stream.task(place // stream.tasks, place % stream.tasks)
    return TaskData(
        place,
        share.classes,
        share.seen,
        share.train,
        share.test,
        share.is_incremental,
    )


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("cnn6", "resnet18"), default="cnn6")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--last", type=int, default=9, help="number of past tasks to end with"
    )
    parser.add_argument(
        "--past",
        type=int,
        nargs="*",
        default=[],
        help="longer streams instead, timed at these places",
    )
    parser.add_argument(
        "--states",
        type=Path,
        help="folder that keeps the client of --past at its places, for another run",
    )
    parser.add_argument(
        "--learners",
        nargs="+",
        choices=sorted(SETTINGS),
        default=["fedknow"],
        help="whose settings; several only with --past",
    )
    parser.add_argument(
        "--margin", type=float, help="FedKNOW's setting, where not its default"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "results" / "fedknow_step.json"
    )
    return parser.parse_args()


def noting(
    out: Path, key: str, header: dict[str, object]
) -> Callable[[dict[str, object]], None]:
    """Make what prints each row and writes it beside those before it."""
    rows: list[dict[str, object]] = []

    def note(row: dict[str, object]) -> None:
        rows.append(row)
        print(key, json.dumps(row), flush=True)
        measured = header | {"load_at_end": os.getloadavg()[0], "rows": rows}
        results = json.loads(out.read_text()) if out.exists() else {}
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(results | {key: measured}, indent=1) + "\n")

    return note


def watching(
    chosen: argparse.Namespace,
    config: ExperimentConfig,
    stream: Benchmark,
    learner: str,
    margin: dict[str, float],
    header: dict[str, object],
) -> tuple[Stopwatch, FedKnowSettings, Note]:
    """Make what times and notes the steps of one learner's settings."""
    settings = SETTINGS[learner](k=100, **margin)
    key = f"{chosen.model}-{chosen.precision}-{chosen.device}"
    if chosen.past:
        # The epoch after aggregation has steps of another kind.
        settings = settings.model_copy(update={"post_aggregation": "off"})
        key += "-longer"
        key += "" if chosen.width == 1 else f"-width-{chosen.width:g}"
        key += "" if chosen.rounds == 1 else f"-rounds-{chosen.rounds}"
    key += "" if learner == "fedknow" else f"-{learner}"
    key += "" if chosen.margin is None else f"-margin-{chosen.margin:g}"
    contenders = LONG if chosen.past else ()
    watch = Stopwatch(config, stream, chosen.device, settings, contenders)
    return watch, settings, noting(chosen.out, key, header)


def main() -> None:
    chosen = read_options()
    torch.set_num_threads(1)
    if len(chosen.learners) > 1 and not chosen.past:
        raise SystemExit("--learners takes several only with --past")
    margin = {} if chosen.margin is None else {"margin": chosen.margin}
    config = load_preset(
        "paper-cifar100-small" if chosen.model == "cnn6" else "paper-cifar100",
        [
            f"learner={chosen.learners[0]}",
            f"model.name={chosen.model}",
            f"model.width={chosen.width}",
            f"train.precision={chosen.precision}",
            f"train.rounds={chosen.rounds}",
            f"train.epochs={chosen.epochs}",
            "learner.k=100",
            *(f"learner.{name}={value}" for name, value in margin.items()),
        ],
    )
    stream = make_benchmark(config)
    header: dict[str, object] = machine() | {
        "settings": {
            "width": chosen.width,
            "rounds": chosen.rounds,
            "epochs": chosen.epochs,
            "batch": 40,
        },
    }
    watches = [
        watching(chosen, config, stream, learner, margin, header)
        for learner in chosen.learners
    ]
    if chosen.past:
        longer(config, stream, watches, chosen.past, chosen.states)
    else:
        watch, _, note = watches[0]
        paper(config, stream, watch, chosen.last, note)


if __name__ == "__main__":
    main()
