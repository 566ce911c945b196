"""What a client shares beside the parameters, and what no client of its method would."""

import numpy as np
import pytest

from fedknow.client.learners import build_learner
from fedknow.protocols.config import read_config
from fedknow.protocols.messages import END_TASK, EXTRA, TRAIN, Arrays, Message
from fedknow.server.checks.faults import Fault, Unusable
from fedknow.server.checks.sharing import Sharing

CLASSES = 4


def learner_of(name):
    config = read_config({"learner": name, "model": "mlp"})
    return build_learner(config, (1, 8, 8), CLASSES)


def labels(*values):
    return np.array(values, np.int64)


SAMPLES = {
    "x": np.zeros((3, 1, 8, 8), np.uint8),
    "y": labels(1, 2, 1),
    "classes": labels(1, 2),
}


@pytest.mark.parametrize(
    ("name", "honest", "changes"),
    [
        (
            "flcn",
            SAMPLES,
            [
                {"y": labels(1, 2)},
                {"y": labels(1, 2, 3)},
                {"classes": labels(1, 4)},
                {"classes": labels(-1, 2)},
                {"classes": labels(1, 1, 2)},
                {"x": SAMPLES["x"][:0], "y": labels()},
            ],
        ),
        (
            "target",
            {"classes": labels(0, 3)},
            [
                {"classes": labels(0, 4)},
                {"classes": labels(-1, 0)},
                {"classes": labels(2, 2)},
            ],
        ),
    ],
)
def test_labels_are_classes_of_the_model(name, honest, changes):
    learner = learner_of(name)
    learner.check_share(honest)
    for change in changes:
        with pytest.raises(ValueError, match=r"."):
            learner.check_share({**honest, **change})


def test_moments_are_sums_of_squares():
    learner = learner_of("fot")
    honest = {
        name: np.zeros(shape, dtype)
        for name, (dtype, shape) in learner.shares(ended=True).items()
    }
    learner.check_share(honest)
    name = next(iter(honest))
    for place, value in ((0, -1.0), (-1, -1.0), (1, 1e30)):
        wrong = honest[name].copy()
        wrong[place] = value
        with pytest.raises(ValueError, match=name):
            learner.check_share({**honest, name: wrong})


def test_what_a_method_refuses_is_that_clients_failure():
    learner = learner_of("target")
    sharing = Sharing({END_TASK: learner.shares(ended=True)})
    wrong = Arrays(classes=labels(7))
    reply = Message(END_TASK, 3, "1", content={EXTRA: wrong})
    sharing.inspect(reply)
    sharing.check = learner.check_share
    with pytest.raises(Unusable, match="classes are 0 to 3") as problem:
        sharing.inspect(reply)
    assert problem.value.fault is Fault.VALUES
    # Nothing shared is nothing to check, and so is another kind of message.
    sharing.inspect(Message(END_TASK, 3, "1", content={}))
    sharing.inspect(Message("evaluate", 3, "1", content={EXTRA: wrong}))
    with pytest.raises(Unusable, match="not the method's"):
        sharing.inspect(Message(TRAIN, 3, "1", content={EXTRA: wrong}))
