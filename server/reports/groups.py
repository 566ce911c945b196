"""Groups of runs that differ in the seed alone, and names for them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from fedknow.client.learners import learner_class, list_learners, resolve
from fedknow.protocols.config import ConfigError
from fedknow.server.reports.measures import (
    SEEDS_FOR_INTERVAL,
    Estimate,
    Measure,
    estimate,
)
from fedknow.server.reports.summary import Array, Summary

__all__ = ["Group", "group", "interval_note", "ranked"]


@dataclass(frozen=True)
class Group:
    """The runs of one method, one a seed."""

    label: str
    runs: Sequence[Summary]

    def estimate(self, key: str) -> Estimate:
        """One of :data:`MEASURES` over the group's runs."""
        return estimate(run.measures()[key] for run in self.runs)

    def seed_curves(self, pick: str, is_global: bool = False) -> list[Array]:
        """Collect a field of :class:`Scoring` from each run.

        Parameters
        ----------
        pick : str
            The field, such as ``"average"``.
        is_global : bool
            Whether to take it from the global model's scores.

        Returns
        -------
        list of float64 [trained]
        """
        scorings = [
            run.global_model if is_global else run.personal for run in self.runs
        ]
        return [
            getattr(scoring, pick) for scoring in scorings if scoring is not None
        ]

    def estimates(self, pick: str, is_global: bool = False) -> list[Estimate]:
        """Estimate a field of :class:`Scoring` after each task.

        A run that has not come to a task does not count at that task.
        """
        curves = self.seed_curves(pick, is_global)
        # Unfinished runs have shorter curves, and NaN is left out of a mean.
        seeds_by_task = zip_longest(*curves, fillvalue=math.nan)
        return [estimate(values) for values in seeds_by_task]

    def curve(self, pick: str, is_global: bool = False) -> Array:
        """Average a field of :class:`Scoring` over seeds, float64 [trained]."""
        return np.array([point.mean for point in self.estimates(pick, is_global)])

    def band(
        self,
        pick: str,
        measure: Measure,
        is_global: bool = False,
    ) -> tuple[Array, Array] | None:
        """Compute the 95 % intervals of a field of :class:`Scoring`.

        They stay within the bounds of its measure.

        Returns
        -------
        (float64 [trained], float64 [trained]) or None
            Lower and upper ends; ``None`` where too few seeds allow no interval at any task.
        """
        points = self.estimates(pick, is_global)
        if not any(point.has_interval for point in points):
            return None
        # NaN where a task has too few seeds, which matplotlib leaves open.
        low, high = zip(
            *(point.interval(measure) for point in points), strict=True
        )
        return np.array(low), np.array(high)


def interval_note(groups: Iterable[Group]) -> str:
    """Say briefly how these groups' numbers show several seeds."""
    counts = {len(members.runs) for members in groups}
    if max(counts, default=1) == 1:
        return "one seed: no interval"
    interval = "mean ± 95 % interval over seeds (Student's t)"
    each = f"below {SEEDS_FOR_INTERVAL} seeds each seed's value, as an interval needs more"
    if min(counts) >= SEEDS_FOR_INTERVAL:
        return interval
    return each if max(counts) < SEEDS_FOR_INTERVAL else f"{interval}; {each}"


def group(runs: Iterable[Summary]) -> list[Group]:
    """Put runs together that differ in the seed alone, in order of appearance.

    Labels say what tells the groups apart.
    """
    groups: list[list[Summary]] = []
    for run in runs:
        # A search one by one: methods are dictionaries and cannot be keys of one.
        for members in groups:
            if _method(members[0]) == _method(run):
                members.append(run)
                break
        else:
            groups.append([run])
    labels = _labels([members[0] for members in groups])
    return [
        Group(label, members)
        for label, members in zip(labels, groups, strict=True)
    ]


def ranked(groups: Iterable[Group]) -> list[Group]:
    """Sort groups with the most accurate first; those without a score last."""

    def place(members: Group) -> tuple[bool, float]:
        mean = members.estimate("accuracy").mean
        # The flag comes first, as NaN compares with nothing and would spoil the order.
        return math.isnan(mean), -mean

    return sorted(groups, key=place)


Method = Mapping[str, Any]
"""All settings that change a result, by their whole name."""


def _method(run: Summary) -> Method:
    config = run.config
    if config.learner.name in list_learners():
        # An older run lacks settings that its learner did not have yet: they are at their
        # defaults. A configuration that is refused by now stays as it was run.
        with suppress(ConfigError):
            config = resolve(config)
    # The engine and the folder of the data are not among them: they change no result.
    fields = _flat(config.digest_fields())
    # Presets that differ in their name alone are one method.
    return {
        key: value for key, value in fields.items() if key not in ("seed", "name")
    }


def _labels(firsts: Sequence[Summary]) -> list[str]:
    """Name groups by their learner, and by what else tells them apart.

    The strategy is named where it differs, and further settings where these two are not enough.
    A value that more than half of the groups of that name have goes without saying.
    """
    methods = [_method(run) for run in firsts]
    strategies = [_named_strategy(method) for method in methods]
    has_several = len(set(strategies) - {""}) > 1
    names = []
    for method, strategy in zip(methods, strategies, strict=True):
        name = str(method["learner.name"])
        names.append(f"{name} + {strategy}" if has_several and strategy else name)
    by_name: dict[str, list[Method]] = {}
    for name, method in zip(names, methods, strict=True):
        by_name.setdefault(name, []).append(method)
    return [
        _with_settings(name, method, by_name[name])
        for name, method in zip(names, methods, strict=True)
    ]


def _with_settings(name: str, method: Method, rivals: Sequence[Method]) -> str:
    """Add the settings that fewer than half of the methods of that name have."""

    def is_rare(key: str) -> bool:
        same = [rival for rival in rivals if rival.get(key) == method[key]]
        # Settings that most share would make each name long and tell nothing.
        return 2 * len(same) <= len(rivals)

    settings = [
        f"{key.removeprefix('learner.')}={method[key]}"
        for key in method
        if is_rare(key)
    ]
    return f"{name} ({', '.join(settings)})" if settings else name


def _named_strategy(method: Method) -> str:
    """Give the strategy, unless it is the one that comes with the learner."""
    strategy = str(method["strategy.name"])
    learner = method["learner.name"]
    # A user's own learner may not be installed where the report is written.
    paired = learner_class(learner).strategy if learner in list_learners() else ""
    return "" if strategy == paired else strategy


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
