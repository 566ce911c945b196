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
from typing import TYPE_CHECKING, Any, Self

from fedknow.protocols.config import (
    ConfigError,
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    TrainConfig,
)
from fedknow.protocols.installed import is_offered
from fedknow.protocols.instructions import OVERRIDES
from fedknow.protocols.plugins import is_reference
from fedknow.protocols.security.signing import PublicKey

if TYPE_CHECKING:
    from fedknow.client.data.samples import SampleSpec

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
    clients, tasks : int
        Of the experiment: each client of a shared data set makes the split for all.
    parameters : int
        Numbers in the model.
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
    clients: int = 10_000
    tasks: int = 1000
    parameters: int = 200_000_000
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
        under which an installed package offers one. Settings of a model that the server may
        choose stand behind it: ``module:name(width,depth)``. Other entries are files that may
        be read (``file:PATH``), and ``download`` for data sets of a public hub.
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
        self._check_model_settings(config)
        self._check_file("model.weights", config.model.weights)
        if config.data.split:
            self._check_file("data.split", f"file:{config.data.split}")
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
        for key, value in config.learner.options.items():
            # Some methods train their heads for epochs of their own.
            if key.endswith("epochs") and isinstance(value, int | float):
                self._check_size(f"learner.{key}", value, "epochs")
        self._check_size("data.classes", config.data.classes, "classes")
        self._check_size("data.clients", config.data.clients, "clients")
        self._check_size("data.tasks", config.data.tasks, "tasks")
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

    def check_model(
        self, config: ModelConfig, sample: SampleSpec, classes: int
    ) -> None:
        """Refuse a model of more parameters than the owner's limit.

        Of a model that fedknow ships no memory is taken for it.

        Raises
        ------
        ConfigError
            Naming the limit.
        """
        # Imported late: PyTorch takes seconds.
        from fedknow.client.models import count_parameters

        count = count_parameters(config, sample, classes)
        self._check_size("the model's parameters", count, "parameters")

    def check_download(self, config: DataConfig) -> None:
        """Refuse to fetch a data set from a public hub at a server's word.

        Parameters
        ----------
        config : DataConfig
            With the client's own folder of data.

        Raises
        ------
        ConfigError
            If there is no such folder, and the owner allowed no download.
        """
        from fedknow.client.data.datasets import is_fetched

        if "download" not in self.parts and is_fetched(config):
            raise ConfigError(
                f"data.name = {config.name!r}: this client has no folder of data, and fetches none "
                "at a server's word; its owner can add --data DIR or --allow download to the "
                "client's command"
            )

    def _check_part(self, key: str, name: str) -> None:
        is_foreign = is_reference(name) or _is_of_a_package(key, name)
        if not is_foreign or name in {*self.parts, *map(_part_name, self.parts)}:
            return
        permitted = ", ".join(sorted(self.parts)) or "none"
        raise ConfigError(
            f"{key} = {name!r}: this client runs only code that its owner allowed "
            f"({permitted}); its owner can add --allow {name} to the client's command"
        )

    def _check_model_settings(self, config: ExperimentConfig) -> None:
        """Refuse arguments for foreign code that the owner did not name."""
        model = config.model
        if not (
            is_reference(model.name) or _is_of_a_package("model.name", model.name)
        ):
            # Of a model that fedknow ships all settings are checked.
            return
        named: set[str] = set()
        for part in self.parts:
            if _part_name(part) == model.name:
                named.update(_part_settings(part))
        unknown = sorted(model.options.keys() - named)
        if unknown:
            settings = ",".join(sorted({*named, *unknown}))
            raise ConfigError(
                f"model.{unknown[0]}: this client's owner allowed {model.name} without this "
                f"setting; its owner can write --allow '{model.name}({settings})'"
            )

    def _check_file(self, key: str, name: str) -> None:
        # A path that a server names is a file of the client's owner.
        if name.startswith("file:") and name not in self.parts:
            raise ConfigError(
                f"{key} = {name.removeprefix('file:')!r}: this client reads only files that its "
                f"owner allowed; its owner can add --allow {name} to the client's command"
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


def _part_name(part: str) -> str:
    """Take the name out of a permitted part: what stands before its settings."""
    return part.partition("(")[0].strip()


def _part_settings(part: str) -> list[str]:
    """Take the settings out of a permitted part.

    Examples
    --------
    >>> _part_settings("my_models:build(width, depth)")
    ['width', 'depth']
    """
    text = part.partition("(")[2].rstrip(") ")
    return [name.strip() for name in text.split(",") if name.strip()]


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
