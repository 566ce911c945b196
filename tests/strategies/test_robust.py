"""Robust aggregates: by hand, by their properties, and beside Flower's where it has them."""

import logging

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy.multikrum import select_multikrum
from hypothesis import given, settings
from hypothesis import strategies as st

from fedknow.protocols.config import ConfigError, StrategyConfig
from fedknow.protocols.flower import identify, set_id, to_arrays, to_record
from fedknow.protocols.messages import Arrays
from fedknow.strategies import build_strategy, quiet_flower
from fedknow.strategies.robust import MultiKrum, select_repeatedly
from fedknow.strategies.robust_rules import (
    clip_around,
    krum_order,
    squared_distances,
)


def content(values, examples=1.0, loss=0.5) -> RecordDict:
    arrays = Arrays(w=np.asarray(values, np.float32))
    metrics = MetricRecord({"num-examples": examples, "loss": loss})
    return RecordDict({"arrays": to_record(arrays), "metrics": metrics})


def replies(rows, examples=None) -> list[Message]:
    identify()
    answers = []
    weights = examples or [1.0] * len(rows)
    for node, (row, weight) in enumerate(zip(rows, weights, strict=True)):
        request = Message(RecordDict(), node + 2, "train")
        set_id(request, str(node))
        answers.append(Message(content(row, weight), reply_to=request))
    return answers


def aggregate(strategy, rows, examples=None) -> np.ndarray:
    with quiet_flower():
        record, _ = strategy.aggregate_train(1, replies(rows, examples))
    return to_arrays(record)["w"]


def build(name, clients=None, **options):
    return build_strategy(StrategyConfig(name=name, **options), clients)


class Nodes:
    """A grid of which strategies ask the nodes alone."""

    def __init__(self, count: int) -> None:
        self.count = count

    def get_node_ids(self) -> list[int]:
        return [node + 2 for node in range(self.count)]


def centred(rows, model, **options) -> np.ndarray:
    strategy = build("centred-clipping", **options)
    record = to_record(Arrays(w=np.asarray(model, np.float32)))
    with quiet_flower():
        list(
            strategy.configure_train(1, record, ConfigRecord(), Nodes(len(rows)))
        )
    return aggregate(strategy, rows)


# --- by hand


def test_krum_by_hand():
    # Five points on a line, f = 1: a score is the sum of the 2 smallest squared distances.
    # 0: 1 + 4 = 5;  1: 1 + 1 = 2;  2: 1 + 4 = 5;  4: 4 + 9 = 13;  9: 25 + 49 = 74.
    # Of 0 and 2, the latter is nearer to all others together.
    points = np.array([[0.0], [1.0], [2.0], [4.0], [9.0]])
    assert krum_order(squared_distances(points), 1) == [1, 2, 0, 3, 4]
    assert aggregate(build("krum", num_malicious_nodes=1), points) == 1.0


def test_multikrum_by_hand_counts_all_alike():
    strategy = build("multikrum", num_malicious_nodes=1, num_nodes_to_select=3)
    rows = [[0.0], [1.0], [2.0], [4.0], [9.0]]
    # A client that claims many samples weighs no more than others.
    assert aggregate(strategy, rows, [1e12, 1, 1, 1, 1]) == 1.0


def test_bulyan_by_hand():
    # 7 = 4 f + 3 answers, f = 1: 5 are chosen, and of them the 3 nearest to the median count.
    rows = [[0.0], [1.0], [2.0], [3.0], [4.0], [5.0], [1000.0]]
    # The chosen ones are five neighbours; the median's nearest three average to the median.
    chosen = select_repeatedly([content(row) for row in rows], 1, 5)
    values = [float(to_arrays(c["arrays"])["w"][0]) for c in chosen]
    assert 1000.0 not in values
    middle = np.median(values)
    nearest = sorted(values, key=lambda value: abs(value - middle))[:3]
    result = aggregate(build("bulyan", num_malicious_nodes=1), rows)
    assert result == pytest.approx(np.mean(nearest))


def test_bulyan_scores_anew_after_each_choice():
    # f = 0: a score of n points has n - 2 terms. Scores of 0, 1, 2, 4, 7:
    # 1 + 4 + 16 = 21, 1 + 1 + 9 = 11, 1 + 4 + 4 = 9, 4 + 9 + 9 = 22, 9 + 25 + 36 = 70: takes 2.
    # Of 0, 1, 4, 7: 1 + 16, 1 + 9, 9 + 9, 9 + 36: takes 1.
    # Of 0, 4, 7: 16, 9, 9. The two are nearest to each other, and 4 is nearer to the third.
    # The first scores alone would have chosen 2, 1 and 0.
    contents = [content([value]) for value in (0.0, 1.0, 2.0, 4.0, 7.0)]
    chosen = select_repeatedly(contents, 0, 3)
    values = [float(to_arrays(c["arrays"])["w"][0]) for c in chosen]
    assert values == [1.0, 2.0, 4.0]


def test_the_median_and_the_trimmed_mean_by_hand():
    rows = [[1.0, 5.0], [2.0, -1.0], [3.0, 0.0], [4.0, 1.0], [1e6, 2.0]]
    assert aggregate(build("fedmedian"), rows).tolist() == [3.0, 1.0]
    # One of five is cut off at either end.
    trimmed = aggregate(build("fedtrimmedavg", beta=0.2), rows)
    assert trimmed.tolist() == [3.0, 1.0]


def test_centred_clipping_by_hand():
    # Changes from the model 10: -1, 1, 2, 90, clipped to 2: (-1 + 1 + 2 + 2) / 4 = 1.
    assert centred([[9.0], [11.0], [12.0], [100.0]], [10.0], radius=2.0) == 11.0
    # The median of the lengths 1, 1, 2, 90 is 1.5: (-1 + 1 + 1.5 + 1.5) / 4 = 0.75.
    assert centred([[9.0], [11.0], [12.0], [100.0]], [10.0]) == 10.75
    # Second iteration from 1: offsets -2, 0, 1, 89, clipped: (-2 + 0 + 1 + 2) / 4 = 0.25.
    twice = centred(
        [[9.0], [11.0], [12.0], [100.0]], [10.0], radius=2.0, iterations=2
    )
    assert twice == 11.25


def test_clients_that_change_nothing_are_no_division_by_zero():
    assert centred([[10.0], [10.0], [10.0]], [10.0]) == 10.0
    assert aggregate(build("krum"), [[1.0], [1.0], [1.0]]) == 1.0


# --- against another implementation


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2))
def test_krum_is_flowers_where_rounding_does_not_matter(seed, malicious):
    draws = np.random.default_rng(seed)
    rows = draws.normal(size=(8, 5)).astype(np.float32)
    contents = [content(row) for row in rows]
    theirs = select_multikrum(contents, malicious, 3)
    order = krum_order(squared_distances(rows.astype(np.float64)), malicious)
    assert [contents.index(each) for each in theirs] == order[:3]


def test_krum_finds_small_changes_of_a_large_model():
    # Around 1000, float32 cannot tell |x|^2 + |y|^2 - 2 x y of such points from 0.
    draws = np.random.default_rng(0)
    rows = 1000 + draws.normal(0, 0.01, (7, 200))
    rows[3] += 0.05
    rows = rows.astype(np.float32)
    contents = [content(row) for row in rows]
    exact = krum_order(squared_distances(rows.astype(np.float64)), 1)
    assert exact[-1] == 3
    theirs = [contents.index(each) for each in select_multikrum(contents, 1, 7)]
    assert theirs != exact
    strategy = build("multikrum", num_malicious_nodes=1, num_nodes_to_select=6)
    kept = np.delete(rows, 3, axis=0).astype(np.float64).mean(axis=0)
    assert np.array_equal(aggregate(strategy, rows), kept.astype(np.float32))


def test_bulyan_is_flowers_where_the_choice_is_the_same():
    rows = np.random.default_rng(2).normal(size=(7, 4)).astype(np.float32)
    theirs = flower.Bulyan(
        num_malicious_nodes=1, selection_rule=select_repeatedly
    )
    ours = aggregate(build("bulyan", num_malicious_nodes=1), rows)
    assert ours == pytest.approx(aggregate(theirs, rows), rel=1e-6)


def test_the_median_and_the_trimmed_mean_are_numpys_and_scipys():
    from scipy.stats import trim_mean

    rows = np.random.default_rng(1).normal(size=(9, 4)).astype(np.float32)
    assert np.array_equal(
        aggregate(build("fedmedian"), rows), np.median(rows, axis=0)
    )
    trimmed = aggregate(build("fedtrimmedavg", beta=0.25), rows)
    assert trimmed == pytest.approx(trim_mean(rows, 0.25), rel=1e-6)


# --- properties

ROBUST = [
    ("fedmedian", {}),
    ("fedtrimmedavg", {"beta": 0.3}),
    ("krum", {"num_malicious_nodes": 2}),
    ("multikrum", {"num_malicious_nodes": 2, "num_nodes_to_select": 4}),
    ("bulyan", {"num_malicious_nodes": 2}),
    ("centred-clipping", {}),
]


def run(name, options, rows):
    if name == "centred-clipping":
        return centred(rows, np.zeros(rows.shape[1]), **options)
    return aggregate(build(name, **options), rows)


@pytest.mark.parametrize(("name", "options"), ROBUST)
@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1))
def test_the_order_of_clients_does_not_matter(name, options, seed):
    draws = np.random.default_rng(seed)
    rows = draws.normal(size=(11, 3)).astype(np.float32)
    shuffled = rows[draws.permutation(11)]
    assert run(name, options, shuffled) == pytest.approx(
        run(name, options, rows), rel=1e-5, abs=1e-6
    )


@pytest.mark.parametrize(("name", "options"), ROBUST)
@settings(max_examples=15)
@given(
    st.integers(0, 2**32 - 1),
    st.floats(-1e6, 1e6).filter(lambda size: abs(size) > 100),
)
def test_two_of_eleven_clients_cannot_break_it(name, options, seed, size):
    # The breakdown point: whatever two send, the result stays among what honest clients send.
    draws = np.random.default_rng(seed)
    rows = draws.uniform(-1, 1, (11, 3)).astype(np.float32)
    hostile = draws.choice(11, 2, replace=False)
    rows[hostile] = size * (1 + draws.uniform(0, 1, (2, 3)))
    assert np.abs(run(name, options, rows)).max() <= 2.0
    # The plain mean breaks.
    assert np.abs(aggregate(build("fedavg"), rows)).max() > 10


@settings(max_examples=50)
@given(
    st.integers(0, 2**32 - 1),
    st.floats(0.01, 10),
    st.integers(1, 4),
)
def test_a_step_of_centred_clipping_is_bounded(seed, radius, iterations):
    draws = np.random.default_rng(seed)
    changes = draws.normal(0, 1e4, (5, 3))
    step, clipped = clip_around(changes, radius, iterations)
    assert np.linalg.norm(step) <= iterations * radius * (1 + 1e-9)
    assert 0 <= clipped <= 1


# --- too few answers


def test_too_few_answers_of_a_round_aggregate_nothing(caplog):
    strategy = MultiKrum(num_malicious_nodes=1, fraction_evaluate=0.0)
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    try:
        assert strategy.aggregate_train(1, replies([[1.0]] * 4)) == (None, None)
    finally:
        logger.removeHandler(caplog.handler)
    assert "needs 2 x 1 + 3 = 5 answers" in caplog.text
    assert "got 4" in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"radius": -1.0}, "radius = -1.0: must be a number, at least 0"),
        ({"iterations": 0}, "iterations = 0: must be a whole number, at least 1"),
        ({"beta": 0.1}, "centred-clipping has no such option"),
    ],
)
def test_impossible_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        build("centred-clipping", **options)


def test_names_make_these_classes():
    assert isinstance(build("krum"), flower.Krum)
    assert build("bulyan").selection_rule is select_repeatedly
