"""Ranks of methods over the streams of several comparisons."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from fedknow.protocols.config import ConfigError
from fedknow.protocols.files import write_atomic
from fedknow.server.reports.statistics import Ranks, rank
from fedknow.server.run.disk import running_out_of_disk
from fedknow.simulations.records import refuse_damaged

__all__ = ["SIGNS", "rank_comparisons", "write_ranks"]

SIGNS = {"accuracy": 1.0, "forgetting": -1.0}
"""Measures to rank by, and whether more of them is better."""


def rank_comparisons(comparisons: Sequence[Path], measure: str) -> Ranks:
    """Rank the methods that all comparisons have.

    Parameters
    ----------
    comparisons : sequence of Path
        Folders with a ``compare.json``, one a stream.
    measure : str
        One of :data:`SIGNS`.

    Raises
    ------
    ConfigError
        If there is no such measure, a folder has no readable ``compare.json``, or fewer than two
        streams or common methods are left.
    """
    if measure not in SIGNS:
        raise ConfigError(
            f"--measure = {measure!r}: must be one of {', '.join(SIGNS)}"
        )
    means = [_means(path, measure) for path in comparisons]
    if len(means) < 2:
        raise ConfigError("ranks need two streams or more; name two comparisons")
    # In the order of the first one, for equal ranks.
    shared = set.intersection(*(set(each) for each in means))
    common = [name for name in means[0] if name in shared]
    if len(common) < 2:
        raise ConfigError(
            "ranks need two methods that all comparisons have; these have in common: "
            f"{', '.join(common) or 'none'}"
        )
    sign = SIGNS[measure]
    scores = {}
    for name in common:
        scores[name] = [sign * each[name] for each in means]
    return rank(scores)


def _means(folder: Path, measure: str) -> Mapping[str, float]:
    """Read a comparison's means by method; one without a number is left out."""
    path = folder / "compare.json"
    if not path.is_file():
        raise ConfigError(
            f"{folder} has no compare.json; name the folder of a comparison, or make the file "
            f"with: fedknow report {folder}"
        )
    means = {}
    with refuse_damaged(path):
        learners = json.loads(path.read_text("utf-8"))["learners"]
        for name, measures in learners.items():
            mean = measures[measure]["mean"]
            if mean is not None:
                means[name] = float(mean)
    return means


def write_ranks(ranks: Ranks, measure: str, out: Path) -> Path:
    """Write ``ranks.json`` and ``plots/ranks.png``; gives the plot."""
    # Here, as matplotlib takes a second to import.
    from fedknow.server.reports.rank_plot import rank_plot

    path = out / "plots" / "ranks.png"
    text = json.dumps({"measure": measure, **asdict(ranks)}, indent=1)
    with running_out_of_disk(out):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "ranks.json", text.encode() + b"\n")
        write_atomic(path, rank_plot(ranks, measure).png())
    return path
