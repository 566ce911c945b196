"""Data sets of other libraries, as objects in Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedknow.client.data.arrays import Dataset, Labels
from fedknow.client.data.classes import whole_numbers
from fedknow.client.data.columns import Column
from fedknow.client.data.own import KINDS
from fedknow.client.data.ragged import Ragged
from fedknow.client.data.samples import Raw, SampleSpec
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
        if part is not None:
            _check_table(name, part)
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
        With a length; items are (tensor, array or picture; whole number). Series may differ
        in their length.
    columns : mapping of str to Column, optional
        What else is known of each sample.
    sample : SampleSpec, optional
        What a sample is; by default by its axes: three are an image, two a series, one a row.

    Raises
    ------
    ConfigError
        Naming the item that is no sample with its class.

    Examples
    --------
    >>> import torch
    >>> from torch.utils.data import TensorDataset
    >>> from fedknow.client.data.objects import from_torch
    >>> part = TensorDataset(torch.rand(6, 3), torch.arange(6) % 2)
    >>> str(from_torch("mine", part, part).spec)
    'rows of 3'
    """
    items = [_items(name, part) for part in (train, test)]
    x, sample = _joined(name, [item[0] for item in items], sample)
    dataset = Dataset.from_arrays(
        name, x[0], items[0][1], x[1], items[1][1], columns=columns, sample=sample
    )
    dataset.check_labels()
    return dataset


def _check_table(name: str, part: Any) -> None:
    if isinstance(part, Mapping):
        raise ConfigError(
            f"data set {name!r}: a {type(part).__name__} holds several parts; give each by "
            f"itself: from_huggingface({name!r}, data['train'], data['test'], roles)"
        )
    # A stream has no number of rows, which shares are cut from.
    if not (hasattr(part, "with_format") and hasattr(part, "__len__")):
        raise ConfigError(
            f"data set {name!r}: a part is {type(part).__name__}; it must be a "
            "datasets.Dataset, loaded without streaming"
        )


def _items(name: str, part: Any) -> tuple[list[NDArray[Any]], Labels]:
    # Shares are cut before a sample is read, so their number must be known.
    if not (hasattr(part, "__len__") and hasattr(part, "__getitem__")):
        raise ConfigError(
            f"data set {name!r}: {type(part).__name__} has no length or no items; it must be a "
            "torch data set that can be indexed"
        )
    samples, labels = [], []
    for place in range(len(part)):
        x, y = _pair(name, place, part[place])
        array = np.asarray(x)
        # Pictures of Pillow have their channels last, if they have any.
        if hasattr(x, "getbands"):
            array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        samples.append(array.astype(_FLOATS.get(array.dtype.name, array.dtype)))
        labels.append(y)
    if not samples:
        raise ConfigError(f"data set {name!r}: a torch data set holds no samples")
    return samples, np.array(labels, np.int64)


def _pair(name: str, place: int, item: Any) -> tuple[Any, int]:
    """Split an item into a sample and its class."""
    label_place = f"data set {name!r}: item {place}"
    # A dictionary of two keys would come apart into its keys.
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise ConfigError(
            f"{label_place} is {type(item).__name__}; it must be a pair of a sample and its class"
        )
    label = np.asarray(item[1])
    if label.size != 1:
        raise ConfigError(
            f"{label_place} has labels of shape {list(label.shape)}; it must have one, the class"
        )
    return item[0], int(whole_numbers(f"{label_place}: its label", label).item())


def _joined(
    name: str, parts: Sequence[list[NDArray[Any]]], sample: SampleSpec | None
) -> tuple[list[Raw], SampleSpec]:
    """Join the samples of each part, and say what they are."""
    shapes = set(map(np.shape, chain.from_iterable(parts)))
    example = parts[0][0]
    if len(shapes) == 1 and not (sample and sample.is_ragged):
        kind = KINDS.get(1 + example.ndim, "table")
        spec = sample or SampleSpec(kind, example.shape, str(example.dtype))
        return [np.stack(part) for part in parts], spec
    # Sounds and texts may differ in length too, but only the user can tell them from rows.
    is_clear = sample is not None or example.ndim == 2
    if not (is_clear and _differ_in_length_alone(shapes)):
        raise ConfigError(
            f"data set {name!r} has samples of shapes {sorted(shapes)[:4]}; all must be alike, "
            "or series [T, C] of one C. Bring them to one shape in the data set's transform"
        )
    spec = sample or SampleSpec(
        "series", max(shapes), str(example.dtype), is_ragged=True
    )
    return [Ragged.join(part) for part in parts], spec


def _differ_in_length_alone(shapes: set[tuple[int, ...]]) -> bool:
    return () not in shapes and len({shape[1:] for shape in shapes}) == 1


_FLOATS = {"float64": "float32", "float16": "float32"}
"""Types that samples are not stored in, and those that take their place."""
