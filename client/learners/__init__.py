"""Learners by name: the methods that run on a client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import ValidationError

from fedknow.client.data.samples import SampleSpec, as_spec
from fedknow.client.learners.afcl import Afcl
from fedknow.client.learners.agscl import AgsCl
from fedknow.client.learners.apfl import Apfl
from fedknow.client.learners.baselines import (
    FedPer,
    FedProx,
    FedRep,
    Finetune,
    Local,
)
from fedknow.client.learners.bcn import Bcn
from fedknow.client.learners.best import with_best
from fedknow.client.learners.co2l import Co2L
from fedknow.client.learners.derpp import Derpp
from fedknow.client.learners.er import ExperienceReplay
from fedknow.client.learners.ewc import Ewc, OnlineEwc
from fedknow.client.learners.fedknow.learner import FedKnow
from fedknow.client.learners.fedknow.plus import FedKnowPlus
from fedknow.client.learners.fedprotip import FedProtip
from fedknow.client.learners.fedssi import FedSsi
from fedknow.client.learners.fedweit import FedWeit
from fedknow.client.learners.flcn import Flcn
from fedknow.client.learners.fot import Fot
from fedknow.client.learners.frames.checks import (
    check_cache,
    check_exchange,
    check_head,
)
from fedknow.client.learners.frames.learner import Learner, LearnerSettings
from fedknow.client.learners.gem import AGem, Gem
from fedknow.client.learners.glfc import Glfc
from fedknow.client.learners.joint import (
    Joint,
    JointCentral,
    JointCentralEqual,
    JointEqual,
)
from fedknow.client.learners.lander import Lander
from fedknow.client.learners.loci import Loci
from fedknow.client.learners.lorm import Lorm
from fedknow.client.learners.lwf import Lwf
from fedknow.client.learners.mas import Mas
from fedknow.client.learners.refed import ReFed
from fedknow.client.learners.sizes import check_samples
from fedknow.client.learners.stsa import Stsa
from fedknow.client.learners.target import Target
from fedknow.client.models import build_model
from fedknow.protocols.config import (
    ConfigError,
    ExperimentConfig,
    LearnerConfig,
    StrategyConfig,
    closest,
)
from fedknow.protocols.descriptions import summary
from fedknow.protocols.installed import find_installed, list_installed
from fedknow.protocols.plugins import (
    PASSED_ON,
    calling,
    explain,
    is_reference,
    load_object,
)
from fedknow.protocols.seeds import integer
from fedknow.protocols.values import show

__all__ = [
    "Learner",
    "LearnerSettings",
    "build_learner",
    "check_samples",
    "keep_at_home",
    "keeps_parameters",
    "learner_class",
    "list_learners",
    "resolve",
]

LEARNERS: dict[str, type[Learner]] = {
    "fedknow": FedKnow,
    "fedknow-plus": FedKnowPlus,
    "finetune": Finetune,
    "fedavg": Finetune,  # the field's name for it
    "fedper": FedPer,
    "fedrep": FedRep,
    "local": Local,
    "fedprox": FedProx,
    "apfl": Apfl,
    "flcn": Flcn,
    "fedweit": FedWeit,
    "joint": Joint,
    "joint-equal": JointEqual,
    "joint-central": JointCentral,
    "joint-central-equal": JointCentralEqual,
    "agscl": AgsCl,
    "gem": Gem,
    "agem": AGem,
    "er": ExperienceReplay,
    "ewc": Ewc,
    "online-ewc": OnlineEwc,
    "mas": Mas,
    "lwf": Lwf,
    "bcn": Bcn,
    "co2l": Co2L,
    "refed": ReFed,
    "fot": Fot,
    "target": Target,
    "afcl": Afcl,
    "stsa": Stsa,
    "derpp": Derpp,
    "fedssi": FedSsi,
    "fedprotip": FedProtip,
    "lorm": Lorm,
    "glfc": Glfc,
    "lander": Lander,
    "loci": Loci,
}


_FOR_ANY = frozenset({"fedprox"})
"""Strategies that a learner may need and that fit any: Flower's FedProx, as every learner's
training has its term."""


def list_learners() -> dict[str, str]:
    """Name and one line of each learner.

    Examples
    --------
    >>> import fedknow
    >>> fedknow.list_learners()["ewc"]
    'A penalty for each past task, by its Fisher information (PNAS 2017).'
    """
    return {name: summary(kind) for name, kind in LEARNERS.items()}


def learner_class(name: str) -> type[Learner]:
    """Find the class behind a learner's name, or behind ``module:Class``.

    Installed packages may offer learners by name (:mod:`fedknow.protocols.installed`).

    Raises
    ------
    ConfigError
        If there is none.
    """
    if name in LEARNERS:
        return LEARNERS[name]
    # A reference first: it has a colon, which no installed name has.
    kind = (
        load_object(name, "learner.name")
        if is_reference(name)
        else _installed(name)
    )
    if not (isinstance(kind, type) and issubclass(kind, Learner)):
        raise ConfigError(
            f"learner.name = {name!r}: not a subclass of fedknow.client.learners.Learner"
        )
    if not (
        isinstance(kind.Settings, type)
        and issubclass(kind.Settings, LearnerSettings)
    ):
        raise ConfigError(
            f"learner.name = {name!r}: its Settings must be a subclass of "
            f"fedknow.client.learners.LearnerSettings"
        )
    return kind


def _installed(name: str) -> Any:
    """Find the learner that an installed package offers."""
    part = find_installed("learner", name, "learner.name")
    if part is None:
        names = [*LEARNERS, *list_installed("learner", LEARNERS)]
        raise ConfigError(
            f"learner.name = {name!r}: no such learner{closest(name, names)}; "
            f"there are: {', '.join(names)}, or your own as module:Class"
        )
    return part


def _settings(config: LearnerConfig) -> LearnerSettings:
    kind = learner_class(config.name).Settings
    try:
        return kind.model_validate(config.options)
    except ValidationError as error:
        names = list(kind.model_fields)
        lines = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"])
            # A mistyped name gets a likely one; pydantic's own message has none.
            if problem["type"] == "extra_forbidden":
                has = (
                    f"learner {config.name} has: {', '.join(names)}"
                    if names
                    else f"learner {config.name} has none"
                )
                lines.append(
                    f"learner.{key}: unknown setting{closest(key, names)}; {has}"
                )
            else:
                lines.append(
                    f"learner.{key} = {show(problem['input'])}: {problem['msg']}"
                )
        raise ConfigError("\n".join(lines)) from None
    # An interrupt is no fault of the settings.
    except PASSED_ON:
        raise
    except (
        BaseException
    ) as error:  # a user's settings may check themselves in any way
        raise ConfigError(
            f"learner.name = {config.name!r}: its Settings failed: {explain(error)}"
        ) from error


def resolve(config: ExperimentConfig) -> ExperimentConfig:
    """Spell out every setting of an experiment's learner.

    The result also has the strategy that the learner needs.

    Raises
    ------
    ConfigError
        For an unknown learner, an unknown setting, an impossible value, a scenario the method
        is not made for, or a strategy that is not its own where it or the strategy is one half
        of a method.
    """
    # First of all, as "@best" stands for settings that are then checked like any other.
    config = with_best(config)
    kind, scenario = learner_class(config.learner.name), config.data.scenario
    if scenario not in kind.scenarios:
        raise ConfigError(
            f"learner.name = {config.learner.name!r} is not made for data.scenario = {scenario!r}; "
            f"set data.scenario = {' or '.join(repr(name) for name in kind.scenarios)}"
        )
    settings = _settings(config.learner)
    # With all defaults spelled out, so that a later version's defaults change no resumed run.
    learner = LearnerConfig(name=config.learner.name, **settings.model_dump())
    strategy = _with_paired_strategy(config, kind, settings)
    return config.model_copy(update={"learner": learner, "strategy": strategy})


def _with_paired_strategy(
    config: ExperimentConfig, kind: type[Learner], settings: LearnerSettings
) -> StrategyConfig:
    """Give the strategy that a learner needs; otherwise the configured one.

    Its options are settings of the learner.
    """
    strategy = config.strategy
    if not kind.strategy:
        _check_whole(config)
        return strategy
    # fedavg is the default, which says nothing of what the user wants.
    if strategy.name not in ("fedavg", kind.strategy) and not is_reference(
        strategy.name
    ):
        raise ConfigError(
            f"strategy.name = {strategy.name!r} does not fit learner.name = "
            f"{config.learner.name!r}, whose half on the "
            f"server is {kind.strategy!r}; leave strategy.name out"
        )
    options = kind.strategy_options(settings)
    for key, value in options.items():
        # The learner's settings decide, as both halves must use the same number.
        if strategy.options.get(key, value) != value:
            raise ConfigError(
                f"strategy.{key} = {strategy.options[key]!r} contradicts learner.{key} = "
                f"{value!r}, which decides; "
                f"set learner.{key} alone"
            )
    name = strategy.name if is_reference(strategy.name) else kind.strategy
    return StrategyConfig(name=name, **strategy.options | options)


def _check_whole(config: ExperimentConfig) -> None:
    """Refuse half of a method: its strategy with another learner.

    Raises
    ------
    ConfigError
        Saying which learner is.
    """
    name = config.strategy.name
    partners = [
        repr(learner)
        for learner, kind in LEARNERS.items()
        if kind.strategy == name
    ]
    if partners and name not in _FOR_ANY:
        own_class = (
            f", strategy = {name!r} in your class"
            if is_reference(config.learner.name)
            else ""
        )
        raise ConfigError(
            f"strategy.name = {name!r} is one half of a method and does not fit learner.name = "
            f"{config.learner.name!r}; set learner.name = "
            f"{' or '.join(partners)}{own_class}, or leave strategy.name out"
        )


def keeps_parameters(config: ExperimentConfig) -> bool:
    """Say whether clients keep parameters to themselves, such as a head.

    Examples
    --------
    >>> from fedknow.protocols.config import read_config
    >>> [keeps_parameters(read_config({"learner": n})) for n in ("fedrep", "fedavg")]
    [True, False]
    """
    kind = learner_class(config.learner.name)
    exchange = getattr(_settings(config.learner), "exchange", kind.exchange)
    # A method may keep something beside the model, such as a share of two.
    return exchange != "all" or "local_parameters" in kind.overridden


def keep_at_home(config: ExperimentConfig) -> ExperimentConfig:
    """Have real clients send nothing that the method keeps with them.

    The purely global model is then not scored, unless the user has set
    ``evaluation.global_model``.

    Parameters
    ----------
    config : ExperimentConfig
        An experiment with real clients, as the user gave it.
    """
    # A user who has set it has decided.
    is_set = "global_model" in config.evaluation.model_fields_set
    if is_set or not keeps_parameters(config):
        return config
    evaluation = config.evaluation.model_copy(update={"global_model": False})
    return config.model_copy(update={"evaluation": evaluation})


def build_learner(
    config: ExperimentConfig,
    sample: SampleSpec | Sequence[int],
    classes: int,
    device: torch.device | str = "cpu",
) -> Learner:
    """Build an experiment's learner, with initial weights from its seed.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment.
    sample : SampleSpec or sequence of int
        What a sample is; a shape alone is that of 8-bit images.
    classes : int
        Width of the head.
    device : torch.device or str
        Where it is to compute; the weights are the same.

    Raises
    ------
    ConfigError
        For an unknown learner or model, settings that do not fit, or samples of a kind that the
        learner cannot work with.
    """
    spec = as_spec(sample)
    kind, settings = learner_class(config.learner.name), _settings(config.learner)
    _check_kind(config, kind, spec)
    check_head(kind, config)
    # Weights are drawn on the CPU and then moved, so that they are the same on any device.
    model = build_model(
        config.model, spec, classes, integer(config.seed, "model")
    ).to(device)
    with calling(config.learner.name, "learner.name"):
        learner = kind(model, config.train, settings)
        learner.work_on(spec)
    check_exchange(learner, config)
    check_cache(learner, config)
    return learner


def _check_kind(
    config: ExperimentConfig, kind: type[Learner], spec: SampleSpec
) -> None:
    """Refuse samples that a method does not work with."""
    if kind.kinds and spec.kind not in kind.kinds:
        raise ConfigError(
            f"learner.name = {config.learner.name!r} works on samples of kind "
            f"{' or '.join(kind.kinds)}, and those of data.name = {config.data.name!r} are "
            f"{spec}; choose another learner, for example 'er'"
        )
