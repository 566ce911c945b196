"""The methods of a comparison: names, settings, ``all`` and exclusions."""

from __future__ import annotations

from collections.abc import Sequence

from fedknow.client.data import make_benchmark
from fedknow.client.learners import learner_class, list_learners, resolve
from fedknow.client.learners.best import SUFFIX, searched_settings
from fedknow.protocols.config import (
    ConfigError,
    ExperimentConfig,
    closest,
    read_config,
)
from fedknow.server.start import pin_start
from fedknow.simulations.simulate import prepare

__all__ = ["ALL", "contenders", "plan"]

ALL = "all"
"""Stands for every learner.

``all@best`` takes their best settings, or the default ones of a learner that was not searched.
"""


def plan(config: ExperimentConfig, method: str, seed: int) -> ExperimentConfig:
    """Return the experiment of one method and seed, with every setting.

    Parameters
    ----------
    config : ExperimentConfig
        All but learner and seed; its learner's settings are kept where ``method`` has that
        learner's name.
    method : str
        A learner's name; settings may follow it: ``fedknow@rho=0.2+k=5``, ``ewc@best``,
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
    # "best" is no setting but a part of the name.
    if changes[:1] == ["learner.best"]:
        name = f"{name}{SUFFIX}"
        changes = changes[1:]
    # Read again as from a file: a change of learner drops the other one's settings.
    tree = config.model_dump(mode="json")
    config = read_config(tree, [f"learner={name}", *changes, f"seed={seed}"])
    return pin_start(resolve(config))


def contenders(
    config: ExperimentConfig, methods: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Spell out ``all``, ``all@best`` and ``-name``.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment; ``all`` includes the learners that are made for its scenario and its
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
        If there is no method, one is given twice, an excluded name is not a learner, or no best
        settings are known.
    """
    # A leading minus takes a method out of "all".
    excluded = [method[1:] for method in methods if method.startswith("-")]
    _check_excluded(excluded)
    included = [method for method in methods if not method.startswith("-")]
    if not included or len(set(included)) < len(included):
        raise ConfigError(
            f"learners = {', '.join(methods)!r}: give one or more names, none of them twice"
        )
    # A dictionary keeps the order and drops what "all" repeats.
    chosen: dict[str, None] = {}
    left_out: dict[str, str] = {}
    for method in included:
        if method in (ALL, f"{ALL}{SUFFIX}"):
            fitting, left_out = _all(config, excluded, is_best=method != ALL)
            chosen |= dict.fromkeys(fitting)
        else:
            chosen[method] = None
    return list(chosen), left_out


def _check_excluded(excluded: Sequence[str]) -> None:
    names = list_learners()
    for name in excluded:
        if name not in names:
            raise ConfigError(
                f"-{name}: no such learner{closest(name, names)}; "
                f"there are: {', '.join(names)}"
            )


def _all(
    config: ExperimentConfig, excluded: Sequence[str], is_best: bool
) -> tuple[list[str], dict[str, str]]:
    """Return the methods that fit, and the reasons against the other ones."""
    names = list_learners()
    searched = searched_settings(config.name) if is_best else {}
    if is_best and not searched:
        raise ConfigError(
            f"learners = '{ALL}{SUFFIX}': no best settings are shipped for name = "
            f"{config.name!r}; compare {ALL!r}, which takes default settings, or search "
            f"them with: fedknow search {config.name}"
        )
    # Of two names of one class the later one is compared.
    canonical = {learner_class(name): name for name in names}
    # Once for all learners, as to load it may take minutes.
    benchmark = make_benchmark(config)
    fitting: list[str] = []
    left_out: dict[str, str] = {}
    for name in names:
        synonym = canonical[learner_class(name)]
        if name in excluded:
            left_out[name] = "as was asked"
        elif synonym != name:
            left_out[name] = f"the same method as {synonym}"
        else:
            method = f"{name}{SUFFIX}" if name in searched else name
            # Building its parts is the only full check whether a learner fits.
            try:
                prepare(plan(config, method, config.seed), benchmark)
            except ConfigError as error:
                left_out[name] = str(error)
            else:
                fitting.append(method)
    return fitting, left_out
