"""Trackers by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from fedknow.protocols.config import ConfigError, closest
from fedknow.protocols.descriptions import Description
from fedknow.protocols.extras import how_to_install
from fedknow.protocols.installed import find_installed, list_installed
from fedknow.protocols.plugins import calling, is_reference, load_object
from fedknow.server.tracking.tracker import Tracker

__all__ = [
    "BUILTIN",
    "NONE",
    "check_trackers",
    "describe_tracker",
    "is_tracker",
    "list_trackers",
    "make_tracker",
]

NONE = "none"
"""Stands for no tracker where a resumed run would go on with those it had."""

_KEY = "tracking.to"


@dataclass(frozen=True)
class Builtin:
    """A tracker that comes with fedknow.

    Attributes
    ----------
    place : str
        ``module:Class`` of the tracker, imported when used.
    needs : str
        The package that it needs, which is also the name of the extra.
    summary : str
        One line about it.
    target : str
        Where the numbers go, and which variables change that.
    """

    place: str
    needs: str
    summary: str
    target: str


BUILTIN = {
    "tensorboard": Builtin(
        "fedknow.server.tracking.tensorboard:TensorBoard",
        "tensorboard",
        "event files of TensorBoard in the run folder",
        "RUN/tensorboard; look at them with: tensorboard --logdir runs",
    ),
    "mlflow": Builtin(
        "fedknow.server.tracking.mlflow:Mlflow",
        "mlflow",
        "a run of MLflow",
        "MLFLOW_TRACKING_URI, else as MLflow does: mlflow.db in the current folder",
    ),
    "wandb": Builtin(
        "fedknow.server.tracking.wandb:WeightsAndBiases",
        "wandb",
        "a run of Weights & Biases",
        "your account (wandb login), or RUN/wandb with WANDB_MODE=offline; WANDB_ENTITY",
    ),
    "trackio": Builtin(
        "fedknow.server.tracking.trackio:Trackio",
        "trackio",
        "a run of trackio, stored on this machine",
        "TRACKIO_DIR, else as trackio does; look at them with: trackio show",
    ),
}


def list_trackers() -> dict[str, str]:
    """List the trackers known by name, with a line about each."""
    lines = {
        name: f"{builtin.summary}{_lack(builtin)}"
        for name, builtin in BUILTIN.items()
    }
    return lines | list_installed("tracking", BUILTIN)


def describe_tracker(name: str) -> Description:
    """Describe a tracker: what it writes, and where.

    Raises
    ------
    ConfigError
        If there is none of this name.
    """
    builtin = BUILTIN.get(name)
    if builtin is not None:
        facts = {"Goes to": builtin.target, "Needs": f"the extra {builtin.needs}"}
        return Description(f"{builtin.summary}{_lack(builtin)}", facts)
    # A user's class need not have a docstring.
    summary = (_maker(name).__doc__ or "").strip().partition("\n")[0]
    return Description(summary, {"Source": list_trackers().get(name, name)})


def is_tracker(name: str) -> bool:
    """Say whether a name stands for a tracker that can be made again."""
    return is_reference(name) or name in list_trackers()


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that do not exist or whose package is not installed.

    Raises
    ------
    ConfigError
        Saying which there are, or how to install it.
    """
    for name in names:
        if name == NONE:
            if len(names) > 1:
                raise ConfigError(
                    f"{_KEY} = {', '.join(names)}: {NONE!r} stands alone; leave it out"
                )
            continue
        builtin = BUILTIN.get(name)
        if builtin is None:
            # Found now, so that a mistyped name is refused before the run.
            _maker(name)
        # To import it takes seconds, so it is only looked for.
        elif not _is_there(builtin):
            raise ConfigError(
                f"{_KEY} = {name!r}: needs {builtin.needs}, which is not installed; "
                f"{how_to_install(builtin.needs)}"
            )


def make_tracker(name: str) -> Tracker:
    """Make the tracker of a name.

    Raises
    ------
    ConfigError
        If there is none, or it cannot be made.
    """
    maker = _maker(name)
    # A user's class may fail in any way; the error then names the key.
    with calling(name, _KEY):
        tracker = maker()
    # Before the run: a tracker that cannot log would only show it in its thread.
    if not isinstance(tracker, Tracker):
        raise ConfigError(
            f"{_KEY} = {name!r}: made a {type(tracker).__name__}, which lacks the methods "
            "start, log and finish of fedknow.server.tracking.Tracker"
        )
    return tracker


def _maker(name: str) -> type[Tracker]:
    """Find the class of a tracker."""
    if name in BUILTIN:
        # Imported late: the libraries take seconds, and most runs have no tracker.
        module, _, path = BUILTIN[name].place.partition(":")
        maker = getattr(import_module(module), path)
    elif is_reference(name):
        maker = load_object(name, _KEY)
    else:
        maker = find_installed("tracking", name, _KEY)
        if maker is None:
            names = list_trackers()
            raise ConfigError(
                f"{_KEY} = {name!r}: no such tracker{closest(name, names)}; "
                f"there are: {', '.join(names)}, or your own as module:Class"
            )
    if not isinstance(maker, type):
        raise ConfigError(
            f"{_KEY} = {name!r}: is a {type(maker).__name__}; it must be a class with the "
            "methods start, log and finish of fedknow.server.tracking.Tracker"
        )
    return maker


def _is_there(builtin: Builtin) -> bool:
    return importlib.util.find_spec(builtin.needs) is not None


def _lack(builtin: Builtin) -> str:
    return (
        ""
        if _is_there(builtin)
        else f" (not installed: the extra {builtin.needs})"
    )
