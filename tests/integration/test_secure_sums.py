"""Sums under masks: the same numbers on real clients and on workers, and none is lost."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fedknow.client.data import make_benchmark
from fedknow.client.edge.client import EdgeClient
from fedknow.client.host import secured
from fedknow.client.node import Node
from fedknow.client.secure import SecureNode
from fedknow.protocols.config import read_config
from fedknow.protocols.messages import EXTRA, client_of
from fedknow.protocols.secure.rounds import UNMASK
from fedknow.server.checks.faults import RunError
from fedknow.server.run.folder import RunFolder
from fedknow.server.serve import serve
from fedknow.simulations.simulate import simulate

WAIT = 120
CLIENTS = 4
CONFIG = {
    "data": {
        "clients": CLIENTS,
        "tasks": 2,
        "scenario": "class-incremental",
        "partition": "dirichlet",
        "test_samples": 0.5,
    },
    # Three clients a round, so that the fourth shares when a task is over.
    "strategy": {"fraction": 0.75},
    "model": {"name": "mlp", "hidden": 12, "train": "head"},
    "train": {"rounds": 1},
    "learner": "afcl",
    "engine": {"backend": "inline"},
    "privacy": {"secure": True},
}


class Answers:
    """Real clients' nodes; all are threads that share torch's generator.

    Parameters
    ----------
    silent : set of int
        Clients that fail to open sums.
    """

    def __init__(self, silent=()):
        self.silent = set(silent)
        self.at_work = threading.Lock()
        self.sent = []

    def __call__(self, config):
        """Make a node."""
        with self.at_work:
            node = secured(Node(config, make_benchmark(config)), config)
        assert isinstance(node, SecureNode)
        return _Node(node, self)


class _Node:
    def __init__(self, node, answers):
        self.node = node
        self.learner = node.learner
        self.answers = answers

    def handle(self, message, state):
        """Answer one at a time."""
        with self.answers.at_work:
            reply, new = self.node.handle(message, state)
            self.answers.sent.append(reply)
            is_silent = client_of(message.node) in self.answers.silent
            if message.kind == UNMASK and is_silent:
                return message.fail(2, "it went away"), state
            return reply, new


def run_for_real(config, tmp_path, answers, **options):
    """Run a server and clients, which go when it has gone."""
    with ThreadPoolExecutor(CLIENTS) as threads:
        running = []

        def start(port):
            for client in range(CLIENTS):
                edge = EdgeClient(
                    f"127.0.0.1:{port}",
                    tmp_path / f"state{client}",
                    client=client,
                    node=answers,
                    give_up=3,
                )
                running.append(threads.submit(asyncio.run, edge.run()))

        try:
            serve(
                config, tmp_path / "real", "127.0.0.1:0", ready=start, **options
            )
        finally:
            ended = [client.exception(WAIT) for client in running]
    return ended


@pytest.mark.parametrize("learner", ["afcl", "stsa"])
def test_real_clients_and_simulated_ones_agree(tmp_path, numbers, learner):
    config = read_config(CONFIG, [f"learner={learner}"])
    answers = Answers()
    assert run_for_real(config, tmp_path, answers) == [None] * CLIENTS
    assert answers.sent
    assert not any(EXTRA in reply.content for reply in answers.sent)
    real = numbers(tmp_path / "real")
    assert real == numbers(
        simulate(config, tmp_path / "inline", report=False).folder
    )
    traffic = RunFolder.open(tmp_path / "real").events()[-1]["traffic"]
    assert not any("extra" in kind for kind in traffic)
    clear = read_config(CONFIG, [f"learner={learner}", "privacy.secure=false"])
    in_the_clear = simulate(clear, tmp_path / "clear", report=False)
    masked = simulate(config, tmp_path / "again", report=False)
    for name, array in in_the_clear.arrays.items():
        np.testing.assert_allclose(masked.arrays[name], array, atol=1e-5)


def test_ray_gives_the_numbers_of_one_process(tmp_path, numbers):
    inline = simulate(read_config(CONFIG), tmp_path / "inline", report=False)
    changes = ["engine.backend=ray", "engine.workers=2"]
    on_ray = simulate(
        read_config(CONFIG, changes), tmp_path / "ray", report=False
    )
    assert numbers(on_ray.folder) == numbers(inline.folder)


def test_a_run_that_could_not_open_a_sum_goes_on_with_all(tmp_path, numbers):
    """The checkpoint of the first task has the clients' states, with nothing shared since."""
    config = read_config(CONFIG, ["engine.on_client_error=skip"])
    answers = Answers()

    def go_away(event):
        # In the second task too few are left when the sum is to be opened.
        if event.event == "task_end":
            answers.silent = {0, 1, 2}

    with pytest.raises(RunError, match=r"task 2, .* clients opened the sum"):
        run_for_real(config, tmp_path, answers, observers=[go_away])
    answers.silent = set()
    run_for_real(config, tmp_path, answers, resume=True)
    expected = simulate(config, tmp_path / "virtual", report=False)
    assert numbers(tmp_path / "real") == numbers(expected.folder)
