"""Typed work for clients, and typed reports of it.

A :class:`~fedknow.protocols.messages.Message` carries records of named values. The classes here
give those values types: three kinds of work, and a report for each. ``to_content`` lays one out
on records, ``from_content`` reads it from them. No array is copied in either direction.

The names of all keys stand in :mod:`fedknow.protocols.work.keys`.
"""

from fedknow.protocols.work.keys import (
    ACCURACY,
    BOUNDARIES,
    BOUNDARY_DELAY,
    COSTS,
    FLOPS,
    FROZEN,
    KNOWLEDGE_BYTES,
    LOSS,
    MEMORY,
    NUM_EXAMPLES,
    POSITION,
    ROUND,
    ROUNDS,
    SAMPLES,
    SCORE_LISTS,
    SECONDS,
    SERVER_ROUND,
    TASK,
    TASKS,
)
from fedknow.protocols.work.records import merge_settings
from fedknow.protocols.work.reports import (
    EndTaskReport,
    Report,
    ScoreReport,
    TaskScores,
    TrainReport,
)
from fedknow.protocols.work.work import (
    EndTaskWork,
    Position,
    ScoreWork,
    TrainWork,
    Work,
)

__all__ = [
    "ACCURACY",
    "BOUNDARIES",
    "BOUNDARY_DELAY",
    "COSTS",
    "FLOPS",
    "FROZEN",
    "KNOWLEDGE_BYTES",
    "LOSS",
    "MEMORY",
    "NUM_EXAMPLES",
    "POSITION",
    "ROUND",
    "ROUNDS",
    "SAMPLES",
    "SCORE_LISTS",
    "SECONDS",
    "SERVER_ROUND",
    "TASK",
    "TASKS",
    "EndTaskReport",
    "EndTaskWork",
    "Position",
    "Report",
    "ScoreReport",
    "ScoreWork",
    "TaskScores",
    "TrainReport",
    "TrainWork",
    "Work",
    "merge_settings",
]
