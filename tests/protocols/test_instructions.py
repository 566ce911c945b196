"""What a strategy may tell clients, and what is refused."""

import math

import pytest

from fedknow.protocols.config import TrainConfig
from fedknow.protocols.instructions import read_instructions

TRAIN = TrainConfig(epochs=2, batch_size=16, lr=0.01)
POSITION = {"task": 1, "round": 2, "rounds": 3, "tasks": 4, "server-round": 5}


def test_nothing_said_leaves_training_as_it_is():
    read = read_instructions(POSITION, TRAIN)
    assert read.train is TRAIN
    assert (read.proximal_mu, read.learner_settings) == (0.0, {})


def test_settings_take_the_place_of_the_experiments():
    said = {
        "lr": 1,
        "local-epochs": 7,
        "batch-size": 4,
        "proximal-mu": 0.5,
        "beta": [1.0],
        "mode": "fast",
    }
    read = read_instructions(POSITION | said, TRAIN)
    assert read.train == TRAIN.model_copy(
        update={"lr": 1.0, "epochs": 7, "batch_size": 4}
    )
    assert read.proximal_mu == 0.5
    assert read.learner_settings == {"beta": [1.0], "mode": "fast"}
    assert (
        read_instructions({"epochs": 3, "local-epochs": 3}, TRAIN).train.epochs
        == 3
    )


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"lr": math.nan}, "lr = nan"),
        ({"lr": math.inf}, "lr = inf"),
        ({"lr": 0.0}, "lr = 0.0: Input should be greater than 0"),
        ({"lr": -1}, "lr = -1"),
        ({"lr": 1e6}, "lr = 1000000.0: Input should be less than or equal to 10"),
        ({"lr": "0.1"}, "lr = '0.1': must be a number"),
        ({"lr": True}, "lr = True: must be a number"),
        ({"epochs": 0}, "epochs = 0: Input should be greater than or equal to 1"),
        ({"epochs": 1.5}, "epochs = 1.5"),
        ({"epochs": 10**18}, "epochs = 1000000000000000000"),
        ({"local-epochs": [2]}, r"local-epochs = \[2\]: must be a number"),
        (
            {"epochs": 2, "local-epochs": 3},
            "local-epochs = 3 contradicts epochs = 2; send one of them",
        ),
        ({"batch-size": 0}, "batch-size = 0"),
        (
            {"proximal-mu": -0.1},
            "proximal-mu = -0.1: must be a finite number, not below 0",
        ),
        ({"proximal-mu": math.inf}, "proximal-mu = inf"),
        ({"proximal-mu": b"1"}, "proximal-mu = b'1'"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(said, words):
    with pytest.raises(ValueError, match=words):
        read_instructions(POSITION | said, TRAIN)
