"""How samples are cut into batches, one rule for all learners.

An epoch is cut into batches of ``train.batch_size`` in random order, and the last one holds what is
left. There is one exception. A BatchNorm layer that sees one value a channel has no variance to
divide by, and PyTorch refuses to train on it. A model with such a layer needs two samples a batch
(:func:`smallest_batch`); there a single last sample joins the batch before it. Other models, and
BatchNorm layers that see several places of an image, keep a last batch of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedknow.client.models.frozen import is_held
from fedknow.protocols.errors import FedknowError

__all__ = ["TooFewSamples", "batches", "check_batches", "smallest_batch"]


class TooFewSamples(FedknowError, ValueError):
    """A model cannot be trained on so few samples at once."""


def batches(
    count: int,
    size: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    smallest: int = 1,
) -> Iterator[Tensor]:
    """Cut the indices of one epoch, in random order, into batches.

    They are the same on any device.

    Parameters
    ----------
    count : int
        Samples.
    size : int
        Samples a batch.
    generator : torch.Generator
        Source of the order.
    device : torch.device or str
        Where the indices are to be.
    smallest : int
        The fewest samples a batch may have (:func:`smallest_batch`). A last batch with fewer joins
        the one before it.

    Yields
    ------
    Tensor
        Int64 [size]; the last one may be shorter, or longer by less than ``smallest``.
    """
    # Drawn on the CPU: a GPU's generator would give another order for the same seed.
    order = torch.randperm(count, generator=generator).to(device)
    parts = torch.split(order, size)
    if len(parts) > 1 and len(parts[-1]) < smallest:
        start = sum(map(len, parts[:-2]))
        parts = (*parts[:-2], order[start:])
    yield from parts


def smallest_batch(model: nn.Module, x: Tensor) -> int:
    """Tell the fewest samples that a model can be trained on at once: 1 or 2.

    Parameters
    ----------
    model : nn.Module
        It is tried in evaluation mode and left as it was.
    x : Tensor
        A sample, float [1, C, H, W]; what is in it does not matter.

    Returns
    -------
    int
        2 where a BatchNorm layer gets one value a channel from a sample.
    """
    # Those of a frozen part take no statistics of a batch.
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and not is_held(module)
    ]
    if not norms:
        return 1
    alone = False

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal alone
        # Two samples went in, so this is one value for each channel of each.
        alone = alone or inputs[0].numel() == 2 * inputs[0].shape[1]

    # Module by module, as a user may have set parts of a model to evaluation.
    modes = [(module, module.training) for module in model.modules()]
    hooks = [norm.register_forward_pre_hook(look) for norm in norms]
    try:
        with torch.no_grad():
            model.eval()(
                torch.cat([x, x])
            )  # of one, a layer without running statistics would fail
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return 2 if alone else 1


def check_batches(count: int, size: int, smallest: int) -> None:
    """Refuse to train on fewer samples at once than a model needs.

    Parameters
    ----------
    count : int
        A client's training samples.
    size : int
        ``train.batch_size``.
    smallest : int
        What the model needs (:func:`smallest_batch`).

    Raises
    ------
    TooFewSamples
        Naming what is too small, and the remedy.
    """
    if min(count, size) >= smallest:
        return
    fault = (
        "train.batch_size is 1"
        if size < smallest
        else "this client has one training sample"
    )
    raise TooFewSamples(
        f"{fault}, and the model's BatchNorm layers need two values a channel; take at "
        f"least two, or a "
        "model without BatchNorm"
    )
