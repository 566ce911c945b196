"""The node: what answers messages for a client. One function, message and state in, message and
state out."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from fedknow.client.compute.cost import Cost, costs, tensor_bytes
from fedknow.client.compute.device import Border, find_device
from fedknow.client.data.stream import TaskData, TaskStream
from fedknow.client.learners import build_learner
from fedknow.client.learners.frames.learner import Learner, Round, State, Tensors
from fedknow.client.together import (
    FEWEST,
    Start,
    Trained,
    clients_at_once,
    fit_together,
    price,
)
from fedknow.protocols.config import ExperimentConfig, TrainConfig
from fedknow.protocols.instructions import own_settings, read_instructions
from fedknow.protocols.messages import (
    ARRAYS,
    CLIENT_FAILED,
    END_TASK,
    EVALUATE,
    EXTRA,
    KEPT,
    METRICS,
    TRAIN,
    Arrays,
    Message,
    Metrics,
    Record,
    client_of,
)
from fedknow.protocols.plugins import PASSED_ON, explain
from fedknow.protocols.seeds import integer

__all__ = ["Node"]

log = logging.getLogger(__name__)


class Node:
    """Answers messages for the clients of one experiment with one learner.

    Parameters
    ----------
    config : ExperimentConfig
        The experiment.
    stream : TaskStream
        Where clients find their data.

    Attributes
    ----------
    at_once : int
        How many clients :meth:`train_together` takes (``engine.vectorize``); 1: none, they
        train one by one.

    Raises
    ------
    ConfigError
        If the learner cannot be built, its device is not there (``engine.device``), or its
        clients cannot train at once where that is asked for.
    """

    def __init__(self, config: ExperimentConfig, stream: TaskStream) -> None:
        self.config = config
        self.stream = stream
        self._border = Border(find_device(config.engine.device))
        self.learner = build_learner(
            config, stream.shape, stream.classes, self._border.device
        )
        self.at_once = clients_at_once(
            self.learner, config.engine.vectorize, stream.shape
        )

    def handle(self, message: Message, state: State) -> tuple[Message, State]:
        """Do what a message asks for.

        Parameters
        ----------
        message : Message
            Work of any kind in :mod:`fedknow.protocols.messages`.
        state : State
            What the client kept from its last message; ``{}`` for a fresh one.

        Returns
        -------
        tuple
            The answer, and the client's state from now on: the very object given where nothing
            changed. If the client fails, the answer carries a
            :class:`~fedknow.protocols.messages.Failure` and the state is the old one.
        """
        work = {
            TRAIN: self._train,
            END_TASK: self._end_task,
            EVALUATE: self._evaluate,
        }.get(message.kind)
        if work is None:
            return message.fail(
                CLIENT_FAILED, f"this client knows no work of kind {message.kind!r}"
            ), state
        started = time.perf_counter()
        meter = self.learner.meter
        try:
            with meter.message():
                content, new = work(message, state)
        except PASSED_ON:
            raise
        except (
            BaseException
        ) as error:  # whatever user code raises is this client's failure, not the run's
            return _failed(message, error), state
        metrics = content[METRICS]
        assert isinstance(metrics, Metrics)
        metrics |= self._costs(meter.cost, state, new)
        if message.kind != EVALUATE:
            metrics["seconds"] = time.perf_counter() - started
        return message.reply(content), new

    def _counted(self, *methods: str) -> AbstractContextManager[None]:
        """Count everything where one of these methods is not in parts already."""
        return (
            nullcontext()
            if self.learner.unmetered.isdisjoint(methods)
            else self.learner.meter.part()
        )

    def _costs(self, cost: Cost, before: State, after: State) -> dict[str, float]:
        """What work on a client cost, whose state it found and left."""
        replay, knowledge = 0, 0
        for state in (before,) if before is after else (before, after):
            samples = sum(
                tensor_bytes(state.get(name, {})) for name in self.learner.replay
            )
            replay = max(replay, samples)
            knowledge = max(
                knowledge,
                tensor_bytes(state) - tensor_bytes(state.get("kept", {})) - samples,
            )
        return costs(cost, self.learner.weight_bytes, knowledge, replay)

    def train_together(
        self, messages: Sequence[Message], states: Sequence[State]
    ) -> list[tuple[Message, State]]:
        """Have several clients train at once; where they are too few for it, one by one.

        Parameters
        ----------
        messages : sequence of Message
            All of kind ``train`` or all of ``train.end_task``, each of another client.
        states : sequence of State
            Of these clients.

        Returns
        -------
        list of tuple
            As :meth:`handle` gives them, up to rounding; ``seconds`` are shared out evenly.
        """
        if len(messages) < FEWEST:
            return [
                self.handle(message, state)
                for message, state in zip(messages, states, strict=True)
            ]
        started = time.perf_counter()
        answers: dict[int, tuple[Message, State]] = {}
        starts: dict[int, Start] = {}
        trains: dict[int, TrainConfig] = {}
        for i, (message, state) in enumerate(zip(messages, states, strict=True)):
            try:
                task, data = self._task(message)
                self._become(state, message)
                if message.kind == END_TASK and self.learner.has_trained(task):
                    answers[i] = self.handle(message, state)
                    continue
                round = self._round(
                    message, task, "train" if message.kind == TRAIN else "end_task"
                )
                starts[i] = Start(
                    self.learner.send() | self.learner.kept(), data, round
                )
                trains[i] = self.learner.train
            except PASSED_ON:
                raise
            except BaseException as error:  # as in handle
                answers[i] = _failed(message, error), state
        trained: dict[int, Trained] = {}
        for train in dict.fromkeys(
            trains.values()
        ):  # as a rule all clients are told the same
            group = {i: start for i, start in starts.items() if trains[i] == train}
            self.learner.train = train
            trained |= self._fit_group(group)
        for i, start in starts.items():
            result = trained[i]
            self.learner.train = trains[i]
            if isinstance(result.report, BaseException):
                answers[i] = _failed(messages[i], result.report), states[i]
                continue
            cost = price(self.learner, start)
            self.learner.adopt(result.parameters, start.task.task)
            if messages[i].kind == TRAIN:
                samples = self.learner.epochs * len(start.task.train)
                content, state = self._trained(
                    start.task, start.round, result.report, samples
                )
            else:
                content, state = self._ended(
                    start.task, start.round, self.learner.epochs * len(start.task.train)
                )
            own = content[METRICS]
            assert isinstance(own, Metrics)
            own |= self._costs(cost, states[i], state)
            answers[i] = messages[i].reply(content), state
        seconds = (time.perf_counter() - started) / len(messages)
        for reply, _ in answers.values():
            if isinstance(metrics := reply.content.get(METRICS), Metrics):
                metrics["seconds"] = seconds
        return [answers[i] for i in range(len(messages))]

    def _fit_group(self, starts: Mapping[int, Start]) -> dict[int, Trained]:
        """Train clients at once that are told to train alike."""
        try:
            return dict(
                zip(
                    starts,
                    fit_together(self.learner, list(starts.values())),
                    strict=True,
                )
            )
        except PASSED_ON:
            raise
        except BaseException as error:  # the failure of all of them, whose tensors its traceback would keep
            log.info("%d clients failed together", len(starts), exc_info=error)
            failed = Trained({}, error.with_traceback(None))
            return dict.fromkeys(starts, failed)

    def _train(self, message: Message, state: State) -> tuple[dict[str, Record], State]:
        task, data = self._task(message)
        self._become(state, message)
        round = self._round(message, task, "train")
        with self._counted("fit", "begin_epoch"):
            report = self.learner.fit(data, round)
        return self._trained(data, round, report, self.learner.meter.samples)

    def _trained(
        self, data: TaskData, round: Round, report: dict[str, float], samples: int
    ) -> tuple[dict[str, Record], State]:
        sent = self._arrays(self.learner.send())
        if (
            type(self.learner).send is Learner.send
        ):  # which copies: nobody else holds these, so nobody need copy again
            for array in sent.values():
                array.flags.writeable = False
        content: dict[str, Record] = {
            ARRAYS: sent,
            METRICS: Metrics(
                {"num-examples": len(data.train.y), "samples": samples, **report}
            ),
        }
        with self.learner.meter.part():
            extra = self.learner.share(data, round, ended=False)
        if extra:
            content[EXTRA] = self._arrays(extra)
        return content, self._border.leave(self.learner.state_dict())

    def _end_task(
        self, message: Message, state: State
    ) -> tuple[dict[str, Record], State]:
        task, data = self._task(message)
        self._become(state, message)
        return self._ended(data, self._round(message, task, "end_task"))

    def _ended(
        self, data: TaskData, round: Round, before: int = 0
    ) -> tuple[dict[str, Record], State]:
        """End a task; ``before``: samples learned from for it apart from what the meter has seen."""
        with self.learner.meter.part():
            report = self.learner.end_task(data, round)
            extra = self.learner.share(data, round, ended=True)
        samples = before + self.learner.meter.samples
        content: dict[str, Record] = {
            METRICS: Metrics(
                {"num-examples": len(data.train.y), "samples": samples, **report}
            )
        }
        if extra:
            content[EXTRA] = self._arrays(extra)
        return content, self._border.leave(self.learner.state_dict())

    def _evaluate(
        self, message: Message, state: State
    ) -> tuple[dict[str, Record], State]:
        config = own_settings(message)
        task = int(_number(message, "task"))
        client = client_of(message.node)
        current = self.stream.task(client, task)
        self._become(state, message)
        if config.get("scoring") == "global":
            self.learner.load_kept(
                self._border.enter(as_tensors(_named(message, KEPT)))
            )
        last = self.stream.tasks if config.get("forward") else task + 1
        scored = [self.stream.task(client, t) for t in range(last)]
        tests = [self._border.enter_split(data.test) for data in scored]
        heads = [
            current.head if current.incremental and t <= task else data.head
            for t, data in enumerate(scored)
        ]
        with self._counted("logits", "score"):
            results = self.learner.score(
                tests, heads, self.config.evaluation.batch_size
            )
        right, total, losses = ([result[i] for result in results] for i in range(3))
        metrics = Metrics(
            {
                "num-examples": sum(total[: task + 1]),
                "accuracy": _mean(
                    [r / n for r, n in zip(right, total, strict=True)][: task + 1]
                ),
                "loss": _mean(losses[: task + 1]),
            }
        )
        content: dict[str, Record] = {METRICS: metrics}
        if config.get("scoring"):
            metrics |= {"correct": right, "total": total, "losses": losses}
        if config.get("collect"):
            content[KEPT] = self._arrays(self.learner.kept())
        return content, state

    def _task(self, message: Message) -> tuple[int, TaskData]:
        task = int(_number(message, "task"))
        return task, self._border.enter_task(
            self.stream.task(client_of(message.node), task)
        )

    def _round(self, message: Message, task: int, purpose: str) -> Round:
        number = int(_number(message, "round", 0))
        client = client_of(message.node)
        seed = integer(self.config.seed, purpose, client, task, number)
        instructions = read_instructions(own_settings(message), self.config.train)
        self.learner.train = instructions.train
        settings = instructions.others | self._other_records(message)
        return Round(number, seed, instructions.proximal_mu, client, settings)

    def _other_records(self, message: Message) -> dict[str, Any]:
        """Records that a strategy sends under names of its own, for the learner."""
        records: dict[str, Any] = {}
        parameters = _named(message, ARRAYS)
        for name, record in message.content.items():
            if (
                isinstance(record, Arrays)
                and record is not parameters
                and name not in (EXTRA, KEPT)
            ):
                records[name] = self._border.enter(as_tensors(record))
            elif isinstance(record, Metrics):
                records[name] = dict(record)
        return records

    def _become(self, state: State, message: Message) -> None:
        _check_frozen(message, self.learner)
        self.learner.train = (
            self.config.train
        )  # what the last message's strategy put in its place is over
        self.learner.load_state_dict(self._border.enter(state))
        only_read = type(self.learner).receive is Learner.receive
        self.learner.receive(
            self._border.enter(as_tensors(_named(message, ARRAYS), only_read))
        )
        if isinstance(extra := message.content.get(EXTRA), Arrays):
            self.learner.receive_extra(self._border.enter(as_tensors(extra)))

    def _arrays(self, tensors: Tensors) -> Arrays:
        return Arrays(
            (name, tensor.numpy())
            for name, tensor in self._border.leave(tensors).items()
        )


def _check_frozen(message: Message, learner: Learner) -> None:
    """Refuse work for a model whose frozen parameters, which do not travel, are other ones than here."""
    digest = own_settings(message).get("frozen", "")
    if digest and digest != learner.frozen_digest:
        raise ValueError(
            "the frozen parameters of this client's model are not the server's, and they are never sent; have "
            "model.name draw them by torch's generator alone, or read them from the same file everywhere"
        )


def _failed(message: Message, error: BaseException) -> Message:
    log.info(
        "client %d failed in %s", client_of(message.node), message.kind, exc_info=error
    )
    return message.fail(CLIENT_FAILED, explain(error))


def _number(message: Message, key: str, default: float | None = None) -> float:
    value = own_settings(message).get(key, default)
    if not isinstance(value, int | float):
        raise ValueError(
            f"{message.kind}: the config record needs a number under {key!r}, got {value!r}"
        )
    return value


def _named(message: Message, name: str) -> Arrays:
    record = message.content.get(name)
    return record if isinstance(record, Arrays) else message.arrays()


def as_tensors(arrays: Arrays, only_read: bool = False) -> Tensors:
    """Arrays as tensors on the same memory; copies of read-only ones, which others may share,
    unless only read."""
    return {
        name: torch.from_numpy(
            array if only_read else np.require(array, requirements="W")
        )
        for name, array in arrays.items()
    }


with (
    warnings.catch_warnings()
):  # PyTorch warns of read-only arrays once a process; ours are not written to
    warnings.simplefilter("ignore")
    torch.from_numpy(np.frombuffer(bytes(1), np.uint8))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
