"""Run a comparison under the protocol of ADR 12 and ADR 13.

    python benchmarks/protocol.py digits
    python benchmarks/protocol.py har-wharf --data-dir DIR
    python benchmarks/protocol.py --list
    python benchmarks/protocol.py --ranks    # plot mean ranks over the streams measured so far

Where a stream allows more than one candidate, settings are searched with seed 1000 on held-out
training samples. The methods then run with seeds from 2001 on. Given again, the command reads
what is finished and goes on. After each seed the numbers are written to
``results/protocol_STREAM.json``, of which ``page.py`` makes the table.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# First, as it sets the number of threads before torch is imported.
from _common import HERE, RESULTS, machine
from _protocol_tables import ranks_over_streams

from fedknow.client.learners import learner_class
from fedknow.protocols.config import ExperimentConfig
from fedknow.server.reports.rank_plot import rank_plot
from fedknow.server.reports.summary import summarise
from fedknow.server.run.events import Event
from fedknow.server.run.folder import RunFolder
from fedknow.server.run.recorder import Subscriber
from fedknow.simulations.compare import RunSeries
from fedknow.simulations.presets import load_preset
from fedknow.simulations.search import SearchRequest, candidates, search

SEARCH_SEED = 1000
FIRST_SEED = 2001
FIGURES = (
    "accuracy",
    "accuracy_global",
    "forgetting",
    "forgetting_relative",
    "samples",
    "knowledge_bytes",
    "server_bytes",
    "bytes",
    "flops",
    "seconds",
    "peak_memory_mb",
    "client_memory_bytes",
)
VARIANTS = {
    "fedknow-sum": ("fedknow", {"integrator": "sum"}),
    "fedknow-off": ("fedknow", {"integrator": "off"}),
}
"""Methods that take the settings chosen for another one, and change some of them."""

Settings = dict[str, Any]


@dataclass(frozen=True)
class Stream:
    """A stream of the protocol.

    Attributes
    ----------
    preset : str
        Its preset.
    methods : tuple of str
        Learners, and names of :data:`VARIANTS`.
    candidates : int
        Settings that each learner may try, its defaults among them.
    seeds : int
        Reported seeds, from 2001 on.
    """

    preset: str
    methods: tuple[str, ...]
    candidates: int
    seeds: int


COMMON = ("fedknow", "fedknow-plus", "er", "lwf", "ewc", "fedrep", "fedavg")
"""Methods on every stream, so that they can be ranked over streams."""
MORE = (
    "fedknow-sum",
    "fedknow-off",
    "gem",
    "mas",
    "online-ewc",
    "fedweit",
    "joint",
    "joint-equal",
)
STREAMS = {
    "digits": Stream("digits", COMMON + MORE, candidates=1, seeds=3),
    "speech-digits": Stream("speech-digits", COMMON, candidates=1, seeds=3),
    "clinc150": Stream("clinc150", COMMON, candidates=1, seeds=3),
    "har-wharf": Stream("har-wharf", COMMON, candidates=1, seeds=3),
    "cifar100-pretrained": Stream(
        "cifar100-pretrained", COMMON, candidates=1, seeds=3
    ),
    "speech-digits-searched": Stream(
        "speech-digits", COMMON, candidates=3, seeds=3
    ),
}


def main() -> None:
    """Run one stream, or list all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stream", nargs="?", choices=list(STREAMS))
    parser.add_argument("--list", action="store_true", help="list the streams")
    parser.add_argument(
        "--common", action="store_true", help="only methods of all streams"
    )
    parser.add_argument("--ranks", action="store_true", help="plot the ranks")
    parser.add_argument("--data-dir", default="")
    parser.add_argument("--runs", type=Path, default=Path("runs/protocol"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.ranks:
        plot_ranks(args.results)
        return
    if args.list or args.stream is None:
        for name, stream in STREAMS.items():
            print(name, json.dumps(asdict(stream)))
        return
    stream = STREAMS[args.stream]
    if args.common:
        stream = replace(stream, methods=COMMON)
    folder = args.runs / args.stream
    chosen = find_settings(stream, args.data_dir, folder / "search")
    for seeds in range(1, stream.seeds + 1):
        series, failures = report(
            stream, chosen, args.data_dir, folder / "runs", seeds
        )
        numbers = collect(stream, chosen, series, failures)
        name = args.stream.replace("-", "_")
        write(args.results / f"protocol_{name}.json", numbers)


def plot_ranks(results: Path) -> None:
    """Plot mean ranks by accuracy over the streams in a folder."""
    ranked = ranks_over_streams(results, "accuracy")
    if ranked is None:
        raise SystemExit("ranks need two streams; run two of them first")
    path = HERE.parent / "docs" / "assets" / "ranks.png"
    path.write_bytes(rank_plot(ranked[1], "accuracy").png())
    print(f"written to {path}")


def experiment(preset: str, data_dir: str, seed: int) -> ExperimentConfig:
    """Load a preset with the classes in an order of the seed."""
    settings = [
        "data.class_order=shuffled",
        "engine.backend=inline",
        f"seed={seed}",
    ]
    if data_dir:
        settings.append(f"data.dir={data_dir}")
    return load_preset(preset, settings)


def find_settings(
    stream: Stream, data_dir: str, out: Path
) -> dict[str, dict[str, Any]]:
    """Give the entry of each method, with settings searched where asked."""
    learners = [name for name in stream.methods if name not in VARIANTS]
    best: dict[str, Any] = {}
    tried: list[dict[str, Any]] = []
    # A single candidate needs no search: it is the defaults.
    if stream.candidates > 1:
        best, tried = _searched(stream, learners, data_dir, out)
    entries = {}
    for name in learners:
        settings = candidates(name, stream.candidates, SEARCH_SEED)
        entries[name] = {
            "learner": name,
            "settings": best[name]["settings"] if name in best else settings[0],
            "candidates": len(settings),
            "tried": [line for line in tried if line["learner"] == name],
        }
    for name in stream.methods:
        if name in VARIANTS:
            learner, changes = VARIANTS[name]
            entries[name] = {
                "learner": learner,
                "settings": entries[learner]["settings"] | changes,
                "candidates": 0,
                "tried": [],
            }
    return {name: entries[name] for name in stream.methods}


def _searched(
    stream: Stream, learners: Sequence[str], data_dir: str, out: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Search, and read the best settings and all that were tried."""
    config = experiment(stream.preset, data_dir, SEARCH_SEED)
    request = SearchRequest(learners, stream.candidates)
    _, failures = search(config, request, out, timed)
    for name, reason in failures.items():
        print("failed in the search:", name, reason, flush=True)
    # From the files: an earlier call may have made some of them.
    best = tomllib.loads((out / "best.toml").read_text("utf-8"))
    lines = (out / "search.jsonl").read_text("utf-8").splitlines()
    return best, [json.loads(line) for line in lines]


def method(learner: str, settings: Mapping[str, Any]) -> str:
    """Write a learner and what differs from its defaults as a method."""
    defaults = learner_class(learner).Settings()
    changes = []
    for key, value in settings.items():
        if getattr(defaults, key) != value:
            # As a configuration reads it, where true has a small letter.
            text = value if isinstance(value, str) else json.dumps(value)
            changes.append(f"{key}={text}")
    return f"{learner}@{'+'.join(changes)}" if changes else learner


def report(
    stream: Stream,
    chosen: Mapping[str, Mapping[str, Any]],
    data_dir: str,
    out: Path,
    seeds: int,
) -> tuple[RunSeries, dict[str, str]]:
    """Run every method with the first so many reported seeds."""
    config = experiment(stream.preset, data_dir, FIRST_SEED)
    methods = _distinct(chosen)
    series = RunSeries.plan(config, list(methods), seeds, out)
    return series, series.run(timed, is_lean=True)


def _distinct(chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Give the names of each method; two names may come to one method."""
    names: dict[str, list[str]] = {}
    for name, entry in chosen.items():
        key = method(entry["learner"], entry["settings"])
        names.setdefault(key, []).append(name)
    return names


def collect(
    stream: Stream,
    chosen: Mapping[str, Mapping[str, Any]],
    series: RunSeries,
    failures: Mapping[str, str],
) -> dict[str, Any]:
    """Gather the numbers of all runs by the names of the methods."""
    names = _distinct(chosen)
    methods = {name: {**entry, "runs": []} for name, entry in chosen.items()}
    stride = len(series.methods)
    for place, path in enumerate(series.plans):
        if path.name in failures:
            continue
        run = summarise(RunFolder.open(path))
        measures = run.measures()
        figures = {key: _finite(measures[key]) for key in FIGURES}
        for name in names[series.methods[place % stride]]:
            methods[name]["runs"].append({"seed": run.config.seed, **figures})
    return {
        "about": machine() | {"commit": commit()},
        "stream": asdict(stream),
        "search_seed": SEARCH_SEED,
        "methods": methods,
        "failures": dict(failures),
    }


def _finite(value: float) -> float | None:
    # JSON has no NaN.
    return value if math.isfinite(value) else None


def commit() -> str:
    """Name the commit of the working tree, and whether it was changed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    output = subprocess.run(
        command, cwd=HERE, capture_output=True, text=True, check=True
    )
    return output.stdout.strip()


def write(path: Path, numbers: Mapping[str, Any]) -> None:
    """Write the numbers of a stream."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(numbers, indent=1, allow_nan=False)
    path.write_text(text + "\n", "utf-8")
    print(f"written to {path}", flush=True)


@contextmanager
def timed(
    config: ExperimentConfig, title: str, path: Path
) -> Iterator[Subscriber]:
    """Print a run's title and how long it took."""
    begin = time.perf_counter()

    def ignore(event: Event) -> None:
        """Watch nothing."""

    yield ignore
    print(f"{time.perf_counter() - begin:7.1f} s  {title}", flush=True)


if __name__ == "__main__":
    main()
