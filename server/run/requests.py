"""What clients are asked to score, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedknow.protocols.messages import Arrays

__all__ = ["ScoreRequest", "Scored"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ScoreRequest:
    """What clients are asked to score.

    Attributes
    ----------
    task : int
        Tasks 0 to this one have been learned.
    tasks : int
        All tasks of the stream.
    with_global : bool
        Score the purely global model too; its results are NaN otherwise.
    with_later : bool
        Score tasks that are not learned yet too.
    nodes : sequence of int, or None
        Who is asked; ``None``: everybody.
    sample : sequence of int, or None
        Of those, only these clients are asked, ascending; ``None``: all of them.
    extra : Arrays, or None
        What a method's half on the server has clients answer with.
    """

    task: int
    tasks: int
    with_global: bool = False
    with_later: bool = False
    nodes: Sequence[int] | None = None
    sample: Sequence[int] | None = None
    extra: Arrays | None = None


class Scored(NamedTuple):
    """Answers of clients that were asked to score.

    Attributes
    ----------
    correct : dict of scoring to float64 [client, seen]
        Samples classified rightly; NaN where a task or client was not scored.
    total : float64 [client, seen]
        Samples.
    means : Arrays
        Mean of what clients keep to themselves; empty where they keep nothing, or where the
        purely global model was not scored.
    """

    correct: dict[str, Floats]
    total: Floats
    means: Arrays
