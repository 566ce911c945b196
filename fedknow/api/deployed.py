"""A trained model as others use it: samples in, logits out.

A run's network expects normalised samples. A :class:`DeployedModel` brings the normalisation
along, so that it can be exported, evaluated and asked for predictions without the data set.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from fedknow.api.inputs import as_input
from fedknow.client.data.samples import (
    SampleSpec,
    as_spec,
    normalized,
    shaped,
)
from fedknow.protocols.config import ConfigError

__all__ = ["DeployedModel", "ExportFormat", "Scores"]

ExportFormat = Literal["safetensors", "onnx", "torchscript"]
_ENDINGS = {"safetensors": ".safetensors", "onnx": ".onnx", "torchscript": ".pt"}
_BATCH = 256


@dataclass(frozen=True)
class Scores:
    """How a model did on labelled samples.

    Attributes
    ----------
    accuracy : float
        Share of the samples whose largest logit is at their label.
    samples : int
        How many there were.
    confusion : int64 [classes, classes]
        Samples of each true class (row) by predicted class (column).
    class_names : tuple of str
        Names of the rows and columns.
    """

    accuracy: float
    samples: int
    confusion: NDArray[np.int64]
    class_names: tuple[str, ...]


class DeployedModel(nn.Module):
    """A network with its normalisation.

    Parameters
    ----------
    network : nn.Module
        Normalised samples ``[n, ...]`` to logits ``[n, classes]``.
    sample : SampleSpec or sequence of int
        What a sample is; a shape alone is that of 8-bit images.
    mean, std : sequence of float
        One number a channel; of 8-bit images on the scale 0..1. Empty for tokens.
    class_names : sequence of str
        One name a logit.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        sample: SampleSpec | Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        class_names: Sequence[str],
    ) -> None:
        super().__init__()
        self.network = network
        self.sample = as_spec(sample)
        self.shape = self.sample.shape
        self.class_names = tuple(class_names)
        # Buffers, so that the normalisation is exported and moved to a device with the network.
        self.register_buffer("mean", shaped(mean, self.sample))
        self.register_buffer("std", shaped(std, self.sample))

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits.

        Parameters
        ----------
        images : Tensor [n, ...]
            Samples: of 8-bit images float32 ``[n, C, H, W]`` from 0 to 1, of tokens int64
            ``[n, T]``, of others float32.

        Returns
        -------
        Tensor, float32 [n, classes]
        """
        x = normalized(images, self.sample, self.mean, self.std)
        return cast(Tensor, self.network(x))

    @torch.inference_mode()
    def logits(self, x: NDArray[Any]) -> NDArray[np.float32]:
        """Compute the logits of samples.

        Parameters
        ----------
        x : ndarray [n, ...]
            As :func:`~fedknow.api.inputs.as_input` takes them: images are uint8, or float
            from 0 to 1.

        Returns
        -------
        float32 [n, classes]

        Raises
        ------
        ConfigError
            If the samples have another shape, type or range.
        """
        images = as_input(x, self.sample)
        # An exporter or a user may have left it in training mode.
        self.eval()
        # In parts, as the activations of thousands of images fit into no memory.
        parts = [self(part) for part in torch.split(images, _BATCH)]
        return np.asarray(torch.cat(parts))

    def predict(
        self, x: NDArray[Any], classes: Sequence[int] | None = None
    ) -> NDArray[np.int64]:
        """Predict the label of each sample.

        Parameters
        ----------
        x : ndarray [n, ...]
            As for :meth:`logits`.
        classes : sequence of int, optional
            The labels to choose among, such as those of one task; all without.

        Returns
        -------
        int64 [n]
        """
        logits = self.logits(x)
        labels = (
            np.arange(logits.shape[1]) if classes is None else np.array(classes)
        )
        if not set(labels.tolist()) <= set(range(logits.shape[1])):
            raise ConfigError(
                f"classes = {labels.tolist()}: the model knows 0 to {logits.shape[1] - 1}"
            )
        choice: NDArray[np.int64] = labels[logits[:, labels].argmax(1)]
        return choice

    def evaluate(
        self,
        x: NDArray[Any],
        y: NDArray[Any],
        classes: Sequence[int] | None = None,
    ) -> Scores:
        """Compare predictions with labels.

        Parameters
        ----------
        x : ndarray [n, ...]
            As for :meth:`logits`.
        y : integer ndarray [n]
            Labels.
        classes : sequence of int, optional
            As for :meth:`predict`.

        Raises
        ------
        ConfigError
            If the labels do not fit the images or the model.
        """
        y = np.asarray(y)
        count = len(self.class_names)
        if y.dtype.kind not in "iu" or y.shape != x.shape[:1] or not len(y):
            raise ConfigError(
                f"y is {y.dtype} {list(y.shape)}; it must be integers [{len(x)}], at least one"
            )
        if y.min() < 0 or y.max() >= count:
            raise ConfigError(
                f"y runs from {y.min()} to {y.max()}; the model knows 0 to {count - 1}"
            )
        predicted = self.predict(x, classes)
        confusion = np.zeros((count, count), np.int64)
        # Plain indexing would count a pair that comes twice once.
        np.add.at(confusion, (y, predicted), 1)
        right = int(np.trace(confusion))
        return Scores(right / len(y), len(y), confusion, self.class_names)

    def description(self) -> dict[str, Any]:
        """Describe input and output, for whoever loads an exported file."""
        return {
            "input": {
                "name": _input_name(self.sample),
                "kind": self.sample.kind,
                "dtype": str(self.sample.input_dtype).removeprefix("torch."),
                "shape": ["n", *self.shape],
            },
            "range": _range(self.sample),
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
            "output": {"name": "logits", "dtype": "float32"},
            "classes": list(self.class_names),
        }

    def export(self, path: str | os.PathLike[str], to: ExportFormat) -> Path:
        """Write the model to a file.

        Parameters
        ----------
        path : path
            The file; its ending is added where it has none.
        to : {"safetensors", "onnx", "torchscript"}
            ``safetensors``: the weights by name, for PyTorch. ``onnx`` and ``torchscript``: the
            whole computation, normalisation included, for a batch of any size.

        Returns
        -------
        Path
            The file written. Its metadata say what :meth:`description` says.

        Raises
        ------
        ConfigError
            If there is no such format.
        ModuleNotFoundError
            If ``onnx`` is asked for and the extra ``export`` is not installed.
        """
        if to not in get_args(ExportFormat):
            raise ConfigError(
                f"to = {to!r}: must be one of {', '.join(get_args(ExportFormat))}"
            )
        path = Path(path)
        path = path if path.suffix else path.with_suffix(_ENDINGS[to])
        path.parent.mkdir(parents=True, exist_ok=True)
        self.eval()
        description = json.dumps(self.description())
        if to == "safetensors":
            tensors = {
                name: value.contiguous()
                for name, value in self.state_dict().items()
            }
            save_file(tensors, path, metadata={"fedknow": description})
        elif to == "torchscript":
            self._export_torchscript(path, description)
        else:
            self._export_onnx(path, description)
        return path

    def _example(self) -> Tensor:
        # Two images: with one alone an exporter may take the size of a batch for a constant.
        draws = torch.Generator().manual_seed(0)
        size = (2, *self.shape)
        if self.sample.kind == "tokens":
            return torch.randint(1, self.sample.vocabulary, size, generator=draws)
        return torch.rand(size, generator=draws)

    def _export_torchscript(self, path: Path, description: str) -> None:
        with torch.no_grad():
            traced = torch.jit.trace(self, self._example())  # type: ignore[no-untyped-call]
        torch.jit.save(
            traced, str(path), _extra_files={"fedknow.json": description}
        )

    def _export_onnx(self, path: Path, description: str) -> None:
        import onnx  # an extra: only this format needs it

        # ONNX has no memory formats: channels-last weights would be copied at each call.
        model = self.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        batch = torch.export.Dim("n")
        with torch.no_grad(), _without_notes():
            program = torch.onnx.export(
                model,
                (self._example(),),
                input_names=[_input_name(self.sample)],
                output_names=["logits"],
                dynamic_shapes=({0: batch},),
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        proto = program.model_proto
        entry = proto.metadata_props.add()
        entry.key = "fedknow"
        entry.value = description
        onnx.checker.check_model(proto)
        onnx.save(proto, str(path))


@contextmanager
def _without_notes() -> Iterator[None]:
    """Keep back the exporter's notes on what this model does not use.

    They are of torchvision's operators and of names that PyTorch itself uses; errors are
    raised all the same.
    """
    registry = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registry.level
    registry.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        registry.setLevel(level)


def _input_name(spec: SampleSpec) -> str:
    """Name the input in exported files."""
    return "images" if spec.kind == "image" else spec.kind


def _range(spec: SampleSpec) -> list[float] | None:
    """Give the lowest and the highest value of an input, where there are any."""
    if spec.kind == "tokens":
        return [0, spec.vocabulary - 1]
    return [0.0, 1.0] if (spec.kind, spec.dtype) == ("image", "uint8") else None
