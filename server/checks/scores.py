"""Checks of the numbers of a scoring."""

from __future__ import annotations

import numpy as np

from fedknow.protocols.messages import Metrics
from fedknow.protocols.work import SCORE_LISTS
from fedknow.server.checks.faults import Fault, Unusable

__all__ = ["check_hits", "read_score_lists"]


def read_score_lists(metrics: Metrics, tasks: int) -> dict[str, np.ndarray]:
    """Read the lists of a scoring, which have an entry for each task."""
    lists = {name: np.asarray(metrics.get(name)) for name in SCORE_LISTS}
    for name, values in lists.items():
        is_loss = name == "losses"
        # Right answers are counted, so that they are whole numbers.
        is_kind = values.dtype.kind in ("if" if is_loss else "i")
        if values.shape != (tasks,) or not is_kind:
            kind = "numbers" if is_loss else "whole numbers"
            raise Unusable(
                Fault.METRICS,
                name,
                f"{name} must be a list of {tasks} {kind}, one a task, got "
                f"{metrics.get(name)!r:.200}",
            )
    return lists


def check_hits(correct: np.ndarray, total: np.ndarray) -> None:
    """Refuse counts that cannot be: more right answers than samples, or none."""
    """Refuse hits that no test sets can have.

    A client may have fewer tasks than others; of those it has, it has samples.
    """
    is_known = np.logical_or.accumulate(total[::-1] > 0)[::-1]
    are_sizes = (total > 0) | ~is_known
    are_hits = (correct >= 0) & (correct <= total)
    if is_known[0] and (are_sizes & are_hits).all():
        return
    raise Unusable(
        Fault.METRICS,
        "correct",
        f"correct must lie between 0 and total, and total above 0 for each task that the client "
        f"has; got {correct.tolist()!s:.200} of {total.tolist()!s:.200}",
    )
