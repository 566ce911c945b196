import random
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAvg
from torch import nn

from fedknow.api.fingerprints import fingerprint


def make(number):
    def answer(x):
        return x + number

    return answer


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        ([1, 2], [2, 1]),
        ([[1], 2], [1, [2]]),
        ({"a": 1}, {"a": 2}),
        (np.zeros(4), np.zeros((2, 2))),
        (np.zeros(2, np.int64), np.zeros(2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)),
        (torch.tensor(1.0), torch.tensor(2.0)),
        (np.array(["a", "b"], object), np.array(["a", "c"], object)),
        (make(1), make(2)),
        (lambda x: x + 1, lambda x: x + 2),
        (FedAvg(), FedAvg(fraction_train=0.5)),
        (nn.Linear(2, 2), nn.Linear(2, 2)),
        (np.random.default_rng(1), np.random.default_rng(2)),
        (random.Random(1), random.Random(2)),
        (partial(make, 1), partial(make, 2)),
    ],
)
def test_other_content_gives_another_digest(one, other):
    assert fingerprint(one) != fingerprint(other)
    assert len(fingerprint(one)) == 8


def test_equal_content_gives_the_same_digest():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    again = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    again.load_state_dict(net.state_dict())
    assert fingerprint(net) == fingerprint(again)
    assert fingerprint(FedAvg()) == fingerprint(FedAvg())
    assert fingerprint(make(3)) == fingerprint(make(3))


def test_the_digest_is_that_of_another_process():
    code = (
        "import numpy as np; from flwr.serverapp.strategy import FedAvg;"
        "from fedknow.api.fingerprints import fingerprint;"
        "print(fingerprint([FedAvg(), {'b', 'a'}, np.arange(9.0)]))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    here = fingerprint([FedAvg(), {"b", "a"}, np.arange(9.0)])
    assert answer.stdout.strip() == here


def test_objects_in_a_circle_end():
    circle: list = [1]
    circle.append(circle)
    assert fingerprint(circle) != fingerprint([1])


def test_of_a_large_array_rows_are_read(monkeypatch):
    monkeypatch.setattr("fedknow.api.fingerprints._READ_WHOLE", 1000)
    large = np.arange(20_000.0).reshape(10_000, 2)
    other = large.copy()
    other[-1] = 0
    assert fingerprint(large) == fingerprint(large.copy())
    assert fingerprint(large) != fingerprint(other)
