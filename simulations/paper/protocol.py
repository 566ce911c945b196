"""The paper's experiments as configurations, whole or scaled down."""

from __future__ import annotations

import math
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from fedknow.protocols.config import (
    ConfigError,
    ExperimentConfig,
    closest,
    parse_override,
    read_config,
)
from fedknow.simulations.fleet.devices import assign

__all__ = [
    "Scaled",
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


class Scaled(NamedTuple):
    """A number that is scaled: as it is run, and as the paper has it."""

    measured: int
    published: int

    @property
    def share(self) -> float:
        """The share of the paper's number."""
        return self.measured / self.published

    @property
    def factor(self) -> float:
        """By how much the paper's number is larger."""
        return self.published / self.measured


@dataclass(frozen=True)
class Variant:
    """One comparison of an experiment.

    Attributes
    ----------
    name : str
        Its name within the experiment; the data set's name where it is the only one.
    config : ExperimentConfig
        The experiment as it is run.
    paper : ExperimentConfig
        The experiment as the paper has it: unscaled, without changes.
    """

    name: str
    config: ExperimentConfig
    paper: ExperimentConfig

    @property
    def scaled(self) -> dict[str, Scaled]:
        """The numbers that are scaled, by key."""
        scaled = {}
        for section, key in SCALED:
            measured = getattr(getattr(self.config, section), key)
            published = getattr(getattr(self.paper, section), key)
            scaled[f"{section}.{key}"] = Scaled(measured, published)
        return scaled

    @property
    def share(self) -> float:
        """The share of the paper's training.

        It is the product of the shares of rounds, epochs, clients and tasks.
        """
        return math.prod(number.share for number in self.scaled.values())

    def __str__(self) -> str:
        parts = []
        for key, number in self.scaled.items():
            _, _, name = key.partition(".")
            parts.append(f"{number.measured} of {number.published} {name}")
        devices = devices_of(self.config).items()
        fleet = ", ".join(f"{count} {device}" for device, count in devices)
        share = share_text(self.share)
        return (
            f"{self.name}: {share} of the paper's training ({', '.join(parts)}) "
            f"on {fleet or 'no fleet'}"
        )


def devices_of(config: ExperimentConfig) -> Counter[str]:
    """Count the clients of each device."""
    if not config.fleet.devices:
        return Counter()
    return Counter(assign(config.fleet, config.data.clients, config.seed))


def share_text(value: float) -> str:
    """Write a share with three digits."""
    return f"{100 * value:.3g}%"


def experiments() -> dict[str, str]:
    """List the paper's experiments, with a line about each."""
    return {
        name: spec["title"] for name, spec in paper_table()["experiments"].items()
    }


def variants(
    experiment: str,
    data: str = "",
    scale: float = 1.0,
    changes: Sequence[str] = (),
    seed: int = 0,
) -> list[Variant]:
    """List the comparisons of an experiment.

    ``scale`` is the wanted share of the paper's training. Rounds of a task and epochs of a
    round shrink by its root each. Where both have come to one, clients and tasks shrink
    likewise, to no fewer than two. As these are whole numbers, the true share differs:
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
    # Written so that NaN is refused too.
    if not 0 < scale <= 1:
        raise ConfigError(f"--scale {scale:g}: give a number above 0, at most 1")
    chosen = []
    for name, special in spec.get("variants", {"all": {}}).items():
        full = _full(experiment, data, special, seed)
        config = _configured(experiment, _scaled(full, scale), changes)
        paper = _configured(experiment, full, ())
        chosen.append(Variant(data if name == "all" else name, config, paper))
    return chosen


def _full(experiment: str, data: str, special: Tree, seed: int) -> Tree:
    """Return a variant's configuration without its fleet, unscaled."""
    table = paper_table()
    work = table["workloads"][data]
    model = special.get("model", work["model"])
    # A model with options is a table.
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
    """Read a configuration, with a fleet for its number of clients."""
    table = paper_table()
    source = f"experiment {experiment}"
    # Read twice: a change may set the number of clients, from which the fleet follows.
    clients = read_config(tree, changes, source).data.clients
    fleet_name = table["experiments"][experiment]["fleet"]
    devices = mixed(table["fleets"][fleet_name], clients)
    fleet = {"fleet": {**table["links"], "devices": devices}}
    return read_config(_with_share(tree, changes) | fleet, changes, source)


def mixed(devices: Sequence[str], clients: int) -> list[str]:
    """Return as many devices as clients, in the proportions of a list.

    The list stays as it is where its length divides their number. Otherwise each kind has at
    least one, without the rarest where clients are too few. Each further one is of the kind
    that is furthest below its share.

    Parameters
    ----------
    devices : sequence of str
        The whole fleet, or the part that repeats in it.
    clients : int
        How many clients the fleet is to have.

    Returns
    -------
    list of str
        To be repeated until every client has one.
    """
    # The simulation repeats the list by itself.
    if clients % len(devices) == 0:
        return list(devices)
    counts = Counter(devices)
    # The most common kinds first, so that only rare ones are left out.
    chosen = Counter({kind: 1 for kind, _ in counts.most_common(clients)})

    def shortage(kind: str) -> float:
        return counts[kind] * clients / len(devices) - chosen[kind]

    while chosen.total() < clients:
        chosen[max(counts, key=shortage)] += 1
    fleet: list[str] = []
    # In the order of the list, whatever order the kinds were chosen in.
    for kind in counts:
        fleet += [kind] * chosen[kind]
    return fleet


@cache
def paper_table() -> Tree:
    """Read ``paper.toml``: experiments, their parts, and the paper's values."""
    path = files("fedknow.simulations.paper") / "paper.toml"
    return tomllib.loads(path.read_text("utf-8"))


def entry(table: Mapping[str, Tree], name: str, kind: str) -> Tree:
    """Return an entry of a table by name.

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
    """Shrink rounds and epochs, and once these are one, clients and tasks."""
    train, share = _shrunk(full["train"], ("rounds", "epochs"), scale, minimum=1)
    data = full["data"]
    if train["rounds"] == train["epochs"] == 1:
        remaining = min(1.0, scale / share)
        data, _ = _shrunk(data, ("clients", "tasks"), remaining, minimum=2)
    return full | {"train": train, "data": data}


def _shrunk(
    tree: Tree,
    keys: tuple[str, str],
    factor: float,
    minimum: int,
) -> tuple[Tree, float]:
    """Shrink two numbers by a factor together.

    Returns
    -------
    tree : dict
        With the smaller numbers.
    share : float
        The factor that whole numbers allow.
    """
    # Each of the two by the root, so that the product shrinks by the factor.
    root = math.sqrt(factor)
    smaller = {}
    for key in keys:
        # A number that is below the minimum already stays.
        smaller[key] = min(tree[key], max(minimum, round(tree[key] * root)))
    share = math.prod(smaller.values()) / math.prod(tree[key] for key in keys)
    return tree | smaller, share


def _with_share(tree: Tree, changes: Iterable[str]) -> Tree:
    """Make clients' shares disjoint where there are enough for all.

    A class makes ten shares of a tenth of its samples.
    """
    data = dict(tree["data"])
    for path, value in map(parse_override, changes):
        if path[0] == "data":
            data[path[-1]] = value
    classes = data.get("classes_per_task", 5)
    # Shares of a task that all clients together need at most.
    demand = data["clients"] * data.get("classes_max", min(5, classes))
    share = "disjoint" if demand <= 10 * classes else "overlapping"
    # A share that the table sets itself goes before.
    return tree | {"data": {"share": share, **tree["data"]}}
