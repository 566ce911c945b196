"""The server as a Flower ``ServerApp``.

It runs our experiment on whatever Flower runs, a SuperLink or its simulation.

The experiment is the app's configuration (``[tool.flwr.app.config]``, ``flwr run
--run-config``), with the keys of ``fedknow show``: ``data.clients = 4``, ``learner.name =
"fedknow"``. Three keys are the app's own:

``out``
    The run folder; by default ``~/.fedknow/runs/NAME-LEARNER-RUN``, with Flower's number of the
    run.
``resume``
    Whether to go on with the unfinished run in ``out``, if there is one.
``signature``
    The file of ``fedknow sign``, for nodes with ``signed-by`` in their ``--node-config``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedknow.protocols.config import ConfigError, ExperimentConfig, read_config
from fedknow.protocols.security.signing import read_signature
from fedknow.protocols.texts import counted
from fedknow.server.assemble import Clients, assemble
from fedknow.server.grids.flower_grid import FlowerGrid
from fedknow.server.reports.page import write_report
from fedknow.server.run.activity import ActivityLog
from fedknow.server.run.events import (
    ClientBegunAnew,
    ClientFailed,
    Evaluated,
    Event,
    RoundEnded,
    Warned,
)
from fedknow.server.run.experiment import Experiment, RunResult
from fedknow.server.run.folder import RunFolder
from fedknow.server.tracking import tracking

__all__ = ["app", "run_on_flower"]

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the app's configuration describes."""
    run_on_flower(grid, context.run_config, context.run_id)


def run_on_flower(
    grid: Grid, settings: Mapping[str, Any], run_id: int = 0
) -> RunResult:
    """Run an experiment with the clients that a Flower grid reaches.

    Everything it yields, report included, is written to its run folder.

    Parameters
    ----------
    grid : flwr.serverapp.Grid
        Flower's; its nodes run :mod:`fedknow.client.flower_app`.
    settings : mapping
        The experiment as flat keys (``data.clients``), ``out``, ``resume`` and ``signature``.
    run_id : int
        Flower's number of the run, for the name of the run folder.

    Raises
    ------
    ConfigError
        If the configuration cannot be run, or ``out`` holds another or a finished run.
    RunError
        If the run fails; what it earned until then is kept and can be resumed.
    """
    tree = dict(settings)
    out, resume = str(tree.pop("out", "")), tree.pop("resume", False)
    signature = str(tree.pop("signature", ""))
    experiment = read_config(_nested(tree))
    parts = assemble(experiment, Clients.FLOWER)
    config = parts.config
    signed = read_signature(Path(signature), config) if signature else b""
    place = Path(out) if out else _default_folder(config, run_id)

    def waiting(present: int) -> None:
        print(
            f"connected: {present} of {counted(config.data.clients, 'client')}",
            # Flower reads this process's output line by line while it runs.
            flush=True,
        )

    # `resume` may stand in an app's configuration for good: without a run yet, one is begun.
    is_resumed = resume and (place / "config.toml").is_file()
    with (
        RunFolder.resume(place, config)
        if is_resumed
        else RunFolder.create(place, config) as folder
    ):
        with (
            FlowerGrid(
                grid,
                config.data.clients,
                config.for_clients().to_toml(),
                folder.run_id,
                waiting,
                listener=ActivityLog(folder.path),
                signature=signed,
            ) as own_grid,
            tracking(config, experiment.tracking, place, is_resumed) as trackers,
        ):
            result = Experiment(parts, own_grid, folder, [*trackers, _show]).run()
        print(f"Report: {write_report([folder], folder.path)}", flush=True)
    return result


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        # Flower flattens an app's configuration into dotted keys.
        *parents, leaf = key.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(
                    f"{key}: {parent} is set to a value and has settings too; "
                    f"write {parent}.name = ..."
                )
        place[leaf] = value
    return tree


def _default_folder(config: ExperimentConfig, run_id: int) -> Path:
    # In the home folder: Flower runs an app in a folder of its own that it deletes.
    name = f"{config.name}-{config.learner.name}-{run_id}"
    return Path.home() / ".fedknow" / "runs" / name


def _show(event: Event) -> None:
    line = _line(event)
    if line:
        # What a ServerApp prints is what `flwr log` shows.
        print(line, flush=True)


def _line(event: Event) -> str:
    match event:
        case ClientFailed() | ClientBegunAnew() | Warned():
            return event.reason
        case RoundEnded():
            clients = counted(event.clients, "client")
            return f"{_place(event)}: {clients}, {event.seconds:.2f} s"
        case Evaluated():
            return f"{_place(event)}: accuracy {100 * event.accuracy:.1f} %"
    return ""


def _place(event: RoundEnded | Evaluated) -> str:
    return f"task {event.task + 1}, round {event.round}"
