"""What a search tries next: by a sampler of Optuna's, or on a grid."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fedknow.protocols.config import ConfigError
from fedknow.protocols.seeds import integer
from fedknow.simulations.space import Dimension, Integers, Reals, Value

__all__ = ["Proposer", "Sampler", "Settings", "Trial", "make_proposer"]

Sampler = Literal["tpe", "random", "grid"]
Settings = dict[str, Value]
STARTUP_TRIALS = 5
"""Trials that ``tpe`` draws at random before it learns from them."""


@dataclass(frozen=True)
class Trial:
    """One try.

    Attributes
    ----------
    number : int
        From 0.
    settings : dict
        What was set.
    accuracy, forgetting : float or None
        Means over seeds, on the held-out samples; ``None`` where a run failed, or where a single
        task can have no forgetting.
    failure : str
        Why it failed; empty: it did not.
    """

    number: int
    settings: Settings
    accuracy: float | None
    forgetting: float | None
    failure: str = ""


Proposer = Callable[[int, Sequence[Trial]], Settings | None]
"""Gives the settings of a try from its number and the tries before; None ends the search."""


def make_proposer(
    space: Mapping[str, Dimension],
    sampler: str,
    trials: int,
    seed: int,
) -> Proposer:
    """Make what gives the settings of a try.

    Raises
    ------
    ConfigError
        If there is no such sampler, or the grid has no points or more than ``trials``.
    ModuleNotFoundError
        If the sampler needs Optuna, which is not installed.
    """
    if sampler not in get_args(Sampler):
        raise ConfigError(
            f"sampler = {sampler!r}: must be one of {', '.join(get_args(Sampler))}"
        )
    if sampler != "grid":
        return _Optuna(space, sampler, seed)
    grids = {key: dimension.grid for key, dimension in space.items()}
    for key, values in grids.items():
        if not values:
            raise ConfigError(
                f"{key}: a grid needs points; write their number after the range, as in "
                "log:1e-4..1e-1/4, or choose another sampler"
            )
    size = math.prod(len(values) for values in grids.values())
    if size > trials:
        raise ConfigError(
            f"the grid has {size} points, and --runs = {trials}: raise --runs, or search "
            "fewer values"
        )
    points = [
        dict(zip(grids, values, strict=True))
        for values in itertools.product(*grids.values())
    ]
    return lambda number, tried: points[number] if number < size else None


class _Optuna:
    """Proposes by a sampler of Optuna's."""

    def __init__(
        self,
        space: Mapping[str, Dimension],
        sampler: str,
        seed: int,
    ) -> None:
        # An extra: only here. Before any run, so that its lack shows at once.
        import optuna

        self._optuna: Any = optuna
        self._kind = sampler
        self._seed = seed
        self._space = {
            key: self._distribution(dimension) for key, dimension in space.items()
        }

    def __call__(self, number: int, trials: Sequence[Trial]) -> Settings:
        optuna = self._optuna
        # Its notes on each try are not for the user of another program.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # A seed for each try: a search that goes on needs no state of the sampler.
        sampler = self._sampler(integer(self._seed, "sweep", number))
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for trial in trials:
            study.add_trial(self._finished(trial))
        return dict(study.ask(self._space).params)

    def _sampler(self, seed: int) -> Any:
        samplers = self._optuna.samplers
        # What Optuna takes is a NumPy seed of 32 bits.
        seed %= 2**32
        if self._kind == "random":
            return samplers.RandomSampler(seed=seed)
        return samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, seed=seed)

    def _finished(self, trial: Trial) -> Any:
        states = self._optuna.trial.TrialState
        has_failed = trial.accuracy is None
        return self._optuna.trial.create_trial(
            params=dict(trial.settings),
            distributions=self._space,
            value=trial.accuracy,
            state=states.FAIL if has_failed else states.COMPLETE,
        )

    def _distribution(self, dimension: Dimension) -> Any:
        kinds = self._optuna.distributions
        if isinstance(dimension, Reals):
            return kinds.FloatDistribution(
                dimension.low, dimension.high, log=dimension.is_log
            )
        if isinstance(dimension, Integers):
            return kinds.IntDistribution(dimension.low, dimension.high)
        return kinds.CategoricalDistribution(dimension.values)
