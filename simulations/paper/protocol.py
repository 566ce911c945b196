"""The paper's experiments as configurations, whole or scaled down."""

from __future__ import annotations

import math
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from fedknow.protocols.config import (
    ConfigError,
    ExperimentConfig,
    closest,
    parse_override,
    read_config,
)
from fedknow.simulations.fleet.devices import assign

__all__ = [
    "Tree",
    "Variant",
    "devices_of",
    "entry",
    "experiments",
    "mixed",
    "paper_table",
    "share_text",
    "variants",
]

Tree = dict[str, Any]

SCALED = (
    ("train", "rounds"),
    ("train", "epochs"),
    ("data", "clients"),
    ("data", "tasks"),
)
"""Numbers that are scaled: rounds of a task, epochs of a round, then clients and tasks."""


@dataclass(frozen=True)
class Variant:
    """One comparison of an experiment.

    Attributes
    ----------
    name : str
        What tells it from the experiment's others; the data set's name where there are none.
    config : ExperimentConfig
        As it is run.
    paper : ExperimentConfig
        As the paper has it: unscaled, without changes.
    """

    name: str
    config: ExperimentConfig
    paper: ExperimentConfig

    @property
    def scaled(self) -> dict[str, tuple[int, int]]:
        """Count what is scaled, in this run and in the paper."""
        return {
            f"{section}.{key}": (
                getattr(getattr(self.config, section), key),
                getattr(getattr(self.paper, section), key),
            )
            for section, key in SCALED
        }

    @property
    def share(self) -> float:
        """Compute the share of the paper's training.

        It is the product of the shares of rounds, epochs, clients and tasks.
        """
        return math.prod(ours / papers for ours, papers in self.scaled.values())

    def __str__(self) -> str:
        parts = ", ".join(
            f"{ours} of {papers} {key.partition('.')[2]}"
            for key, (ours, papers) in self.scaled.items()
        )
        devices = devices_of(self.config).items()
        fleet = (
            ", ".join(f"{count} {device}" for device, count in devices) or "no fleet"
        )
        share = share_text(self.share)
        return f"{self.name}: {share} of the paper's training ({parts}) on {fleet}"


def devices_of(config: ExperimentConfig) -> Counter[str]:
    """Count the clients of each device."""
    if not config.fleet.devices:
        return Counter()
    return Counter(assign(config.fleet, config.data.clients, config.seed))


def share_text(value: float) -> str:
    """Write a share with three digits."""
    return f"{100 * value:.3g}%"


def experiments() -> dict[str, str]:
    """Give the paper's experiments, with a line about each."""
    return {name: spec["title"] for name, spec in paper_table()["experiments"].items()}


def variants(
    experiment: str,
    data: str = "",
    scale: float = 1.0,
    changes: Sequence[str] = (),
    seed: int = 0,
) -> list[Variant]:
    """Give the comparisons of an experiment.

    ``scale`` is the share of the paper's training that is to be left. Rounds of a task and epochs
    of a round shrink by its root each. Where both have come to one, clients and tasks shrink
    likewise, to no fewer than two. As these are whole numbers, what is left is another share:
    :attr:`Variant.share`. A fleet keeps its mix (:func:`mixed`).

    Parameters
    ----------
    experiment : str
        Such as ``"5.1"``.
    data : str
        A data set of the paper; empty: the experiment's own.
    scale : float
        Above 0, at most 1.
    changes : sequence of str
        ``key=value``, applied last.
    seed : int
        The seed.

    Raises
    ------
    ConfigError
        If there is no such experiment or data set, the scale is out of range, or a change is
        refused.
    """
    table = paper_table()
    spec = entry(table["experiments"], experiment, "experiment")
    data = data or spec["data"]
    entry(table["workloads"], data, "--data")
    if not 0 < scale <= 1:
        raise ConfigError(f"--scale {scale:g}: give a number above 0, at most 1")
    found = []
    for name, special in spec.get("variants", {"all": {}}).items():
        full = _full(experiment, data, special, seed)
        config = _configured(experiment, _scaled(full, scale), changes)
        papers = _configured(experiment, full, ())
        found.append(Variant(data if name == "all" else name, config, papers))
    return found


def _full(experiment: str, data: str, special: Tree, seed: int) -> Tree:
    """Give a variant's configuration without its fleet, unscaled."""
    table = paper_table()
    work = table["workloads"][data]
    model = special.get("model", work["model"])
    model_name = model if isinstance(model, str) else model["name"]
    network = table["networks"].get(model_name, table["networks"]["others"])
    clients = {"name": data, "clients": table["clients"]}
    return {
        "name": f"paper-{experiment}-{data}",
        "seed": seed,
        "data": clients | work["data"] | special.get("data", {}),
        "model": model,
        "train": {"rounds": table["rounds"], **network},
        "learner": {"name": "fedknow", **table["learner"]["fedknow"]},
        "strategy": {"name": "fedavg", "fraction": table["fraction"]},
    }


def _configured(
    experiment: str, tree: Tree, changes: Sequence[str]
) -> ExperimentConfig:
    """Read a configuration with the experiment's fleet for as many clients as it has."""
    table = paper_table()
    source = f"experiment {experiment}"
    clients = read_config(tree, changes, source).data.clients
    devices = mixed(table["fleets"][table["experiments"][experiment]["fleet"]], clients)
    fleet = {"fleet": {**table["links"], "devices": devices}}
    return read_config(_shared(tree, changes) | fleet, changes, source)


def mixed(devices: Sequence[str], clients: int) -> list[str]:
    """Give as many devices as there are clients, in the proportions of a list.

    The list stays as it is where it goes into their number. Otherwise each kind has at least one,
    the rarest left out where clients are too few. Each further one is of the kind that lacks most
    of its share.

    Parameters
    ----------
    devices : sequence of str
        The whole fleet, or what is repeated in it.
    clients : int
        How many clients the fleet is to have.

    Returns
    -------
    list of str
        To be repeated until every client has one.
    """
    if clients % len(devices) == 0:
        return list(devices)
    whole = Counter(devices)
    taken = Counter({kind: 1 for kind, _ in whole.most_common(clients)})

    def lacks(kind: str) -> float:
        return whole[kind] * clients / len(devices) - taken[kind]

    while taken.total() < clients:
        taken[max(whole, key=lacks)] += 1
    return [kind for kind in whole for _ in range(taken[kind])]


@cache
def paper_table() -> Tree:
    """Read ``paper.toml``: experiments, their parts, and the paper's values."""
    return tomllib.loads(
        (files("fedknow.simulations.paper") / "paper.toml").read_text("utf-8")
    )


def entry(table: Mapping[str, Tree], name: str, kind: str) -> Tree:
    """Give an entry of a table by name.

    Raises
    ------
    ConfigError
        If there is none, with the names that there are.
    """
    if name not in table:
        names = f"{closest(name, table)}; known: {', '.join(table)}"
        raise ConfigError(f"{kind} {name!r}: there is none{names}")
    return table[name]


def _scaled(full: Tree, scale: float) -> Tree:
    train, done = _shrunk(full["train"], ("rounds", "epochs"), scale, least=1)
    data = full["data"]
    if train["rounds"] == train["epochs"] == 1:
        data, _ = _shrunk(data, ("clients", "tasks"), min(1.0, scale / done), least=2)
    return full | {"train": train, "data": data}


def _shrunk(
    tree: Tree, keys: tuple[str, str], factor: float, least: int
) -> tuple[Tree, float]:
    """Shrink two numbers by a factor together; give also by how much they did."""
    root = math.sqrt(factor)
    smaller = {key: min(tree[key], max(least, round(tree[key] * root))) for key in keys}
    done = math.prod(smaller.values()) / math.prod(tree[key] for key in keys)
    return tree | smaller, done


def _shared(tree: Tree, changes: Iterable[str]) -> Tree:
    """Make clients' shares disjoint where there are enough for all.

    A class makes ten shares of a tenth of its samples.
    """
    overrides = {
        path[-1]: value
        for path, value in map(parse_override, changes)
        if path[0] == "data"
    }
    data = {**tree["data"], **overrides}
    classes = data.get("classes_per_task", 5)
    needed = data["clients"] * data.get("classes_max", min(5, classes))
    share = "disjoint" if needed <= 10 * classes else "overlapping"
    return tree | {"data": {"share": share, **tree["data"]}}
