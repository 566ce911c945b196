"""What a client's owner lets a server have it do.

A server describes the experiment. The client decides whether to take part in it: it runs the
parts that fedknow ships, and of other code only what its owner allowed by name. It also refuses
work that is larger than its owner's limits. A server can therefore choose among what the owner
permits, and nothing more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any, Self

from fedknow.protocols.config import (
    ConfigError,
    ExperimentConfig,
    TrainConfig,
)
from fedknow.protocols.installed import is_offered
from fedknow.protocols.instructions import OVERRIDES
from fedknow.protocols.plugins import is_reference
from fedknow.protocols.security.signing import PublicKey

__all__ = ["Limits", "Permissions", "sends_own"]


@dataclass(frozen=True)
class Limits:
    """The largest experiment that a client takes part in.

    Attributes
    ----------
    batch_size : int
        Samples of one step, in training and in scoring.
    epochs : int
        Local epochs of one round.
    classes : int
        Classes of all tasks together.
    image_values : int
        Numbers of one sample: channels times height times width.
    message_mb : int
        Size of a message in MiB, whatever the model is. A message must also fit the model.
    disk_mb : int
        Size of the client's state folder in MiB, before work begins.
    """

    batch_size: int = 4096
    epochs: int = 1000
    classes: int = 100_000
    image_values: int = 4_000_000
    message_mb: int = 1024
    disk_mb: int = 16_384

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Self:
        """Read ``key=value`` texts of the command line.

        Raises
        ------
        ConfigError
            If a key is unknown or a value is no whole number above 0.
        """
        names = [entry.name for entry in fields(cls)]
        values: dict[str, int] = {}
        for text in texts:
            key, _, value = text.partition("=")
            if key not in names:
                raise ConfigError(
                    f"--limit {text}: write KEY=NUMBER; the keys are {', '.join(names)}"
                )
            if not value.isdecimal() or int(value) < 1:
                raise ConfigError(
                    f"--limit {text}: {key} must be a whole number above 0"
                )
            values[key] = int(value)
        return cls(**values)


@dataclass(frozen=True)
class Permissions:
    """What a server may have a client do.

    Attributes
    ----------
    parts : frozenset of str
        Parts that fedknow does not ship and that may be imported: ``module:name``, or the name
        under which an installed package offers one.
    limits : Limits
        The largest experiment.
    signed_by : PublicKey, optional
        The owner's key: nothing runs that it did not sign.
    keeps_own : bool
        Refuse experiments in which this client would send parameters that its method keeps
        to itself (``evaluation.global_model``).

    Examples
    --------
    >>> from fedknow.protocols.config import read_config
    >>> Permissions().check(read_config({"model": "cnn"}))
    >>> Permissions().check(read_config({"model": "os:system"}))
    Traceback (most recent call last):
    fedknow.protocols.config.errors.ConfigError: model.name = 'os:system': this client ...
    """

    parts: frozenset[str] = frozenset()
    limits: Limits = field(default_factory=Limits)
    signed_by: PublicKey | None = None
    keeps_own: bool = False

    def check_signature(self, config: ExperimentConfig, signature: bytes) -> None:
        """Refuse an experiment that the owner's key did not sign, if there is one.

        Raises
        ------
        ConfigError
            Saying what is missing or wrong.
        """
        if self.signed_by is not None:
            self.signed_by.check(config, signature)

    def check(self, config: ExperimentConfig) -> None:
        """Refuse an experiment that the owner did not permit.

        No foreign code is imported for it.

        Raises
        ------
        ConfigError
            Naming the key, the value, and how the owner could permit it.
        """
        for key, name in (
            ("model.name", config.model.name),
            ("learner.name", config.learner.name),
            ("data.name", config.data.name),
        ):
            self._check_part(key, name)
        self._check_weights(config.model.weights)
        if self.keeps_own and sends_own(config):
            raise ConfigError(
                "evaluation.global_model = true: the owner of this client lets no parameters go "
                f"that learner {config.learner.name} keeps to itself; set it to false, or leave "
                "--keep-own out of the client's command"
            )
        self._check_size(
            "train.batch_size", config.train.batch_size, "batch_size"
        )
        size = config.evaluation.batch_size
        self._check_size("evaluation.batch_size", size, "batch_size")
        self._check_size("train.epochs", config.train.epochs, "epochs")
        self._check_size("data.classes", config.data.classes, "classes")
        self._check_size("data.shape", prod(config.data.shape), "image_values")
        # Pictures on disk have three channels at most.
        pixels = 3 * config.data.image_size**2
        self._check_size("data.image_size", pixels, "image_values")

    def check_work(self, settings: Mapping[str, Any], train: TrainConfig) -> None:
        """Refuse a round whose settings are over the owner's limits.

        A strategy may put other numbers in the place of the experiment's in each round, unless
        the experiment is to be a signed one.

        Parameters
        ----------
        settings : mapping
            Of the round.
        train : TrainConfig
            The experiment's.

        Raises
        ------
        ConfigError
            Naming the key and the limit.
        """
        for key, limit in (
            ("epochs", "epochs"),
            ("local-epochs", "epochs"),
            ("batch-size", "batch_size"),
        ):
            value = settings.get(key)
            # What is no number is refused by whoever reads the settings.
            if isinstance(value, int | float):
                self._check_size(key, value, limit)
        for key, name in OVERRIDES.items():
            signed = getattr(train, name)
            if self.signed_by is not None and settings.get(key, signed) != signed:
                raise ConfigError(
                    f"{key} = {settings[key]!r:.100}: the owner of this client signed "
                    f"train.{name} = {signed}"
                )

    def check_disk(self, size: int) -> None:
        """Refuse work when the client's state takes too much of the disk.

        Parameters
        ----------
        size : int
            Bytes of the state folder.

        Raises
        ------
        ConfigError
            Naming the limit.
        """
        self._check_size("the client's state in MiB", size // 2**20, "disk_mb")

    def _check_part(self, key: str, name: str) -> None:
        is_foreign = is_reference(name) or _is_of_a_package(key, name)
        if not is_foreign or name in self.parts:
            return
        permitted = ", ".join(sorted(self.parts)) or "none"
        raise ConfigError(
            f"{key} = {name!r}: this client runs only code that its owner allowed "
            f"({permitted}); its owner can add --allow {name} to the client's command"
        )

    def _check_weights(self, weights: str) -> None:
        # A path that a server names is a file of the client's owner.
        if weights.startswith("file:") and weights not in self.parts:
            raise ConfigError(
                f"model.weights = {weights!r}: this client reads only files that its owner "
                f"allowed; its owner can add --allow {weights} to the client's command"
            )

    def _check_size(self, key: str, value: float, limit: str) -> None:
        bound = getattr(self.limits, limit)
        if value > bound:
            # A server may say infinity, of which there is no whole number.
            number = int(min(value, 2**63))
            raise ConfigError(
                f"{key} = {value}: this client's owner set a limit of {bound} ({limit}); its "
                f"owner can raise it by --limit {limit}={number}"
            )


def sends_own(config: ExperimentConfig) -> bool:
    """Say whether a client sends parameters that its method keeps to itself."""
    # Imported late: what was not permitted must not be imported for it.
    from fedknow.client.learners import keeps_parameters

    return config.evaluation.global_model and keeps_parameters(config)


def _is_of_a_package(key: str, name: str) -> bool:
    """Say whether a name stands for the part of an installed package."""
    section = key.partition(".")[0]
    if not is_offered(section, name):
        return False
    # Only now: the imports take a second. A built-in name is never taken over.
    from fedknow.client.data.datasets import NAMES
    from fedknow.client.learners import LEARNERS
    from fedknow.client.models import list_models

    shipped: dict[str, Collection[str]] = {
        "learner": LEARNERS,
        "model": list_models(),
        "data": NAMES,
    }
    return name not in shipped[section]
