"""The names of all keys of work and reports.

They are part of the wire format, and some of them are Flower's, so a name never changes.
"""

from __future__ import annotations

__all__ = [
    "ACCURACY",
    "BOUNDARIES",
    "BOUNDARY_DELAY",
    "COLLECT",
    "CORRECT",
    "COSTS",
    "FLOPS",
    "FORWARD",
    "FROZEN",
    "KNOWLEDGE_BYTES",
    "LOSS",
    "LOSSES",
    "MEMORY",
    "NUM_EXAMPLES",
    "POSITION",
    "ROUND",
    "ROUNDS",
    "SAMPLES",
    "SCORE_LISTS",
    "SCORING",
    "SECONDS",
    "SERVER_ROUND",
    "TASK",
    "TASKS",
    "TOTAL",
]

# Keys of the config record, which travels to clients.
TASK = "task"
ROUND = "round"
ROUNDS = "rounds"
TASKS = "tasks"
SERVER_ROUND = "server-round"
FROZEN = "frozen"
POSITION = (TASK, ROUND, ROUNDS, TASKS, SERVER_ROUND, FROZEN)
"""Keys of the experiment itself: :class:`Position`."""

SCORING = "scoring"
COLLECT = "collect"
FORWARD = "forward"

# Keys of the metrics record, which travels back.
NUM_EXAMPLES = "num-examples"
"""A client's weight in means: Flower's strategies read it by this name."""
SAMPLES = "samples"
LOSS = "loss"
ACCURACY = "accuracy"
SECONDS = "seconds"
KNOWLEDGE_BYTES = "knowledge-bytes"
CORRECT = "correct"
TOTAL = "total"
LOSSES = "losses"
SCORE_LISTS = (CORRECT, TOTAL, LOSSES)
"""Lists with a value a task, of :class:`TaskScores`."""

BOUNDARIES = "boundaries"
"""With hidden task boundaries: how many the client has found so far."""
BOUNDARY_DELAY = "boundary-delay"
"""Samples of the round that it took to find one; 0: none was found."""

FLOPS = "flops"
MEMORY = "memory-bytes"
COSTS = (
    FLOPS,
    MEMORY,
    "memory-weights",
    "memory-gradients",
    "memory-activations",
    "memory-knowledge",
    "memory-replay",
)
"""Metrics of every answer; ``memory-bytes`` is the sum of its parts."""
