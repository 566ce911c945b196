import pytest

from fedknow.protocols.config import read_config
from fedknow.simulations.simulate import simulate

SMALL = {
    "data": {"clients": 3, "tasks": 2},
    "train": {"rounds": 2, "epochs": 1},
    "engine": {"backend": "inline"},
    "learner": "fedavg",
}


@pytest.fixture(scope="session")
def config():
    return read_config(SMALL)


@pytest.fixture(scope="session")
def plain(config, tmp_path_factory):
    """A run without trackers."""
    folder = tmp_path_factory.mktemp("plain") / "plain"
    simulate(config, folder, report=False)
    return folder
