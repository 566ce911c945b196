from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord

from fedknow.protocols.flower import to_record
from fedknow.protocols.messages import (
    END_TASK,
    EVALUATE,
    KEPT,
    TRAIN,
    Arrays,
    Message,
    Metrics,
    node_of,
)
from fedknow.server.checks.aggregates import check_aggregate
from fedknow.server.checks.faults import Fault, RunError
from fedknow.server.checks.replies import Inspector

CURRENT = Arrays(w=np.zeros((2, 3), np.float32), n=np.array(4, np.int64))


def reply(arrays=None, metrics=None, kind=TRAIN, client=3, **records):
    arrays = CURRENT if arrays is None else arrays
    metrics = (
        Metrics({"num-examples": 5, "loss": 1.0}) if metrics is None else metrics
    )
    return Message(
        kind,
        node_of(client),
        "9",
        "8",
        content={"arrays": arrays, "metrics": metrics, **records},
    )


@pytest.fixture
def inspector():
    failures = []
    inspector = Inspector(failures.append)
    inspector.seen = failures
    inspector.begin(1, 2, CURRENT)
    return inspector


def with_value(value):
    w = np.zeros((2, 3), np.float32)
    w[1, 2] = value
    return Arrays(CURRENT, w=w)


@pytest.mark.parametrize(
    ("bad", "fault", "tensor", "words"),
    [
        (
            reply(with_value(np.nan)),
            Fault.NOT_FINITE,
            "w",
            "w: NaN or infinite in 1 of 6 values",
        ),
        (reply(with_value(-np.inf)), Fault.NOT_FINITE, "w", "NaN or infinite"),
        (reply(Arrays(w=CURRENT["w"])), Fault.NAMES, "n", "arrays n are missing"),
        (
            reply(Arrays(CURRENT, extra=np.zeros(1))),
            Fault.NAMES,
            "extra",
            "missing or unknown",
        ),
        (
            reply(Arrays(CURRENT, w=np.zeros((3, 2), np.float32))),
            Fault.SHAPE,
            "w",
            "(3, 2), not (2, 3)",
        ),
        (
            reply(Arrays(CURRENT, w=np.zeros((2, 3)))),
            Fault.DTYPE,
            "w",
            "float64, not float32",
        ),
        (
            reply(metrics=Metrics(loss=1.0)),
            Fault.METRICS,
            "num-examples",
            "got None",
        ),
        (
            reply(metrics=Metrics({"num-examples": 0, "loss": 1.0})),
            Fault.METRICS,
            "num-examples",
            "got 0",
        ),
        (
            reply(metrics=Metrics({"num-examples": [1], "loss": 1.0})),
            Fault.METRICS,
            "num-examples",
            "got [1]",
        ),
        (
            reply(metrics=Metrics({"num-examples": 5, "loss": np.nan})),
            Fault.NOT_FINITE,
            "loss",
            "metric loss is nan",
        ),
        (
            reply(kind=EVALUATE, kept=Arrays(h=np.array([np.nan]))),
            Fault.NOT_FINITE,
            "h",
            "h: NaN or infinite",
        ),
        (reply().fail(2, "ValueError: no"), Fault.FAILED, "", "ValueError: no"),
    ],
)
def test_bad_replies_become_failures_that_name_everything(
    inspector, bad, fault, tensor, words
):
    answer = inspector(bad)
    assert answer.failure is not None
    assert not answer.content
    assert (answer.node, answer.reply_to) == (bad.node, bad.reply_to)
    [failure] = inspector.seen
    assert (
        failure.fault,
        failure.tensor,
        failure.client,
        failure.task,
        failure.round,
    ) == (fault, tensor, 3, 1, 2)
    assert words in str(failure)
    assert "client 3, task 2, round 2" in answer.failure.reason
    event = failure.event()
    assert event["fault"] == fault.name.lower()
    assert event["reason"] == str(failure)
    assert inspector.failures == 1
    assert inspector.trained == []


def test_good_replies_pass_untouched_and_are_counted(inspector):
    good = reply()
    assert inspector(good) is good
    other = reply(metrics=Metrics({"num-examples": 15, "loss": 3.0}), client=0)
    assert inspector(other) is other
    assert inspector.failures == 0
    assert inspector.mean("loss") == pytest.approx((5 * 1 + 15 * 3) / 20)
    assert np.isnan(inspector.mean("accuracy"))
    inspector.begin(1, 3, CURRENT)
    assert np.isnan(inspector.mean("loss"))


@pytest.mark.parametrize(
    ("sent", "value", "refused"),
    [
        (0.0, 10.0, False),  # a model of zeros has norm 0: measured against 1
        (0.0, 10.1, True),
        (3.0, 33.0, False),  # the update's norm is 30, ten times the model's
        (3.0, -27.0, False),
        (3.0, 33.1, True),
        (3.0, -27.1, True),
        (3.0, 1e30, True),  # whose square no float32 holds
    ],
)
def test_an_update_far_beyond_the_model_is_refused(sent, value, refused):
    def arrays(first):
        w = np.zeros((2, 3), np.float32)
        w[0, 0] = first
        return Arrays(
            w=w, n=np.array(10**9 * int(first != sent))
        )  # a counter may be anything

    failures = []
    inspector = Inspector(failures.append, max_update_norm=10)
    inspector.begin(0, 1, arrays(sent))
    answer = inspector(reply(arrays(value)))
    assert (answer.failure is not None) == refused == bool(failures)
    if refused:
        assert failures[0].fault is Fault.NORM
        assert "engine.max_update_norm = 10 allows" in failures[0].reason
        assert inspector.trained == []
    unbounded = Inspector(failures.append)
    unbounded.begin(0, 1, arrays(sent))
    assert unbounded(reply(arrays(value))).failure is None


def test_the_mean_does_not_depend_on_the_order_of_arrival():
    values = [0.1, 0.7, 1e9, -1e9, 0.3]
    replies = [
        reply(metrics=Metrics({"num-examples": 1, "loss": v}), client=c)
        for c, v in enumerate(values)
    ]
    means = set()
    for order in (replies, replies[::-1], replies[2:] + replies[:2]):
        inspector = Inspector(lambda failure: None)
        inspector.begin(0, 1, CURRENT)
        for message in order:
            inspector(message)
        means.add(inspector.mean("loss"))
    assert len(means) == 1


def test_metrics_must_be_the_same_from_every_client(inspector):
    inspector(reply())
    inspector(
        reply(metrics=Metrics({"num-examples": 5, "loss": 1.0, "mine": 2.0}))
    )
    assert inspector.seen[0].fault is Fault.METRICS
    assert "mine" in str(inspector.seen[0])


def test_evaluation_replies_need_not_look_like_training(inspector):
    answer = reply(
        kind=EVALUATE, arrays=Arrays(), metrics=Metrics(correct=[1, 2])
    )
    assert inspector(answer) is answer
    assert KEPT not in answer.content


def scores(**changes):
    metrics = {
        "num-examples": 9,
        "correct": [0, 5],
        "total": [4, 5],
        "losses": [1.5, 0.25],
    }
    metrics = {
        name: value
        for name, value in (metrics | changes).items()
        if value is not None
    }
    return reply(
        kind=EVALUATE,
        arrays=Arrays(),
        metrics=Metrics(metrics),
        kept=Arrays(h=np.zeros(2)),
    )


@pytest.mark.parametrize(
    ("bad", "fault", "tensor", "words"),
    [
        (
            scores(correct=None),
            Fault.METRICS,
            "correct",
            "a list of 2 whole numbers, one a task, got None",
        ),
        (scores(total=[4]), Fault.METRICS, "total", "got [4]"),
        (scores(total=[4, 5, 6]), Fault.METRICS, "total", "got [4, 5, 6]"),
        (scores(correct=[0.0, 5.0]), Fault.METRICS, "correct", "whole numbers"),
        (scores(correct=5), Fault.METRICS, "correct", "got 5"),
        (scores(losses=[1.0]), Fault.METRICS, "losses", "a list of 2 numbers"),
        (
            scores(losses=[1.0, np.inf]),
            Fault.NOT_FINITE,
            "losses",
            "metric losses is [1.0, inf]",
        ),
        (
            scores(correct=[5, 5]),
            Fault.METRICS,
            "correct",
            "got [5, 5] of [4, 5]",
        ),
        (
            scores(correct=[-1, 5]),
            Fault.METRICS,
            "correct",
            "between 0 and total",
        ),
        (
            scores(correct=[0, 0], total=[0, 5]),
            Fault.METRICS,
            "correct",
            "total above 0",
        ),
        (scores(**{"num-examples": 0}), Fault.METRICS, "num-examples", "got 0"),
        (
            scores(mine="good"),
            Fault.METRICS,
            "mine",
            "a number or a list of numbers, got 'good'",
        ),
        (
            replace(scores(), content={}),
            Fault.METRICS,
            "metrics",
            "'metrics' is missing",
        ),
        (
            replace(scores(), content={"metrics": scores().content["metrics"]}),
            Fault.NAMES,
            KEPT,
            "asked for",
        ),
    ],
)
def test_scores_are_not_believed(inspector, bad, fault, tensor, words):
    inspector.expect_scores(2, should_collect=True)
    assert inspector(bad).failure is not None
    [failure] = inspector.seen
    assert (failure.fault, failure.tensor, failure.client, failure.kind) == (
        fault,
        tensor,
        3,
        EVALUATE,
    )
    assert words in str(failure)


def test_good_scores_pass(inspector):
    inspector.expect_scores(2, should_collect=True)
    good = scores()
    assert inspector(good) is good
    other = replace(good, content={**good.content, KEPT: Arrays(h=np.zeros(3))})
    assert (
        inspector(other).failure is not None
    )  # an average over clients could not be taken
    assert inspector.seen[0].fault is Fault.SHAPE
    inspector.expect_scores(2, should_collect=False)
    without = replace(good, content={"metrics": good.content["metrics"]})
    assert inspector(without) is without
    inspector.begin(
        1, 3, CURRENT
    )  # a strategy's own evaluation may say what it likes
    free = reply(kind=EVALUATE, arrays=Arrays(), metrics=Metrics(mine=0.5))
    assert inspector(free) is free


@pytest.mark.parametrize(
    ("metrics", "tensor"),
    [
        (Metrics({"num-examples": 1}), "knowledge-bytes"),
        (
            Metrics({"num-examples": 1, "knowledge-bytes": -1.0}),
            "knowledge-bytes",
        ),
        (
            Metrics({"num-examples": 1, "knowledge-bytes": np.nan}),
            "knowledge-bytes",
        ),
        (
            Metrics({"num-examples": 1, "knowledge-bytes": [1.0]}),
            "knowledge-bytes",
        ),
        (Metrics({"knowledge-bytes": 1.0}), "num-examples"),
    ],
)
def test_what_clients_say_at_the_end_of_a_task_is_not_believed(
    inspector, metrics, tensor
):
    assert (
        inspector(reply(kind=END_TASK, arrays=Arrays(), metrics=metrics)).failure
        is not None
    )
    assert inspector.seen[0].tensor == tensor
    good = reply(
        kind=END_TASK,
        arrays=Arrays(),
        metrics=Metrics({"num-examples": 1, "knowledge-bytes": 0.0}),
    )
    assert inspector(good) is good


@pytest.mark.parametrize("value", [-1.0, [1.0]])
def test_a_cost_below_nothing_is_not_believed(inspector, value):
    told = Metrics({"num-examples": 1, "knowledge-bytes": 0.0, "flops": value})
    assert (
        inspector(reply(kind=END_TASK, arrays=Arrays(), metrics=told)).failure
        is not None
    )
    assert inspector.seen[0].tensor == "flops"


def test_raising_ends_the_wave():
    def stop(failure):
        raise RunError(str(failure))

    inspector = Inspector(stop)
    inspector.begin(0, 1, CURRENT)
    with pytest.raises(RunError, match="client 3"):
        inspector(reply(with_value(np.nan)))


def aggregate(returned):
    return check_aggregate(returned, CURRENT, "mine")


def test_aggregates_keep_order_and_dtype():
    returned = to_record({"n": np.array(6.5000001), "w": np.full((2, 3), 0.25)})
    arrays, metrics = aggregate((returned, MetricRecord({"loss": 0.5})))
    assert list(arrays) == ["w", "n"]
    assert (arrays["w"].dtype, arrays["n"].dtype) == (np.float32, np.int64)
    assert arrays["n"] == 7
    np.testing.assert_array_equal(arrays["w"], np.full((2, 3), 0.25, np.float32))
    assert metrics == {"loss": 0.5}


def test_nothing_aggregated_is_allowed():
    assert aggregate((None, None)) == (None, {})


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (None, "returned nothing (None); it must return a pair"),
        (to_record(CURRENT), "a ArrayRecord; it must return a pair"),
        (({"w": 1}, None), "a dict where a ArrayRecord belongs"),
        (
            (to_record(CURRENT), {"loss": 1}),
            "a dict where a MetricRecord belongs",
        ),
        ((to_record({"w": CURRENT["w"]}), None), "arrays n are missing"),
        (
            (to_record({"w": np.zeros(6), "n": CURRENT["n"]}), None),
            "shape (6,), not (2, 3)",
        ),
        ((to_record(with_value(np.nan)), None), "NaN or infinite"),
        (
            (to_record({"w": np.full((2, 3), 1e300), "n": CURRENT["n"]}), None),
            "w: NaN or infinite in 6 of 6 values",
        ),
        (
            (ArrayRecord({"w": Array(np.zeros((2, 3)))}), None),
            "arrays n are missing",
        ),
    ],
)
def test_unusable_aggregates_name_the_strategy(returned, words):
    with pytest.raises(RunError) as error:
        aggregate(returned)
    assert "strategy mine" in str(error.value)
    assert words in str(error.value)


def test_strong_noise_is_no_absurd_update():
    """Noise of 20 clips in a thousand numbers is 630 long, and the model is 1."""
    failures = []
    inspector = Inspector(failures.append, 100.0, noise=20.0)
    model = Arrays(w=np.zeros(1000, np.float32))
    inspector.begin(0, 1, model)
    for length, count in ((630.0, 0), (900.0, 1)):
        row = np.full(1000, length / np.sqrt(1000), np.float32)
        content = {"a": Arrays(w=row), "m": Metrics({"num-examples": 1})}
        inspector(Message(TRAIN, 2, "1", content=content))
        assert len(failures) == count
