"""The command that ranks methods over several comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedknow.cli.errors import explained
from fedknow.cli.output import out, point_to

__all__ = ["ranks"]

MEASURE = typer.Option(
    "--measure",
    metavar="accuracy|forgetting",
    help="What to rank by.",
)
FOLDER = typer.Option(
    "--out",
    metavar="DIR",
    help="Where `ranks.json` and `plots/ranks.png` go.",
)


def ranks(
    comparisons: Annotated[list[Path], typer.Argument(metavar="COMPARISON...")],
    measure: Annotated[str, MEASURE] = "accuracy",
    folder: Annotated[Path, FOLDER] = Path("runs/ranks"),
) -> None:
    """Rank methods over the streams of several comparisons.

    COMPARISON is a folder with a `compare.json`. Methods that each of them has are ranked on
    each stream, and their ranks are averaged. Friedman's test says whether they differ at all;
    Nemenyi's critical difference says which mean ranks are too close to tell apart. Below five
    streams that is nearly always all of them.

    For example:

    - `fedknow ranks runs/digits-compare runs/har-wharf-compare --measure forgetting`
    """
    with explained(folder):
        # Imported late, so that the command line starts fast and on an edge box.
        from fedknow.cli.tables import print_table, ranks_table
        from fedknow.simulations.ranking import rank_comparisons, write_ranks

        ranking = rank_comparisons(comparisons, measure)
        print_table(out, ranks_table(ranking, measure))
        point_to(write_ranks(ranking, measure, folder))
