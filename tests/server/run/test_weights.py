import pytest
from flwr.app import Message, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedknow.protocols.flower import empty_run, identify
from fedknow.protocols.messages import node_of
from fedknow.server.run.weights import WeightBounds, bound_weights


def replies(*claims):
    """Answers of clients 0, 1, ... that claim so many samples."""
    # Flower's messages take the run's id from class attributes.
    identify(empty_run().run_id)
    made = []
    for client, claim in enumerate(claims):
        work = Message(RecordDict(), node_of(client), "train")
        record = MetricRecord({"num-examples": claim, "loss": 0.5})
        made.append(Message(RecordDict({"metrics": record}), reply_to=work))
    return made


def weights(answers):
    return [
        answer.content.metric_records["metrics"]["num-examples"]
        for answer in answers
    ]


@pytest.mark.parametrize(
    ("claims", "counted", "changed"),
    [
        ([100, 120, 80], [100, 120, 80], {}),
        ([100, 120, 80, 10**12], [100, 120, 80, 300], {3: (10**12, 300)}),
        ([100.0, 1e12], [100.0, 300.0], {1: (1e12, 300.0)}),
        ([7], [7], {}),
        ([], [], {}),
    ],
)
def test_a_weight_is_at_most_a_multiple_of_the_median(claims, counted, changed):
    answers = replies(*claims)
    assert bound_weights(answers, 3.0) == changed
    assert weights(answers) == counted


@given(st.lists(st.integers(1, 10**15), min_size=3, max_size=9))
def test_no_client_outweighs_honest_ones_together(claims):
    answers = replies(*claims)
    bound_weights(answers, 3.0)
    after = weights(answers)
    # Half of the clients weigh the lower median or more, and nobody more than three times it.
    assert max(after) <= 3 * sorted(after)[(len(after) - 1) // 2]
    assert all(new <= old for new, old in zip(after, claims, strict=True))


def test_answers_that_come_one_by_one_are_bounded_by_all_claims_so_far():
    bounds = WeightBounds(3.0)
    liar, *honest = replies(10**12, 100, 120, 80)
    # Nobody else has said anything yet.
    assert bounds.bound([liar]) == {}
    for answer in honest:
        assert bounds.bound([answer]) == {}
    # A strategy that gathered them asks again before it weighs them.
    assert bounds.bound([liar, *honest]) == {0: (10**12, 300)}
    assert weights([liar, *honest]) == [300, 100, 120, 80]
    # Later answers are bounded when they come.
    again = replies(10**12)
    assert bounds.bound(again) == {0: (10**12, 300)}


def test_what_is_no_training_has_no_weight_to_bound():
    work = Message(RecordDict(), node_of(0), "evaluate")
    record = MetricRecord({"num-examples": 10**12})
    answer = Message(RecordDict({"metrics": record}), reply_to=work)
    assert WeightBounds(3.0).bound([answer, *replies(5, 6)]) == {}
