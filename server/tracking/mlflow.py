"""MLflow: a run with settings as parameters and numbers as metrics."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from fedknow.server.tracking.tracker import Status, TrackedRun, settings

__all__ = ["Mlflow"]

_STATUS = {"complete": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
_MOST_PARAMS = 100
"""MLflow's limit of one request."""
_LONGEST = 500
"""Characters of a parameter that every MLflow server takes."""


class Mlflow:
    """Writes to the tracking server or store that MLflow is set up for."""

    _client: Any
    _id: str

    def start(self, run: TrackedRun) -> str:
        """Make a run, or go on with the former one."""
        # Imported late: it takes seconds. The client alone: MLflow's functions for the current
        # run are global, and another thread may use them.
        from mlflow import MlflowClient

        self._client = MlflowClient()
        if run.former:
            self._id = run.former
            self._client.update_run(self._id, status="RUNNING")
            return self._id
        created = self._client.create_run(
            self._experiment(run.project),
            run_name=run.name,
            tags={
                "fedknow.folder": str(run.folder.resolve()),
                # Without it MLflow names the program that happens to run.
                "mlflow.source.name": "fedknow",
            },
        )
        self._id = created.info.run_id
        self._store_settings(run)
        return self._id

    def _experiment(self, project: str) -> str:
        experiment = self._client.get_experiment_by_name(project)
        if experiment is not None:
            return str(experiment.experiment_id)
        return str(self._client.create_experiment(project))

    def _store_settings(self, run: TrackedRun) -> None:
        from mlflow.entities import Param

        values = settings(run.config).items()
        params = iter(
            [Param(key, str(value)[:_LONGEST]) for key, value in values]
        )
        while batch := list(islice(params, _MOST_PARAMS)):
            self._client.log_batch(self._id, params=batch)

    def log(self, step: int, numbers: Mapping[str, float], time: float) -> None:
        """Store metrics, each with its step and time."""
        from mlflow.entities import Metric

        milliseconds = int(1000 * time)
        metrics = [
            Metric(_metric_name(name), value, milliseconds, step)
            for name, value in numbers.items()
        ]
        self._client.log_batch(self._id, metrics=metrics)

    def finish(self, status: Status) -> None:
        """Set the run's status."""
        self._client.set_terminated(self._id, _STATUS[status])


def _metric_name(name: str) -> str:
    """Replace characters that MLflow's names cannot have."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name)
