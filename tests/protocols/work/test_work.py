"""Typed work and reports: their records are the wire's, key by key."""

import math

import numpy as np
import pytest

from fedknow.protocols.messages import Arrays, Config, Metrics
from fedknow.protocols.work import (
    EndTaskReport,
    EndTaskWork,
    Position,
    ScoreReport,
    ScoreWork,
    TaskScores,
    TrainReport,
    TrainWork,
    merge_settings,
)

WEIGHTS = Arrays(w=np.ones(3, np.float32))
KEPT = Arrays(head=np.zeros(2, np.float32))
WHERE = Position(1, 2, 3, 4, server_round=6, frozen="abc")


def laid_out(content):
    """Records with their type and order."""
    return [
        (name, type(record), list(record.items()))
        for name, record in content.items()
    ]


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (
            TrainWork(position=WHERE, parameters=WEIGHTS, settings={"lr": 0.5}),
            {
                "arrays": WEIGHTS,
                "config": Config(
                    {
                        "task": 1,
                        "round": 2,
                        "rounds": 3,
                        "tasks": 4,
                        "server-round": 6,
                        "frozen": "abc",
                        "lr": 0.5,
                    }
                ),
            },
        ),
        (
            EndTaskWork(position=Position(1), parameters=WEIGHTS),
            {"arrays": WEIGHTS, "config": Config(task=1)},
        ),
        (
            ScoreWork(
                position=Position(1),
                parameters=WEIGHTS,
                scoring="global",
                has_forward=True,
                local_parameters=KEPT,
            ),
            {
                "arrays": WEIGHTS,
                "kept": KEPT,
                "config": Config(
                    task=1, scoring="global", collect=False, forward=True
                ),
            },
        ),
    ],
    ids=["train", "end", "score"],
)
def test_work_has_the_records_of_the_wire_and_comes_back(work, expected):
    content = work.to_content()
    assert laid_out(content) == laid_out(expected)
    assert content["arrays"] is WEIGHTS  # not a copy
    assert type(work).from_content(content) == work


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (
            TrainReport(
                parameters=WEIGHTS,
                examples=7,
                samples=14,
                measures={"loss": 0.5, "accuracy": 0.25},
                costs={"flops": 3.0},
                seconds=0.5,
                extra=KEPT,
            ),
            {
                "arrays": WEIGHTS,
                "metrics": Metrics(
                    {
                        "num-examples": 7,
                        "samples": 14,
                        "loss": 0.5,
                        "accuracy": 0.25,
                        "flops": 3.0,
                        "seconds": 0.5,
                    }
                ),
                "extra": KEPT,
            },
        ),
        (
            EndTaskReport(
                examples=7,
                samples=14,
                measures={"knowledge-bytes": 8.0},
                seconds=1.0,
            ),
            {
                "metrics": Metrics(
                    {
                        "num-examples": 7,
                        "samples": 14,
                        "knowledge-bytes": 8.0,
                        "seconds": 1.0,
                    }
                )
            },
        ),
        (
            ScoreReport(
                examples=4,
                measures={"accuracy": 0.5, "loss": 2.0},
                scores=TaskScores([1, 1], [2, 2], [1.5, 2.5]),
                costs={"flops": 1.0},
                local_parameters=KEPT,
            ),
            {
                "metrics": Metrics(
                    {
                        "num-examples": 4,
                        "accuracy": 0.5,
                        "loss": 2.0,
                        "correct": [1, 1],
                        "total": [2, 2],
                        "losses": [1.5, 2.5],
                        "flops": 1.0,
                    }
                ),
                "kept": KEPT,
            },
        ),
    ],
    ids=["train", "end", "score"],
)
def test_a_report_has_the_records_of_the_wire_and_comes_back(report, expected):
    content = report.to_content()
    assert laid_out(content) == laid_out(expected)
    assert type(report).from_content(content) == report


def test_a_method_that_reports_a_count_itself_has_its_own():
    report = TrainReport(
        parameters=WEIGHTS, examples=7, samples=14, measures={"samples": 3.0}
    )
    assert report.to_content()["metrics"] == {"num-examples": 7, "samples": 3.0}


def test_clients_of_another_make_need_not_say_everything():
    content = {
        "metrics": Metrics(
            {"num-examples": 1, "knowledge-bytes": 2, "each": [1, 2]}
        )
    }
    report = EndTaskReport.from_content(content)
    assert math.isnan(report.samples)
    assert report.knowledge_bytes == 2
    assert report.measures["each"] == [1, 2]
    assert report.costs == {}
    with pytest.raises(
        ValueError, match="'num-examples' must be a number, got None"
    ):
        ScoreReport.from_content({"metrics": Metrics()})
    with pytest.raises(ValueError, match="needs a record 'metrics'"):
        ScoreReport.from_content({})
    with pytest.raises(ValueError, match="'knowledge-bytes' must be a number"):
        _ = EndTaskReport(examples=1).knowledge_bytes


def test_records_under_a_strategys_own_names_are_for_the_learner():
    content = {
        "weights": WEIGHTS,
        "mine": Config(lr=0.5, task=1),
        "anchors": KEPT,
        "sums": Metrics(a=1),
        "extra": KEPT,
        "other": Config(lr=0.1, beta=2),
    }
    work = TrainWork.from_content(content)
    assert work.parameters is WEIGHTS
    assert work.extra is KEPT
    assert dict(work.records) == {"anchors": KEPT, "sums": {"a": 1}}
    assert work.settings == {"lr": 0.5, "beta": 2}
    assert merge_settings(content) == {"lr": 0.5, "task": 1, "beta": 2}


def test_work_without_a_task_is_refused_by_kind_and_key():
    with pytest.raises(
        ValueError,
        match="train: the config record needs a number under 'task', got None",
    ):
        TrainWork.from_content({"config": Config(round=1)})
    with pytest.raises(ValueError, match=r"evaluate: .* under 'task', got 'one'"):
        ScoreWork.from_content({"config": Config(task="one")})
