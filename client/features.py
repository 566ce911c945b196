"""Features of a frozen network, computed once and kept on disk.

A file is named after all that features depend on but the samples: the frozen weights and the
network's settings. A feature's key in it is a digest of the sample. So runs, clients and
partitions share features, and none has to be thrown away.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fedknow.client.data.samples import SampleSpec
from fedknow.client.data.stream import Split, TaskData, TaskStream
from fedknow.client.feature_store import FeatureStore
from fedknow.client.learners.frames.learner import Learner
from fedknow.client.models.frozen import (
    Backbone,
    one_by_one,
    split_random_features,
)
from fedknow.protocols.config import ModelConfig

__all__ = ["FeatureStream", "with_features"]

_FORMAT = 2
"""Counted up whenever the rules of computing or storing features change."""
_REMEMBERED = 1 << 28
"""Bytes of features that a process holds at hand."""
_BEHIND = {"neck", "random_features", "head", "cache_features"}
"""Settings of a model that change nothing in what is stored."""


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
        # Columns drawn anew for each seed are cheap to apply, and would fill the disk.
        self._stored, self._drawn = split_random_features(backbone.frozen)
        self._shape = backbone.feature_shape
        if self._drawn is not None:
            self._shape = (len(self._drawn.matrix),)
        # Not in the run's folder: runs with the same network share their features.
        folder = os.environ.get("FEDKNOW_CACHE") or "~/.cache/fedknow"
        name = f"{self._digest(config)[:32]}.sqlite"
        self._store = FeatureStore(Path(folder).expanduser() / "features" / name)
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

    def _digest(self, config: ModelConfig) -> str:
        """Digest everything but samples that stored features depend on."""
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
        settings = config.model_dump(mode="json", exclude=_BEHIND)
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        # The weights themselves, as a file of the same name may hold others by now.
        for name, value in self._stored.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().flatten().numpy().tobytes())
        return digest.hexdigest()

    def _count(self) -> int:
        # Blank samples do: the operations depend on shapes alone.
        sample = self.spec.blank(1, device=self._learner.device)
        with FlopCounterMode(display=False) as counter:
            self._backbone.features(self._learner.images(sample))
        return int(counter.get_total_flops())

    def _features(self, split: Split) -> Split:
        if not len(split):
            return Split(self._backbone.features(split.x), split.y)
        keys = _keys(split.x)
        stored = self._store.get(keys)
        # Each once, as a stream with repeats has the same sample several times.
        missing = {key: row for row, key in enumerate(keys) if key not in stored}
        if missing:
            x = split.x[list(missing.values())].to(self._learner.device)
            output = one_by_one(self._stored, self._learner.images(x)).cpu()
            fresh = dict(zip(missing, output.flatten(1).numpy(), strict=True))
            self._store.put(fresh)
            stored |= fresh
        stacked = np.stack([stored[key] for key in keys])
        features = torch.from_numpy(stacked).view(len(keys), *self._shape)
        if self._drawn is not None:
            device = self._learner.device
            features = one_by_one(self._drawn, features.to(device)).cpu()
        return Split(features.contiguous(), split.y)


def _keys(x: Tensor) -> list[bytes]:
    """Digest each sample."""
    # The same bytes are another sample in another shape.
    start = hashlib.sha256(f"{x.dtype} {tuple(x.shape[1:])}".encode())
    keys = []
    for sample in x.contiguous().numpy():
        digest = start.copy()
        digest.update(sample.tobytes())
        keys.append(digest.digest()[:16])
    return keys


def _nbytes(data: TaskData) -> int:
    splits = (data.train, data.test)
    return sum(split.x.nbytes + split.y.nbytes for split in splits)
