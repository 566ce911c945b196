"""A recorded search for the settings of learners, scored on training samples that were held out."""

from __future__ import annotations

import itertools
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedknow.client.learners import learner_class
from fedknow.client.state import write_atomic
from fedknow.protocols.bounds import check_between
from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.seeds import generator
from fedknow.server.reports.groups import Group
from fedknow.simulations.compare import MOST_SEEDS, Watch, compare, reading_a_summary
from fedknow.simulations.contenders import contenders

__all__ = ["Found", "candidates", "search"]

HOLDOUT = 0.2
"""Fraction of the training samples that settings are chosen by, unless ``data.holdout`` says another.
"""

MOST_CANDIDATES = 10_000
"""Of one learner; no grid has as many."""

Settings = dict[str, float | str]


@dataclass(frozen=True)
class Found:
    """What a search found for one learner.

    Attributes
    ----------
    settings : dict
        The best: highest average accuracy after the last task, then least forgetting, then
        tried first.
    accuracy, forgetting : float
        Theirs on the held-out samples, means over seeds.
    default : float
        Accuracy of the learner's defaults on the same; NaN if that failed.
    runs : int
        Candidates that were scored.
    space : dict
        What was searched.
    """

    settings: Settings
    accuracy: float
    forgetting: float
    default: float
    runs: int
    space: dict[str, list[float | str]]


def candidates(learner: str, limit: int, seed: int) -> list[Settings]:
    """Settings to try: the whole grid of :attr:`~fedknow.client.learners.Learner.search`, or a
    part of it.

    Parameters
    ----------
    learner : str
        Its name.
    limit : int
        At most so many; a larger grid is drawn from without repetition.
    seed : int
        For the draw.

    Returns
    -------
    list of dict
        The learner's defaults come first, whether they are on the grid or not.
    """
    kind = learner_class(learner)
    defaults = {name: getattr(kind.Settings(), name) for name in kind.search}
    grid = [
        dict(zip(kind.search, values, strict=True))
        for values in itertools.product(*kind.search.values())
    ]
    others = [settings for settings in grid if settings != defaults]
    if len(others) >= limit:
        drawn = generator(seed, f"search/{learner}").choice(
            len(others), limit - 1, replace=False
        )
        others = [others[place] for place in sorted(drawn)]
    return [defaults, *others]


def search(
    config: ExperimentConfig,
    learners: Sequence[str],
    limit: int,
    seeds: int,
    out: Path,
    command: str,
    watch: Watch | None = None,
) -> tuple[dict[str, Found], dict[str, str]]:
    """Score candidates for each learner; what an earlier call left in ``out`` is read, or resumed.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment; ``data.holdout`` is set to :data:`HOLDOUT` where it is 0.
    learners : sequence of str
        Names, or ``all`` (:func:`~fedknow.simulations.contenders.contenders`).
    limit : int
        Most candidates a learner.
    seeds : int
        Runs of each candidate, with seeds from ``config.seed`` on.
    out : Path
        Gets a run folder each run, ``search.jsonl`` (one line a candidate) and ``best.toml``,
        whose entries belong into ``client/learners/best/<preset>.toml``. What the two hold of
        other learners already stays.
    command : str
        What was called, for the record.
    watch : callable, optional
        Gives each run its observer.

    Returns
    -------
    tuple of dict
        What was found, by learner; and the candidates that failed, by folder name, with the
        reasons.

    Raises
    ------
    ConfigError
        Before anything is run, if something does not fit.
    """
    check_between("--runs", limit, 1, MOST_CANDIDATES)
    check_between("--seeds", seeds, 1, MOST_SEEDS)
    if not config.data.holdout:
        config = config.model_copy(
            update={"data": config.data.model_copy(update={"holdout": HOLDOUT})}
        )
    names, _ = contenders(config, learners)
    if settled := [name for name in names if "@" in name]:
        raise ConfigError(
            f"learners = {settled[0]!r}: settings are what is searched; give the name alone"
        )
    tried = {name: candidates(name, limit, config.seed) for name in names}
    lines, tree = _found_before(
        out, names
    )  # before hours of runs: a damaged file is refused at once
    result = compare(
        config,
        [_spelled(n, s) for n in names for s in tried[n]],
        seeds,
        out,
        watch,
        lean=True,
    )
    found: dict[str, Found] = {}
    record = out / "search.jsonl"
    for name in names:
        scored = [
            (
                settings,
                members.estimate("accuracy").mean,
                members.estimate("forgetting").mean,
            )
            for settings in tried[name]
            for members in result.groups
            if _is(members, name, settings)
        ]
        lines += [
            {
                "learner": name,
                "settings": settings,
                "accuracy": accuracy,
                "forgetting": _or_none(forgetting),
            }
            for settings, accuracy, forgetting in scored
        ]
        if scored:
            best, accuracy, forgetting = min(
                scored, key=lambda one: (-one[1], 0.0 if math.isnan(one[2]) else one[2])
            )
            default = next(
                (score for settings, score, _ in scored if settings == tried[name][0]),
                math.nan,
            )
            space = {
                key: list(values) for key, values in learner_class(name).search.items()
            }
            found[name] = Found(best, accuracy, forgetting, default, len(scored), space)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(record, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    write_atomic(out / "best.toml", _as_toml(found, command, tree))
    return found, result.failures


def _spelled(name: str, settings: Settings) -> str:
    values = "+".join(
        f"{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in settings.items()
    )
    return f"{name}@{values}" if values else name


def _is(members: Group, name: str, settings: Settings) -> bool:
    learner = members.runs[0].config.learner
    return learner.name == name and settings.items() <= learner.options.items()


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _found_before(
    out: Path, names: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Read what earlier searches in a folder found for other learners: lines, and best settings."""
    record, best = out / "search.jsonl", out / "best.toml"
    lines: list[dict[str, Any]] = []
    tree: dict[str, dict[str, Any]] = {}
    if record.is_file():
        with reading_a_summary(record):
            lines = [
                json.loads(line) for line in record.read_text("utf-8").splitlines()
            ]
            lines = [line for line in lines if line["learner"] not in names]
    if best.is_file():
        with reading_a_summary(best):
            tree = tomllib.loads(best.read_text("utf-8"))
    return lines, tree


def _as_toml(
    found: Mapping[str, Found], command: str, before: Mapping[str, Any]
) -> bytes:
    tree = dict(before)
    for name, best in found.items():
        numbers = {
            "accuracy": best.accuracy,
            "default": best.default,
            "forgetting": best.forgetting,
        }
        tree[name] = {
            "command": command,
            "runs": best.runs,
            **{
                key: round(value, 4)
                for key, value in numbers.items()
                if not math.isnan(value)
            },
            "settings": best.settings,
            "space": best.space,
        }
    return tomli_w.dumps(dict(sorted(tree.items()))).encode()
