"""Commands that show parts and results: list, show, report, calibrate."""

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
from fedknow.protocols.installed import list_installed

if TYPE_CHECKING:
    from fedknow.server.run.folder import RunFolder

__all__ = ["calibrate", "list_", "report", "show"]

NAME = typer.Option("--name", metavar="NAME", help="The name of this device.")
PROFILES = typer.Option(
    "--out",
    metavar="FILE",
    help="Where to write; other devices in the file stay.",
)
SECONDS = typer.Option("--seconds", min=0, help="How long to measure.")
BUSY = typer.Option(
    "--busy-watts",
    min=0,
    help="The power that this machine draws when it trains, from a meter.",
)
IDLE = typer.Option(
    "--idle-watts", min=0, help="The power that it draws when it does not."
)

LISTS = {
    Listed.learners: "fedknow.client.learners:list_learners",
    Listed.strategies: "fedknow.strategies:list_strategies",
    Listed.models: "fedknow.client.models:list_models",
    Listed.datasets: "fedknow.client.data:list_datasets",
    Listed.devices: "fedknow.simulations.fleet.devices:list_devices",
    Listed.trackers: "fedknow.server.tracking:list_trackers",
    Listed.presets: "fedknow.simulations.presets:list_presets",
}
INSTALLED = {
    Listed.learners: "learner",
    Listed.models: "model",
    Listed.datasets: "data",
}
"""Sections whose parts of installed packages the functions above leave out."""
DESCRIPTIONS = {
    Listed.learners: "fedknow.client.descriptions:describe_learner",
    Listed.strategies: "fedknow.strategies:describe_strategy",
    Listed.models: "fedknow.client.descriptions:describe_model",
    Listed.datasets: "fedknow.client.descriptions:describe_dataset",
    Listed.trackers: "fedknow.server.tracking:describe_tracker",
    Listed.presets: "fedknow.simulations.presets:describe_preset",
}
"""Functions that list and describe each kind of part.

They are imported when they are asked for, because some need PyTorch or Flower.
"""


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
    """Write report.html and plots again from run folders.

    They show one run, or several side by side. For several runs `compare.json` and
    `compare.csv` are written too: for a comparison that is going on, or for several together.

    RUN is a run folder or a folder that holds run folders. Interrupted runs, and runs that are
    still going on, can be reported too.
    """
    with explained(None):
        # Imported late, so that the command line starts fast and on an edge box.
        from fedknow.server.reports.page import write_report

        folders: list[RunFolder] = []
        for path in runs:
            folders += _runs_in(path)
        paths = [run.path.absolute() for run in folders]
        # The folder that holds them all.
        target = folder or Path(os.path.commonpath(paths))
        if len(folders) == 1:
            point_to(write_report(folders, target))
            return
        # A server writes the report of its run without the packages of a simulation.
        from fedknow.simulations.fleet.devices import shipped_memory_limits
        from fedknow.simulations.records import read_left_out, write_numbers

        left_out = read_left_out(target)
        write_numbers(folders, target, left_out=left_out)
        point_to(write_report(folders, target, left_out, shipped_memory_limits()))


_UNSET_GLOBAL = "\n# global_model = true  # with real clients false, where they keep parameters\n"


def show(
    experiment: Annotated[str, EXPERIMENT] = "digits",
    changes: Annotated[list[str] | None, SET] = None,
    data_dir: Annotated[Path | None, DATA_DIR] = None,
) -> None:
    """Print an experiment with every setting, as TOML.

    EXPERIMENT is a preset's name (`fedknow list presets`) or a TOML file; without one it is
    `digits`.

    For example:

    - `fedknow show digits --set learner=fedrep > mine.toml`
    """
    with explained(None):
        # Imported late, so that the command line starts fast and on an edge box.
        from fedknow.client.learners import resolve

        config = resolve(read_experiment(experiment, changes, data_dir))
        text = config.to_toml()
        if "global_model" not in config.evaluation.model_fields_set:
            # In a file it would be a wish of the user's, and real clients would send heads.
            text = text.replace("\nglobal_model = true\n", _UNSET_GLOBAL)
        typer.echo(text, nl=False)


def calibrate(  # noqa: PLR0913  # a command's options are its arguments
    experiment: Annotated[str, EXPERIMENT] = "digits",
    name: Annotated[str, NAME] = "here",
    profiles: Annotated[Path, PROFILES] = Path("devices.toml"),
    seconds: Annotated[float, SECONDS] = 10.0,
    busy: Annotated[float | None, BUSY] = None,
    idle: Annotated[float | None, IDLE] = None,
    changes: Annotated[list[str] | None, SET] = None,
    data_dir: Annotated[Path | None, DATA_DIR] = None,
) -> None:
    """Measure how fast this machine trains, for simulated fleets.

    The result is written down as a device. EXPERIMENT says what to train: a preset's name
    (`fedknow list presets`) or a TOML file; without one it is `digits`. Speeds differ from
    model to model: calibrate with the one you simulate.

    Clients train on the CPU, so the CPU's counted operations a second are measured. The shipped
    Jetsons (`fedknow list devices`) have another number: their GPUs' peak times an assumed
    share.

    For example:

    - `fedknow calibrate digits --set model=cnn6 --name my-pi --out devices.toml`, then
      `fedknow simulate digits --set model=cnn6 --set fleet=my-pi --set fleet.profiles=devices.toml`
    """
    with explained(None, extra="sim"):
        # Imported late, so that the command line starts fast and on an edge box.
        from fedknow.simulations.fleet.calibrate import calibrate as measure
        from fedknow.simulations.fleet.calibrate import (
            check_device_name,
            write_profile,
        )
        from fedknow.simulations.fleet.devices import read_profiles

        check_device_name(name)
        # Read before the measurement, so that a damaged file is refused at once.
        existing = read_profiles(profiles) if profiles.exists() else {}
        config = read_experiment(experiment, changes, data_dir)
        profile = measure(config, seconds, busy, idle)
        write_profile(profiles, name, profile, existing)
        out.print(
            f"{escape(name)}: {profile.peak / 1e9:.3g} GFLOP/s, room for "
            f"{profile.memory_limit / 1e9:.1f} GB; written to {escape(str(profiles))}",
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
    kind: Annotated[Listed, typer.Argument(metavar="|".join(Listed))],
    name: Annotated[str | None, typer.Argument(metavar="NAME")] = None,
) -> None:
    """List the parts that an experiment can name, or explain one of them.

    With a NAME, that part is explained. For a learner: its memory, its traffic and its
    requirements, and its settings with their values and meaning. For a device (or a fleet, or a
    pattern such as `jetson-*`): each number, with its source or `assumed`.

    For example:

    - `fedknow list learners` shows all learners, `fedknow list learners ewc` explains one.

    - `fedknow list devices jetson-nano` shows where its numbers are from.
    """
    with explained(None):
        if name is None:
            lines: dict[str, str] = _function(LISTS[kind])()
            section = INSTALLED.get(kind)
            if section is not None:
                lines |= list_installed(section, lines)
            print_list(out, lines)
        elif kind is Listed.devices:
            _describe_device(name)
        else:
            describe = _function(DESCRIPTIONS[kind])
            print_description(out, name, describe(name))


def _runs_in(path: Path) -> list[RunFolder]:
    """Return the run in a folder, or the runs in the folders it holds."""
    # Imported late, so that the command line starts fast and on an edge box.
    from fedknow.server.run.folder import RunFolder

    if (path / "config.toml").is_file():
        return [RunFolder.open(path)]
    files = sorted(path.glob("*/config.toml"))
    if not files:
        raise ConfigError(
            f"{path}: no run here (a run folder has a config.toml); "
            "give a run folder or a folder of them"
        )
    return [RunFolder.open(file.parent) for file in files]


def _describe_device(name: str) -> None:
    # Imported late, so that the command line starts fast and on an edge box.
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
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function
