"""Commands that run experiments with virtual clients: simulate, compare, search, paper."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fedknow.cli.errors import explained, report_failures
from fedknow.cli.options import (
    DATA_DIR,
    EXPERIMENT,
    OUT,
    QUIET,
    SET,
    default_run_folder,
    overrides,
    read_experiment,
    split_names,
)
from fedknow.cli.output import (
    out,
    point_to,
    progress_of_each,
    progress_shown,
    say_starting,
    show_run,
)
from fedknow.protocols.config import ExperimentConfig

__all__ = ["compare", "paper", "search", "simulate"]


def simulate(
    experiment: Annotated[str, EXPERIMENT] = "digits",
    changes: Annotated[list[str] | None, SET] = None,
    folder: Annotated[Path | None, OUT] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the unfinished run in the run folder, from its last round.",
        ),
    ] = False,
    data_dir: Annotated[Path | None, DATA_DIR] = None,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Run one experiment with virtual clients on this machine and write a report.

    EXPERIMENT is a preset's name (`fedknow list presets`) or a TOML file; without one it is
    `digits`.

    The run folder gets `report.html`, `plots/`, `config.toml`, `metrics.jsonl`, `accuracy.npz`
    and a checkpoint after each round. Ctrl-C and SIGTERM are safe: go on later with `--resume`.

    Examples:

    - `fedknow simulate digits --set seed=1`

    - `fedknow simulate paper-cifar100-small --data-dir ~/data --out runs/paper`

    - `fedknow simulate runs/paper/config.toml --data-dir ~/data --out runs/paper --resume`
    """
    with explained(folder):
        config = read_experiment(experiment, changes, data_dir)
        run = folder or default_run_folder(config)
        say_starting(
            f"{config.name} with {config.learner.name} in {run}", quiet, config
        )
    with explained(run, extra="sim"), ray_started(config):
        from fedknow.simulations.simulate import simulate as run_experiment

        with progress_shown(config, quiet) as observers:
            run_experiment(config, run, resume, observers)
        show_run(run, quiet)


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
    seeds: Annotated[
        int,
        typer.Option("--seeds", min=1, help="Runs of each, with seeds from `seed` on."),
    ] = 3,
    changes: Annotated[list[str] | None, SET] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder of all runs.  [default: runs/NAME-compare]",
            show_default=False,
        ),
    ] = None,
    data_dir: Annotated[Path | None, DATA_DIR] = None,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Run several learners with several seeds and put them side by side.

    EXPERIMENT is a preset's name (`fedknow list presets`) or a TOML file; without one it is
    `digits`.

    With one seed all learners get the same data and start from the same weights. Given the same
    command again, finished runs are read and unfinished ones go on. The folder gets a run
    folder for each run, `report.html`, `compare.json`, `compare.csv` and `plots/`.

    Example:

    - `fedknow compare digits --learners fedavg,fedrep,fedknow --seeds 5`

    - `fedknow compare digits --learners all,fedknow@rho=0.2` also says which learners do not
      fit the experiment.
    """
    with explained(folder):
        config = read_experiment(experiment, changes, data_dir)
        names = split_names(learners)
        place = folder or Path("runs") / f"{config.name}-compare"
        say_starting(f"a comparison of {learners} on {config.name} in {place}", quiet)
    with explained(place, extra="sim"):
        from fedknow.cli.tables import comparison_table, print_table
        from fedknow.simulations.compare import compare as run_all

        result = run_all(config, names, seeds, place, progress_of_each(quiet))
        if result.groups and not quiet:
            print_table(out, comparison_table(result.groups))
        if not quiet:
            for name, reason in result.left_out.items():
                out.print(
                    f"[dim]left out: {escape(name)}: {escape(reason)}[/]",
                    highlight=False,
                )
        if result.report:
            point_to(result.report)
        report_failures(result.failures)


def search(
    experiment: Annotated[str, EXPERIMENT] = "digits",
    learners: Annotated[
        str,
        typer.Option(
            "--learners",
            metavar="NAME,NAME",
            help="Whose settings to search, or `all`; all,-gem: without one.",
        ),
    ] = "all",
    runs: Annotated[
        int,
        typer.Option(
            "--runs", min=1, help="Most candidates a learner; its defaults are one."
        ),
    ] = 8,
    seeds: Annotated[
        int,
        typer.Option("--seeds", min=1, help="Runs of each, with seeds from `seed` on."),
    ] = 1,
    changes: Annotated[list[str] | None, SET] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder of all runs.  [default: runs/NAME-search]",
            show_default=False,
        ),
    ] = None,
    data_dir: Annotated[Path | None, DATA_DIR] = None,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Search the settings of learners over the values their papers give, on training samples that
    are held out.

    EXPERIMENT is a preset's name (`fedknow list presets`) or a TOML file; without one it is
    `digits`.

    A fifth of each class's training samples (`data.holdout`) is trained on by nobody and scores
    the candidates; the test samples are not touched. Given the same command again, finished
    runs are read and unfinished ones go on. The folder gets `search.jsonl`, one line a
    candidate, and `best.toml`.

    Example:

    - `fedknow search digits --learners ewc,fedknow --runs 12 --seeds 2`
    """
    with explained(folder):
        config = read_experiment(experiment, changes, data_dir)
        names = split_names(learners)
        place = folder or Path("runs") / f"{config.name}-search"
        say_starting(
            f"a search for settings of {learners} on {config.name} in {place}", quiet
        )
    with explained(place, extra="sim"):
        from fedknow.cli.tables import found_table, print_table
        from fedknow.simulations.search import search as search_all

        given = [
            "fedknow",
            "search",
            experiment,
            "--learners",
            learners,
            "--runs",
            str(runs),
            "--seeds",
            str(seeds),
        ]
        command = shlex.join(
            [*given, *(part for change in changes or [] for part in ("--set", change))]
        )
        found, failures = search_all(
            config, names, runs, seeds, place, command, progress_of_each(quiet)
        )
        if found and not quiet:
            print_table(out, found_table(found))
        out.print(
            f"Found: {escape(str(place / 'best.toml'))}",
            highlight=False,
            soft_wrap=True,
        )
        report_failures(failures, is_fatal=not found)


def paper(
    experiment: Annotated[
        str, typer.Argument(metavar="5.1|5.1-pi|5.2|5.3|5.4|5.5|5.6")
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="NAME",
            help="Which of the paper's data sets.  [default: the experiment's]",
        ),
    ] = "",
    scale: Annotated[
        float,
        typer.Option(
            "--scale",
            metavar="SHARE",
            help="How much of the paper's training, above 0, at most 1.",
        ),
    ] = 1.0,
    learners: Annotated[
        str,
        typer.Option(
            "--learners",
            metavar="NAME,NAME",
            help="Which to run.  [default: the experiment's]",
        ),
    ] = "",
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="Runs of each, with seeds from 0 on.")
    ] = 1,
    changes: Annotated[list[str] | None, SET] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder of all runs.  [default: runs/paper-EXPERIMENT]",
            show_default=False,
        ),
    ] = None,
    data_dir: Annotated[Path | None, DATA_DIR] = None,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Run an experiment of the FedKNOW paper and put what comes of it beside the paper's values.

    5.1: methods on twenty Jetsons, 5.1-pi: with ten Raspberry Pis; 5.2: slow and fast links;
    5.3: 50 and 100 clients; 5.4: 80 tasks; 5.5: how much is kept of a task; 5.6: networks.
    `--scale` shrinks rounds and epochs by its root each (and clients and tasks, where these
    have come to one); page and output say what share of the paper's training that comes to, and
    on which devices.

    Given the same command again, finished runs are read and unfinished ones go on. The folder
    gets `paper.html` and `plots/`, and a comparison in a folder of its own for each variant.

    Example:

    - `fedknow paper 5.1 --data cifar100 --scale 0.1 --learners fedknow,fedavg,gem,fedweit
      --data-dir ~/data`
    """
    place = folder or Path("runs") / f"paper-{experiment}"
    with explained(place, extra="sim"):
        say_starting(f"the paper's experiment {experiment} in {place}", quiet)
        from fedknow.simulations.paper import run_paper, variants

        names = split_names(learners)
        settings = overrides(changes, data_dir)
        for variant in [] if quiet else variants(experiment, data, scale, settings):
            out.print(escape(str(variant)), highlight=False, soft_wrap=True)
        outcome = run_paper(
            experiment,
            place,
            data,
            scale,
            names,
            seeds,
            settings,
            progress_of_each(quiet),
        )
        if outcome.page:
            point_to(outcome.page)
        report_failures(outcome.failures)


@contextmanager
def ray_started(config: ExperimentConfig) -> Iterator[None]:
    """Have Ray start, where a run needs it, while what else the run needs is imported."""
    if config.engine.backend != "ray":
        yield
        return
    from fedknow.simulations.engine.cluster import one_ray

    with one_ray(config.engine.address, meanwhile="fedknow.simulations.simulate"):
        yield
