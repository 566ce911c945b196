"""Commands that run experiments with virtual clients."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
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
    TRACK,
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
from fedknow.cli.watch import WATCH, page_served
from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.texts import counted

__all__ = ["compare", "paper", "search", "simulate"]

RESUME = typer.Option(
    "--resume",
    help="Go on with the unfinished run in the run folder, from its last round.",
)
LEARNERS = typer.Option(
    "--learners",
    metavar="NAME,NAME",
    help="Which to compare (`fedknow list learners`), or `all`; settings may follow: "
    "fedknow@rho=0.2+k=5; ewc@best, all@best: the settings a search found; all,-gem: "
    "without one.",
)
SEEDS = typer.Option(
    "--seeds", min=1, help="Runs of each, with seeds from `seed` on."
)
COMPARE_OUT = typer.Option(
    "--out",
    metavar="DIR",
    help="Folder of all runs.  [default: runs/NAME-compare]",
    show_default=False,
)
SEARCH_LEARNERS = typer.Option(
    "--learners",
    metavar="NAME,NAME",
    help="Whose settings to search, or `all`; all,-gem: without one.",
)
RUNS = typer.Option(
    "--runs",
    min=1,
    help="Candidates of a learner at most, its defaults among them; or tries of `--over`.",
)
OVER = typer.Option(
    "--over",
    metavar="KEY=RANGE",
    help="A setting to search instead, and its range: log:1e-4..1e-1, uniform:0..1, "
    "int:1..5, choice:a,b; may be given many times.",
    show_default=False,
)
SAMPLER = typer.Option(
    "--sampler",
    metavar="NAME",
    help="How `--over` is searched: `tpe`, near what scored well; `random`; `grid`, every "
    "combination.",
)
SEARCH_OUT = typer.Option(
    "--out",
    metavar="DIR",
    help="Folder of all runs.  [default: runs/NAME-search]",
    show_default=False,
)
PAPER_EXPERIMENT = typer.Argument(metavar="5.1|5.1-pi|5.2|5.3|5.4|5.5|5.6")
DATA = typer.Option(
    "--data",
    metavar="NAME",
    help="Which of the paper's data sets.  [default: the experiment's]",
)
SCALE = typer.Option(
    "--scale",
    metavar="SHARE",
    help="How much of the paper's training, above 0, at most 1.",
)
PAPER_LEARNERS = typer.Option(
    "--learners",
    metavar="NAME,NAME",
    help="Which to run.  [default: the experiment's]",
)
PAPER_SEEDS = typer.Option(
    "--seeds", min=1, help="Runs of each, with seeds from 0 on."
)
PAPER_OUT = typer.Option(
    "--out",
    metavar="DIR",
    help="Folder of all runs.  [default: runs/paper-EXPERIMENT]",
    show_default=False,
)


def simulate(  # noqa: PLR0913  # a command's options are its arguments
    experiment: Annotated[str, EXPERIMENT] = "digits",
    changes: Annotated[list[str] | None, SET] = None,
    folder: Annotated[Path | None, OUT] = None,
    resume: Annotated[bool, RESUME] = False,
    data_dir: Annotated[Path | None, DATA_DIR] = None,
    watch: Annotated[bool, WATCH] = False,
    track: Annotated[list[str] | None, TRACK] = None,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Run one experiment with virtual clients and write a report.

    EXPERIMENT is a preset's name (`fedknow list presets`) or a TOML file; without one it is
    `digits`.

    The run folder gets `report.html`, `plots/`, `config.toml`, `metrics.jsonl`, `accuracy.npz`
    and a checkpoint after each round. Ctrl-C and SIGTERM are safe: go on later with `--resume`.

    For example:

    - `fedknow simulate digits --set seed=1`

    - `fedknow simulate paper-cifar100-small --data-dir ~/data --out runs/paper`

    - `fedknow simulate runs/paper/config.toml --data-dir ~/data --out runs/paper --resume`
    """
    with explained(folder):
        config = read_experiment(experiment, changes, data_dir, track)
        run = folder or default_run_folder(config)
        say_starting(
            f"{config.name} with {config.learner.name} in {run}", quiet, config
        )
    with explained(run, extra="sim"), ray_started(config):
        # Imported late, so that the command line starts fast and on an edge box.
        from fedknow.simulations.simulate import simulate as run_experiment

        with page_served(run, watch), progress_shown(config, quiet) as observers:
            run_experiment(config, run, resume, observers)
        show_run(run, quiet)


def compare(  # noqa: PLR0913  # a command's options are its arguments
    experiment: Annotated[str, EXPERIMENT] = "digits",
    learners: Annotated[str, LEARNERS] = "fedavg,fedknow",
    seeds: Annotated[int, SEEDS] = 3,
    changes: Annotated[list[str] | None, SET] = None,
    folder: Annotated[Path | None, COMPARE_OUT] = None,
    data_dir: Annotated[Path | None, DATA_DIR] = None,
    watch: Annotated[bool, WATCH] = False,
    track: Annotated[list[str] | None, TRACK] = None,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Run several learners with several seeds and put them side by side.

    EXPERIMENT is a preset's name (`fedknow list presets`) or a TOML file; without one it is
    `digits`.

    With one seed all learners get the same data and start from the same weights. Given the same
    command again, finished runs are read and unfinished ones go on. The folder gets a run
    folder for each run, `report.html`, `compare.json`, `compare.csv` and `plots/`.

    For example:

    - `fedknow compare digits --learners fedavg,fedrep,fedknow --seeds 5`

    - `fedknow compare digits --learners all,fedknow@rho=0.2` also says which learners do not
      fit the experiment.
    """
    with explained(folder):
        config = read_experiment(experiment, changes, data_dir, track)
        names = split_names(learners)
        place = folder or Path("runs") / f"{config.name}-compare"
        say_starting(
            f"a comparison of {learners} on {config.name} in {place}", quiet
        )
    with explained(place, extra="sim"):
        # Imported late, so that the command line starts fast and on an edge box.
        from fedknow.cli.tables import (
            comparison_table,
            contrast_lines,
            print_table,
        )
        from fedknow.simulations.compare import compare as run_all

        with page_served(place, watch):
            result = run_all(config, names, seeds, place, progress_of_each(quiet))
        if result.groups and not quiet:
            print_table(out, comparison_table(result.groups))
            differences = contrast_lines(result.groups)
            if differences:
                print_table(out, differences)
        if not quiet:
            for name, reason in result.left_out.items():
                out.print(
                    f"[dim]left out: {escape(name)}: {escape(reason)}[/]",
                    highlight=False,
                )
        if result.report:
            point_to(result.report)
        # Last: it ends the command with another exit code.
        report_failures(result.failures)


def search(  # noqa: PLR0913  # a command's options are its arguments
    experiment: Annotated[str, EXPERIMENT] = "digits",
    learners: Annotated[str, SEARCH_LEARNERS] = "all",
    runs: Annotated[int, RUNS] = 8,
    seeds: Annotated[int, SEEDS] = 1,
    ranges: Annotated[list[str] | None, OVER] = None,
    sampler: Annotated[str, SAMPLER] = "tpe",
    changes: Annotated[list[str] | None, SET] = None,
    folder: Annotated[Path | None, SEARCH_OUT] = None,
    data_dir: Annotated[Path | None, DATA_DIR] = None,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Search settings: those of learners, or any that `--over` names.

    Without `--over` learners are searched over the values that their papers give.
    Samples that are held out of the training score them.

    EXPERIMENT is a preset's name (`fedknow list presets`) or a TOML file; without one it is
    `digits`.

    No client trains on a fifth of each class's training samples (`data.holdout`), which scores
    the candidates; the test samples are not touched. Given the same command again, finished
    runs are read and unfinished ones go on. The folder gets one line a candidate and the
    best settings: `search.jsonl` and `best.toml`, with `--over` `sweep.jsonl` and `sweep.json`.

    For example:

    - `fedknow search digits --learners ewc,fedknow --runs 12 --seeds 2`

    - `fedknow search digits --over train.lr=log:1e-4..1e-1 --over train.epochs=int:1..4 --runs 20`
    """
    if ranges:
        with explained(folder):
            config = read_experiment(experiment, changes, data_dir)
            _refuse_learners(learners)
        _sweep(config, ranges, (runs, seeds, sampler), folder, quiet)
        return
    with explained(folder):
        config = read_experiment(experiment, changes, data_dir)
        names = split_names(learners)
        place = folder or Path("runs") / f"{config.name}-search"
        say_starting(
            f"a search for settings of {learners} on {config.name} in {place}",
            quiet,
        )
    with explained(place, extra="sim"):
        # Imported late, so that the command line starts fast and on an edge box.
        from fedknow.cli.tables import print_table, search_table
        from fedknow.simulations.search import SearchRequest, count_runs
        from fedknow.simulations.search import search as search_all

        words = ["fedknow", "search", experiment, "--learners", learners]
        words += ["--runs", str(runs), "--seeds", str(seeds)]
        # The whole command, so that the record can be repeated.
        words += chain.from_iterable(("--set", text) for text in changes or [])
        request = SearchRequest(names, runs, seeds, shlex.join(words))
        _say_runs(count_runs(config, request), quiet)
        best, failures = search_all(
            config, request, place, progress_of_each(quiet)
        )
        if best and not quiet:
            print_table(out, search_table(best))
        out.print(
            f"Found: {escape(str(place / 'best.toml'))}",
            highlight=False,
            soft_wrap=True,
        )
        # Some candidates may fail; a search fails when all of them did.
        report_failures(failures, is_fatal=not best)


def _say_runs(count: int, quiet: bool) -> None:
    # Of all learners it is hundreds, which one would not guess.
    if not quiet:
        out.print(f"It takes {counted(count, 'run')} at most.", highlight=False)


def _refuse_learners(learners: str) -> None:
    if learners != "all":
        raise ConfigError(
            f"--learners = {learners!r}: with --over it is a setting like others; give "
            "--set learner=NAME, or --over learner=NAME,NAME"
        )


def _sweep(
    config: ExperimentConfig,
    ranges: list[str],
    extent: tuple[int, int, str],
    folder: Path | None,
    quiet: bool,
) -> None:
    """Search settings by their ranges; ``extent``: tries, seeds and sampler."""
    place = folder or Path("runs") / f"{config.name}-sweep"
    say_starting(f"a search over {', '.join(ranges)} in {place}", quiet)
    with explained(place, extra="sim,search"):
        # Imported late, so that the command line starts fast and on an edge box.
        from fedknow.cli.tables import print_table, sweep_table
        from fedknow.simulations.space import read_space
        from fedknow.simulations.sweep import SweepRequest, best_trial, sweep

        trials, seeds, sampler = extent
        request = SweepRequest(read_space(ranges), trials, seeds, sampler)  # type: ignore[arg-type]
        tried = sweep(config, request, place, progress_of_each(quiet))
        if not quiet:
            print_table(out, sweep_table(tried))
        best = best_trial(tried)
        if best is not None:
            words = shlex.join(
                f"--set={key}={value}" for key, value in best.settings.items()
            )
            out.print(f"Best: {escape(words)}", highlight=False, soft_wrap=True)
        failures = {
            f"trial {trial.number}": trial.failure
            for trial in tried
            if trial.failure
        }
        report_failures(failures, is_fatal=best is None)


def paper(  # noqa: PLR0913  # a command's options are its arguments
    experiment: Annotated[str, PAPER_EXPERIMENT],
    data: Annotated[str, DATA] = "",
    scale: Annotated[float, SCALE] = 1.0,
    learners: Annotated[str, PAPER_LEARNERS] = "",
    seeds: Annotated[int, PAPER_SEEDS] = 1,
    changes: Annotated[list[str] | None, SET] = None,
    folder: Annotated[Path | None, PAPER_OUT] = None,
    data_dir: Annotated[Path | None, DATA_DIR] = None,
    quiet: Annotated[bool, QUIET] = False,
) -> None:
    """Run an experiment of the FedKNOW paper and compare with its values.

    5.1: methods on twenty Jetsons, 5.1-pi: with ten Raspberry Pis; 5.2: slow and fast links;
    5.3: 50 and 100 clients; 5.4: 80 tasks; 5.5: how much is kept of a task; 5.6: networks.
    `--scale` shrinks rounds and epochs by its root each (and clients and tasks, where these
    have come to one). Page and output say which share of the paper's training that is, and on
    which devices.

    Given the same command again, finished runs are read and unfinished ones go on. The folder
    gets `paper.html` and `plots/`, and a comparison in a folder of its own for each variant.

    For example:

    - `fedknow paper 5.1 --data cifar100 --scale 0.1 --learners fedknow,fedavg,gem,fedweit
      --data-dir ~/data`
    """
    place = folder or Path("runs") / f"paper-{experiment}"
    with explained(place, extra="sim"):
        say_starting(f"the paper's experiment {experiment} in {place}", quiet)
        # Imported late, so that the command line starts fast and on an edge box.
        from fedknow.simulations.paper import PaperRequest, run_paper

        settings = overrides(changes, data_dir)
        names = split_names(learners)
        request = PaperRequest(experiment, data, scale, settings, names, seeds)
        if not quiet:
            for variant in request.variants():
                out.print(escape(str(variant)), highlight=False, soft_wrap=True)
        outcome = run_paper(request, place, progress_of_each(quiet))
        if outcome.page:
            point_to(outcome.page)
        report_failures(outcome.failures)


@contextmanager
def ray_started(config: ExperimentConfig) -> Iterator[None]:
    """Start Ray, where a run needs it, while other packages are imported."""
    if config.engine.backend != "ray":
        yield
        return
    # Imported late, so that the command line starts fast and on an edge box.
    from fedknow.simulations.engine.cluster import one_ray

    meanwhile = "fedknow.simulations.simulate"
    with one_ray(config.engine.address, meanwhile, config.engine.code):
        yield
