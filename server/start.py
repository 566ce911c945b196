"""Weights of one's own that a run starts from, read on the server alone."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from fedknow.client.learners import Learner
from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.server.run.checkpoint import find_arrays
from fedknow.server.run.folder import RunFolder

__all__ = ["pin_start", "start_learner"]

MOST_NAMED = 5
"""Names in an error."""


@dataclass(frozen=True)
class _Weights:
    """Weights as they were read.

    Attributes
    ----------
    path : Path
        The file, or the run folder.
    tensors : dict of str to Tensor
    sha256 : str
        Of the file's bytes, as hex digits.
    """

    path: Path
    tensors: dict[str, Tensor]
    sha256: str

    def refuse(self, problem: str) -> NoReturn:
        """Raise the error that these weights cannot be used."""
        raise ConfigError(f"start.weights = {str(self.path)!r}: {problem}")


def pin_start(config: ExperimentConfig) -> ExperimentConfig:
    """Enter the checksum of the weights that a run starts from.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment; one without ``start.weights`` comes back as it is.

    Raises
    ------
    ConfigError
        If the weights cannot be read, or their checksum is not that of ``start.sha256``.
    """
    if not config.start.weights:
        return config
    return _pinned(config, _file_bytes(Path(config.start.weights).expanduser()))


def start_learner(config: ExperimentConfig, learner: Learner) -> ExperimentConfig:
    """Give a server's learner the weights that a run starts from.

    Clients are sent them with their first message, as any global model. So a run has the same
    numbers wherever its clients are.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment; without ``start.weights`` nothing happens.
    learner : Learner
        A freshly built one. What it exchanges is replaced but for ``start.without``.

    Returns
    -------
    ExperimentConfig
        With the checksum of the weights.

    Raises
    ------
    ConfigError
        If the weights cannot be read or do not fit, by names, shapes or types.

    Notes
    -----
    Counters of integers (BatchNorm's) start anew with each message, and are not taken.
    """
    if not config.start.weights:
        return config
    path = Path(config.start.weights).expanduser()
    # Read once, so that the checksum is of the bytes that are used.
    data = _file_bytes(path)
    pinned = _pinned(config, data)
    weights = _Weights(path, _parse(path, data), pinned.start.sha256)
    arrays = learner.send()
    chosen = _choose(weights, learner, arrays, config.start.without)
    # What the file leaves open keeps the values that were drawn from the seed.
    learner.receive(arrays | chosen)
    started = learner.send()
    # A learner may send something else than what it received.
    if any(not torch.equal(started[name], chosen[name]) for name in chosen):
        weights.refuse(
            f"learner.name = {config.learner.name!r} does not send the parameters that it "
            "receives, so it cannot start from weights; leave start.weights out"
        )
    return pinned


def _pinned(config: ExperimentConfig, data: bytes) -> ExperimentConfig:
    digest = hashlib.sha256(data).hexdigest()
    # A resumed run must start from the same bytes, even if the file was replaced.
    expected = config.start.sha256
    if expected and expected != digest:
        raise ConfigError(
            f"start.sha256 = {expected!r}: {config.start.weights} has {digest!r}; "
            "give the file that was meant, or leave start.sha256 out"
        )
    start = config.start.model_copy(update={"sha256": digest})
    return config.model_copy(update={"start": start})


def _file_bytes(path: Path) -> bytes:
    """Read a file of weights, or that of a run's last checkpoint."""
    try:
        if path.is_dir():
            return find_arrays(RunFolder.open(path).checkpoints).read_bytes()
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"start.weights = {str(path)!r}: no such file; give a file of weights or a run "
            "folder with a complete round"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"start.weights = {str(path)!r}: cannot be read: {error.strerror}"
        ) from None


def _parse(path: Path, data: bytes) -> dict[str, Tensor]:
    """Read weights by name; nothing in the file is executed."""
    if path.is_dir() or path.suffix == ".safetensors":
        try:
            tensors = safetensors.load(data)
        except SafetensorError as error:
            raise ConfigError(
                f"start.weights = {str(path)!r}: no safetensors file: {error}"
            ) from None
        return _inner(tensors) if _is_export(data) else tensors
    try:
        # A pickle can run code: tensors and plain containers are all that is let in.
        read = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
    ) as error:
        # PyTorch's errors have a dozen lines, the first of which says it.
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"start.weights = {str(path)!r}: not a state dict that torch.load reads with "
            f"weights_only=True ({reason}); save the model's state_dict() with torch.save, or "
            "as .safetensors"
        ) from None
    return _state_dict(path, read)


def _state_dict(path: Path, read: Any) -> dict[str, Tensor]:
    # What training scripts write: the state dict lies beside an optimizer's.
    if isinstance(read, Mapping) and isinstance(read.get("state_dict"), Mapping):
        read = read["state_dict"]
    is_state_dict = isinstance(read, Mapping) and all(
        isinstance(name, str) and isinstance(value, Tensor)
        for name, value in read.items()
    )
    if not is_state_dict or not read:
        raise ConfigError(
            f"start.weights = {str(path)!r}: holds a {type(read).__name__} that is no state "
            "dict; save the model's state_dict() alone"
        )
    return dict(read)


def _is_export(data: bytes) -> bool:
    """Say whether ``fedknow export`` wrote the file."""
    # A safetensors file begins with the size of its header.
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    return "fedknow" in header.get("__metadata__", {})


def _inner(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the network out of an exported model, which normalises too."""
    return {
        name.removeprefix("network."): value
        for name, value in tensors.items()
        if name.startswith("network.")
    }


def _choose(
    weights: _Weights,
    learner: Learner,
    arrays: Mapping[str, Tensor],
    without: list[str],
) -> dict[str, Tensor]:
    """Choose the tensors that the learner takes, and refuse what does not fit."""
    _check_excluded(weights, learner, without)
    usable = {
        name: value
        for name, value in weights.tensors.items()
        if not _is_in(name, without) and name not in learner.entries.counters
    }
    _check_names(
        weights, learner, usable, [n for n in arrays if not _is_in(n, without)]
    )
    model = learner.model.state_dict()
    chosen = {}
    for name, value in usable.items():
        # Frozen parameters and second names of tied ones hold what they held before.
        expected = arrays.get(name, model[name])
        if value.shape != expected.shape:
            weights.refuse(
                f"{name} has shape {list(value.shape)}, the model's is "
                f"{list(expected.shape)}; give weights of this model, or leave it out by "
                f"start.without={name.partition('.')[0]}"
            )
        if not value.is_floating_point() or not torch.isfinite(value).all():
            weights.refuse(f"{name} is not made of finite floats")
        if name in arrays:
            chosen[name] = value.to(expected.dtype)
    _check_fixed(weights, learner, usable, chosen)
    return chosen


def _check_excluded(
    weights: _Weights, learner: Learner, without: Iterable[str]
) -> None:
    names = [*weights.tensors, *learner.model.state_dict()]
    for part in without:
        # A mistyped part would exclude nothing, and nobody would notice.
        if not any(_is_in(name, [part]) for name in names):
            raise ConfigError(
                f"start.without = {part!r}: neither the model nor {weights.path} has such a "
                "parameter or module"
            )


def _check_names(
    weights: _Weights,
    learner: Learner,
    usable: Mapping[str, Tensor],
    expected: Iterable[str],
) -> None:
    unreachable = learner.local_parameters().keys() & usable.keys()
    if unreachable:
        weights.refuse(
            f"{_listed(unreachable)} would not reach the clients, which keep such parameters to "
            f"themselves with this learner; add start.without={_parts(unreachable)}"
        )
    unknown = usable.keys() - learner.model.state_dict().keys()
    if unknown:
        weights.refuse(
            f"the model has no {_listed(unknown)}; give weights of this model, or add "
            f"start.without={_parts(unknown)}"
        )
    missing = [name for name in expected if name not in usable]
    if missing:
        weights.refuse(
            f"it has no {_listed(missing)}; give weights of this model, or have them drawn "
            f"from the seed by start.without={_parts(missing)}"
        )


def _check_fixed(
    weights: _Weights,
    learner: Learner,
    usable: Mapping[str, Tensor],
    chosen: Mapping[str, Tensor],
) -> None:
    """Refuse other values for what is not exchanged."""
    model = learner.model.state_dict(keep_vars=True)
    # By identity: tied parameters are one object under two names.
    places = {id(model[name]): name for name in chosen}
    for name in usable.keys() - chosen.keys():
        # A tied parameter has the value of its first name.
        twin = places.get(id(model[name]))
        value = model[name] if twin is None else chosen[twin]
        if not torch.equal(usable[name].to(value.dtype), value.detach()):
            weights.refuse(
                f"{name} is frozen in the model or tied to another parameter, and has another "
                f"value there; frozen parameters are never sent, so have the model load them, "
                f"and add start.without={name.partition('.')[0]}"
            )


def _is_in(name: str, parts: Iterable[str]) -> bool:
    """Say whether a parameter is one of these, or belongs to such a module."""
    # With the dot, so that `head` is no prefix of `header.weight`.
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    surplus = len(ordered) - MOST_NAMED
    text = ", ".join(ordered[:MOST_NAMED])
    return f"{text} and {surplus} more" if surplus > 0 else text


def _parts(names: Iterable[str]) -> str:
    """Name the modules of parameters, for ``start.without``."""
    return ",".join(sorted({name.partition(".")[0] for name in names}))
