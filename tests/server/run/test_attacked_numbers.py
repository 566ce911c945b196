"""A client that lies about its numbers, in a whole run."""

from dataclasses import replace

import numpy as np
import pytest

from fedknow.client.workbench import Workbench
from fedknow.protocols.config import read_config
from fedknow.protocols.messages import Arrays
from fedknow.server.checks.claims import Claims
from fedknow.server.run.folder import RunFolder
from fedknow.simulations.simulate import simulate

LIAR = 4


@pytest.fixture
def lie(monkeypatch):
    """Have one client turn its update round, and say that it has 1e12 samples."""
    honest = Workbench.report_training

    def report_training(self, data, round, measures, samples):
        report, state = honest(self, data, round, measures, samples)
        if round.client == LIAR:
            turned = Arrays(
                {name: -array for name, array in report.parameters.items()}
            )
            report = replace(report, parameters=turned, examples=10**12)
        return report, state

    monkeypatch.setattr(Workbench, "report_training", report_training)


def test_a_claim_of_samples_does_not_decide_the_model(lie, tmp_path):
    """The attack took an honest accuracy of 0.983 to 0.103."""
    tree = {
        "data": {"clients": 5, "tasks": 1, "partition": "iid"},
        "train": {"rounds": 4, "epochs": 5},
        "learner": "finetune",
        "engine": {"backend": "inline", "on_client_error": "skip"},
    }
    simulate(read_config(tree), tmp_path / "run", report=False)
    run = RunFolder.open(tmp_path / "run")
    failures = [e for e in run.events() if e["event"] == "failure"]
    assert {event["client"] for event in failures} == {LIAR}
    assert "num-examples is 1000000000000" in failures[0]["reason"]
    honest = run.accuracy()["personal"][:LIAR]
    assert np.mean(honest) > 0.9


def test_a_claim_does_not_decide_where_answers_come_one_by_one(
    lie, tmp_path, monkeypatch
):
    """As with clients that bring data of their own, whose sizes the server does not know."""
    monkeypatch.setattr(Claims, "read", lambda *_: Claims(are_known=False))
    tree = {
        "data": {"clients": 5, "tasks": 1, "partition": "iid"},
        "train": {"rounds": 2, "epochs": 1},
        "model": "mlp",
        "learner": "finetune",
        "strategy": {"name": "fedbuff", "buffer": 5},
        "engine": {"backend": "inline"},
    }
    simulate(read_config(tree), tmp_path / "run", report=False)
    events = RunFolder.open(tmp_path / "run").events()
    [warned] = [e["reason"] for e in events if "claims" in e.get("reason", "")]
    assert warned.startswith(f"client {LIAR} claims 1000000000000 samples")
    samples = int(warned.split("of which ")[1].split()[0])
    assert samples < 1000
