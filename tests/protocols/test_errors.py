import pickle

import pytest

from fedknow.client.edge.errors import EdgeError
from fedknow.client.state import StateError, StateLost
from fedknow.protocols.config import ConfigError
from fedknow.protocols.errors import FAILED, REFUSED, FedknowError
from fedknow.server.checks.faults import RunError
from fedknow.server.run.checkpoint import CheckpointError


@pytest.mark.parametrize(
    ("kind", "exit_code", "is_resumable"),
    [
        (ConfigError, REFUSED, False),
        (RunError, FAILED, True),
        (CheckpointError, FAILED, False),
        (StateError, FAILED, True),
        (StateLost, FAILED, False),
        (EdgeError, FAILED, True),
    ],
)
def test_what_a_person_is_told_has_an_exit_code(kind, exit_code, is_resumable):
    error = pickle.loads(
        pickle.dumps(kind("the sentence"))
    )  # as Ray brings it from a worker
    assert isinstance(error, FedknowError)
    assert (error.exit_code, error.is_resumable) == (exit_code, is_resumable)
    assert str(error) == "the sentence"
