"""Which methods a comparison is between, from what its caller wrote: names, settings, ``all``,
exclusions."""

from __future__ import annotations

from collections.abc import Sequence

from fedknow.client.data import make_benchmark
from fedknow.client.learners import learner_class, list_learners, resolve
from fedknow.client.learners.best import SUFFIX, found
from fedknow.protocols.config import ConfigError, ExperimentConfig, closest, read_config
from fedknow.simulations.simulate import prepare

__all__ = ["ALL", "contenders", "plan"]

ALL = "all"
"""Stands for every learner there is; ``all@best`` for their best settings, or the default ones of
a learner that was not searched."""


def plan(config: ExperimentConfig, method: str, seed: int) -> ExperimentConfig:
    """The experiment of one method and seed, every setting spelled out.

    Parameters
    ----------
    config : ExperimentConfig
        All but learner and seed; its learner's settings are kept where ``method`` has that
        learner's name.
    method : str
        A learner's name; after it may stand settings: ``fedknow@rho=0.2+k=5``, ``ewc@best``,
        ``ewc@best+strength=3``.
    seed : int
        The seed.

    Raises
    ------
    ConfigError
        If the learner or a setting does not fit.
    """
    name, _, settings = method.partition("@")
    changes = [f"learner.{setting}" for setting in settings.split("+") if setting]
    if changes[:1] == ["learner.best"]:
        name, changes = f"{name}{SUFFIX}", changes[1:]
    return resolve(
        read_config(
            config.model_dump(mode="json"),
            [f"learner={name}", *changes, f"seed={seed}"],
        )
    )


def contenders(
    config: ExperimentConfig, methods: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Spell out ``all``, ``all@best`` and ``-name``.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment; of all learners those take part that are made for its scenario and its
        model.
    methods : sequence of str
        Methods (:func:`plan`), ``all``, ``all@best``, and names with a ``-`` before them that
        ``all`` is to leave out.

    Returns
    -------
    methods : list of str
        One or more, each once.
    left_out : dict
        Learners that ``all`` does not include, and why.

    Raises
    ------
    ConfigError
        If there is none, one is given twice, one that was asked not to take part is not a
        learner, or nobody's best settings are known.
    """
    known = list_learners()
    without = [method[1:] for method in methods if method.startswith("-")]
    for name in without:
        if name not in known:
            raise ConfigError(
                f"-{name}: no such learner{closest(name, known)}; there are: {', '.join(known)}"
            )
    given = [method for method in methods if not method.startswith("-")]
    if not given or len(set(given)) < len(given):
        raise ConfigError(
            f"learners = {', '.join(methods)!r}: give one or more names, none of them twice"
        )
    chosen: dict[str, None] = {}
    left_out: dict[str, str] = {}
    for method in given:
        if method in (ALL, f"{ALL}{SUFFIX}"):
            fit, left_out = _all(config, without, best=method != ALL)
            chosen |= dict.fromkeys(fit)
        else:
            chosen[method] = None
    return list(chosen), left_out


def _all(
    config: ExperimentConfig, without: Sequence[str], best: bool
) -> tuple[list[str], dict[str, str]]:
    known = list_learners()
    settled = found(config.name) if best else {}
    if best and not settled:
        raise ConfigError(
            f"learners = '{ALL}{SUFFIX}': no best settings are shipped for name = {config.name!r}; compare {ALL!r}, "
            f"which takes default settings, or search them with: fedknow search {config.name}"
        )
    last_name = {learner_class(name): name for name in known}
    benchmark = make_benchmark(config)
    fit, left_out = [], {}
    for name in known:
        other = last_name[learner_class(name)]
        if name in without:
            left_out[name] = "as was asked"
        elif other != name:
            left_out[name] = f"the same method as {other}"
        else:
            method = f"{name}{SUFFIX}" if name in settled else name
            try:
                prepare(plan(config, method, config.seed), benchmark)
            except ConfigError as error:
                left_out[name] = str(error)
            else:
                fit.append(method)
    return fit, left_out
