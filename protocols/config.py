"""The typed configuration of an experiment: one model for files, the command line, checkpoints and
the wire.

An experiment is a TOML file (or a preset's name) plus ``key=value`` overrides. Everything is
checked when it is read: an unknown key or an impossible value is refused with the key, the
value and what would be right.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from fedknow.protocols.errors import REFUSED, FedknowError
from fedknow.protocols.values import bad_values, show, too_deep

__all__ = [
    "ConfigError",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "ExperimentConfig",
    "FleetConfig",
    "LearnerConfig",
    "ModelConfig",
    "StrategyConfig",
    "TrainConfig",
    "check_device",
    "differences",
    "parse_override",
    "read_config",
]

Scalar = bool | int | float | str


class ConfigError(FedknowError, ValueError):
    """A configuration that cannot be run; the text names the key, the value and what would be right."""

    exit_code = REFUSED
    is_resumable = False


MOST_CLIENTS = 100_000
MOST_TASKS = 10_000
MOST_CLASSES = 1_000_000
MOST_ROUNDS = 1_000_000
MOST_EPOCHS = 10_000
MOST_SAMPLES = 1_000_000
"""Of a batch."""
MOST_SECONDS = 1e9
"""Thirty years; Python's timers end at three hundred."""
MOST_SCORES = 200_000_000
"""Clients x tasks x tasks: 1.6 GB for each way of scoring."""
# Bounds far above what anybody has run: with a zero too many a run would be endless or fill the
# memory.


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused and values never change once read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )


class Component(BaseModel):
    """A part chosen by ``name``, whose further keys are the chosen part's own settings.

    A bare string stands for the name: ``strategy = "fedadam"``. The settings are checked by
    whoever builds the part.
    """

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1)

    @property
    def options(self) -> dict[str, Any]:
        """The settings besides the name."""
        return dict(self.__pydantic_extra__ or {})


def _by_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class DataConfig(Section):
    """Which data, cut into which tasks, shared among which clients."""

    name: str = "digits"
    """``digits`` (embedded), ``cifar100``, ... (``fedknow list datasets``), ``module:callable``,
    or ``local``: each real client's own."""
    dir: str = ""
    """Folder that holds the data set's own, ``<name>/``; empty: ``$FEDKNOW_DATA``."""
    image_size: int = Field(0, ge=0, le=1024)
    """Height and width that images on disk are scaled to; 0: the data set's usual ones."""
    scenario: Literal["task-incremental", "class-incremental"] = "task-incremental"
    """Whether a client knows which task a test sample belongs to (the head is sliced) or not."""
    tasks: int = Field(5, ge=1, le=MOST_TASKS)
    classes_per_task: int = Field(0, ge=0, le=MOST_CLASSES)
    """0: the data set's own groups where it has them (Omniglot's alphabets), else classes divided
    by tasks."""
    class_order: Literal["natural", "shuffled"] = "natural"
    task_order: Literal["same", "shuffled"] = "same"
    """``shuffled``: every client meets the same tasks in an order of its own."""
    arrival: Literal["same", "staggered", "poisson"] = "same"
    """When tasks arrive: at all clients at once, at each some rounds after the one before it
    (``arrival_lag``), or at each by chance, one in ``train.rounds`` rounds on average. A
    client's last task goes on until the run ends."""
    arrival_lag: float = Field(0, ge=0, le=MOST_SECONDS)
    """``staggered``: by how many rounds (with ``arrival_seconds``: virtual seconds) the last
    client is behind the first."""
    arrival_seconds: float = Field(0.0, ge=0, le=MOST_SECONDS)
    """With a fleet: a task arrives every so many virtual seconds, and not every ``train.rounds``
    rounds, which are then the most that it gets: when all clients have had as many, the server
    waits for the next arrival. 0: in rounds."""
    clients: int = Field(20, ge=1, le=MOST_CLIENTS)
    partition: Literal["paper", "iid", "dirichlet"] = "paper"
    """``paper``: each client draws some of a task's classes and a fraction of their samples."""
    classes_min: int = Field(2, ge=1, le=MOST_CLASSES)
    classes_max: int = Field(5, ge=1, le=MOST_CLASSES)
    samples: float = Field(0.1, gt=0, le=1)
    """``paper``: fraction of a class's training samples that one client holds."""
    test_samples: float = Field(0.1, gt=0, le=1)
    """``paper``: fraction of a class's test samples that one client is scored on; the others share
    out all of them."""
    share: Literal["disjoint", "overlapping"] = "overlapping"
    """``paper``: whether two clients may hold the same sample. ``disjoint`` needs enough samples
    for all clients."""
    alpha: float = Field(0.5, ge=1e-6, le=1e6)
    """``dirichlet``: concentration; small is skewed. With another partition it must be left as it is.
    """
    holdout: float = Field(0.0, ge=0, lt=1)
    """Fraction of each class's training samples that takes the place of the test samples, which
    are then not touched: for choosing settings."""

    shape: list[Annotated[int, Field(ge=1, le=4096)]] = Field(default=[], max_length=3)
    """``local``: channels, height and width of the clients' images."""
    classes: int = Field(0, ge=0, le=MOST_CLASSES)
    """``local``: classes of all tasks together."""

    @model_validator(mode="after")
    def _partition_fits(self) -> DataConfig:
        if self.classes_min > self.classes_max:
            raise ValueError(
                f"data.classes_min = {self.classes_min} is above data.classes_max = {self.classes_max}; "
                "lower the first or raise the second"
            )
        if self.partition != "dirichlet" and self.alpha != (
            default := DataConfig.model_fields["alpha"].default
        ):
            raise ValueError(
                f"data.alpha = {self.alpha:g} does nothing with data.partition = {self.partition!r}; "
                f"set data.partition = 'dirichlet', or leave data.alpha at {default:g}"
            )
        return self

    @model_validator(mode="after")
    def _images_fit(self) -> DataConfig:
        if self.image_size and self.name in ("digits", "local"):
            raise ValueError(
                f"data.image_size = {self.image_size}: data.name = {self.name!r} has images of a size of its own; "
                "leave data.image_size at 0"
            )
        if self.holdout and self.name == "local":
            raise ValueError(
                f"data.holdout = {self.holdout:g}: with data.name = 'local' clients bring test samples of their own; "
                "leave data.holdout at 0"
            )
        return self

    @model_validator(mode="after")
    def _arrivals_fit(self) -> DataConfig:
        if (self.arrival == "staggered") != (self.arrival_lag > 0):
            raise ValueError(
                f"data.arrival_lag = {self.arrival_lag:g} with data.arrival = {self.arrival!r}: it must be above 0 "
                "where tasks are staggered, and 0 where they are not"
            )
        if not self.arrival_seconds and self.arrival_lag % 1:
            raise ValueError(
                f"data.arrival_lag = {self.arrival_lag:g}: rounds are counted in whole numbers; round it, or set "
                "data.arrival_seconds"
            )
        return self

    @model_validator(mode="after")
    def _scores_fit(self) -> DataConfig:
        scores = self.clients * self.tasks**2
        if scores > MOST_SCORES:
            raise ValueError(
                f"data.tasks = {self.tasks} with data.clients = {self.clients}: each client is "
                f"scored on each task after each task, {scores:.1e} scores; lower one, so that "
                f"clients x tasks x tasks is at most {MOST_SCORES:.0e}"
            )
        return self


class ModelConfig(Component):
    """The network: ``cnn6``, ``cnn``, ``resnet18``, ... (``fedknow list models``) or
    ``module:callable``; others set it up."""

    name: str = Field("cnn", min_length=1)


class TrainConfig(Section):
    """Local training: what every learner has in common."""

    rounds: int = Field(3, ge=1, le=MOST_ROUNDS)
    """Rounds of each task."""
    epochs: int = Field(2, ge=1, le=MOST_EPOCHS)
    """Local epochs of each round."""
    batch_size: int = Field(16, ge=1, le=MOST_SAMPLES)
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    lr: float = Field(1e-3, gt=0, le=10)
    momentum: float = Field(0.0, ge=0, lt=1)
    """SGD's; with another optimizer it must be 0."""
    weight_decay: float = Field(1e-4, ge=0, le=0.1)
    """L2 term on the body, in every learner, and never on the head, where it would shrink the rows
    of other tasks; above 0.1 it destroys training and is refused."""
    clip_norm: float = Field(0.0, ge=0)
    """Largest norm of a gradient; 0 leaves gradients alone."""
    channels_last: bool = True
    """Memory format of images and convolutions."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """What layers compute in; weights, losses and optimizer stay float32. ``bf16`` is faster where
    the processor has instructions for it, and its results are those of its own kind of
    processor."""

    @model_validator(mode="after")
    def _fit(self) -> TrainConfig:
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(
                f"train.momentum = {self.momentum:g} does nothing with train.optimizer = {self.optimizer!r}; "
                "set train.optimizer = 'sgd', or train.momentum = 0"
            )
        return self


class LearnerConfig(Component):
    """The client's method: ``finetune``, ``fedknow``, ...; other keys are its settings."""

    name: str = Field("fedknow", min_length=1)


class StrategyConfig(Component):
    """The server's method: a Flower strategy by name or ``module:Class``; other keys go to its
    constructor."""

    name: str = Field("fedavg", min_length=1)


class EvaluationConfig(Section):
    """When and how clients are scored. After each task always."""

    every: int = Field(0, ge=0, le=MOST_ROUNDS)
    """Also after every so many rounds; 0: after each task only."""
    batch_size: int = Field(256, ge=1, le=MOST_SAMPLES)
    global_model: bool = True
    """Score the purely global model too (what did not travel is averaged for this purpose alone)."""
    forward: bool = False
    """Score tasks not learned yet as well, which forward transfer needs."""


def check_device(name: str, key: str = "engine.device") -> str:
    """A device's name, if it can be one on some machine.

    Raises
    ------
    ConfigError
        If it cannot; ``key`` is what the error calls the setting.
    """
    if not re.fullmatch(r"cpu|auto|cuda(:[0-9]{1,2})?", name):
        raise ConfigError(
            f"{key} = {name!r}: must be 'cpu', 'cuda', 'cuda:1' (or another number), or 'auto'"
        )
    return name


class EngineConfig(Section):
    """How a run is carried out; none of this changes a result, as long as no client is left out
    (and but for rounding errors of ``vectorize``, ``running_mean`` and ``device``, and the
    dropout masks of another ``device``)."""

    backend: Literal["ray", "inline"] = "ray"
    workers: int = Field(0, ge=0, le=4096)
    """0: one a core; one a GPU where clients train on GPUs."""
    device: Annotated[str, AfterValidator(check_device)] = "cpu"
    """What clients train and are scored on: ``cpu``; ``cuda``, a GPU (on Ray each worker's own, or
    its part of one); ``cuda:1``, ..., that GPU of the machine; ``auto``, a GPU where there is
    one. Messages and states stay on the CPU, and so does the server. Samples come in the same
    order on any device; results are the same up to rounding, which on a GPU need not be the
    same twice, and dropout masks are a device's own."""
    address: str = ""
    """Ray cluster to join, as ``HOST:PORT``; empty: a Ray of our own, whatever else runs."""
    memory_mb: int = Field(1024, ge=16, le=2**24)
    """Memory for client states a worker keeps at hand; the rest is read back from the run folder."""
    vectorize: Literal["off", "auto", "on"] = "off"
    """Simulations: train many clients at once, their weights stacked, where the method is plain
    local training and the model has neither dropout nor BatchNorm. ``auto``: where it was
    measured to be faster. Equal to one by one up to rounding; which clients are stacked depends
    on the workers, so numbers are no longer the same bit for bit."""
    running_mean: bool = False
    """Average clients' parameters as they arrive (on Ray in each worker, of its own clients) and
    give the strategy one answer, the mean weighted by samples, and not one a client: less
    copying, and memory for one model. For strategies that ask for this mean alone. Equal up to
    rounding, which depends on the order of arrival and on the workers."""
    round_timeout: float = Field(0.0, ge=0, le=MOST_SECONDS)
    """Real clients: seconds after which a wave of work goes on without those that have not
    answered; 0: it waits."""
    min_clients: int = Field(0, ge=0, le=MOST_CLIENTS)
    """Real clients: how many must be connected before work is given out. 0: all of them before the
    first round; after that as many as there are where ``round_timeout`` is set, and all of them
    where it is not."""
    max_update_norm: float = Field(100.0, ge=0)
    """A client's update whose L2 norm is above so many times that of the model it was sent (or
    above so much, where the model's norm is below 1) is refused as that client's failure; 0:
    any finite update will do."""
    on_client_error: Literal["stop", "skip"] = "stop"
    """What a failed client does to the run: end it, or leave that client's reply out and count it."""
    on_lost_state: Literal["stop", "fresh"] = "stop"
    """What becomes of a client whose state is missing or damaged. ``stop``: it has failed
    (``on_client_error``). ``fresh``: it begins anew, as a client that has not trained yet, and
    the record says so."""

    @model_validator(mode="after")
    def _any_gpu_of_a_cluster(self) -> EngineConfig:
        if self.address and ":" in self.device:
            raise ConfigError(
                f"engine.device = {self.device!r}: that is a GPU of one machine, and engine.address = {self.address!r} "
                "a cluster, where Ray gives each worker one: set engine.device to 'cuda'"
            )
        return self


def _by_devices(value: Any) -> Any:
    return {"devices": value} if isinstance(value, str | list) else value


class FleetConfig(Section):
    """Simulations: the devices and networks that clients are imagined to have, and what these do
    in virtual time.

    Without ``devices`` there is no fleet: clients are equally fast and always there. A bare
    string or list stands for the devices: ``fleet = "testbed-a"``.
    """

    devices: (
        dict[str, Annotated[int, Field(ge=1, le=MOST_CLIENTS)]] | list[str] | str
    ) = {}
    """How many clients have which device (``fedknow list devices``), in the order of clients,
    adding up to ``data.clients``: ``{jetson-nano = 8, ...}``; or a list, repeated as often as
    need be (``ai-*``: all devices named so, in an order drawn at random); or the name of a
    whole fleet, such as ``testbed-a``."""
    profiles: str = ""
    """File with devices of your own: TOML as ``fedknow calibrate`` writes it, or a CSV list of phones.
    """
    down: float = Field(0.0, ge=0)
    up: float = Field(0.0, ge=0)
    """Bytes a second to and from a client; 0: no limit."""
    latency: float = Field(0.0, ge=0, le=MOST_SECONDS)
    """Seconds that any message is under way besides."""
    jitter: float = Field(0.0, ge=0, le=MOST_SECONDS)
    """Mean of a further, exponentially distributed delay of each message, seconds."""
    shared: bool = False
    """``down`` and ``up`` are those of one link, shared equally by all that use it at a moment."""
    link_sigma: float = Field(0.0, ge=0, le=3)
    """Clients' links differ: each one's rate is ``exp(link_sigma * z)`` times what is given, ``z``
    standard normal."""
    compute_sigma: float = Field(0.0, ge=0, le=3)
    """Stragglers: each piece of computing takes ``exp(compute_sigma * z)`` times what it should."""
    availability: str = Field("always", min_length=1)
    """``always``; ``markov``: there and away in turn, for exponentially distributed times; or a
    CSV file with columns ``client,start,end`` (seconds), which is repeated after its last
    ``end``. Who is away is not chosen; who leaves goes on when back."""
    online: float = Field(3600.0, ge=0.1, le=MOST_SECONDS)
    offline: float = Field(3600.0, ge=0.1, le=MOST_SECONDS)
    """``markov``: mean seconds that a client is there, and away."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that an answer is lost on its way."""
    deadline: float = Field(0.0, ge=0, le=MOST_SECONDS)
    """Virtual seconds after which the server goes on without those that have not answered; 0: it
    waits."""
    over_commit: float = Field(1.0, ge=1, le=1000)
    """The server asks so many times the clients it needs to train, and takes the first answers."""

    @model_validator(mode="after")
    def _fit(self) -> FleetConfig:
        if not self.devices:
            defaults = FleetConfig.model_fields
            for name in self.model_fields_set - {"devices"}:
                if getattr(self, name) != defaults[name].default:
                    raise ValueError(
                        f"fleet.{name} = {getattr(self, name)!r} does nothing without devices; set fleet.devices "
                        "(fedknow list devices), 'infinite' for devices that take no time"
                    )
        for name in ("down", "up"):
            if 0 < (rate := getattr(self, name)) < 1:
                raise ValueError(
                    f"fleet.{name} = {rate:g}: must be at least 1 (byte a second), or 0 for no limit"
                )
        if self.shared and self.link_sigma:
            raise ValueError(
                f"fleet.link_sigma = {self.link_sigma:g}: with fleet.shared = true there is one link, so set "
                "fleet.link_sigma = 0"
            )
        return self


class ExperimentConfig(Section):
    """One experiment, complete: the same configuration and seed give the same numbers wherever it
    runs."""

    name: str = Field("digits", pattern=r"^[A-Za-z0-9._-]+$", max_length=100)
    seed: int = Field(0, ge=0, lt=2**31)
    data: Annotated[DataConfig, BeforeValidator(_by_name)] = DataConfig()
    model: Annotated[ModelConfig, BeforeValidator(_by_name)] = ModelConfig()
    train: TrainConfig = TrainConfig()
    learner: Annotated[LearnerConfig, BeforeValidator(_by_name)] = LearnerConfig()
    strategy: Annotated[StrategyConfig, BeforeValidator(_by_name)] = StrategyConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    engine: EngineConfig = EngineConfig()
    fleet: Annotated[FleetConfig, BeforeValidator(_by_devices)] = FleetConfig()

    @model_validator(mode="after")
    def _fit(self) -> ExperimentConfig:
        if self.data.arrival_seconds and not self.fleet.devices:
            raise ValueError(
                f"data.arrival_seconds = {self.data.arrival_seconds:g}: only a fleet has virtual time; set "
                "fleet.devices (fedknow list devices), or data.arrival_seconds = 0"
            )
        return self

    def to_toml(self) -> str:
        """The whole configuration, defaults included, as TOML."""
        return tomli_w.dumps(self.model_dump(mode="json"))

    def on_device(self, device: str) -> ExperimentConfig:
        """The same experiment with its clients on another device."""
        return self.model_copy(
            update={"engine": self.engine.model_copy(update={"device": device})}
        )

    def absolute(self) -> ExperimentConfig:
        """The same experiment with paths that mean the same from any folder.

        A run that is resumed from elsewhere then finds its data and its fleet's files again.
        """
        availability = self.fleet.availability
        is_file = availability not in ("always", "markov")
        fleet = {
            "profiles": _absolute(self.fleet.profiles),
            "availability": _absolute(availability) if is_file else availability,
        }
        update = {
            "data": self.data.model_copy(update={"dir": _absolute(self.data.dir)}),
            "fleet": self.fleet.model_copy(update=fleet),
        }
        return self.model_copy(update=update)

    def digest_fields(self) -> dict[str, Any]:
        """What a result depends on: everything but the engine and the folder the data lie in."""
        fields = self.model_dump(mode="json", exclude={"engine"})
        del fields["data"]["dir"]
        return fields


def _absolute(path: str) -> str:
    """A path from the root on; none stays none."""
    return os.path.abspath(os.path.expanduser(path)) if path else ""


def parse_override(text: str) -> tuple[list[str], Any]:
    """Split ``a.b=value``; the value is read as TOML where it is TOML and as a string where it is not.

    Raises
    ------
    ConfigError
        If there is no ``=`` or the key is empty.
    """
    key, equals, value = text.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path):
        raise ConfigError(
            f"--set {show(text)}: write key=value, for example --set train.lr=0.01"
        )
    try:
        return path, tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return path, value.strip()
    except RecursionError:
        raise ConfigError(
            f"--set {key}: its value is nested too deeply; no setting is"
        ) from None
    except ValueError as error:  # integers with thousands of digits
        raise ConfigError(
            f"--set {key}: its value is no TOML: {_first_line(error)}"
        ) from None


def read_config(
    source: Mapping[str, Any] | str | os.PathLike[str],
    overrides: Iterable[str] = (),
    called: str = "the configuration",
) -> ExperimentConfig:
    """Read an experiment from a TOML file (or a mapping) and apply ``key=value`` overrides in order.

    Parameters
    ----------
    source : mapping, str or path
        The experiment, or the file it stands in.
    overrides : iterable of str
        Changes.
    called : str
        What errors call a mapping; a file is called by its name.

    Raises
    ------
    ConfigError
        For a missing or malformed file, an unknown key or an impossible value; every problem is
        listed.
    """
    if isinstance(source, Mapping):
        where = called
        _refuse_deep(source, where)  # before it is copied, which is recursive
        tree = _copy(source)
    else:
        where = str(source)
        tree = _read_toml(source)
    for text in overrides:
        _assign(tree, *parse_override(text), text)
    _refuse_deep(tree, where)
    try:
        config = ExperimentConfig.model_validate(tree)
    except ValidationError as error:
        _refuse([_explain(problem) for problem in error.errors()], where)
    if problems := list(islice(bad_values(tree), 10)):
        _refuse(problems, where)
    return config


def _read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; give a .toml file or a preset (fedknow list presets)"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(
            f"{path}: not valid TOML: lists or tables nested too deeply"
        ) from None
    except (
        ValueError
    ) as error:  # of TOML, of UTF-8, of integers with thousands of digits
        raise ConfigError(f"{path}: not valid TOML: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).partition(";")[0]


def _refuse_deep(tree: Mapping[str, Any], where: str) -> None:
    if problem := too_deep(tree):
        _refuse([problem], where)


def _refuse(problems: Iterable[str], where: str) -> NoReturn:
    raise ConfigError(
        "\n".join([f"{where}:", *(f"  {problem}" for problem in problems)])
    ) from None


def differences(old: ExperimentConfig, new: ExperimentConfig) -> list[str]:
    """The settings that change a result in which two configurations differ, one readable line each."""

    def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in tree.items():
            out.update(
                flat(value, f"{prefix}{key}.")
                if isinstance(value, Mapping)
                else {f"{prefix}{key}": value}
            )
        return out

    a, b = flat(old.digest_fields()), flat(new.digest_fields())
    return [
        f"{key}: was {a.get(key, 'not set')!r}, now {b.get(key, 'not set')!r}"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, ...) != b.get(key, ...)
    ]


def closest(word: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` where a known word is near, else nothing."""
    match = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _copy(tree: Any) -> Any:
    return (
        {key: _copy(value) for key, value in tree.items()}
        if isinstance(tree, Mapping)
        else tree
    )


def _assign(tree: dict[str, Any], path: list[str], value: Any, text: str) -> None:
    *parents, leaf = path
    for key in parents:
        child = tree.get(key, {})
        if (
            isinstance(child, str) and key in _COMPONENTS
        ):  # learner = "gem", then --set learner.memory=20
            child = {"name": child}
        if key == "fleet" and not isinstance(
            child, dict
        ):  # fleet = "testbed-a", then --set fleet.down=1e6
            child = {"devices": child}
        if not isinstance(child, dict):
            raise ConfigError(f"--set {show(text)}: {key!r} is a value, not a section")
        tree[key] = child
        tree = child
    if (
        leaf in _COMPONENTS
        and not parents
        and isinstance(value, str)
        and isinstance(tree.get(leaf), dict)
    ):
        # Another learner, strategy or model has settings of its own: those of the old one go
        # with it.
        value = (
            {**tree[leaf], "name": value}
            if tree[leaf].get("name") == value
            else {"name": value}
        )
    if (
        leaf == "data"
        and not parents
        and isinstance(value, str)
        and isinstance(tree.get(leaf), dict)
    ):
        value = {**tree[leaf], "name": value}
    if (
        leaf == "fleet"
        and not parents
        and isinstance(value, str | list)
        and isinstance(tree.get(leaf), dict)
    ):
        value = {**tree[leaf], "devices": value}
    tree[leaf] = value


_COMPONENTS = ("learner", "strategy", "model")
_NAMED = (*_COMPONENTS, "data", "fleet")


def _explain(problem: Any) -> str:
    place = [str(part) for part in problem["loc"]]
    key = ".".join(place)
    if problem["type"] == "extra_forbidden":
        section: Any = ExperimentConfig
        for part in place[:-1]:
            annotation = section.model_fields[part].annotation
            section = next(
                (a for a in get_args(annotation) if isinstance(a, type)), annotation
            )
        known = list(section.model_fields)
        owner = ".".join(place[:-1]) or "an experiment"
        return f"{key}: unknown key{closest(place[-1], known)}; {owner} has: {', '.join(known)}"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    value = show(problem["input"])
    if problem["type"] == "string_type" and isinstance(
        problem["input"], bool | int | float
    ):
        quoted = f'{key}="{value}"'
        return f"{key} = {value}: must be text; write {quoted} (in a shell: --set '{quoted}')"
    if problem["type"] == "model_type":
        what = (
            "a name or a table of settings" if key in _NAMED else "a table of settings"
        )
        return f"{key} = {value}: must be {what}"
    return f"{key} = {value}: {problem['msg']}"
