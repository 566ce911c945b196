"""Secure aggregation over real connections gives the numbers of a simulation, bit for bit."""

import pytest
from real_clients import plain_node, run_real_clients

from fedknow.client.host import secured
from fedknow.protocols.config import read_config
from fedknow.server.run.accounting import epsilon_of
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.simulate import simulate

pytestmark = pytest.mark.usefixtures("no_report")

CONFIG = {
    "data": {
        "clients": 3,
        "tasks": 2,
        "classes_per_task": 2,
        "classes_max": 2,
        "test_samples": 0.5,
    },
    "model": "mlp",
    "train": {"rounds": 2, "epochs": 1},
    "learner": "fedrep",
    "evaluation": {"global_model": False},
    "engine": {"backend": "inline"},
    "privacy": {"secure": True},
}


NOISE = {"clip": 1.0, "noise": 0.5}


@pytest.mark.parametrize("privacy", [{"secure": True}, NOISE])
def test_real_clients_and_simulated_ones_agree(tmp_path, numbers, privacy):
    """With noise, too, where its secrets come from the seed; a real client draws its own."""
    config = read_config(CONFIG | {"privacy": privacy})

    def make_node(config, client):
        return secured(plain_node(config, client), config)

    run_real_clients(config, tmp_path / "real", make_node)
    simulate(config, tmp_path / "virtual", report=False)
    assert numbers(tmp_path / "real") == numbers(tmp_path / "virtual")
    events = RunFolder.open(tmp_path / "real").events()
    traffic = events[-1]["traffic"]
    assert "evaluate.global" not in traffic
    said = [event.get("epsilon") for event in events if event["event"] == "round"]
    if privacy is NOISE:
        assert said == [
            pytest.approx(epsilon_of(0.5, rounds, 1e-5))
            for rounds in (1, 2, 3, 4)
        ]
        return
    assert said == [None] * 4
    # Twice the bytes of an update, as its numbers have 64 bits. No head has left a device.
    assert traffic["train"]["up"] == pytest.approx(
        2 * traffic["train"]["down"], rel=0.05
    )
