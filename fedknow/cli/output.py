"""The output of commands.

Results go to standard output, failures to standard error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from fedknow.protocols.config import ExperimentConfig
from fedknow.protocols.texts import counted

if TYPE_CHECKING:
    from fedknow.progress import RunProgress

__all__ = [
    "err",
    "out",
    "point_to",
    "progress_of_each",
    "progress_shown",
    "ray_in_words",
    "say_starting",
    "show_run",
]

# Without emoji: a setting such as my:a:b is no emoji.
out = Console(emoji=False)
err = Console(stderr=True, emoji=False)


@contextmanager
def progress_shown(
    config: ExperimentConfig, quiet: bool
) -> Iterator[list[RunProgress]]:
    """Show how a run goes on; yield the observers that the run needs for it."""
    if quiet:
        yield []
        return
    # Imported late, so that the command line starts fast and on an edge box.
    from fedknow.progress import RunProgress

    with RunProgress(config, out) as progress:
        yield [progress]


def progress_of_each(
    quiet: bool,
) -> Callable[[ExperimentConfig, str, Path], RunProgress] | None:
    """Return a function that makes the progress of each of several runs.

    It takes a configuration, a title and the run folder.
    """
    if quiet:
        return None
    # Imported late, so that the command line starts fast and on an edge box.
    from fedknow.progress import RunProgress

    return lambda config, title, path: RunProgress(config, out, title)


def show_run(run: Path, quiet: bool) -> None:
    """Show the results of a finished run."""
    # Imported late, so that the command line starts fast and on an edge box.
    from fedknow.cli.tables import print_table, result_tables
    from fedknow.server.reports.summary import summarise
    from fedknow.server.run.folder import RunFolder

    if not quiet:
        # The page has everything; the terminal gets the two main tables.
        for table in result_tables(summarise(RunFolder.open(run))):
            print_table(out, table)
    point_to(run / "report.html")


def point_to(page: Path) -> None:
    """Say where a report is."""
    out.print(f"Report: {escape(str(page))}", highlight=False, soft_wrap=True)


def say_starting(
    activity: str, quiet: bool, config: ExperimentConfig | None = None
) -> None:
    """Announce the start of an activity, before it begins.

    On a busy machine the start alone takes half a minute.
    """
    if quiet:
        return
    out.print(f"Starting {escape(activity)} ...", highlight=False, soft_wrap=True)
    if config is not None and config.engine.backend == "ray":
        out.print(
            f"{escape(ray_in_words(config))} ...", highlight=False, soft_wrap=True
        )


def ray_in_words(config: ExperimentConfig) -> str:
    """Say which Ray a run will have, and how many workers."""
    engine = config.engine
    if engine.workers:
        workers = counted(engine.workers, "worker")
    else:
        unit = "GPU" if engine.device == "cuda" else "core"
        workers = f"a worker for each {unit}"
    if engine.address:
        return f"Joining the Ray cluster at {engine.address} with {workers}"
    return f"Starting Ray with {workers}"
