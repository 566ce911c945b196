"""Data sets of other libraries, as objects in Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedknow.client.data.arrays import Dataset, Labels
from fedknow.client.data.columns import Column
from fedknow.client.data.own import KINDS
from fedknow.client.data.samples import SampleSpec
from fedknow.client.data.tables import Roles, from_tables
from fedknow.protocols.config import ConfigError

__all__ = ["from_huggingface", "from_torch"]


def from_huggingface(
    name: str,
    train: Any,
    test: Any | None,
    roles: Roles,
) -> Dataset:
    """Make a data set of ``datasets.Dataset`` objects.

    Parameters
    ----------
    name : str
        What the data set is called in messages.
    train, test : datasets.Dataset
        Its parts; without ``test``, see :class:`Roles`.
    roles : Roles
        Which column is what.

    Examples
    --------
    >>> import datasets
    >>> from fedknow.client.data.objects import from_huggingface
    >>> from fedknow.client.data.tables import Roles
    >>> rows = {"x": [0.0, 1.0] * 5, "y": ["off", "on"] * 5}
    >>> data = from_huggingface(
    ...     "lamp", datasets.Dataset.from_dict(rows), None, Roles(["x"], "y")
    ... )
    >>> data.class_names, len(data.train_y), len(data.test_y)
    (('off', 'on'), 8, 2)
    """
    parts = []
    for part in (train, test):
        # As Arrow gives it, a selection or a shuffle is applied.
        parts.append(None if part is None else part.with_format("arrow")[:])
    return from_tables(name, parts[0], parts[1], roles)


def from_torch(
    name: str,
    train: Any,
    test: Any,
    columns: Mapping[str, Column] | None = None,
    sample: SampleSpec | None = None,
) -> Dataset:
    """Make a data set of torch data sets, whose items are sample and label.

    Each item is read once. A transform that draws at random is therefore drawn once.

    Parameters
    ----------
    name : str
        What the data set is called in messages.
    train, test : torch.utils.data.Dataset
        With a length; items are (tensor, array or picture; whole number).
    columns : mapping of str to Column, optional
        What else is known of each sample.
    sample : SampleSpec, optional
        What a sample is; by default by its axes: three are an image, two a series, one a row.

    Examples
    --------
    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> from fedknow.client.data.objects import from_torch
    >>> part = TensorDataset(torch.rand(6, 3), torch.arange(6) % 2)
    >>> str(from_torch("mine", part, part).spec)
    'rows of 3'
    """
    parts = [_items(name, part) for part in (train, test)]
    x = parts[0][0]
    if sample is None:
        kind = KINDS.get(x.ndim, "table")
        sample = SampleSpec(kind, x.shape[1:], str(x.dtype))
    dataset = Dataset.from_arrays(
        name, *parts[0], *parts[1], columns=columns, sample=sample
    )
    dataset.check_labels()
    return dataset


def _items(name: str, part: Any) -> tuple[NDArray[Any], Labels]:
    samples, labels = [], []
    for place in range(len(part)):
        x, y = part[place]
        array = np.asarray(x)
        # Pictures of Pillow have their channels last, if they have any.
        if hasattr(x, "getbands"):
            array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        samples.append(array.astype(_FLOATS.get(array.dtype.name, array.dtype)))
        labels.append(int(y))
    if not samples:
        raise ConfigError(f"data set {name!r}: a torch data set holds no samples")
    return np.stack(samples), np.array(labels, np.int64)


_FLOATS = {"float64": "float32", "float16": "float32"}
"""Types that samples are not stored in, and those that take their place."""
