"""Names for learners, strategies, models and data given as objects."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from fedknow.api.fingerprints import fingerprint
from fedknow.client.data import Dataset
from fedknow.client.learners import LEARNERS
from fedknow.client.models.split import SplitModel
from fedknow.protocols.config import ConfigError
from fedknow.protocols.parts import MAIN, Given, find, name_part, restore
from fedknow.protocols.plugins import load_object

__all__ = ["SECTIONS", "adopt", "named"]

SECTIONS = ("learner", "strategy", "model", "data")
"""Sections of a configuration that name a part."""


class GivenModel(Given):
    """Makes copies of a network."""

    def __call__(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """Copy the network with its weights."""  # its sizes are checked later
        # A copy for each run: training one must not change the next one's start.
        model: nn.Module = copy.deepcopy(self.part)
        return model

    def source(self) -> str | None:
        """Return the layers of a network that is made of others' modules."""
        # The source of nn.Sequential would not say what the network was.
        is_others = type(self.part).__module__.startswith(("fedknow.", "torch."))
        return repr(self.part) if is_others else None


class GivenStrategy(Given):
    """Makes copies of a strategy."""

    def __call__(self) -> Any:
        """Copy the strategy: each run starts from its first state."""
        return copy.deepcopy(self.part)


class GivenData(Given):
    """Gives a data set."""

    def __call__(self, config: Any) -> Dataset:
        """Return the data set; nothing writes to it."""
        dataset: Dataset = self.part
        return dataset


def named(section: str, value: Any) -> Any:
    """Put names where a section of a configuration has objects.

    Parameters
    ----------
    section : str
        One of :data:`SECTIONS`.
    value : object
        Text, a class, a function, an object, or a table of settings whose ``name`` is one of
        these.

    Returns
    -------
    str or dict
        What a configuration can hold.

    Raises
    ------
    ConfigError
        If the object is of a kind that this section cannot use.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        table = dict(value)
        if "name" in table:
            table["name"] = named(section, table["name"])
        return table
    return _registered(section, value)


_EXPECTED = {
    "learner": "a name, or a class derived from fedknow.Learner",
    "strategy": "a name, a class or an instance of a Flower strategy",
    "model": "a name, a function of shape and classes, or an nn.Module with body and head",
    "data": "a name, a function of the configuration, or a fedknow.Dataset",
}


def _registered(section: str, part: Any) -> str:
    if section == "learner" and isinstance(part, type):
        # A built-in class goes by its short name, which reports and rivals know.
        short = [name for name, kind in LEARNERS.items() if kind is part]
        return short[0] if short else name_part(part)
    kind = type(part).__qualname__
    if (maker := _maker(section, part)) is not None:
        # Two data sets of one class are two parts, and so are two networks.
        return name_part(maker, f"{kind}-{fingerprint(part)}")
    # A network is callable too, but calling it makes no network.
    if callable(part) and not isinstance(part, nn.Module):
        return name_part(part)
    # In one line: tables of other libraries print themselves over several.
    shown = f"{' '.join(repr(part).split()):.80}"
    raise ConfigError(
        f"{section} = {shown}: is a {kind}; it must be {_EXPECTED[section]}"
        f"{_remedy(section, part)}"
    )


def _remedy(section: str, part: Any) -> str:
    """Name what makes a data set of an object of another library."""
    # By the method, as neither library need be installed.
    if section != "data" or isinstance(part, type):
        return ""
    if hasattr(part, "with_format"):
        maker = "from_huggingface(name, train, test, roles)"
    elif hasattr(part, "__getitem__") and hasattr(part, "__len__"):
        maker = "from_torch(name, train, test)"
    else:
        return ""
    return f", which fedknow.client.data.{maker} makes"


def adopt(section: str, part: Any, name: str) -> None:
    """Put an object in the place of one that another process gave a run.

    Parameters
    ----------
    section : str
        One of :data:`SECTIONS`.
    part : object
        What :func:`named` takes for this section, but no text.
    name : str
        The name in the run's configuration.

    Raises
    ------
    ConfigError
        If the run's part has a module or is a built-in one, so that no object can take its
        place, if the object is none of this section's, or if it is another data set.
    """
    if not name.startswith(MAIN):
        raise ConfigError(
            f"{section}.name = {name!r}: the run's {section} has a name that any process "
            f"finds; leave {section} out"
        )
    if isinstance(part, str):
        raise ConfigError(
            f"{section} = {part!r}: must be the class or object itself, as the run was given it"
        )
    # Under the run's name, besides its own.
    new_name = named(section, part)
    # A network may have other weights, since the run's are put into it.
    if section == "data" and _digest(name) and _digest(new_name) != _digest(name):
        raise ConfigError(
            f"data: {new_name!r} is not the data set of the run, {name!r}; their contents differ"
        )
    restore({name: find(new_name) or load_object(new_name, section)})


def _maker(section: str, part: Any) -> Any | None:
    """Return what copies an instance of the section's kind, if it is one."""
    if isinstance(part, type):
        return None
    if section == "model" and isinstance(part, nn.Module):
        return GivenModel(_split(part))
    if section == "data" and isinstance(part, Dataset):
        return GivenData(part)
    if section == "strategy" and hasattr(part, "configure_train"):
        return GivenStrategy(part)
    return None


def _digest(name: str) -> str:
    """Return the fingerprint at the end of a registered object's name."""
    match = re.search(r"-([0-9a-f]{8})$", name)
    return match[1] if match else ""


def _split(model: nn.Module) -> nn.Module:
    """Split a sequence of layers before its last one, if that is linear."""
    if (
        hasattr(model, "body")
        or not isinstance(model, nn.Sequential)
        or len(model) < 2
    ):
        return model
    head = model[-1]
    return SplitModel(model[:-1], head) if isinstance(head, nn.Linear) else model
