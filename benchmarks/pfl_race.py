"""Compare client updates a second with pfl-research.

The set-up is that of its CIFAR-10 benchmark: 1,000 users of 50 images, cohorts of 50.

    python3 -m venv /tmp/pfl && /tmp/pfl/bin/pip install torch==2.13.0 pfl==0.6.0
    python benchmarks/pfl_race.py --pfl /tmp/pfl/bin/python
    python benchmarks/pfl_race.py --pfl /tmp/pfl/bin/python --device cuda
    python benchmarks/pfl_race.py --pfl /tmp/pfl/bin/python --quick

Both: the same synthetic images of CIFAR-10's shape, pfl's two-layer CNN (1.6 M parameters,
dropout), one local epoch in batches of 10, SGD at 0.1, the mean of the cohort, the same
PyTorch, one thread a process, in turn on the same machine; and the same with a dense network of
55,050 parameters on images of MNIST's shape (60 a user), where frameworks cost more than
arithmetic and ours may train clients at once (`engine.vectorize = "auto"`). The first round is
warm-up and not counted; neither is scoring. What is not alike: pfl takes a user's samples in
order and reports nothing of its training; we shuffle them, check each update, report loss and
accuracy of the training, and write a checkpoint after every round. We use channels-last
convolutions (our default); `--channels-last` gives them to pfl too. Two processes are our Ray
workers and pfl's own torch.distributed. `cpu_ratio` is that of processor seconds, which other
work on the machine disturbs less.

With ``--device cuda`` (`engine.device`) one simulated client is too small for a GPU, so there
the cohort trains at once with its weights stacked (`engine.vectorize`), and neither side has
dropout. This has never been run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _common import HERE, RESULTS, give, in_turn, median, ratio, spent, write

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fedknow.protocols.config import ExperimentConfig
    from fedknow.server.run.events import Event

SIZE = {"users": 1000, "cohort": 50}
MODELS: dict[str, dict[str, Any]] = {
    "two_layer_cnn": {
        "data": "cifar10_like",
        "shape": (3, 32, 32),
        "samples": 50,
        "rounds": 6,
    },
    "dnn": {
        "data": "mnist_like",
        "shape": (1, 28, 28),
        "samples": 60,
        "rounds": 30,
    },
}
"""Of ``parts.py``: the data of each, how many images a user has of them, and the rounds that are
counted."""


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pfl",
        type=Path,
        help="the Python of an environment that has pfl; without, we run alone",
    )
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS)
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--channels-last", action="store_true", help="for pfl too"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="cohorts of 4, two rounds, one repeat, one process",
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run all cases, print a table and write the results."""
    args = read_options()
    if args.case:
        case = json.loads(args.case)
        give(simulated(**case))
        return
    is_cpu = args.device == "cpu"
    name = "pfl_race.json" if is_cpu else f"pfl_race_{args.device}.json"
    results = {}
    print(
        f"{'model':14} {'processes':>9} {'':31} {'updates/s':>10} {'ratio':>6}  accuracy"
    )
    for model in args.models:
        for processes in args.processes if is_cpu and not args.quick else [1]:
            size = SIZE | {"rounds": MODELS[model]["rounds"]}
            if args.quick:
                size = SIZE | {"rounds": 2, "cohort": 4}
            contenders = race(args, model, processes, size)
            results[f"{model}, {processes}"] = size | {
                "samples": MODELS[model]["samples"],
                "contenders": contenders,
            }
            for contender, row in contenders.items():
                times = f"{row['ratio']:6.2f}" if "ratio" in row else " " * 6
                print(
                    f"{model:14} {processes:9} {contender:31} "
                    f"{row['updates_per_second']:10.1f} {times}  "
                    f"{row['accuracy']:.3f}",
                    flush=True,
                )
            # After each case, as all of them take long.
            write(
                args.out or RESULTS / name,
                results,
                device=args.device,
                channels_last_for_pfl=args.channels_last,
            )


def race(
    args: argparse.Namespace, model: str, processes: int, size: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """Run the contenders in turn, and return the figures of each."""
    cases = commands(args, model, processes, size)
    repeats = 1 if args.quick else args.repeats
    runs = in_turn(cases, repeats, **environment(args.device))
    updates = size["cohort"] * size["rounds"]
    rows = {}
    for name, contender_runs in runs.items():
        row: dict[str, Any] = {
            "updates_per_second": updates / median(contender_runs, "seconds"),
            "runs": contender_runs,
        }
        if "pfl" in runs:
            row["ratio"] = ratio(runs["pfl"], contender_runs, "seconds")
        # The processor seconds of workers are not counted.
        if "pfl" in runs and processes == 1:
            row["cpu_ratio"] = ratio(runs["pfl"], contender_runs, "cpu")
        row["accuracy"] = median(contender_runs, "accuracy")
        rows[name] = row
    return rows


def commands(
    args: argparse.Namespace, model: str, processes: int, size: Mapping[str, int]
) -> dict[str, list[str]]:
    """Return the command of each contender."""
    cases = {}
    if args.pfl:
        cases["pfl"] = pfl_command(args, model, processes, size)
    for name, settings in our_contenders(model, args.device).items():
        case = {
            "device": args.device,
            "model": model,
            "processes": processes,
            **settings,
            **size,
        }
        cases[name] = [sys.executable, __file__, "--case", json.dumps(case)]
    return cases


def pfl_command(
    args: argparse.Namespace, model: str, processes: int, size: Mapping[str, int]
) -> list[str]:
    """Return the command of pfl-research's side."""
    command = [str(args.pfl)]
    if processes > 1:
        command += ["-m", "torch.distributed.run"]
        command += ["--nproc-per-node", str(processes)]
    command.append(str(HERE / "pfl_client.py"))
    for key, value in size.items():
        command += [f"--{key}", str(value)]
    command += ["--model", model, "--samples", str(MODELS[model]["samples"])]
    command += ["--shape", *map(str, MODELS[model]["shape"])]
    if args.channels_last:
        command.append("--channels-last")
    if args.device == "cuda":
        command.append("--no-dropout")
    return command


def our_contenders(model: str, device: str) -> dict[str, dict[str, Any]]:
    """Return the settings of each way in which we run."""
    if device == "cuda":
        stacked = {"vectorize": "on", "dropout": False}
        return {
            "ours": stacked,
            "ours, running mean": stacked | {"running_mean": True},
        }
    name = "ours, its dropout"
    settings: dict[str, Any] = {"vectorize": "off", "quick": True}
    if model == "dnn":
        name = "ours, vectorized"
        settings = {"vectorize": "auto"}
    return {
        "ours": {"vectorize": "off"},
        name: settings,
        f"{name}, running mean": settings | {"running_mean": True},
    }


def environment(device: str) -> dict[str, str]:
    """Pfl takes a GPU wherever it sees one."""
    return {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}


def configuration(
    model: str,
    processes: int,
    users: int,
    cohort: int,
    rounds: int,
    vectorize: str,
    dropout: bool = True,
    quick: bool = False,
    running_mean: bool = False,
    device: str = "cpu",
) -> ExperimentConfig:
    """Return the experiment; its users share the whole data set."""
    from fedknow.client.learners import resolve
    from fedknow.protocols.config import read_config

    data = f"parts:{MODELS[model]['data']}"
    network = f"name = 'parts:{model}', dropout = {str(dropout).lower()}"
    # With `quick` the model has our dropout layer; other models have no such setting.
    if quick:
        network += ", quick = true"
    changes = [
        f"data={{name = '{data}', tasks = 1, clients = {users}, partition = 'iid'}}",
        f"model={{{network}}}",
        f"train={{rounds = {rounds + 1}, epochs = 1, batch_size = 10, optimizer = 'sgd'}}",
        "train.lr=0.1",
        "train.weight_decay=0",
        f"strategy={{name = 'fedavg', fraction_train = {cohort / users}}}",
        f"engine={{backend = '{'inline' if processes == 1 else 'ray'}', workers = {processes}}}",
        f"engine.device={device}",
        f"engine.vectorize={vectorize}",
        f"engine.running_mean={str(running_mean).lower()}",
        "learner=finetune",
    ]
    return resolve(read_config({}, changes))


def simulated(
    model: str,
    processes: int,
    users: int,
    cohort: int,
    rounds: int,
    **options: Any,
) -> dict[str, Any]:
    """Run the whole experiment here.

    Time counts from the end of the first round to that of the last.
    """
    from fedknow.client.host import one_thread
    from fedknow.simulations.simulate import simulate

    ends: list[tuple[float, float]] = []

    def happened(event: Event) -> None:
        if event.event == "round":
            ends.append((time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory() as folder, one_thread():
        config = configuration(model, processes, users, cohort, rounds, **options)
        result = simulate(config, Path(folder) / "run", observers=[happened])
    return spent(ends) | {"accuracy": result.summary["accuracy"]}


if __name__ == "__main__":
    main()
