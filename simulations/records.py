"""Files with the numbers of a comparison: ``compare.json``, ``.csv``."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedknow.protocols.config import ConfigError
from fedknow.protocols.files import write_atomic
from fedknow.server.reports.contrasts import contrast_numbers
from fedknow.server.reports.groups import Group, group
from fedknow.server.reports.measures import MEASURES
from fedknow.server.reports.summary import Summary, summarise
from fedknow.server.run.disk import running_out_of_disk
from fedknow.server.run.folder import RunFolder

__all__ = ["read_left_out", "refuse_damaged", "write_numbers"]

UNITS = (
    "fractions, bytes, seconds, MB; "
    "half_interval_95: half the width of Student's 95 % interval; differences: each learner "
    "less the reference, paired by seed, p of the paired t-test, p_holm corrected"
)


def write_numbers(
    runs: Sequence[RunFolder],
    out: Path,
    failures: Mapping[str, str] | None = None,
    left_out: Mapping[str, str] | None = None,
) -> list[Group]:
    """Write ``compare.json`` and ``compare.csv``, in the order of the runs.

    Returns
    -------
    list of Group
        The runs by learner.
    """
    summaries = {run.path.name: summarise(run) for run in runs}
    groups = group(summaries.values())
    tree = {
        "name": groups[0].runs[0].config.name,
        "units": UNITS,
        "learners": {members.label: _estimates(members) for members in groups},
        "differences": {
            "reference": groups[0].label,
            **contrast_numbers(groups, groups[0].label),
        },
        "runs": {name: _run_numbers(run) for name, run in summaries.items()},
        "failures": dict(failures or {}),
        "left_out": dict(left_out or {}),
    }
    # Strict JSON: many readers refuse the NaN that Python would write.
    text = json.dumps(tree, indent=1, allow_nan=False)
    with running_out_of_disk(out):
        write_atomic(out / "compare.json", text.encode() + b"\n")
        write_atomic(out / "compare.csv", _as_csv(summaries))
    return groups


def read_left_out(out: Path) -> dict[str, str]:
    """Read which learners the comparison in a folder left out, and why.

    Returns
    -------
    dict
        Reasons by name; empty where there is no ``compare.json``.

    Raises
    ------
    ConfigError
        If the file is damaged.
    """
    path = out / "compare.json"
    if not path.is_file():
        return {}
    with refuse_damaged(path):
        left_out = json.loads(path.read_text("utf-8")).get("left_out", {})
        return {str(name): str(reason) for name, reason in left_out.items()}


@contextmanager
def refuse_damaged(path: Path) -> Iterator[None]:
    """Refuse a damaged file that can be made again from run folders.

    Raises
    ------
    ConfigError
        If its content cannot be read.
    """
    try:
        yield
    # Damaged bytes fail where they are decoded, parsed, or used as another type of thing.
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ConfigError(
            f"{path} is damaged ({type(error).__name__}: {str(error)[:200]}); delete it "
            "and give the command again, which makes it anew from the runs beside it"
        ) from error


def _estimates(members: Group) -> dict[str, dict[str, Any]]:
    """Return mean, interval and number of seeds of each measure of a learner."""
    estimates = {}
    for measure in MEASURES:
        estimate = members.estimate(measure.key)
        # Users' programs read these keys.
        estimates[measure.key] = {
            "mean": _finite(estimate.mean),
            "half_interval_95": _finite(estimate.half),
            "seeds": estimate.count,
        }
    return estimates


def _run_numbers(run: Summary) -> dict[str, Any]:
    """Return all numbers of one run."""
    measures = {key: _finite(value) for key, value in run.measures().items()}
    curve = [_finite(value) for value in run.personal.average.tolist()]
    return {
        "learner": run.config.learner.name,
        "seed": run.config.seed,
        # Absent in runs of earlier versions.
        "partition": run.start.get("partition"),
        **measures,
        "accuracy_after_each_task": curve,
    }


def _finite(value: float) -> float | None:
    """Return a number that JSON can hold; it has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _as_csv(runs: Mapping[str, Summary]) -> bytes:
    """Write one line a run; a cell without a number is empty."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(
        ["run", "learner", "seed", *(measure.key for measure in MEASURES)]
    )
    for name, run in runs.items():
        measures = run.measures()
        values = [measures[measure.key] for measure in MEASURES]
        # ``repr`` writes every digit, so that the number can be read back.
        cells = ["" if math.isnan(value) else repr(value) for value in values]
        table.writerow([name, run.config.learner.name, run.config.seed, *cells])
    return text.getvalue().encode()
