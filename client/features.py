"""Features of a frozen network, computed once and kept on disk.

A file is named after all that its content depends on: the frozen weights, the network's settings
and the samples. So runs share files, and none has to be thrown away.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fedknow.client.data.samples import SampleSpec
from fedknow.client.data.stream import Split, TaskData, TaskStream
from fedknow.client.learners.frames.learner import Learner
from fedknow.client.models.frozen import Backbone
from fedknow.protocols.config import ModelConfig

__all__ = ["FeatureStream", "with_features"]

log = logging.getLogger(__name__)

_FORMAT = 1
"""Counted up whenever the rules of computing or storing features change."""
_REMEMBERED = 1 << 28
"""Bytes of features that a process holds at hand."""


def with_features(
    stream: TaskStream, learner: Learner, config: ModelConfig
) -> TaskStream:
    """Give the stream of features, where ``model.cache_features`` asks."""
    if not config.cache_features:
        return stream
    # `check_cache` has refused all other models.
    assert isinstance(learner.body, Backbone)
    return FeatureStream(stream, learner, learner.body, config)


class FeatureStream:
    """A stream whose samples have gone through the frozen part already.

    Parameters
    ----------
    stream : TaskStream
        Of samples.
    learner : Learner
        Whose network it is; it says in which format samples are laid out.
    backbone : Backbone
        The network's body.
    config : ModelConfig
        Its settings.

    Attributes
    ----------
    sample_flops : int
        Operations of the frozen part for one sample.
    """

    def __init__(
        self,
        stream: TaskStream,
        learner: Learner,
        backbone: Backbone,
        config: ModelConfig,
    ) -> None:
        self._stream = stream
        self._learner = learner
        self._backbone = backbone
        # Not in the run's folder: runs with the same network share their features.
        folder = os.environ.get("FEDKNOW_CACHE") or "~/.cache/fedknow"
        self._folder = Path(folder).expanduser() / "features"
        self._prefix = self._digest(config)
        self._recent: OrderedDict[tuple[int, int], TaskData] = OrderedDict()
        self._bytes = 0
        self.sample_flops = self._count()

    @property
    def tasks(self) -> int:
        """Length of the stream."""
        return self._stream.tasks

    @property
    def classes(self) -> int:
        """Width of the head."""
        return self._stream.classes

    @property
    def spec(self) -> SampleSpec:
        """What a sample is before it goes through the network."""
        return self._stream.spec

    @property
    def clients(self) -> int:
        """Number of clients."""
        return self._stream.clients

    def length(self, client: int) -> int:
        """Count the tasks that a client has."""
        return self._stream.length(client)

    def task(self, client: int, task: int) -> TaskData:
        """Give a client's share of a task, as features."""
        key = (client, task)
        if key in self._recent:
            self._recent.move_to_end(key)
            return self._recent[key]
        data = self._stream.task(client, task)
        train, test = self._features(data.train), self._features(data.test)
        share = self._recent[key] = replace(data, train=train, test=test)
        self._bytes += _nbytes(share)
        # A share larger than the limit goes at once, and is read from the disk each time.
        while self._bytes > _REMEMBERED:
            _, oldest = self._recent.popitem(last=False)
            self._bytes -= _nbytes(oldest)
        return share

    def _digest(self, config: ModelConfig) -> bytes:
        """Digest everything but samples that features depend on."""
        digest = hashlib.sha256()
        device = self._learner.device.type
        # Devices, versions and memory formats round differently.
        facts = (
            _FORMAT,
            torch.__version__,
            device,
            self._learner.train.channels_last,
        )
        digest.update(repr(facts).encode())
        settings = config.model_dump(mode="json")
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        # The weights themselves, as a file of the same name may hold others by now.
        digest.update(self._learner.entries.frozen_digest.encode())
        return digest.digest()

    def _count(self) -> int:
        # Blank samples do: the operations depend on shapes alone.
        sample = self.spec.blank(1, device=self._learner.device)
        with FlopCounterMode(display=False) as counter:
            self._backbone.features(self._learner.images(sample))
        return int(counter.get_total_flops())

    def _features(self, split: Split) -> Split:
        # By content, so that clients with the same samples share a file.
        path = self._folder / f"{self._key(split.x)}.npy"
        features = _read(path)
        if features is None:
            x = self._learner.images(split.x.to(self._learner.device))
            features = self._backbone.features(x).cpu().contiguous()
            _write(features, path)
        return Split(features, split.y)

    def _key(self, x: Tensor) -> str:
        digest = hashlib.sha256(self._prefix)
        # The same bytes are other samples in another shape.
        digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]


def _read(path: Path) -> Tensor | None:
    """Read features; None where there are none, or the file is damaged."""
    if not path.exists():
        return None
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        log.warning(
            "%s: damaged features (%s); they are computed again", path, error
        )
        return None


def _write(features: Tensor, path: Path) -> None:
    """Write a file as a whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same folder, since renaming across disks is not atomic.
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=".", delete=False
        ) as draft:
            np.save(draft, features.numpy(), allow_pickle=False)
        os.replace(draft.name, path)
    except OSError as error:
        log.warning(
            "%s: features cannot be cached (%s); they are computed again next time. Set "
            "FEDKNOW_CACHE to a folder with room in it.",
            path,
            error.strerror or error,
        )


def _nbytes(data: TaskData) -> int:
    splits = (data.train, data.test)
    return sum(split.x.nbytes + split.y.nbytes for split in splits)
