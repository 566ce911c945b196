"""Aggregation strategies: any of Flower's by name, a user's own by ``module:Class``, each of them untouched."""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

from fedknow.protocols.config import ConfigError, ExperimentConfig, StrategyConfig, closest
from fedknow.protocols.plugins import explain, is_reference, load_object
from fedknow.strategies.fedasync import FedAsync
from fedknow.strategies.fedbuff import FedBuff
from fedknow.strategies.fedweit import FedWeit
from fedknow.strategies.flcn import Flcn
from fedknow.strategies.fot import Fot
from fedknow.strategies.joint import JointCentral
from fedknow.strategies.semisync import SemiSync
from fedknow.strategies.target import Target

__all__ = ["build_strategy", "check_running_mean", "list_strategies", "quiet_flower"]

GROUP = "fedknow.strategies"
"""Entry-point group in which an installed package offers strategies."""


@dataclass(frozen=True)
class _Builtin:
    """One of Flower's strategies, and the defaults that suit an experiment of ours."""

    strategy: Callable[..., Strategy]
    summary: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    wrapper: Callable[..., Strategy] | None = None
    """Wraps the strategy; options that are the wrapper's own go to it."""


_DEFAULTS = {
    # The experiment scores every client itself, on every task; and one client is enough to start with.
    "fraction_evaluate": 0.0,
    "min_train_nodes": 1,
    "min_evaluate_nodes": 1,
    "min_available_nodes": 1,
}

# What no file can hold: whoever needs these subclasses the strategy and names the class.
_OBJECTS = ("strategy", "train_metrics_aggr_fn", "evaluate_metrics_aggr_fn", "selection_rule", "accountant")

_BUILTIN = {
    "fedavg": _Builtin(flower.FedAvg, "weighted mean of the clients' parameters (McMahan et al. 2017)"),
    "fedprox": _Builtin(
        flower.FedProx, "FedAvg, clients pulled towards the global model by proximal_mu (Li et al. 2020)"
    ),
    "fedasync": _Builtin(FedAsync, "each answer is mixed into the model as it arrives (Xie et al. 2019)"),
    "fedbuff": _Builtin(FedBuff, "asynchronous, a step from every so many answers (Nguyen et al. 2022)"),
    "semisync": _Builtin(SemiSync, "rounds end at a deadline, and who is late counts in the next"),
    "flcn": _Builtin(Flcn, "FedAvg with importance weights from proxy data, for the learner flcn (Yao and Sun 2020)"),
    "fedweit": _Builtin(
        FedWeit, "sparse bases and everybody's adaptive parameters, for the learner fedweit (Yoon et al. 2021)"
    ),
    "fot": _Builtin(Fot, "FedAvg orthogonal to past tasks' inputs, for the learner fot (Bakman et al. 2024)"),
    "joint-central": _Builtin(JointCentral, "training on all data in one place, for the learner joint-central"),
    "target": _Builtin(Target, "FedAvg and images made of the model, for the learner target (Zhang et al. 2023)"),
    "fedavgm": _Builtin(flower.FedAvgM, "FedAvg with server momentum (Hsu et al. 2019)"),
    "fedadam": _Builtin(flower.FedAdam, "Adam on the server (Reddi et al. 2021)"),
    "fedadagrad": _Builtin(flower.FedAdagrad, "Adagrad on the server (Reddi et al. 2021)"),
    "fedyogi": _Builtin(flower.FedYogi, "Yogi on the server (Reddi et al. 2021)"),
    "fedmedian": _Builtin(flower.FedMedian, "median of each parameter, robust to outliers (Yin et al. 2018)"),
    "fedtrimmedavg": _Builtin(
        flower.FedTrimmedAvg, "mean without the extreme shares beta of each parameter (Yin et al. 2018)"
    ),
    "krum": _Builtin(flower.Krum, "the one client nearest to the others (Blanchard et al. 2017)"),
    "multikrum": _Builtin(flower.MultiKrum, "mean of the clients nearest to the others (Blanchard et al. 2017)"),
    "bulyan": _Builtin(flower.Bulyan, "Krum's choice, then a trimmed mean (El Mhamdi et al. 2018)"),
    "qfedavg": _Builtin(
        flower.QFedAvg, "fairness: clients with a high loss count for more (Li et al. 2020)", {"train_loss_key": "loss"}
    ),
    "dp-fixed-clipping": _Builtin(
        flower.FedAvg,
        "FedAvg with central differential privacy, updates clipped to clipping_norm",
        wrapper=flower.DifferentialPrivacyServerSideFixedClipping,
    ),
    "dp-adaptive-clipping": _Builtin(
        flower.FedAvg,
        "FedAvg with central differential privacy, clipped to a quantile of the updates' norms",
        wrapper=flower.DifferentialPrivacyServerSideAdaptiveClipping,
    ),
}

_OF_THE_MEAN = (
    flower.FedAvg,
    flower.FedProx,
    flower.FedAvgM,
    flower.FedAdam,
    flower.FedAdagrad,
    flower.FedYogi,
)
"""Of Flower's strategies, those that look at nothing but the mean of the clients' answers."""


def check_running_mean(config: ExperimentConfig, strategy: Strategy, sparse: bool) -> None:
    """Refuse ``engine.running_mean``, where it is set, with what must see each client's answer.

    A strategy of a user's own says by an attribute ``of_the_mean = True`` that the mean, weighted by ``num-examples``,
    is all it asks for. ``sparse``: whether the learner's parameters travel without their zeros.

    Raises
    ------
    ConfigError
        If the strategy may ask for more, or the bytes of sparse parameters are to be counted.
    """
    if not config.engine.running_mean:
        return
    name = config.strategy.name
    if sparse:
        raise ConfigError(
            f"engine.running_mean = true: learner {config.learner.name} sends sparse parameters, whose sizes a mean "
            "does not tell; set it to false"
        )
    plain = (
        isinstance(strategy, flower.FedAvg)
        and type(strategy) in _OF_THE_MEAN
        and strategy.train_metrics_aggr_fn is aggregate_metricrecords
    )
    fits = plain or getattr(strategy, "of_the_mean", False)
    if not fits or type(strategy).start is not Strategy.start:
        known = ", ".join(
            n for n, builtin in _BUILTIN.items() if builtin.strategy in _OF_THE_MEAN and not builtin.wrapper
        )
        raise ConfigError(
            f"engine.running_mean = true: strategy {name} may look at each client's answer, not at their mean alone; "
            f"set it to false, or use one of {known}, or a class of your own with of_the_mean = True and Flower's start"
        )
    key = getattr(strategy, "weighted_by_key", "num-examples")
    if key != "num-examples":
        raise ConfigError(
            "engine.running_mean = true: the mean is weighted by num-examples, not by "
            f"strategy.weighted_by_key = {key!r}; set one or the other"
        )


@contextmanager
def quiet_flower() -> Iterator[None]:
    """Keep Flower's log to errors while it works for us, then leave the logger as it was."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def list_strategies() -> dict[str, str]:
    """All strategies that have a name, with one line about each; installed packages' own included."""
    plugins = {entry.name: f"from {entry.value}" for entry in importlib.metadata.entry_points(group=GROUP)}
    return {name: builtin.summary for name, builtin in _BUILTIN.items()} | plugins


def build_strategy(config: StrategyConfig, clients: int | None = None) -> Strategy:
    """Make the strategy that the configuration names.

    Parameters
    ----------
    config : StrategyConfig
        ``name``: one of :func:`list_strategies`, or ``module:Class`` for a class in an importable file (the current
        folder counts). Its other keys are arguments of the constructor; ``fraction`` is short for
        ``fraction_train``, the share of clients that train in a round.
    clients : int, optional
        How many clients there are; a strategy that waits for more is refused.

    Returns
    -------
    flwr.serverapp.strategy.Strategy
        A new one, as Flower or its author made it.

    Raises
    ------
    ConfigError
        If there is no such strategy, an option is unknown or missing, or the constructor refuses a value.
    """
    name, options = config.name, config.options
    builtin = _BUILTIN.get(name)
    factory: Callable[..., Any] = builtin.strategy if builtin else _find(name)
    hidden = _OBJECTS if builtin else ()
    inner = _arguments(factory, hidden)
    outer = _arguments(builtin.wrapper, hidden) if builtin and builtin.wrapper else {}
    known = outer | inner
    if "fraction" in options and "fraction" not in known and "fraction_train" in known:
        options["fraction_train"] = options.pop("fraction")
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for key, value in options.items():
        if key not in known and not open_ended:
            raise ConfigError(
                f"strategy.{key} = {value!r}: {name} has no such option{closest(key, known)}; "
                f"it has: {', '.join(known)}"
            )
    given = ", ".join(f"strategy.{key} = {value!r}" for key, value in options.items())
    if builtin:
        _check_values(options, known)
        options = {key: value for key, value in _DEFAULTS.items() if key in inner} | dict(builtin.defaults) | options
    missing = [key for key, parameter in known.items() if _required(parameter) and key not in options]
    if missing:
        raise ConfigError(f"strategy {name} needs {' and '.join(f'strategy.{key}' for key in missing)}; set it")
    try:
        with quiet_flower():
            strategy = factory(**{key: value for key, value in options.items() if key not in outer})
            if builtin and builtin.wrapper:
                strategy = builtin.wrapper(strategy, **{k: v for k, v in options.items() if k in outer})
    except Exception as error:  # Flower's refuse by TypeError and ValueError, a user's by whatever it likes
        raise ConfigError(f"strategy {name} refused {given or 'its defaults'}: {explain(error)}") from error
    if not isinstance(strategy, Strategy):
        raise ConfigError(
            f"strategy.name = {name!r}: made a {type(strategy).__name__}, which is no flwr.serverapp.strategy.Strategy"
        )
    if clients is not None:
        _check_enough_clients(strategy, clients, name)
    return strategy


def _check_values(options: Mapping[str, Any], known: Mapping[str, inspect.Parameter]) -> None:
    """Refuse what a built-in strategy's constructor would take and choke on later."""
    for key, value in options.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key == "fraction_train":
            fits, right = number and 0 < value <= 1, "above 0 and at most 1: the share of clients in a round"
        elif isinstance(known[key].default, str):
            fits, right = isinstance(value, str), "text"
        else:
            fits, right = number, "a number"
        if not fits:
            raise ConfigError(f"strategy.{key} = {value!r}: must be {right}")


def _find(name: str) -> Callable[..., Any]:
    """A strategy's class from an installed package's entry point or from ``module:Class``."""
    if is_reference(name):
        found = load_object(name, "strategy.name")
    else:
        entries = importlib.metadata.entry_points(group=GROUP, name=name)
        if not entries:
            known = list_strategies()
            raise ConfigError(
                f"strategy.name = {name!r}: no such strategy{closest(name, known)}; there are: {', '.join(known)}, "
                "or your own as module:Class"
            )
        found = next(iter(entries)).load()
    if not callable(found) or (isinstance(found, type) and not issubclass(found, Strategy)):
        raise ConfigError(
            f"strategy.name = {name!r}: neither a class derived from flwr.serverapp.strategy.Strategy nor a function "
            "that makes one (strategies of the older flwr.server.strategy must be ported)"
        )
    return found  # type: ignore[no-any-return]


def _check_enough_clients(strategy: Strategy, clients: int, name: str) -> None:
    """A strategy that waits for more clients than there are would wait for ever."""
    inner: object = strategy
    while isinstance(inner, Strategy):
        for key in ("min_train_nodes", "min_evaluate_nodes", "min_available_nodes", "buffer", "concurrency"):
            wanted = getattr(inner, key, 0)
            if isinstance(wanted, int) and wanted > clients:
                raise ConfigError(
                    f"strategy {name} waits for {key} = {wanted} clients, but data.clients = {clients}; "
                    f"lower strategy.{key} or raise data.clients"
                )
        inner = getattr(inner, "strategy", None)


def _arguments(factory: Callable[..., Any], hidden: Collection[str]) -> dict[str, inspect.Parameter]:
    return {k: p for k, p in inspect.signature(factory).parameters.items() if k not in hidden}


def _required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in (
        parameter.VAR_KEYWORD,
        parameter.VAR_POSITIONAL,
    )
