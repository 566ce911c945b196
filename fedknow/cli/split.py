"""The command that cuts data without a run: split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fedknow.cli.errors import explained
from fedknow.cli.options import DATA_DIR, EXPERIMENT, SET, read_experiment
from fedknow.cli.output import out, point_to
from fedknow.protocols.config import ConfigError

__all__ = ["split"]

FILE = typer.Option(
    "--out", metavar="FILE", help="Where to write the split; ends in `.npz`."
)
PAGE = typer.Option(
    "--html",
    metavar="PAGE",
    help="Where to write a page that shows it; ends in `.html`.",
)


def split(
    experiment: Annotated[str, EXPERIMENT] = "digits",
    file: Annotated[Path, FILE] = Path("split.npz"),
    page: Annotated[Path | None, PAGE] = None,
    changes: Annotated[list[str] | None, SET] = None,
    data_dir: Annotated[Path | None, DATA_DIR] = None,
) -> None:
    """Share data among clients without a run, and show who holds what.

    EXPERIMENT is a preset's name (`fedknow list presets`) or a TOML file; without one it is
    `digits`. The file has row numbers and no sample; a run takes it as `data.split`. The page
    shows each client's training samples by task and class.

    For example:

    - `fedknow split digits --set data.partition=dirichlet --out mine.npz --html mine.html`
    """
    with explained(None, extra="sim"):
        _check_ending(file, "--out", ".npz")
        if page is not None:
            _check_ending(page, "--html", ".html")
        # Imported late, so that the command line starts fast and on an edge box.
        from fedknow.client.data import make_benchmark, save_split
        from fedknow.client.learners import resolve
        from fedknow.server.reports.page import write_split

        config = resolve(read_experiment(experiment, changes, data_dir))
        benchmark = make_benchmark(config)
        save_split(file, benchmark.partition, benchmark.dataset, config.data)
        out.print(f"Split: {escape(str(file))}", highlight=False, soft_wrap=True)
        if page is not None:
            point_to(write_split(page, config, benchmark.partition.summary()))


def _check_ending(path: Path, option: str, ending: str) -> None:
    if path.suffix != ending:
        raise ConfigError(
            f"{option} {path}: the name must end in {ending}; "
            f"give {option} {path.with_suffix(ending)}"
        )
    if not path.parent.is_dir():
        raise ConfigError(
            f"{option} {path}: there is no folder {path.parent}; make it first"
        )
