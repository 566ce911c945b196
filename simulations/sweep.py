"""A search over any setting of an experiment, on held-out samples."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedknow.client.data import make_benchmark
from fedknow.client.learners import resolve
from fedknow.protocols.bounds import check_between
from fedknow.protocols.config import ConfigError, ExperimentConfig, read_config
from fedknow.protocols.files import write_atomic
from fedknow.server.reports.summary import summarise
from fedknow.server.run.folder import RunFolder
from fedknow.server.start import pin_start
from fedknow.simulations.compare import MAX_SEEDS, RunSeries, Watch
from fedknow.simulations.engine.cluster import one_ray
from fedknow.simulations.proposals import (
    Sampler,
    Settings,
    Trial,
    make_proposer,
)
from fedknow.simulations.records import refuse_damaged, write_numbers
from fedknow.simulations.search import MAX_CANDIDATES, with_holdout
from fedknow.simulations.simulate import prepare
from fedknow.simulations.space import Dimension, Value

__all__ = ["SweepRequest", "best_trial", "configure", "sweep"]

PLAN, TRIALS = "sweep.json", "sweep.jsonl"


@dataclass(frozen=True)
class SweepRequest:
    """The extent of a search.

    Attributes
    ----------
    space : mapping of str to Dimension
        Ranges by key (:func:`~fedknow.simulations.space.read_space`).
    trials : int
        How many settings to try; of a grid, how many it may have.
    seeds : int
        Runs of each, with seeds from ``config.seed`` on.
    sampler : {"tpe", "random", "grid"}
        ``tpe``: near what scored well, by Optuna's tree-structured Parzen estimator; ``random``:
        anywhere; ``grid``: every combination, in order.
    """

    space: Mapping[str, Dimension]
    trials: int = 20
    seeds: int = 1
    sampler: Sampler = "tpe"


def sweep(
    config: ExperimentConfig,
    request: SweepRequest,
    out: Path,
    watch: Watch | None = None,
) -> list[Trial]:
    """Try settings one after the other; an earlier search in ``out`` goes on.

    Each try draws from a seed of its own and from the tries before it. So a search that was
    interrupted comes to the same tries as one that was not.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment. Where ``data.holdout`` is 0, a fifth of the training samples is held out
        and scores the settings.
    request : SweepRequest
        The ranges, and how many settings to try.
    out : Path
        Gets a run folder ``trial-NNNN-seedN`` for each run, ``sweep.json`` (what is searched),
        ``sweep.jsonl`` (one line a try), ``compare.json`` and ``compare.csv``.
    watch : callable, optional
        Makes the observer of each run.

    Returns
    -------
    list of Trial
        In their order. One that fails is named and does not stop the others.

    Raises
    ------
    ConfigError
        Before anything is run, if a range does not fit its setting, the grid is larger than
        ``trials``, or ``out`` holds another search.
    ModuleNotFoundError
        If the sampler needs Optuna, and the extra ``search`` is not installed.
    """
    check_between("--runs", request.trials, 1, MAX_CANDIDATES)
    check_between("--seeds", request.seeds, 1, MAX_SEEDS)
    # Test samples must not choose settings, as accuracy on them would then be luck.
    config = pin_start(with_holdout(config))
    _check_space(config, request.space)
    propose = make_proposer(
        request.space, request.sampler, request.trials, config.seed
    )
    trials = _earlier(config, request, out)
    with _one_ray(config):
        while (number := len(trials)) < request.trials:
            settings = propose(number, trials)
            if settings is None:
                break
            plans, failure = _plan_runs(config, number, settings, request, out)
            if not failure:
                failure = _run(plans, watch)
            trials.append(_score(number, settings, plans, failure))
            # After each try, so that an interrupted search loses one at most.
            _write(out, trials)
    _write_numbers(trials, out)
    return trials


def best_trial(trials: Sequence[Trial]) -> Trial | None:
    """Return the best: most accuracy, then least forgetting, then first.

    ``None`` if all failed.
    """
    scored = [trial for trial in trials if trial.accuracy is not None]
    # `min` takes the first one of equals.
    return min(scored, key=_rank, default=None)


def _rank(trial: Trial) -> tuple[float, float]:
    assert trial.accuracy is not None
    return -trial.accuracy, trial.forgetting or 0.0


def configure(
    config: ExperimentConfig, settings: Mapping[str, Value], seed: int
) -> ExperimentConfig:
    """Give an experiment some settings and a seed.

    Raises
    ------
    ConfigError
        If a setting does not fit.
    """
    # Sections by name first: with another learner the settings of the old one go.
    ordered = sorted(settings, key=lambda key: "." in key)
    # As JSON, which is how settings on the command line are read.
    texts = [f"{key}={json.dumps(settings[key])}" for key in ordered]
    tree = config.model_dump(mode="json")
    return read_config(tree, [*texts, f"seed={seed}"])


# --- before the runs


def _check_space(
    config: ExperimentConfig, space: Mapping[str, Dimension]
) -> None:
    """Refuse a range whose ends are no settings."""
    # A valid point, from which one range at a time is tried.
    start = {key: dimension.ends[0] for key, dimension in space.items()}
    benchmark = make_benchmark(resolve(configure(config, start, config.seed)))
    for key, dimension in space.items():
        for value in dimension.ends:
            try:
                changed = configure(config, start | {key: value}, config.seed)
                complete = resolve(changed)
                # Only the data's own settings change the data.
                is_same = not key.startswith("data.") and key != "data"
                data = benchmark if is_same else make_benchmark(complete)
                # Building its parts is the only full check of an experiment.
                prepare(complete, data)
            except ConfigError as error:
                raise ConfigError(
                    f"{key} is searched at {value!r}: {error}"
                ) from None


# --- a try


def _plan_runs(
    config: ExperimentConfig,
    number: int,
    settings: Settings,
    request: SweepRequest,
    out: Path,
) -> tuple[dict[Path, ExperimentConfig], str]:
    """Plan the runs of a try by their folders.

    Returns
    -------
    plans : dict
    failure : str
        Why the settings do not fit together, although each does; else empty.
    """
    plans: dict[Path, ExperimentConfig] = {}
    for seed in range(config.seed, config.seed + request.seeds):
        try:
            complete = resolve(configure(config, settings, seed))
            prepare(complete, make_benchmark(complete))
        except ConfigError as error:
            # Each range was valid by itself, and a combination need not be.
            return {}, str(error)
        plans[out / f"trial-{number:04}-seed{seed}"] = complete
    return plans, ""


def _run(plans: dict[Path, ExperimentConfig], watch: Watch | None) -> str:
    """Run a try with every seed; say why it failed."""
    failures = RunSeries(["trial"], {}, plans).run(watch, is_lean=True)
    return "; ".join(failures.values())


def _score(
    number: int,
    settings: Settings,
    plans: Mapping[Path, ExperimentConfig],
    failure: str,
) -> Trial:
    if failure:
        return Trial(number, settings, None, None, failure)
    measures = [summarise(RunFolder.open(path)).measures() for path in plans]
    accuracy = float(np.mean([each["accuracy"] for each in measures]))
    forgetting = float(np.mean([each["forgetting"] for each in measures]))
    # JSON has no NaN, and with one task nothing can be forgotten.
    return Trial(
        number,
        settings,
        accuracy,
        None if math.isnan(forgetting) else forgetting,
    )


# --- the folder


def _plan(config: ExperimentConfig, request: SweepRequest) -> dict[str, Any]:
    space = {
        key: {"kind": type(dimension).__name__, **asdict(dimension)}
        for key, dimension in request.space.items()
    }
    experiment = config.absolute().digest_fields()
    plan = {
        "space": space,
        "seeds": request.seeds,
        "sampler": request.sampler,
        "experiment": experiment,
    }
    # As it comes back from a file: JSON has lists and no tuples.
    read: dict[str, Any] = json.loads(json.dumps(plan))
    return read


def _earlier(
    config: ExperimentConfig, request: SweepRequest, out: Path
) -> list[Trial]:
    """Read the tries of an earlier search in the folder, or begin one there."""
    plan = _plan(config, request)
    path = out / PLAN
    if not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(plan, indent=1).encode() + b"\n")
        return []
    with refuse_damaged(path):
        recorded = json.loads(path.read_text("utf-8"))
        changed = [key for key in plan if recorded[key] != plan[key]]
    if changed:
        raise ConfigError(
            f"{out} holds another search ({', '.join(changed)} differ); give the same ranges and "
            "settings again, or choose another --out"
        )
    trials: list[Trial] = []
    path = out / TRIALS
    if path.is_file():
        with refuse_damaged(path):
            for line in path.read_text("utf-8").splitlines():
                trials.append(Trial(**json.loads(line)))
    return trials


def _write(out: Path, trials: Sequence[Trial]) -> None:
    lines = [json.dumps(asdict(trial), allow_nan=False) for trial in trials]
    write_atomic(out / TRIALS, "".join(f"{line}\n" for line in lines).encode())


def _write_numbers(trials: Sequence[Trial], out: Path) -> None:
    folders: list[RunFolder] = []
    for trial in trials:
        if trial.accuracy is not None:
            paths = sorted(out.glob(f"trial-{trial.number:04}-seed*"))
            folders += [RunFolder.open(path) for path in paths]
    failures = {
        f"trial-{trial.number:04}": trial.failure
        for trial in trials
        if trial.failure
    }
    if folders:
        write_numbers(folders, out, failures)


def _one_ray(config: ExperimentConfig) -> Any:
    """Start one Ray for all tries, where they need it."""
    if config.engine.backend != "ray":
        return nullcontext()
    return one_ray(config.engine.address)
