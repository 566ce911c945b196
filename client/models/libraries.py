"""Networks of other libraries, by name.

They are called ``timm:NAME``, ``torchvision:NAME`` and ``hf:NAME``. Each library is an extra, and
is imported only where a name asks for it. Its network without the classifier becomes a body; the
head is ours, as everywhere.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedknow.client.data.samples import PADDING, Kind, SampleSpec
from fedknow.client.models.parameters import check_dtypes
from fedknow.client.models.split import Body
from fedknow.protocols.config import ConfigError, ModelConfig
from fedknow.protocols.extras import how_to_install
from fedknow.protocols.plugins import calling

__all__ = ["HUB", "is_of_library", "library_body"]

HUB = "hub"
"""``model.weights``: those that the library fetches from its hub, or finds in its cache."""

Options = Mapping[str, Any]


class _Library(NamedTuple):
    """A library of networks.

    Attributes
    ----------
    module : str
        What is imported.
    kinds : frozenset of str
        Kinds of samples that its networks take.
    build : callable
        From the module, a name, a sample, whether weights are pretrained, and settings to a
        network that gives features ``[n, f]``.
    """

    module: str
    kinds: frozenset[Kind]
    build: Callable[[Any, str, SampleSpec, bool, Options], nn.Module]


def _timm(
    timm: Any,
    name: str,
    sample: SampleSpec,
    is_pretrained: bool,
    options: Options,
) -> nn.Module:
    # Without classes its networks end in pooled features.
    network = timm.create_model(
        name,
        pretrained=is_pretrained,
        num_classes=0,
        in_chans=sample.shape[0],
        **options,
    )
    return cast(nn.Module, network)


def _torchvision(
    torchvision: Any,
    name: str,
    sample: SampleSpec,
    is_pretrained: bool,
    options: Options,
) -> nn.Module:
    weights = "DEFAULT" if is_pretrained else None
    network = torchvision.models.get_model(name, weights=weights, **options)
    linear = [
        place
        for place, module in network.named_modules()
        if isinstance(module, nn.Linear)
    ]
    # The classifier is the last layer of each of its networks, under one of many names.
    parent, _, leaf = linear[-1].rpartition(".")
    setattr(network.get_submodule(parent), leaf, nn.Identity())
    return cast(nn.Module, network)


def _transformers(
    transformers: Any,
    name: str,
    sample: SampleSpec,
    is_pretrained: bool,
    options: Options,
) -> nn.Module:
    if is_pretrained:
        network = transformers.AutoModel.from_pretrained(name, **options)
    else:
        config = transformers.AutoConfig.from_pretrained(name, **options)
        network = transformers.AutoModel.from_config(config)
    return _Encoder(network) if sample.kind == "tokens" else _Vision(network)


_LIBRARIES: Mapping[str, _Library] = {
    "timm": _Library("timm", frozenset(["image"]), _timm),
    "torchvision": _Library("torchvision", frozenset(["image"]), _torchvision),
    "hf": _Library("transformers", frozenset(["image", "tokens"]), _transformers),
}


class _Resized(nn.Module):
    """Images scaled to the size that a network was trained at."""

    def __init__(self, network: nn.Module, side: int) -> None:
        super().__init__()
        self.network = network
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        size = (self.side, self.side)
        if x.shape[-2:] != size:
            x = F.interpolate(x, size, mode="bicubic", align_corners=False)
        return cast(Tensor, self.network(x))


class _Encoder(nn.Module):
    """Mean of a text network's last states over its tokens."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Give features ``[n, f]`` of token ids ``[n, T]``."""
        is_token = x != PADDING
        states = self.network(
            input_ids=x, attention_mask=is_token.long()
        ).last_hidden_state
        weights = is_token.to(states.dtype)[:, :, None]
        # A text without tokens has none to divide by.
        return cast(
            Tensor, (states * weights).sum(1) / weights.sum(1).clamp(min=1)
        )


class _Vision(nn.Module):
    """Mean of an image network's last states over places or patches."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Give features ``[n, f]`` of images ``[n, C, H, W]``."""
        states = self.network(pixel_values=x).last_hidden_state
        # Convolutional networks keep places as height and width, others as one axis.
        mean = states.flatten(2).mean(2) if states.dim() == 4 else states.mean(1)
        return cast(Tensor, mean)


def is_of_library(name: str) -> bool:
    """Say whether ``model.name`` names a network of another library."""
    library, colon, network = name.partition(":")
    return library in _LIBRARIES and bool(colon and network)


def library_body(config: ModelConfig, sample: SampleSpec) -> Body:
    """Build the body of a network of another library.

    Parameters
    ----------
    config : ModelConfig
        ``weights = "hub"`` has the library bring pretrained weights. Other keys are settings of
        the library's own builder, but for ``resize``, the side that images are scaled to.
    sample : SampleSpec
        What goes in.

    Returns
    -------
    (nn.Module, int)
        The body, and how many features it gives.

    Raises
    ------
    ConfigError
        If the library is missing or broken, has no such network, or the network does not take
        such samples.
    """
    key, _, name = config.name.partition(":")
    library = _LIBRARIES[key]
    if sample.kind not in library.kinds:
        raise ConfigError(
            f"model.name = {config.name!r}: {library.module} takes samples of kind "
            f"{' or '.join(sorted(library.kinds))}, and those of this data set are {sample}; "
            "choose another model (fedknow list models)"
        )
    module = _import(library.module, config.name)
    options = dict(config.options)
    side = options.pop("resize", 0)
    with calling(config.name, "model.name"):
        is_pretrained = config.weights == HUB
        network = library.build(module, name, sample, is_pretrained, options)
        body = _Resized(network, side) if side else network
        check_dtypes(body, config.name)
        features = _try(body, sample)
    if features is None:
        raise ConfigError(
            f"model.name = {config.name!r}: its network without the classifier does not give "
            "features [n, f], so that no head fits behind it; wrap it in a module:callable of "
            "your own"
        )
    return body, features


def _import(module: str, name: str) -> Any:
    """Import a library; one that is broken says why."""
    try:
        return importlib.import_module(module)
    # Also what is raised by a library that was built for another PyTorch.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"model.name = {name!r} needs the package {module}, which cannot be imported "
            f"({type(error).__name__}: {reason}); {how_to_install(module)}, with a version made "
            f"for torch {torch.__version__}"
        ) from error


def _try(body: nn.Module, sample: SampleSpec) -> int | None:
    """Count the features that a body gives; ``None``: it gives none."""
    was_training = body.training
    # Two samples: a network may squeeze the axis of a single one away.
    with torch.no_grad():
        output = body.eval()(sample.random(2))
    body.train(was_training)
    is_flat = isinstance(output, Tensor) and output.dim() == 2
    return output.shape[1] if is_flat and len(output) == 2 else None
