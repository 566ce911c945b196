"""Make configurations of names, files, tables and objects."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from fedknow.api.parts import SECTIONS, named
from fedknow.protocols.config import ConfigError, ExperimentConfig, read_config
from fedknow.simulations.presets import load_preset

__all__ = ["experiment"]


def experiment(
    base: str
    | os.PathLike[str]
    | Mapping[str, Any]
    | ExperimentConfig = "digits",
    **changes: Any,
) -> ExperimentConfig:
    """Make the configuration of an experiment.

    Parameters
    ----------
    base : str, path, mapping or ExperimentConfig
        A preset's name, a TOML file, a table like one, or a configuration.
    **changes
        Sections and keys to change, over ``base``: ``seed=3``, ``train={"rounds": 5}``,
        ``data="cifar100"``. ``learner``, ``strategy``, ``model`` and ``data`` also take classes
        and objects; ``learner={"name": MyLearner, "strength": 2}`` gives settings with one.
        ``start`` also takes a :class:`fedknow.Run`.

    Returns
    -------
    ExperimentConfig

    Raises
    ------
    ConfigError
        Naming the key, the value, and what would be right.

    Examples
    --------
    >>> import fedknow
    >>> config = fedknow.experiment("digits", seed=3, train={"rounds": 1})
    >>> config.seed, config.train.rounds, config.data.name
    (3, 1, 'digits')
    """
    texts: list[str] = []
    for section, change in changes.items():
        texts += [
            _assignment(key, value) for key, value in _settings(section, change)
        ]
    if isinstance(base, ExperimentConfig):
        return read_config(_tree(base), texts, called="the configuration")
    if isinstance(base, Mapping):
        tree = {
            key: named(key, value) if key in SECTIONS else value
            for key, value in base.items()
        }
        return read_config(tree, texts, called="the configuration")
    # A preset's name has neither an ending nor a separator.
    if (
        isinstance(base, Path)
        or str(base).endswith(".toml")
        or os.sep in str(base)
    ):
        return read_config(Path(base), texts)
    return load_preset(str(base), texts)


def _tree(config: ExperimentConfig) -> dict[str, Any]:
    return config.model_dump()


def _settings(section: str, change: Any) -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of one change and their values."""
    if section in SECTIONS:
        change = named(section, change)
    if section == "start":
        change = _weights(change)
    if not isinstance(change, Mapping):
        yield section, change
        return
    if (
        "name" in change
    ):  # first, since another part's settings go when the name changes
        yield section, change["name"]
    for key, value in change.items():
        if key != "name":
            yield f"{section}.{key}", value


def _weights(start: Any) -> Any:
    """Put the folder of a run where another one starts from the run's model."""
    if isinstance(start, Mapping):
        return {key: _weights(value) for key, value in start.items()}
    # By its attribute, since the module of runs imports this one.
    path = getattr(start, "path", None)
    return path if isinstance(path, Path) else start


def _assignment(key: str, value: Any) -> str:
    """Write ``key=value`` as the command line's ``--set`` reads it."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy's numbers and arrays
        value = value.tolist()
    # TOML has lists alone.
    if isinstance(value, tuple):
        value = list(value)
    try:
        # By a TOML writer, so that quotes and line breaks in a text are escaped.
        text = tomli_w.dumps({"value": value})
    except (TypeError, ValueError):
        raise ConfigError(
            f"{key} = {value!r:.80}: a {type(value).__name__} cannot stand in a configuration; "
            "use text, a number, true or false, or a list of these"
        ) from None
    return f"{key}={text.partition('=')[2].strip()}"
