"""Scoring people who are no clients (``data.held_out``)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fedknow.client.data.benchmark import Benchmark
from fedknow.client.data.stream import TaskStream
from fedknow.client.host import one_thread
from fedknow.client.learners import Learner, build_learner
from fedknow.client.learners.fedknow.frame import KnowledgeClient
from fedknow.client.tensors import as_tensors
from fedknow.protocols.config import ConfigError, ExperimentConfig
from fedknow.protocols.messages import Arrays
from fedknow.protocols.values import show
from fedknow.server.run import metrics
from fedknow.server.run.stream_events import PeopleScored

__all__ = [
    "HeldOutScorer",
    "HeldOutScores",
    "check_people",
    "people_event",
    "person_accuracy",
]

Floats = NDArray[np.float64]
CORRECT = "correct_held_out"
WEIGHTS = "weights_held_out"


class HeldOutScores:
    """Raw results of people who are held out.

    Parameters
    ----------
    people, tasks : int

    Attributes
    ----------
    correct : float64 [person, seen, trained]
        Samples classified rightly by the global model; NaN: not measured.
    weights : float64 [person, seen]
        Samples; NaN: not known yet, or none.
    """

    def __init__(self, people: int, tasks: int) -> None:
        self.correct: Floats = np.full((people, tasks, tasks), np.nan)
        self.weights: Floats = np.full((people, tasks), np.nan)

    def __len__(self) -> int:
        """Count the people."""
        return len(self.correct)

    def add_task(self, task: int, correct: Floats, total: Floats) -> None:
        """Add results after a task, float64 [person, seen]."""
        self.correct[:, :, task] = correct
        # A task that is not scored yet has no size, and an earlier one keeps its own.
        self.weights = np.where(np.isfinite(total), total, self.weights)

    def accuracy(self) -> Floats:
        """Accuracies, float64 [person, seen, trained]."""
        return self.correct / self.weights[:, :, None]

    def sizes(self) -> Floats:
        """Numbers of samples, float64 [person, seen]; 0: none."""
        return np.nan_to_num(self.weights)

    def raw(self) -> dict[str, np.ndarray]:
        """Give all counts by name; nothing where nobody is held out."""
        if not self:
            return {}
        return {CORRECT: self.correct, WEIGHTS: self.sizes()}

    @classmethod
    def from_raw(cls, arrays: Mapping[str, np.ndarray], tasks: int) -> Self:
        """Undo :meth:`raw`."""
        if CORRECT not in arrays:
            return cls(0, tasks)
        scores = cls(len(arrays[CORRECT]), tasks)
        scores.correct = arrays[CORRECT]
        sizes = arrays[WEIGHTS]
        scores.weights = np.where(sizes > 0, sizes, np.nan)
        return scores


class HeldOutScorer:
    """Scores the global model on people who are held out, on the server.

    They are new clients that never train: the model has the global parameters, and where
    clients keep parameters to themselves, the mean of these.

    Parameters
    ----------
    config : ExperimentConfig
        With all settings.
    stream : TaskStream or None
        Holds their samples; nobody is held out of streams that are no Benchmark.
    """

    def __init__(
        self, config: ExperimentConfig, stream: TaskStream | None
    ) -> None:
        self._config = config
        self._benchmark = stream if isinstance(stream, Benchmark) else None
        self._built: Learner | None = None

    def score(
        self, task: int, scores: HeldOutScores, arrays: Arrays, means: Arrays
    ) -> PeopleScored | None:
        """Score everybody on all tasks so far, and add the results.

        Parameters
        ----------
        task : int
            Tasks 0 to this one have been learned.
        scores : HeldOutScores
            All results so far.
        arrays : Arrays
            Global parameters.
        means : Arrays
            Mean of what clients keep to themselves; may be empty.

        Returns
        -------
        PeopleScored or None
            What is to be recorded; ``None`` where nobody is held out.
        """
        benchmark = self._benchmark
        if benchmark is None or not benchmark.people:
            return None
        began = time.perf_counter()
        learner = self._learner(benchmark)
        # Anew, so that no scoring depends on the one before it.
        learner.load_state_dict({})
        learner.receive(as_tensors(arrays))
        if means:
            learner.load_local_parameters(as_tensors(means))
        correct = np.full((len(benchmark.people), benchmark.tasks), np.nan)
        total = np.full_like(correct, np.nan)
        # As clients compute, so that a sum is taken in one order everywhere.
        with one_thread():
            for row, name in enumerate(benchmark.people):
                for seen in range(task + 1):
                    right, count = self._score_task(benchmark, name, seen, task)
                    if count:
                        correct[row, seen], total[row, seen] = right, count
        scores.add_task(task, correct, total)
        return people_event(task, scores, benchmark.people, began)

    def _learner(self, benchmark: Benchmark) -> Learner:
        # Built when it is needed, and one of its own: that of the experiment keeps the
        # parameters that the run begins with.
        if self._built is None:
            self._built = build_learner(
                self._config, benchmark.spec, benchmark.classes
            )
        return self._built

    def _score_task(
        self, benchmark: Benchmark, name: str, seen: int, task: int
    ) -> tuple[int, int]:
        data = benchmark.held_out(name, seen)
        # Where the model is not told the task, all classes learned by now compete.
        head = (
            benchmark.stream_classes(task)
            if benchmark.is_incremental
            else data.classes
        )
        learner = self._learner(benchmark)
        batch = self._config.evaluation.batch_size
        right = count = 0
        for part in data.parts:
            ((hits, size, _),) = learner.score([part], [head], batch)
            right += hits
            count += size
        return right, count


def people_event(
    task: int, scores: HeldOutScores, names: tuple[str, ...], began: float
) -> PeopleScored:
    """Sum up how well the people are told after a task.

    Parameters
    ----------
    task : int
        The newest task.
    scores : HeldOutScores
        All results so far.
    names : tuple of str
        Of the people.
    began : float
        When scoring began, on ``time.perf_counter``.
    """
    accuracy, sizes = scores.accuracy(), scores.sizes()
    per_task = metrics.task_accuracy(accuracy, sizes)[: task + 1, task]
    return PeopleScored(
        task=task,
        people=names,
        accuracy=metrics.average_accuracy(accuracy, sizes)[task],
        per_person=tuple(person_accuracy(accuracy)[:, task].tolist()),
        per_task=tuple(per_task.tolist()),
        seconds=time.perf_counter() - began,
    )


def person_accuracy(accuracy: Floats) -> Floats:
    """Average each person's accuracy over the tasks so far.

    Parameters
    ----------
    accuracy : float64 [person, seen, trained]

    Returns
    -------
    float64 [person, trained]
        NaN where a person has no sample yet.
    """
    measured = np.isfinite(accuracy)
    counts = measured.sum(1)
    total = np.where(measured, accuracy, 0.0).sum(1)
    # A mean of nothing is no number, and not a warning of NumPy's.
    return np.where(counts > 0, total / np.maximum(counts, 1), np.nan)


def _answers_plainly(learner: Learner) -> bool:
    """Say whether a client that has never trained answers by the model alone."""
    if "predictors" not in learner.overridden:
        return True
    # FedKNOW's clients do, unless they infer tasks from knowledge of their own.
    infers = getattr(learner.settings, "infer_task", "off") != "off"
    return isinstance(learner, KnowledgeClient) and not infers


def check_people(config: ExperimentConfig, learner: Learner) -> None:
    """Refuse people held out where no global model can be scored on them.

    Raises
    ------
    ConfigError
        Naming the setting and the remedy.
    """
    key = f"data.held_out = {show(config.data.held_out)}"
    if not config.data.held_out:
        return
    if not config.evaluation.global_model:
        raise ConfigError(
            f"{key} with evaluation.global_model = false: it is the global model that is scored "
            "on people held out; set evaluation.global_model = true"
        )
    if not _answers_plainly(learner):
        raise ConfigError(
            f"{key} with learner.name = {config.learner.name!r}, whose clients answer by "
            "more than the model, which people who never train do not have; choose another "
            "learner, or leave data.held_out at 0"
        )
