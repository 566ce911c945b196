"""A recorded search for the settings of learners, on held-out samples."""

from __future__ import annotations

import itertools
import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedknow.client.learners import learner_class
from fedknow.protocols.bounds import check_between
from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.files import write_atomic
from fedknow.protocols.seeds import generator
from fedknow.server.reports.groups import Group
from fedknow.simulations.compare import MAX_SEEDS, RunSeries, Watch
from fedknow.simulations.contenders import contenders
from fedknow.simulations.records import refuse_damaged, write_numbers

__all__ = [
    "BestSettings",
    "SearchRequest",
    "candidates",
    "count_runs",
    "search",
    "with_holdout",
]

HOLDOUT = 0.2
"""Fraction of the training samples that score settings, unless ``data.holdout`` is set."""

MAX_CANDIDATES = 10_000
"""Candidates of one learner; no grid has as many."""

Settings = dict[str, float | str]


@dataclass(frozen=True)
class SearchRequest:
    """The extent of a search.

    Attributes
    ----------
    learners : sequence of str
        Names, or ``all`` (:func:`~fedknow.simulations.contenders.contenders`).
    limit : int
        Candidates of a learner, at most.
    seeds : int
        Runs of each candidate, with seeds from ``config.seed`` on.
    command : str
        The command that asks for it, for the record.
    """

    learners: Sequence[str]
    limit: int
    seeds: int = 1
    command: str = ""


@dataclass(frozen=True)
class BestSettings:
    """The result of a search for one learner.

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
        The values that were searched.
    """

    settings: Settings
    accuracy: float
    forgetting: float
    default: float
    runs: int
    space: dict[str, list[float | str]]


@dataclass(frozen=True)
class _Score:
    """The means of one candidate over its seeds."""

    settings: Settings
    accuracy: float
    forgetting: float

    @property
    def rank(self) -> tuple[float, float]:
        """Sort key: the best candidate is the smallest."""
        # With a single task nothing can be forgotten, and NaN would compare with nothing.
        has_forgetting = not math.isnan(self.forgetting)
        return -self.accuracy, self.forgetting if has_forgetting else 0.0


@dataclass(frozen=True)
class _Record:
    """The files of a search: lines of candidates, and best settings."""

    lines: list[dict[str, Any]]
    best: dict[str, dict[str, Any]]


def candidates(learner: str, limit: int, seed: int) -> list[Settings]:
    """List the settings to try for a learner.

    They are the whole grid of :attr:`~fedknow.client.learners.Learner.search`, or a part of it.

    Parameters
    ----------
    learner : str
        Its name.
    limit : int
        At most so many; from a larger grid they are drawn without repetition.
    seed : int
        For the draw.

    Returns
    -------
    list of dict
        The learner's defaults come first, whether they are on the grid or not.
    """
    kind = learner_class(learner)
    # Only settings that are searched: the others stay as the experiment has them.
    defaults = {name: getattr(kind.Settings(), name) for name in kind.search}
    grid = [
        dict(zip(kind.search, values, strict=True))
        for values in itertools.product(*kind.search.values())
    ]
    changed = [settings for settings in grid if settings != defaults]
    if len(changed) >= limit:
        draw = generator(seed, f"search/{learner}")
        drawn = draw.choice(len(changed), limit - 1, replace=False)
        # In the order of the grid, so that equals are told in that order.
        changed = [changed[place] for place in sorted(drawn)]
    # The defaults come first: of equal candidates the first one wins, and nothing changes
    # without need.
    return [defaults, *changed]


def count_runs(config: ExperimentConfig, request: SearchRequest) -> int:
    """Count the runs of a search, if none of them is there yet."""
    names = _names(config, request.learners)
    each = (len(candidates(name, request.limit, config.seed)) for name in names)
    return request.seeds * sum(each)


def search(
    config: ExperimentConfig,
    request: SearchRequest,
    out: Path,
    watch: Watch | None = None,
) -> tuple[dict[str, BestSettings], dict[str, str]]:
    """Score candidates for each learner; an earlier call in ``out`` goes on.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment; ``data.holdout`` is set to :data:`HOLDOUT` where it is 0.
    request : SearchRequest
        Learners, candidates and seeds.
    out : Path
        Gets a run folder each run, ``search.jsonl`` (one line a candidate) and ``best.toml``,
        whose entries belong into ``client/learners/best/<preset>.toml``. Entries of other
        learners in the two files stay.
    watch : callable, optional
        Makes the observer of each run.

    Returns
    -------
    tuple of dict
        The best settings, by learner; and the candidates that failed, by folder name, with the
        reasons.

    Raises
    ------
    ConfigError
        Before anything is run, if something does not fit.
    """
    check_between("--runs", request.limit, 1, MAX_CANDIDATES)
    check_between("--seeds", request.seeds, 1, MAX_SEEDS)
    # Settings that were chosen on the test samples would not be judged by them any more.
    config = with_holdout(config)
    names = _names(config, request.learners)
    grids = {name: candidates(name, request.limit, config.seed) for name in names}
    # Before hours of runs, so that a damaged file is refused at once.
    record = _read_record(out, names)
    methods: list[str] = []
    for name, grid in grids.items():
        methods += [_method(name, settings) for settings in grid]
    # One series for all learners: they share Ray and each seed's data.
    series = RunSeries.plan(config, methods, request.seeds, out)
    failures = series.run(watch, is_lean=True)
    folders = series.folders(failures)
    groups = (
        write_numbers(folders, out, failures, series.left_out) if folders else []
    )
    best: dict[str, BestSettings] = {}
    for name, grid in grids.items():
        scores = _scores(name, grid, groups)
        record.lines.extend(_line(name, score) for score in scores)
        if scores:
            best[name] = _best(name, grid[0], scores)
            record.best[name] = _entry(best[name], request.command)
    _write_record(out, record)
    return best, failures


def with_holdout(config: ExperimentConfig) -> ExperimentConfig:
    """Hold out training samples: test samples must not choose settings."""
    if config.data.holdout:
        return config
    data = config.data.model_copy(update={"holdout": HOLDOUT})
    return config.model_copy(update={"data": data})


def _names(config: ExperimentConfig, learners: Sequence[str]) -> list[str]:
    """Return the learners to search, without settings of their own."""
    names, _ = contenders(config, learners)
    for name in names:
        if "@" in name:
            raise ConfigError(
                f"learners = {name!r}: settings are what is searched; give the name alone"
            )
    return names


def _method(name: str, settings: Settings) -> str:
    """Write a candidate as a method, such as ``fedknow@rho=0.2+k=5``."""
    changes = []
    for key, value in settings.items():
        # As a configuration reads it, where true has a small letter.
        text = value if isinstance(value, str) else json.dumps(value)
        changes.append(f"{key}={text}")
    return f"{name}@{'+'.join(changes)}" if changes else name


def _scores(
    name: str, grid: Sequence[Settings], groups: Sequence[Group]
) -> list[_Score]:
    """Return the scores of a learner's candidates that ended."""
    scores = []
    for settings in grid:
        for members in groups:
            learner = members.runs[0].config.learner
            # A run's options hold every setting, a candidate's the searched ones alone.
            is_candidate = settings.items() <= learner.options.items()
            if learner.name == name and is_candidate:
                accuracy = members.estimate("accuracy").mean
                forgetting = members.estimate("forgetting").mean
                scores.append(_Score(settings, accuracy, forgetting))
    return scores


def _best(
    name: str, defaults: Settings, scores: Sequence[_Score]
) -> BestSettings:
    # Of equals the first one tried is the best.
    best = min(scores, key=lambda score: score.rank)
    # NaN: the learner's defaults failed.
    default = math.nan
    for score in scores:
        if score.settings == defaults:
            default = score.accuracy
            break
    # The space is recorded, since a later version may search another.
    space = learner_class(name).search
    return BestSettings(
        best.settings,
        best.accuracy,
        best.forgetting,
        default,
        len(scores),
        {key: list(values) for key, values in space.items()},
    )


def _line(name: str, score: _Score) -> dict[str, Any]:
    """Return a candidate's line of ``search.jsonl``."""
    # JSON has no NaN.
    has_forgetting = not math.isnan(score.forgetting)
    return {
        "learner": name,
        "settings": score.settings,
        "accuracy": score.accuracy,
        "forgetting": score.forgetting if has_forgetting else None,
    }


def _entry(best: BestSettings, command: str) -> dict[str, Any]:
    """Return a learner's entry of ``best.toml``."""
    numbers = {
        "accuracy": best.accuracy,
        "default": best.default,
        "forgetting": best.forgetting,
    }
    # Four digits, as more would only be noise of the seeds.
    rounded = {
        key: round(value, 4)
        for key, value in numbers.items()
        if not math.isnan(value)
    }
    return {
        "command": command,
        "runs": best.runs,
        **rounded,
        "settings": best.settings,
        "space": best.space,
    }


def _read_record(out: Path, names: Sequence[str]) -> _Record:
    """Read the entries of other learners that an earlier search wrote."""
    lines: list[dict[str, Any]] = []
    best: dict[str, dict[str, Any]] = {}
    path = out / "search.jsonl"
    if path.is_file():
        with refuse_damaged(path):
            for text in path.read_text("utf-8").splitlines():
                line = json.loads(text)
                # Learners searched anew lose their old lines.
                if line["learner"] not in names:
                    lines.append(line)
    path = out / "best.toml"
    if path.is_file():
        with refuse_damaged(path):
            best = tomllib.loads(path.read_text("utf-8"))
    return _Record(lines, best)


def _write_record(out: Path, record: _Record) -> None:
    out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(line).encode() + b"\n" for line in record.lines]
    write_atomic(out / "search.jsonl", b"".join(lines))
    # Sorted, so that a later search changes its own entries alone.
    best = dict(sorted(record.best.items()))
    write_atomic(out / "best.toml", tomli_w.dumps(best).encode())
