"""The command line: each command reads its arguments, calls the rest of the package and shows what came of it."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedknow import __version__
from fedknow.protocols.config import ConfigError, ExperimentConfig, read_config
from fedknow.protocols.extras import how_to_install, providing_extra
from fedknow.protocols.interruption import is_interrupted

if TYPE_CHECKING:
    from fedknow.client.edge import EdgeClient
    from fedknow.protocols.descriptions import Description
    from fedknow.server.run_folder import RunFolder

__all__ = ["main"]

FAILED, REFUSED, INTERRUPTED = 1, 2, 130
"""Exit codes: the run failed; the command or the configuration cannot be run; Ctrl-C or SIGTERM. 0 is success."""

# Without emoji: a setting such as my:a:b is no emoji.
out = Console(emoji=False)
err = Console(stderr=True, emoji=False)

app = typer.Typer(
    name="fedknow",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _presets(incomplete: str) -> list[str]:
    """Offer presets to a shell that completes an experiment."""
    from fedknow.simulations.presets import list_presets

    return [name for name in list_presets() if name.startswith(incomplete)]


# Arguments are explained in the commands' texts: typer and click do not agree on how to show an argument's own help.
EXPERIMENT = typer.Argument(metavar="EXPERIMENT", autocompletion=_presets)
SET = typer.Option(
    "--set",
    metavar="KEY=VALUE",
    help="Change one setting; may be given many times. `fedknow show` prints them all.",
)
DATA_DIR = typer.Option(
    "--data-dir",
    metavar="DIR",
    help="Folder with `cifar100/*.parquet`, `omniglot/*.parquet` as on the Hugging Face hub. "
    "Without it `FEDKNOW_DATA` is used; `digits` needs neither.",
)
OUT = typer.Option("--out", metavar="DIR", help="Run folder.  [default: runs/NAME-LEARNER-seedN]", show_default=False)
SERVER = typer.Option("--server", metavar="HOST:PORT", help="Where the server listens.")
CLIENT_TLS = typer.Option("--tls", metavar="DIR", help="`clients/NNN/` of a folder that `fedknow certs` made.")
INSECURE = typer.Option("--insecure", help="Without TLS although the address is not on this machine alone.")
QUIET = typer.Option("--quiet", "-q", help="Print nothing but errors and where the report is.")


class Listed(StrEnum):
    """What ``fedknow list`` lists."""

    learners = "learners"
    strategies = "strategies"
    models = "models"
    datasets = "datasets"
    devices = "devices"
    presets = "presets"


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"fedknow {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _fedknow(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Federated continual learning: clients learn a stream of tasks together without sharing data.

    An experiment says which data, clients, tasks, model, learner (the method on the clients) and strategy (the method
    on the server). It is a preset or a TOML file, and every setting can be changed with `--set`.

    Examples:

    - `fedknow compare digits --learners fedavg,fedknow` puts FedKNOW beside FedAvg.

    - `fedknow simulate digits --set data.clients=50 --set train.rounds=5` runs one experiment.

    - `fedknow simulate digits --set strategy=my_strategy:MyStrategy` uses your own strategy from `my_strategy.py`.

    - `fedknow show digits` prints every setting with its value, ready to be saved as a TOML file.
    """


@app.command()
def simulate(
    experiment: Annotated[str, EXPERIMENT] = "digits",
    changes: Annotated[list[str] | None, SET] = None,
    folder: Annotated[Path | None, OUT] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the unfinished run in the run folder, from its last round.")
    ] = False,
    data_dir: Annotated[Path | None, DATA_DIR] = None,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Run one experiment with virtual clients on this machine and write a report.

    EXPERIMENT is a preset's name (`fedknow list presets`) or a TOML file; without one it is `digits`.

    The run folder gets `report.html`, `plots/`, `config.toml`, `metrics.jsonl`, `accuracy.npz` and a checkpoint after
    each round. Ctrl-C and SIGTERM are safe: go on later with `--resume`.

    Examples:

    - `fedknow simulate digits --set seed=1`

    - `fedknow simulate paper-cifar100-small --data-dir ~/data --out runs/paper`

    - `fedknow simulate runs/paper/config.toml --data-dir ~/data --out runs/paper --resume`
    """
    with _explained(folder):
        config = _read(experiment, changes, data_dir)
        run = folder or _run_folder(config)
        _say_starting(f"{config.name} with {config.learner.name} in {run}", quiet, config)
    with _explained(run, extra="sim"), _ray_started(config):
        from fedknow.progress import RunProgress
        from fedknow.simulations.simulate import simulate as run_experiment

        with nullcontext() if quiet else RunProgress(config, out) as progress:
            run_experiment(config, run, resume, [] if progress is None else [progress])
        _show_run(run, quiet)


@app.command()
def compare(
    experiment: Annotated[str, EXPERIMENT] = "digits",
    learners: Annotated[
        str,
        typer.Option(
            "--learners",
            metavar="NAME,NAME",
            help="Which to compare (`fedknow list learners`), or `all`; settings may follow: fedknow@rho=0.2+k=5; "
            "ewc@best, all@best: the settings a search found; all,-gem: without one.",
        ),
    ] = "fedavg,fedknow",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each, with seeds from `seed` on.")] = 3,
    changes: Annotated[list[str] | None, SET] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Folder of all runs.  [default: runs/NAME-compare]", show_default=False
        ),
    ] = None,
    data_dir: Annotated[Path | None, DATA_DIR] = None,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Run several learners with several seeds and put them side by side.

    EXPERIMENT is a preset's name (`fedknow list presets`) or a TOML file; without one it is `digits`.

    With one seed all learners get the same data and start from the same weights. Given the same command again, finished
    runs are read and unfinished ones go on. The folder gets a run folder for each run, `report.html`, `compare.json`,
    `compare.csv` and `plots/`.

    Example:

    - `fedknow compare digits --learners fedavg,fedrep,fedknow --seeds 5`

    - `fedknow compare digits --learners all,fedknow@rho=0.2` also says which learners do not fit the experiment.
    """
    with _explained(folder):
        config = _read(experiment, changes, data_dir)
        names = [name.strip() for name in learners.split(",") if name.strip()]
        place = folder or Path("runs") / f"{config.name}-compare"
        _say_starting(f"a comparison of {learners} on {config.name} in {place}", quiet)
    with _explained(place, extra="sim"):
        from fedknow.progress import RunProgress
        from fedknow.simulations.compare import compare as run_all
        from fedknow.tables import comparison_table, print_table

        watch = None if quiet else lambda plan, title: RunProgress(plan, out, title)
        result = run_all(config, names, seeds, place, watch)
        if result.groups and not quiet:
            print_table(out, comparison_table(result.groups))
        if not quiet:
            for name, reason in result.left_out.items():
                out.print(f"[dim]left out: {escape(name)}: {escape(reason)}[/]", highlight=False)
        if result.report:
            _point_to(result.report)
        for name, reason in result.failures.items():
            err.print(f"[red]{escape(name)} failed:[/] {escape(reason)}", highlight=False)
        if result.failures:
            raise typer.Exit(FAILED)


@app.command()
def search(
    experiment: Annotated[str, EXPERIMENT] = "digits",
    learners: Annotated[
        str,
        typer.Option(
            "--learners", metavar="NAME,NAME", help="Whose settings to search, or `all`; all,-gem: without one."
        ),
    ] = "all",
    runs: Annotated[int, typer.Option("--runs", min=1, help="Most candidates a learner; its defaults are one.")] = 8,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each, with seeds from `seed` on.")] = 1,
    changes: Annotated[list[str] | None, SET] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Folder of all runs.  [default: runs/NAME-search]", show_default=False
        ),
    ] = None,
    data_dir: Annotated[Path | None, DATA_DIR] = None,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Search the settings of learners over the values their papers give, on training samples that are held out.

    EXPERIMENT is a preset's name (`fedknow list presets`) or a TOML file; without one it is `digits`.

    A fifth of each class's training samples (`data.holdout`) is trained on by nobody and scores the candidates; the
    test samples are not touched. Given the same command again, finished runs are read and unfinished ones go on. The
    folder gets `search.jsonl`, one line a candidate, and `best.toml`.

    Example:

    - `fedknow search digits --learners ewc,fedknow --runs 12 --seeds 2`
    """
    with _explained(folder):
        config = _read(experiment, changes, data_dir)
        names = [name.strip() for name in learners.split(",") if name.strip()]
        place = folder or Path("runs") / f"{config.name}-search"
        _say_starting(f"a search for settings of {learners} on {config.name} in {place}", quiet)
    with _explained(place, extra="sim"):
        from fedknow.progress import RunProgress
        from fedknow.simulations.search import search as search_all
        from fedknow.tables import found_table, print_table

        given = ["fedknow", "search", experiment, "--learners", learners, "--runs", str(runs), "--seeds", str(seeds)]
        command = shlex.join([*given, *(part for change in changes or [] for part in ("--set", change))])
        watch = None if quiet else lambda plan, title: RunProgress(plan, out, title)
        found, failures = search_all(config, names, runs, seeds, place, command, watch)
        if found and not quiet:
            print_table(out, found_table(found))
        out.print(f"Found: {escape(str(place / 'best.toml'))}", highlight=False, soft_wrap=True)
        for name, reason in failures.items():
            err.print(f"[red]{escape(name)} failed:[/] {escape(reason)}", highlight=False)
        if not found:
            raise typer.Exit(FAILED)


@app.command()
def paper(
    experiment: Annotated[str, typer.Argument(metavar="5.1|5.1-pi|5.2|5.3|5.4|5.5|5.6")],
    data: Annotated[
        str, typer.Option("--data", metavar="NAME", help="Which of the paper's data sets.  [default: the experiment's]")
    ] = "",
    scale: Annotated[
        float, typer.Option("--scale", metavar="SHARE", help="How much of the paper's training, above 0, at most 1.")
    ] = 1.0,
    learners: Annotated[
        str, typer.Option("--learners", metavar="NAME,NAME", help="Which to run.  [default: the experiment's]")
    ] = "",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each, with seeds from 0 on.")] = 1,
    changes: Annotated[list[str] | None, SET] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Folder of all runs.  [default: runs/paper-EXPERIMENT]", show_default=False
        ),
    ] = None,
    data_dir: Annotated[Path | None, DATA_DIR] = None,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Run an experiment of the FedKNOW paper and put what comes of it beside the paper's values.

    5.1: methods on twenty Jetsons, 5.1-pi: with ten Raspberry Pis; 5.2: slow and fast links; 5.3: 50 and 100 clients;
    5.4: 80 tasks; 5.5: how much is kept of a task; 5.6: networks. `--scale` shrinks rounds and epochs by its root each
    (and clients and tasks, where these have come to one); page and output say what share of the paper's training that
    comes to, and on which devices.

    Given the same command again, finished runs are read and unfinished ones go on. The folder gets `paper.html` and
    `plots/`, and a comparison in a folder of its own for each variant.

    Example:

    - `fedknow paper 5.1 --data cifar100 --scale 0.1 --learners fedknow,fedavg,gem,fedweit --data-dir ~/data`
    """
    place = folder or Path("runs") / f"paper-{experiment}"
    with _explained(place, extra="sim"):
        _say_starting(f"the paper's experiment {experiment} in {place}", quiet)
        from fedknow.progress import RunProgress
        from fedknow.simulations.paper import run_paper, variants

        names = [name.strip() for name in learners.split(",") if name.strip()]
        overrides = [*(changes or []), *([f"data.dir={json.dumps(str(data_dir))}"] if data_dir else [])]
        watch = None if quiet else lambda plan, title: RunProgress(plan, out, title)
        for variant in [] if quiet else variants(experiment, data, scale, overrides):
            out.print(escape(str(variant)), highlight=False, soft_wrap=True)
        outcome = run_paper(experiment, place, data, scale, names, seeds, overrides, watch)
        for name, reason in outcome.failures.items():
            err.print(f"[red]{escape(name)} failed:[/] {escape(reason)}", highlight=False)
        if outcome.page:
            _point_to(outcome.page)
        if outcome.failures:
            raise typer.Exit(FAILED)


@app.command()
def certs(
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    clients: Annotated[int, typer.Option("--clients", min=1, help="How many clients there shall be.")],
    hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--host",
            metavar="NAME",
            help="Name or address of the server, without a port; `*.example.org` stands for all names with one part "
            "before; may be given many times.",
        ),
    ] = None,
    days: Annotated[int, typer.Option("--days", min=1, help="How long certificates are valid.")] = 365,
) -> None:
    """Make the certificates and tokens of a run: its CA, one folder for the server and one for each client.

    Give `DIR/server` to the server and `DIR/clients/NNN` to client NNN; `DIR/ca.key` stays where it is. What is there
    is never changed, so the same command with more clients adds the new ones.

    Example:

    - `fedknow certs certs --clients 20 --host fl.example.org --host 192.0.2.7`
    """
    with _explained(None):
        from fedknow.server.certs import make_certificates

        for made in make_certificates(folder, clients, hosts or [], days):
            out.print(escape(str(made)), highlight=False, soft_wrap=True)


@app.command()
def server(
    experiment: Annotated[str, EXPERIMENT] = "digits",
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Where clients connect; port 0 is any free one.")
    ] = "127.0.0.1:8700",
    tls: Annotated[
        Path | None, typer.Option("--tls", metavar="DIR", help="`server/` of a folder that `fedknow certs` made.")
    ] = None,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Let clients in by their tokens instead of their certificates.")
    ] = False,
    insecure: Annotated[bool, INSECURE] = False,
    changes: Annotated[list[str] | None, SET] = None,
    folder: Annotated[Path | None, OUT] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the run folder, from its last round; else begin.")
    ] = False,
    data_dir: Annotated[Path | None, DATA_DIR] = None,
    port_file: Annotated[
        Path | None, typer.Option("--port-file", metavar="FILE", help="Write the port here when clients can connect.")
    ] = None,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Run one experiment with real clients (`fedknow client`) and write a report.

    EXPERIMENT is a preset's name (`fedknow list presets`) or a TOML file; without one it is `digits`. The run begins
    when all `data.clients` clients are connected (`engine.min_clients`), and waits for those that drop, or with
    `engine.round_timeout` goes on without them.

    Clients that lose the server come back by themselves. Ctrl-C and SIGTERM are safe: go on later with `--resume`.

    Examples:

    - `fedknow server digits --set data.clients=4` with four `fedknow client` on this machine

    - `fedknow server digits --listen 0.0.0.0:8700 --tls certs/server --out runs/field --resume`
    """
    with _explained(folder, "server"):
        config = _read(experiment, changes, data_dir)
        run = folder or _run_folder(config)
    with _explained(run, "server", extra=_extra_of_server(config)):
        from fedknow.client.state import write_atomic
        from fedknow.progress import RunProgress
        from fedknow.server.serve import serve

        def ready(port: int) -> None:
            logging.getLogger("fedknow").info("listening on %s:%d", listen.rpartition(":")[0], port)
            if port_file is not None:
                write_atomic(port_file, f"{port}\n".encode())

        _log_plainly(quiet)
        with nullcontext() if quiet else RunProgress(config, out) as progress:
            serve(
                config,
                run,
                listen,
                tls=tls,
                tokens=tokens,
                insecure=insecure,
                resume=resume,
                observers=[] if progress is None else [progress],
                ready=ready,
            )
        _show_run(run, quiet)


@app.command()
def client(
    server: Annotated[str, SERVER],
    tls: Annotated[Path | None, CLIENT_TLS] = None,
    insecure: Annotated[bool, INSECURE] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="DIR",
            help="This client's own data (`task-000.npz`, ...) where the experiment says `data.name = local`; else the "
            "folder of the experiment's data set. Without it `FEDKNOW_DATA` is used; `digits` needs neither.",
        ),
    ] = None,
    state: Annotated[
        Path, typer.Option("--state", metavar="DIR", help="What this client keeps; a folder of its own.")
    ] = Path("fedknow-state"),
    number: Annotated[
        int | None,
        typer.Option("--client", metavar="N", min=0, help="Which client this is; a certificate says it by itself."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="What to compute on: `cpu`, `cuda`, `cuda:1`, ... or `auto`, a GPU if there is one.  [as the "
            "experiment's `engine.device` says]",
        ),
    ] = None,
    give_up: Annotated[
        float | None,
        typer.Option("--give-up", metavar="SECONDS", min=0, help="End after so long without a connection.  [never]"),
    ] = None,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Take part in the experiment of a server (`fedknow server`) until it is over.

    All that this machine needs is the server's address, its certificate and its data; the server says what the
    experiment is. What is kept in `--state` survives a reboot in any second. The exit code is 0 when the run is over,
    1 when the client gave up, 2 when the server refuses it or the command cannot be run.

    Examples:

    - `fedknow client --server 127.0.0.1:8700 --state state/0`

    - `fedknow client --server fl.example.org:8700 --tls certs/clients/003 --data ~/data --state ~/fedknow-state`
    """
    with _explained(None):
        from fedknow.client.edge import EdgeClient, run_client
        from fedknow.protocols.transport import check_address

        check_address(server, tls, insecure)
        _log_plainly(quiet)
        edge = EdgeClient(server, state, tls=tls, data=data, client=number, device=device, give_up=give_up)
        with _not_waiting_for(edge), _explained(None):
            run_client(edge)


@app.command()
def status(
    server: Annotated[str, SERVER],
    tls: Annotated[Path | None, CLIENT_TLS] = None,
    insecure: Annotated[bool, INSECURE] = False,
) -> None:
    """Print how the run of a server stands, as JSON: who is connected, what is being done, bytes, refusals."""
    with _explained(None):
        from fedknow.client.edge import fetch_status
        from fedknow.protocols.transport import check_address

        check_address(server, tls, insecure)
        typer.echo(json.dumps(json.loads(fetch_status(server, tls)), indent=1))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...")],
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="Where to write.  [default: the folder of the run or runs]", show_default=False
        ),
    ] = None,
) -> None:
    """Write report.html and plots again from what is in run folders: one run, or several side by side.

    Of several, `compare.json` and `compare.csv` too: of a comparison that is going on, or of several together.

    RUN is a run folder or a folder that holds run folders. Interrupted runs, and runs that are still going on, can be
    reported too.
    """
    with _explained(None):
        from fedknow.server.reports.page import write_report

        found = [run for path in runs for run in _runs_in(path)]
        target = folder or Path(os.path.commonpath([run.path.absolute() for run in found]))
        if len(found) > 1:
            from fedknow.simulations.compare import left_out_before, write_numbers
            from fedknow.simulations.fleet.devices import shipped_rooms

            left_out = left_out_before(target)
            write_numbers(found, target, left_out=left_out)
            _point_to(write_report(found, target, left_out, shipped_rooms()))
        else:
            _point_to(write_report(found, target))


@app.command()
def show(
    experiment: Annotated[str, EXPERIMENT] = "digits",
    changes: Annotated[list[str] | None, SET] = None,
    data_dir: Annotated[Path | None, DATA_DIR] = None,
) -> None:
    """Print an experiment with every setting spelled out, as TOML.

    EXPERIMENT is a preset's name (`fedknow list presets`) or a TOML file; without one it is `digits`.

    Example:

    - `fedknow show digits --set learner=fedrep > mine.toml`
    """
    with _explained(None):
        from fedknow.client.learners import resolve

        typer.echo(resolve(_read(experiment, changes, data_dir)).to_toml(), nl=False)


@app.command()
def calibrate(
    experiment: Annotated[str, EXPERIMENT] = "digits",
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="What to call this device.")] = "here",
    profiles: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="Where to write; other devices in it are kept.")
    ] = Path("devices.toml"),
    seconds: Annotated[float, typer.Option("--seconds", min=0, help="How long to measure.")] = 10.0,
    busy: Annotated[
        float | None, typer.Option("--busy-watts", min=0, help="What this machine draws when it trains, from a meter.")
    ] = None,
    idle: Annotated[float | None, typer.Option("--idle-watts", min=0, help="What it draws when it does not.")] = None,
    changes: Annotated[list[str] | None, SET] = None,
    data_dir: Annotated[Path | None, DATA_DIR] = None,
) -> None:
    """Measure how fast this machine trains, and write it down as a device for simulated fleets.

    EXPERIMENT says what to train: a preset's name (`fedknow list presets`) or a TOML file; without one it is `digits`.
    Speeds differ from model to model: calibrate with the one you simulate.

    Clients train on the CPU, and that is what is measured, with its counted operations a second. The Jetsons that are
    shipped (`fedknow list devices`) are something else: their GPUs' peak times a share that is assumed.

    Example:

    - `fedknow calibrate digits --set model=cnn6 --name my-pi --out devices.toml`, then
      `fedknow simulate digits --set model=cnn6 --set fleet=my-pi --set fleet.profiles=devices.toml`
    """
    with _explained(None, extra="sim"):
        from fedknow.simulations.fleet.calibrate import calibrate as measure
        from fedknow.simulations.fleet.calibrate import check_device_name, write_profile
        from fedknow.simulations.fleet.devices import read_profiles

        check_device_name(name)
        others = read_profiles(profiles) if profiles.exists() else {}
        profile = measure(_read(experiment, changes, data_dir), seconds, busy, idle)
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


@app.command("list")
def list_(
    what: Annotated[Listed, typer.Argument(metavar="|".join(Listed))],
    name: Annotated[str | None, typer.Argument(metavar="NAME")] = None,
) -> None:
    """List what can be named in an experiment, or explain one of it.

    With a NAME, all about that one. Of a learner: what it keeps, sends and needs, and its settings with their values
    and meaning. Of a device (or a fleet, or a pattern such as `jetson-*`): each number, with its source or `assumed`.

    Examples:

    - `fedknow list learners` shows all learners, `fedknow list learners ewc` explains one.

    - `fedknow list devices jetson-nano` shows where its numbers are from.
    """
    with _explained(None):
        if name is None:
            from fedknow.descriptions import print_list

            print_list(out, _known(what))
        elif what is Listed.devices:
            _describe_device(name)
        else:
            from fedknow.descriptions import print_description

            print_description(out, name, _described(what, name))


def main() -> None:
    """Entry point of the ``fedknow`` command."""
    app(prog_name="fedknow")  # its own name, in completion scripts too, when started with python -m


def _describe_device(name: str) -> None:
    from fedknow.simulations.fleet.devices import describe_devices

    for title, numbers in describe_devices(name).items():
        out.print(escape(title), highlight=False, soft_wrap=True)
        table = Table.grid(padding=(0, 2))
        for number, value, source in numbers:
            table.add_row(f"  {number}", escape(value), escape(source), style="")
        out.print(table, highlight=False)


def _described(what: Listed, name: str) -> Description:
    if what is Listed.learners:
        from fedknow.client.descriptions import describe_learner

        return describe_learner(name)
    if what is Listed.strategies:
        from fedknow.strategies import describe_strategy

        return describe_strategy(name)
    if what is Listed.models:
        from fedknow.client.descriptions import describe_model

        return describe_model(name)
    if what is Listed.datasets:
        from fedknow.client.descriptions import describe_dataset

        return describe_dataset(name)
    from fedknow.simulations.presets import describe_preset

    return describe_preset(name)


def _known(what: Listed) -> dict[str, str]:
    if what is Listed.learners:
        from fedknow.client.learners import list_learners

        return list_learners()
    if what is Listed.strategies:
        from fedknow.strategies import list_strategies

        return list_strategies()
    if what is Listed.models:
        from fedknow.client.models import list_models

        return list_models()
    if what is Listed.datasets:
        from fedknow.client.data import list_datasets

        return list_datasets()
    if what is Listed.devices:
        from fedknow.simulations.fleet.devices import list_devices

        return list_devices()
    from fedknow.simulations.presets import list_presets

    return list_presets()


def _read(experiment: str, changes: Sequence[str] | None, data_dir: Path | None) -> ExperimentConfig:
    """A preset by its name, else a TOML file, with the changes applied in the order given."""
    from fedknow.simulations.presets import load_preset

    # A JSON string is a TOML string, so no folder's name can be taken for a number.
    overrides = [*(changes or []), *([f"data.dir={json.dumps(str(data_dir))}"] if data_dir else [])]
    is_file = experiment.endswith(".toml") or os.sep in experiment
    return read_config(experiment, overrides) if is_file else load_preset(experiment, overrides)


def _run_folder(config: ExperimentConfig) -> Path:
    """Where a run goes that nobody gave a folder."""
    return Path("runs") / f"{config.name}-{_file_name(config.learner.name)}-seed{config.seed}"


def _runs_in(path: Path) -> list[RunFolder]:
    """The run in a folder, or the runs in the folders it holds."""
    from fedknow.server.run_folder import RunFolder

    if (path / "config.toml").is_file():
        return [RunFolder.open(path)]
    found = [RunFolder.open(file.parent) for file in sorted(path.glob("*/config.toml"))]
    if not found:
        raise ConfigError(
            f"{path}: no run here (a run folder has a config.toml); give a run folder or a folder of them"
        )
    return found


def _log_plainly(quiet: bool) -> None:
    """Write our log as plain lines, with the time, to stderr."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", force=True)
    logging.getLogger("fedknow").setLevel(logging.WARNING if quiet else logging.INFO)


@contextmanager
def _not_waiting_for(edge: EdgeClient) -> Iterator[None]:
    """End the process although a client trains: nothing can interrupt that, and it is done again next time."""
    try:
        yield
    except typer.Exit as end:
        if edge.busy:
            sys.stderr.flush()
            os._exit(end.exit_code)
        raise


def _extra_of_server(config: ExperimentConfig) -> str:
    """The extra that a server of an experiment needs: clients with data of their own spare it."""
    from fedknow.client.data.local import LOCAL

    return "server" if config.data.name == LOCAL else "server,data"


@contextmanager
def _explained(run: Path | None, command: str = "simulate", extra: str | None = None) -> Iterator[None]:
    """Turn what may go wrong into a sentence on stderr and an exit code.

    Parameters
    ----------
    run : Path, optional
        The run folder, or the folder of several.
    command : str
        What goes on with the run.
    extra : str, optional
        What brings all that the command needs; by default what brings the first package missed.
    """
    try:
        yield
    except KeyboardInterrupt:
        _end_interrupted(run, command)
    except ConfigError as error:
        err.print(f"[red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(REFUSED) from None
    except ModuleNotFoundError as error:
        needed = providing_extra(error.name)
        if needed is None:
            raise
        err.print(
            f"[red]Error:[/] this command needs {error.name}, which is not installed; "
            f"{escape(how_to_install(extra or needed))}",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(REFUSED) from None
    except Exception as error:
        if is_interrupted():
            _end_interrupted(run, command)
        if not _expected(error):
            raise
        err.print(f"[red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        if not _lost(error) and (kept := _kept(run, command)):
            err.print(escape(kept), highlight=False, soft_wrap=True)
        raise typer.Exit(FAILED) from None


def _end_interrupted(run: Path | None, command: str) -> NoReturn:
    """Say in one line that the command was interrupted, what is kept, and how to go on."""
    kept = _kept(run, command)
    if run is not None and not kept:
        kept = f"Nothing is kept yet. Begin again with: {_same_command()}"
    text = f"[yellow]Interrupted.[/] {escape(kept)}".strip()
    err.print(text, highlight=False, soft_wrap=True)
    raise typer.Exit(INTERRUPTED) from None


def _expected(error: Exception) -> bool:
    """Whether an exception tells of the run or the machine; any other is a fault of this program, shown in full."""
    from fedknow.client.state import StateError

    return isinstance(error, StateError | OSError) or _is(error, "server.checks.RunError", "client.edge.EdgeError")


def _lost(error: Exception) -> bool:
    """Whether resuming would fail again: what a run goes on from is damaged, or it stands still."""
    return _is(
        error, "client.state.StateLost", "server.checkpoint.CheckpointError", "server.checks.NothingAggregatedError"
    )


def _is(error: Exception, *kinds: str) -> bool:
    """Whether an exception is of one of these kinds; imports nothing, as an edge box lacks what a server imports."""
    return any(
        f"{kind.__module__}.{kind.__name__}" in {f"fedknow.{name}" for name in kinds} for kind in type(error).mro()
    )


def _kept(run: Path | None, verb: str) -> str:
    """Say what is kept, and how to go on; empty where nothing is.

    Nothing is imported here, as what was interrupted may be an import.
    """
    if run is None:
        return ""
    config = run / "config.toml"
    if config.is_file():
        if _is_finished(run):
            command = shlex.join(["fedknow", "report", str(run)])
            return f"The run in {run} is finished. Write its report with: {command}"
        command = shlex.join(["fedknow", verb, str(config), "--out", str(run), "--resume"])
        return f"All up to the last complete round is kept in {run}. Go on with: {command}"
    if any(run.glob("*/config.toml")) or any(run.glob("*/*/config.toml")):
        return f"What was done is kept in {run}. Go on with: {_same_command()}"
    return ""


def _is_finished(run: Path) -> bool:
    """Whether the record of a run ends with its end."""
    record = run / "metrics.jsonl"
    lines = record.read_bytes().splitlines() if record.is_file() else []
    return bool(lines) and b'"event":"end"' in lines[-1].replace(b" ", b"")


def _same_command() -> str:
    """Spell the command that this process was given."""
    return shlex.join(["fedknow", *sys.argv[1:]])


def _show_run(run: Path, quiet: bool) -> None:
    """What a finished run came to."""
    from fedknow.server.reports.summary import summarise
    from fedknow.server.run_folder import RunFolder
    from fedknow.tables import print_table, result_tables

    if not quiet:
        for table in result_tables(summarise(RunFolder.open(run))):
            print_table(out, table)
    _point_to(run / "report.html")


@contextmanager
def _ray_started(config: ExperimentConfig) -> Iterator[None]:
    """Have Ray start, where a run needs it, while what else the run needs is imported."""
    if config.engine.backend != "ray":
        yield
        return
    from fedknow.simulations.cluster import one_ray

    with one_ray(config.engine.address, meanwhile="fedknow.simulations.simulate"):
        yield


def _say_starting(what: str, quiet: bool, config: ExperimentConfig | None = None) -> None:
    """Say what is being started, before it is: on a busy machine the start alone takes half a minute."""
    if quiet:
        return
    out.print(f"Starting {escape(what)} ...", highlight=False, soft_wrap=True)
    if config is not None and config.engine.backend == "ray":
        out.print(f"{escape(_ray_in_words(config))} ...", highlight=False, soft_wrap=True)


def _ray_in_words(config: ExperimentConfig) -> str:
    engine = config.engine
    if engine.workers:
        workers = "1 worker" if engine.workers == 1 else f"{engine.workers} workers"
    else:
        workers = "a worker for each GPU" if engine.device == "cuda" else "a worker for each core"
    if engine.address:
        return f"Joining the Ray cluster at {engine.address} with {workers}"
    return f"Starting Ray with {workers}"


def _point_to(page: Path) -> None:
    out.print(f"Report: {escape(str(page))}", highlight=False, soft_wrap=True)


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", text)
