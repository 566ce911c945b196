"""The place of a run's client states: its folder, or a storage URL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedknow.client.state.remote import UrlFiles, is_url
from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.values import show

if TYPE_CHECKING:
    from fedknow.server.run.folder import RunFolder

__all__ = ["check_same_place", "forget_states", "states_place"]


def states_place(folder: RunFolder) -> str:
    """Say where the states of a run's clients lie."""
    url = folder.config.engine.states.rstrip("/")
    # A place of its own for each run, by a name that it keeps.
    return f"{url}/{folder.run_id}" if url else str(folder.clients)


def check_same_place(old: ExperimentConfig, new: ExperimentConfig) -> None:
    """Refuse to go on with a run whose states lie elsewhere.

    Raises
    ------
    ConfigError
        Naming both places.
    """
    earlier, present = old.engine.states, new.engine.states
    if earlier != present:
        raise ConfigError(
            f"engine.states: was {show(earlier)}, now {show(present)}; states lie where they "
            "were: give the setting as it was, or choose another --out"
        )


def forget_states(folder: RunFolder) -> None:
    """Delete the states at a storage URL; others go with their folder."""
    place = states_place(folder)
    if is_url(place):
        UrlFiles(place).remove()
