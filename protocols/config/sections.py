"""The sections of a configuration but ``data`` and ``fleet``."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from fedknow.protocols.config.base import (
    MOST_CLIENTS,
    MOST_EPOCHS,
    MOST_ROUNDS,
    MOST_SAMPLES,
    MOST_SECONDS,
    Component,
    Section,
)
from fedknow.protocols.config.errors import ConfigError
from fedknow.protocols.values import show

__all__ = [
    "EngineConfig",
    "EvaluationConfig",
    "LearnerConfig",
    "ModelConfig",
    "StrategyConfig",
    "TrainConfig",
    "check_device",
]


class ModelConfig(Component):
    """The network.

    ``cnn6``, ``cnn``, ``resnet18``, ... (``fedknow list models``), ``timm:NAME``,
    ``torchvision:NAME``, ``hf:NAME``, or ``module:callable``; other keys are its settings.
    """

    name: str = Field("cnn", min_length=1)
    weights: str = ""
    """Pretrained weights of the body. ``package``: a Python package's, for the models that know
    one; ``file:PATH``: a state dict of the body, as safetensors or of PyTorch; ``hub``: those that
    timm, torchvision or transformers fetch. Empty: none."""
    train: str = Field("all", pattern=r"^(all|head|lora|last:[1-9][0-9]{0,3})$")
    """What of the network is trained, travels and is kept. ``all``; ``head``: nothing of the
    network itself; ``last:2``: its last two blocks; ``lora``: low-rank adapters of its linear and
    convolutional layers. The head and the ``neck`` always are. What is frozen stays in evaluation
    mode."""
    lora_rank: int = Field(8, ge=1, le=1024)
    """Rank of the adapters."""
    lora_alpha: float = Field(16.0, gt=0, le=1e4)
    """Adapters are scaled by ``lora_alpha / lora_rank``."""
    neck: int = Field(0, ge=0, le=65536)
    """Units of a trained layer with ReLU between network and head; 0: none. It belongs to the body,
    so it gives methods with a head of one's own something to share."""
    random_features: int = Field(0, ge=0, le=65536)
    """With ``train = "head"``: features relu(x R) of so many columns of a fixed random R take the
    place of the network's x, which makes a linear head stronger; 0: x itself."""
    head: Literal["linear", "cosine"] = "linear"
    """``cosine``: logits are a learned scale times the cosine of features and class weights."""
    cache_features: bool = False
    """Compute what the frozen part gives once for each sample, and keep it on disk in
    ``$FEDKNOW_CACHE``. Results are the same to the bit. Refused where a method changes samples, or
    the frozen part is not the network's beginning."""

    @model_serializer(mode="wrap")
    def _without_defaults(
        self, serialize: SerializerFunctionWrapHandler
    ) -> dict[str, Any]:
        # Run folders and clients of earlier versions do not know these settings.
        defaults = {
            name: entry.default
            for name, entry in type(self).model_fields.items()
            if name != "name"
        }
        settings: dict[str, Any] = serialize(self)
        return {
            key: value
            for key, value in settings.items()
            if key not in defaults or value != defaults[key]
        }


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
                f"train.momentum = {self.momentum:g} does nothing with train.optimizer = "
                f"{self.optimizer!r}; "
                "set train.optimizer = 'sgd', or train.momentum = 0"
            )
        return self


class LearnerConfig(Component):
    """The client's method.

    ``finetune``, ``fedknow``, ...; other keys are its settings.
    """

    name: str = Field("fedknow", min_length=1)


class StrategyConfig(Component):
    """The server's method.

    A Flower strategy by name or ``module:Class``; other keys go to its constructor.
    """

    name: str = Field("fedavg", min_length=1)


class EvaluationConfig(Section):
    """When and how clients are scored. After each task always."""

    every: int = Field(0, ge=0, le=MOST_ROUNDS)
    """Also after every so many rounds; 0: after each task only."""
    batch_size: int = Field(256, ge=1, le=MOST_SAMPLES)
    global_model: bool = True
    """Score the purely global model too (what did not travel is averaged for this purpose
    alone). Real clients and Flower's nodes would have to send what they keep, such as heads.
    So there it is false for such methods, unless it is set."""
    forward: bool = False
    """Score tasks not learned yet as well, which forward transfer needs."""
    clients: int = Field(0, ge=0, le=MOST_CLIENTS)
    """Score a sample of so many clients, drawn once a run; 0: all. Accuracies are estimates then,
    and ``accuracy_margin`` in ``metrics.jsonl`` is half of their 95 % interval. Scoring all of
    thousands of clients takes longer than training some of them."""


def check_device(name: str, key: str = "engine.device") -> str:
    """Give a device's name, if it can be one on some machine.

    Raises
    ------
    ConfigError
        If it cannot; ``key`` is what the error calls the setting.
    """
    # By its form alone: which GPUs there are is known only on the machine that uses them.
    if not re.fullmatch(r"cpu|auto|cuda(:[0-9]{1,2})?", name):
        raise ConfigError(
            f"{key} = {name!r}: must be 'cpu', 'cuda', 'cuda:1' (or another number), or 'auto'"
        )
    return name


class EngineConfig(Section):
    """How a run is carried out.

    None of this changes a result, as long as no client is left out. Rounding errors of
    ``vectorize``, ``running_mean`` and ``device`` are the exception, and so are the dropout masks
    of another ``device``. With ``running_mean`` they are the same for any workers and any order.
    """

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
    code: str = ""
    """A folder of Python modules of yours, which goes along to all machines of the cluster at
    ``address``, first on the path of their workers. Empty: they have what they need."""
    states: str = Field("", pattern=r"^([a-z][a-z0-9+.-]*://.+)?$")
    """Simulations: a storage URL for client states, as fsspec reads it: ``s3://BUCKET/FOLDER``,
    ``gs://...``, ``file:///nfs/FOLDER``. Each run has a folder of its own there, and ``--resume``
    needs it. Empty: the run folder. ``memory://`` is one process's, and goes with ``backend =
    "inline"`` alone."""
    memory_mb: int = Field(1024, ge=16, le=2**24)
    """Memory for client states a worker keeps at hand; the rest is read back from the run
    folder."""
    vectorize: Literal["off", "auto", "on"] = "off"
    """Simulations: train many clients at once, their weights stacked, where the method is plain
    local training and the model has neither dropout nor BatchNorm. ``auto``: where it was
    measured to be faster. Equal to one by one up to rounding; which clients are stacked depends
    on the workers, so numbers are no longer the same bit for bit."""
    running_mean: bool = False
    """Average clients' parameters as they arrive (on Ray in each worker, of its own clients) and
    give the strategy one answer, the mean weighted by samples, and not one a client: less
    copying, and 24 bytes a parameter in each process, for any number of clients. For strategies
    that ask for this mean alone. The sum is exact and rounded once, so the numbers are the same
    to the bit for any order and any workers; without it each client's term is rounded."""
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
    max_weight: float = Field(3.0, ge=0)
    """Real clients with data of their own: how many times the median of a round's ``num-examples``
    one client may claim; above that it counts for so much, and the record says so. Where answers
    come one by one (``fedbuff``), the median is of all clients' latest claims. 0: any claim
    is believed. Where the server makes the data itself it knows the sizes, and refuses a claim
    that is too large."""
    on_client_error: Literal["stop", "skip"] = "stop"
    """What a failed client does to the run: end it, or leave that client's reply out and
    count it."""
    on_lost_state: Literal["stop", "fresh"] = "stop"
    """What becomes of a client whose state is missing or damaged. ``stop``: it has failed
    (``on_client_error``). ``fresh``: it begins anew, as a client that has not trained yet, and
    the record says so."""

    @model_validator(mode="after")
    def _code_for_a_cluster(self) -> EngineConfig:
        if self.code and not self.address:
            raise ConfigError(
                f"engine.code = {show(self.code)}: it goes to the machines of a cluster, and "
                "engine.address names none; leave engine.code empty, or set engine.address"
            )
        return self

    @model_validator(mode="after")
    def _states_that_workers_see(self) -> EngineConfig:
        if self.states.startswith("memory://") and self.backend == "ray":
            raise ConfigError(
                f"engine.states = {show(self.states)}: the memory of one process, which workers "
                "do not see; set engine.backend = 'inline', or name another place"
            )
        return self

    @model_validator(mode="after")
    def _any_gpu_of_a_cluster(self) -> EngineConfig:
        # Ray shows each worker its own GPU as number 0.
        if self.address and ":" in self.device:
            raise ConfigError(
                f"engine.device = {self.device!r}: that is a GPU of one machine, and "
                f"engine.address = {self.address!r} "
                "a cluster, where Ray gives each worker one: set engine.device to 'cuda'"
            )
        return self
