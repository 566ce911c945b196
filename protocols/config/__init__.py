"""The typed configuration of an experiment.

One model serves files, the command line, checkpoints and the wire. An experiment is a TOML file
(or a preset's name) plus ``key=value`` overrides. Everything is checked when it is read: an
unknown key or an impossible value is refused with the key, the value and what would be right.
"""

from fedknow.protocols.config.attack import AttackConfig
from fedknow.protocols.config.base import MOST_CLIENTS, MOST_SECONDS
from fedknow.protocols.config.data import DataConfig
from fedknow.protocols.config.errors import ConfigError, closest
from fedknow.protocols.config.experiment import ExperimentConfig, differences
from fedknow.protocols.config.fleet import FleetConfig
from fedknow.protocols.config.overrides import parse_override
from fedknow.protocols.config.privacy import PrivacyConfig
from fedknow.protocols.config.read import read_config
from fedknow.protocols.config.sections import (
    EngineConfig,
    EvaluationConfig,
    LearnerConfig,
    ModelConfig,
    StrategyConfig,
    TrainConfig,
    check_device,
)
from fedknow.protocols.config.start import StartConfig
from fedknow.protocols.config.tracking import TrackingConfig

__all__ = [
    "MOST_CLIENTS",
    "MOST_SECONDS",
    "AttackConfig",
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "ExperimentConfig",
    "FleetConfig",
    "LearnerConfig",
    "ModelConfig",
    "PrivacyConfig",
    "StartConfig",
    "StrategyConfig",
    "TrackingConfig",
    "TrainConfig",
    "check_device",
    "closest",
    "differences",
    "parse_override",
    "read_config",
]
