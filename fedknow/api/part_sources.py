"""The record of parts that were given as objects, in the run folder."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from fedknow.protocols import parts
from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.files import write_atomic
from fedknow.server.run.events import Event, RunStarted
from fedknow.server.run.integrity import FolderDamaged

__all__ = ["PARTS_FILE", "PartsRecorder", "given_parts", "warn_of_changes"]


PARTS_FILE = "parts.json"
"""Of a run folder: the source of parts that were given as objects."""


def given_parts(config: ExperimentConfig) -> dict[str, str]:
    """Return the names of parts that were given as objects, by their keys."""
    names = {
        "learner.name": config.learner.name,
        "strategy.name": config.strategy.name,
        "model.name": config.model.name,
        "data.name": config.data.name,
    }
    # Only what was given as an object: a module of the user's own has its file.
    return {
        key: name for key, name in names.items() if name.startswith(parts.MAIN)
    }


class PartsRecorder:
    """Writes the source of parts given as objects into the run folder.

    A run that is resumed with another source keeps both, the newest last.
    """

    def __init__(self, folder: Path, config: ExperimentConfig) -> None:
        self.folder = folder
        self.parts = given_parts(config)

    def __call__(self, event: Event) -> None:
        """Write the file when the run begins or goes on."""
        # Not before: a refused run leaves no folder behind.
        if not isinstance(event, RunStarted) or not self.parts:
            return
        recorded = _read(self.folder)
        table: dict[str, Any] = {}
        for key, name in self.parts.items():
            source = parts.source_of(name)
            sources = recorded.get(key, {}).get("sources", [])
            if not sources or sources[-1] != source:
                sources = [*sources, source]
            table[key] = {"name": name, "sources": sources}
        write_atomic(
            self.folder / PARTS_FILE, json.dumps(table, indent=1).encode()
        )


def warn_of_changes(folder: Path, config: ExperimentConfig) -> None:
    """Warn of each part whose source is not the one that was recorded.

    Raises
    ------
    FolderDamaged
        If the record cannot be read.
    """
    recorded = _read(folder)
    for key, name in given_parts(config).items():
        sources = recorded.get(key, {}).get("sources", [])
        source = parts.source_of(name)
        # In a plain interactive session there is no source to compare.
        if source is None or not sources or sources[-1] in (None, source):
            continue
        warnings.warn(
            f"{key} = {name!r}: its source is not the one with which {folder} ran "
            f"({PARTS_FILE} has that one)",
            stacklevel=3,
        )


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / PARTS_FILE
    if not path.is_file():
        return {}
    try:
        table: dict[str, dict[str, Any]] = json.loads(path.read_bytes())
        return {key: dict(entry) for key, entry in table.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise FolderDamaged(
            f"{path} is damaged: {error}; remove it, and only the record of sources is lost"
        ) from None
