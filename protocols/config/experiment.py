"""A whole configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any

import tomli_w
from pydantic import BeforeValidator, Field, model_validator

from fedknow.protocols.config.attack import AttackConfig
from fedknow.protocols.config.base import MOST_SCORES, Section
from fedknow.protocols.config.data import DataConfig
from fedknow.protocols.config.fleet import FleetConfig
from fedknow.protocols.config.privacy import PrivacyConfig
from fedknow.protocols.config.sections import (
    EngineConfig,
    EvaluationConfig,
    LearnerConfig,
    ModelConfig,
    StrategyConfig,
    TrainConfig,
)
from fedknow.protocols.config.start import StartConfig
from fedknow.protocols.config.tracking import TrackingConfig

__all__ = ["ExperimentConfig", "differences"]


YOUNG = ("privacy", "attack", "start", "tracking")
"""Sections that run folders and clients of earlier versions do not know."""


def _by_name(value: Any) -> Any:
    """Let a bare string stand for the name."""
    # Other types pass through, so that pydantic names what is wrong with them.
    return {"name": value} if isinstance(value, str) else value


def _by_devices(value: Any) -> Any:
    """Let a bare string or list stand for the devices."""
    return {"devices": value} if isinstance(value, str | list) else value


def _by_trackers(value: Any) -> Any:
    """Let a bare string or list stand for the trackers."""
    return {"to": value} if isinstance(value, str | list) else value


def _by_weights(value: Any) -> Any:
    """Let bare text stand for the weights."""
    return {"weights": value} if isinstance(value, str) else value


class ExperimentConfig(Section):
    """One experiment, complete.

    The same configuration and seed give the same numbers wherever it runs.

    Examples
    --------
    >>> import fedknow
    >>> config = fedknow.ExperimentConfig(learner="ewc", data={"clients": 5})
    >>> config.learner.name, config.data.clients, config.data.name
    ('ewc', 5, 'digits')
    """

    # The name becomes a part of a folder's name.
    name: str = Field("digits", pattern=r"^[A-Za-z0-9._-]+$", max_length=100)
    seed: int = Field(0, ge=0, lt=2**31)
    data: Annotated[DataConfig, BeforeValidator(_by_name)] = DataConfig()
    model: Annotated[ModelConfig, BeforeValidator(_by_name)] = ModelConfig()
    start: Annotated[StartConfig, BeforeValidator(_by_weights)] = StartConfig()
    train: TrainConfig = TrainConfig()
    learner: Annotated[LearnerConfig, BeforeValidator(_by_name)] = LearnerConfig()
    strategy: Annotated[StrategyConfig, BeforeValidator(_by_name)] = (
        StrategyConfig()
    )
    evaluation: EvaluationConfig = EvaluationConfig()
    engine: EngineConfig = EngineConfig()
    fleet: Annotated[FleetConfig, BeforeValidator(_by_devices)] = FleetConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    attack: Annotated[AttackConfig, BeforeValidator(_by_name)] = AttackConfig()
    tracking: Annotated[TrackingConfig, BeforeValidator(_by_trackers)] = (
        TrackingConfig()
    )

    @model_validator(mode="after")
    def _fit(self) -> ExperimentConfig:
        if self.data.arrival_seconds and not self.fleet.devices:
            raise ValueError(
                f"data.arrival_seconds = {self.data.arrival_seconds:g}: only a fleet has "
                f"virtual time; set "
                "fleet.devices (fedknow list devices), or data.arrival_seconds = 0"
            )
        return self

    @model_validator(mode="after")
    def _scores_fit(self) -> ExperimentConfig:
        data = self.data
        # Each bound alone may be large, but the matrix of scores is their product.
        scored = min(self.evaluation.clients or data.clients, data.clients)
        scores = scored * data.tasks**2
        if scores > MOST_SCORES:
            raise ValueError(
                f"data.tasks = {data.tasks} with data.clients = {data.clients}: each client is "
                f"scored on each task after each task, {scores:.1e} scores; score a sample of them "
                "(evaluation.clients), or lower one, so that "
                f"clients x tasks x tasks is at most {MOST_SCORES:.0e}"
            )
        return self

    def to_toml(self) -> str:
        """Give the whole configuration, defaults included, as TOML.

        The sections of :data:`YOUNG` are left out where nothing of them is set.
        """
        return tomli_w.dumps(self.model_dump(mode="json", exclude=self._unset()))

    def _unset(self) -> set[str]:
        """Name the younger sections that are as they are by default."""
        fields = type(self).model_fields
        return {
            name for name in YOUNG if getattr(self, name) == fields[name].default
        }

    def on_device(self, device: str) -> ExperimentConfig:
        """Give the same experiment with its clients on another device."""
        return self.model_copy(
            update={"engine": self.engine.model_copy(update={"device": device})}
        )

    def untracked(self) -> ExperimentConfig:
        """Give the same experiment without trackers."""
        return self.model_copy(update={"tracking": TrackingConfig()})

    def for_clients(self) -> ExperimentConfig:
        """Give what clients are told: nothing of the server's files.

        They are sent the global model, whatever it started from.
        """
        return self.model_copy(update={"start": StartConfig()})

    def absolute(self) -> ExperimentConfig:
        """Give the same experiment with paths that mean the same from any folder.

        A run that is resumed from elsewhere then finds its data and its fleet's files again.
        """
        availability = self.fleet.availability
        # The setting is a word or a path, and only a path depends on the folder.
        is_file = availability not in ("always", "markov")
        fleet = {
            "profiles": _absolute(self.fleet.profiles),
            "availability": _absolute(availability) if is_file else availability,
        }
        folder = self.data.dir
        # A file's own path is counted from the present folder where none is named.
        if self.data.name.startswith("file:") and not folder:
            folder = "."
        update = {
            "data": self.data.model_copy(
                update={
                    "dir": _absolute(folder),
                    "split": _absolute(self.data.split),
                }
            ),
            "fleet": self.fleet.model_copy(update=fleet),
            "start": self.start.model_copy(
                update={"weights": _absolute(self.start.weights)}
            ),
        }
        return self.model_copy(update=update)

    def digest_fields(self) -> dict[str, Any]:
        """Give what a result depends on.

        That is everything but the engine, trackers, and where data and first weights lie.
        """
        # How and where a run is carried out may change when it is resumed.
        exclude = {"engine", "tracking"} | self._unset()
        fields = self.model_dump(mode="json", exclude=exclude)
        # The same data may lie elsewhere on another machine.
        del fields["data"]["dir"]
        # So may the same weights, whose checksum counts.
        if "start" in fields:
            del fields["start"]["weights"]
        return fields


def differences(old: ExperimentConfig, new: ExperimentConfig) -> list[str]:
    """List the settings that change a result and differ, a line each."""
    a = _flatten(old.digest_fields())
    b = _flatten(new.digest_fields())
    return [
        f"{key}: was {a.get(key, 'not set')!r}, now {b.get(key, 'not set')!r}"
        for key in sorted(a.keys() | b.keys())
        # The ellipsis differs from every value, None included.
        if a.get(key, ...) != b.get(key, ...)
    ]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give the values of nested mappings by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _absolute(path: str) -> str:
    """Give a path from the root on; an empty one stays empty."""
    return os.path.abspath(os.path.expanduser(path)) if path else ""
