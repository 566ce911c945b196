"""Weights & Biases: a run in an account, or offline in the run folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fedknow.server.tracking.tracker import Status, TrackedRun

__all__ = ["WeightsAndBiases"]


class WeightsAndBiases:
    """Writes to an account, or offline to ``wandb/`` of the run folder."""

    _run: Any

    def start(self, run: TrackedRun) -> str:
        """Begin a run, or go on with the former one."""
        # Imported late: it takes seconds.
        import wandb

        _check_login(wandb)
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            config=run.config.model_dump(mode="json", exclude={"tracking"}),
            dir=str(run.folder),
            id=run.former or None,
            resume="allow" if run.former else None,
            # Else it writes to the terminal, and takes the program's own output along.
            settings=wandb.Settings(silent=True, console="off"),
        )
        # W&B's own steps only grow; a resumed run repeats its last rounds.
        self._run.define_metric("server_round")
        self._run.define_metric("*", step_metric="server_round")
        return str(self._run.id)

    def log(self, step: int, numbers: Mapping[str, float], time: float) -> None:
        """Store numbers beside the round that they belong to."""
        self._run.log({**numbers, "server_round": step, "time": time})

    def finish(self, status: Status) -> None:
        """End the run and send what is left."""
        self._run.summary["status"] = status
        self._run.finish(exit_code=0 if status == "complete" else 1)


def _check_login(wandb: Any) -> None:
    """Raise where W&B would ask for a key on the terminal, and wait for it."""
    mode = os.environ.get("WANDB_MODE", "online")
    if mode == "online" and not wandb.api.api_key:
        raise RuntimeError(
            "not logged in: run `wandb login`, or set WANDB_MODE=offline"
        )
