"""Commands that show what there is or was: list, show, report, calibrate."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from fedknow.cli.descriptions import print_description, print_list
from fedknow.cli.errors import explained
from fedknow.cli.options import (
    DATA_DIR,
    EXPERIMENT,
    SET,
    Listed,
    read_experiment,
)
from fedknow.cli.output import out, point_to
from fedknow.protocols.config import ConfigError

if TYPE_CHECKING:
    from fedknow.server.run.folder import RunFolder

__all__ = ["calibrate", "list_", "report", "show"]

LISTS = {
    Listed.learners: "fedknow.client.learners:list_learners",
    Listed.strategies: "fedknow.strategies:list_strategies",
    Listed.models: "fedknow.client.models:list_models",
    Listed.datasets: "fedknow.client.data:list_datasets",
    Listed.devices: "fedknow.simulations.fleet.devices:list_devices",
    Listed.presets: "fedknow.simulations.presets:list_presets",
}
DESCRIPTIONS = {
    Listed.learners: "fedknow.client.descriptions:describe_learner",
    Listed.strategies: "fedknow.strategies:describe_strategy",
    Listed.models: "fedknow.client.descriptions:describe_model",
    Listed.datasets: "fedknow.client.descriptions:describe_dataset",
    Listed.presets: "fedknow.simulations.presets:describe_preset",
}
"""What lists and describes each kind, imported when it is asked for: some need PyTorch or Flower."""


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...")],
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Where to write.  [default: the folder of the run or runs]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write report.html and plots again from what is in run folders: one run, or several side by side.

    Of several, `compare.json` and `compare.csv` too: of a comparison that is going on, or of
    several together.

    RUN is a run folder or a folder that holds run folders. Interrupted runs, and runs that are
    still going on, can be reported too.
    """
    with explained(None):
        from fedknow.server.reports.page import write_report

        found = [run for path in runs for run in _runs_in(path)]
        target = folder or Path(
            os.path.commonpath([run.path.absolute() for run in found])
        )
        if len(found) > 1:
            from fedknow.simulations.compare import left_out_before, write_numbers
            from fedknow.simulations.fleet.devices import shipped_rooms

            left_out = left_out_before(target)
            write_numbers(found, target, left_out=left_out)
            point_to(write_report(found, target, left_out, shipped_rooms()))
        else:
            point_to(write_report(found, target))


def show(
    experiment: Annotated[str, EXPERIMENT] = "digits",
    changes: Annotated[list[str] | None, SET] = None,
    data_dir: Annotated[Path | None, DATA_DIR] = None,
) -> None:
    """Print an experiment with every setting spelled out, as TOML.

    EXPERIMENT is a preset's name (`fedknow list presets`) or a TOML file; without one it is
    `digits`.

    Example:

    - `fedknow show digits --set learner=fedrep > mine.toml`
    """
    with explained(None):
        from fedknow.client.learners import resolve

        typer.echo(
            resolve(read_experiment(experiment, changes, data_dir)).to_toml(), nl=False
        )


def calibrate(
    experiment: Annotated[str, EXPERIMENT] = "digits",
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="What to call this device.")
    ] = "here",
    profiles: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Where to write; other devices in it are kept.",
        ),
    ] = Path("devices.toml"),
    seconds: Annotated[
        float, typer.Option("--seconds", min=0, help="How long to measure.")
    ] = 10.0,
    busy: Annotated[
        float | None,
        typer.Option(
            "--busy-watts",
            min=0,
            help="What this machine draws when it trains, from a meter.",
        ),
    ] = None,
    idle: Annotated[
        float | None,
        typer.Option("--idle-watts", min=0, help="What it draws when it does not."),
    ] = None,
    changes: Annotated[list[str] | None, SET] = None,
    data_dir: Annotated[Path | None, DATA_DIR] = None,
) -> None:
    """Measure how fast this machine trains, and write it down as a device for simulated fleets.

    EXPERIMENT says what to train: a preset's name (`fedknow list presets`) or a TOML file;
    without one it is `digits`. Speeds differ from model to model: calibrate with the one you
    simulate.

    Clients train on the CPU, and that is what is measured, with its counted operations a
    second. The Jetsons that are shipped (`fedknow list devices`) are something else: their
    GPUs' peak times a share that is assumed.

    Example:

    - `fedknow calibrate digits --set model=cnn6 --name my-pi --out devices.toml`, then
      `fedknow simulate digits --set model=cnn6 --set fleet=my-pi --set fleet.profiles=devices.toml`
    """
    with explained(None, extra="sim"):
        from fedknow.simulations.fleet.calibrate import calibrate as measure
        from fedknow.simulations.fleet.calibrate import check_device_name, write_profile
        from fedknow.simulations.fleet.devices import read_profiles

        check_device_name(name)
        others = read_profiles(profiles) if profiles.exists() else {}
        profile = measure(
            read_experiment(experiment, changes, data_dir), seconds, busy, idle
        )
        write_profile(profiles, name, profile, others)
        out.print(
            f"{escape(name)}: {profile.peak / 1e9:.3g} GFLOP/s, room for {profile.room / 1e9:.1f} GB; written to "
            f"{escape(str(profiles))}",
            highlight=False,
            soft_wrap=True,
        )
        if busy is None or idle is None:
            out.print(
                "Its energy is unknown: give --busy-watts and --idle-watts, from a meter.",
                highlight=False,
                soft_wrap=True,
            )


def list_(
    what: Annotated[Listed, typer.Argument(metavar="|".join(Listed))],
    name: Annotated[str | None, typer.Argument(metavar="NAME")] = None,
) -> None:
    """List what can be named in an experiment, or explain one of it.

    With a NAME, all about that one. Of a learner: what it keeps, sends and needs, and its
    settings with their values and meaning. Of a device (or a fleet, or a pattern such as
    `jetson-*`): each number, with its source or `assumed`.

    Examples:

    - `fedknow list learners` shows all learners, `fedknow list learners ewc` explains one.

    - `fedknow list devices jetson-nano` shows where its numbers are from.
    """
    with explained(None):
        if name is None:
            print_list(out, _function(LISTS[what])())
        elif what is Listed.devices:
            _describe_device(name)
        else:
            print_description(out, name, _function(DESCRIPTIONS[what])(name))


def _runs_in(path: Path) -> list[RunFolder]:
    """The run in a folder, or the runs in the folders it holds."""
    from fedknow.server.run.folder import RunFolder

    if (path / "config.toml").is_file():
        return [RunFolder.open(path)]
    found = [RunFolder.open(file.parent) for file in sorted(path.glob("*/config.toml"))]
    if not found:
        raise ConfigError(
            f"{path}: no run here (a run folder has a config.toml); give a run folder or a folder of them"
        )
    return found


def _describe_device(name: str) -> None:
    from fedknow.simulations.fleet.devices import describe_devices

    for title, numbers in describe_devices(name).items():
        out.print(escape(title), highlight=False, soft_wrap=True)
        table = Table.grid(padding=(0, 2))
        for number, value, source in numbers:
            table.add_row(f"  {number}", escape(value), escape(source), style="")
        out.print(table, highlight=False)


def _function(place: str) -> Callable[..., Any]:
    """Import a function that is named as ``module:function``."""
    module, _, name = place.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found
