import pytest

from fedknow.protocols.messages import (
    END_TASK,
    EVALUATE,
    TRAIN,
    Arrays,
    Message,
    Metrics,
    node_of,
)
from fedknow.server.checks.claims import Claims
from fedknow.server.checks.faults import Fault
from fedknow.server.checks.replies import Inspector

TASKS = [{"train": 5, "test": 2}, {"train": 7, "test": 3}]
KNOWN = {"clients": [TASKS, TASKS], "digest": "abc"}


@pytest.fixture
def inspect():
    """Makes an inspector; gives a function that shows it an answer, and gives its failure."""

    def make(partition, scored=0):
        failures = []
        inspector = Inspector(failures.append, claims=Claims.read(partition))
        inspector.begin(0, 1, Arrays())
        if scored:
            inspector.expect_scores(scored, should_collect=False)

        def show(kind, client=1, **metrics):
            values = {name.replace("_", "-"): v for name, v in metrics.items()}
            content = {"metrics": Metrics(values)}
            if kind == TRAIN:
                content["arrays"] = Arrays()
            message = Message(kind, node_of(client), "9", "8", content=content)
            answer = inspector(message)
            return failures.pop() if answer.failure else None

        return show

    return make


def scores(total, correct=None):
    correct = correct or [0] * len(total)
    return {
        "num_examples": 1,
        "total": total,
        "correct": correct,
        "losses": [0.5] * len(total),
    }


def test_more_samples_than_the_server_gave_out_are_refused(inspect):
    show = inspect(KNOWN)
    assert show(TRAIN, num_examples=7) is None
    failure = show(TRAIN, num_examples=8)
    assert failure.fault is Fault.METRICS
    assert "num-examples is 8, but this client has at most 7" in failure.reason
    assert "at most 7" in show(TRAIN, num_examples=1e12).reason
    end = {"num_examples": 10**12, "knowledge_bytes": 0}
    assert "1000000000000" in show(END_TASK, **end).reason


def test_the_weight_of_a_strategys_own_evaluation_is_bounded(inspect):
    show = inspect(KNOWN)
    assert show(EVALUATE, num_examples=5) is None
    assert "at most 5" in show(EVALUATE, num_examples=6).reason


def test_a_test_set_has_the_size_that_the_server_knows(inspect):
    show = inspect(KNOWN, scored=2)
    assert show(EVALUATE, **scores([2, 3])) is None
    lie = show(EVALUATE, **scores([2, 2**62], [2, 2**62]))
    assert f"total is {2**62} for task 2, whose test set has 3" in lie.reason


def test_a_test_set_of_unknown_size_does_not_change(inspect):
    show = inspect({}, scored=2)
    assert show(EVALUATE, **scores([4, 5])) is None
    assert show(EVALUATE, client=0, **scores([9, 9])) is None
    assert show(EVALUATE, **scores([4, 5])) is None
    changed = show(EVALUATE, **scores([4, 6]))
    assert "total is 6 for task 2, whose test set had before 5" in changed.reason


def test_claims_are_known_only_with_a_partition():
    assert Claims.read(KNOWN).are_known
    assert not Claims.read({}).are_known
    Claims().check_training(0, 1e12)
