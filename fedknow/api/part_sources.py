"""The record of parts that were given as objects, in the run folder."""

from __future__ import annotations

import json
from pathlib import Path

from fedknow.protocols import parts
from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.files import write_atomic
from fedknow.server.run.events import Event, RunStarted

__all__ = ["PARTS_FILE", "PartsRecorder"]


PARTS_FILE = "parts.json"
"""Of a run folder: the source of parts that were given as objects."""


class PartsRecorder:
    """Writes the source of parts given as objects into the run folder."""

    def __init__(self, folder: Path, config: ExperimentConfig) -> None:
        self.folder = folder
        names = {
            "learner.name": config.learner.name,
            "strategy.name": config.strategy.name,
            "model.name": config.model.name,
            "data.name": config.data.name,
        }
        # Only what was given as an object: a module of the user's own has its file.
        self.parts = {
            key: name
            for key, name in names.items()
            if parts.find(name) is not None
        }

    def __call__(self, event: Event) -> None:
        """Write the file when the run begins."""
        # Not before: a refused run leaves no folder behind.
        if isinstance(event, RunStarted) and self.parts:
            table = {
                key: {"name": name, "source": parts.source_of(name)}
                for key, name in self.parts.items()
            }
            write_atomic(
                self.folder / PARTS_FILE, json.dumps(table, indent=1).encode()
            )
