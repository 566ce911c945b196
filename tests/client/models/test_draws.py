"""PyTorch's global generator, which threads share."""

import threading

import pytest
import torch
from torch import nn

from fedknow.client.models import build_model, draws
from fedknow.protocols.config import ModelConfig

WAIT = 60


class Noted:
    """A lock that tells when a thread has to wait for it."""

    def __init__(self, lock, told):
        self.lock, self.told = lock, told

    def __enter__(self):
        if not self.lock.acquire(blocking=False):
            self.told.set()
            self.lock.acquire()

    def __exit__(self, *_):
        self.lock.release()


def build(seed):
    model = build_model(ModelConfig(name="mlp"), (1, 8, 8), 10, seed)
    return model.state_dict()


@pytest.fixture
def expected():
    return [build(seed) for seed in range(2)]


def test_a_thread_draws_nothing_from_anothers_sequence(monkeypatch, expected):
    """The second begins to build while the first has drawn one layer of several."""
    found = [None, None]
    is_first_done = threading.Event()
    is_second_under_way = threading.Event()

    def build_second():
        found[1] = build(1)

    second = threading.Thread(target=build_second, daemon=True)
    reset = nn.Linear.reset_parameters

    def halfway(layer):
        reset(layer)
        # The dry run for the size draws nothing that counts.
        if layer.weight.is_meta:
            return
        if threading.current_thread() is second:
            is_second_under_way.set()
            assert is_first_done.wait(WAIT)
        elif second.ident is None:
            second.start()
            assert is_second_under_way.wait(WAIT)

    monkeypatch.setattr(nn.Linear, "reset_parameters", halfway)
    noted = Noted(draws._IN_USE, is_second_under_way)
    monkeypatch.setattr(draws, "_IN_USE", noted)
    found[0] = build(0)
    is_first_done.set()
    second.join(WAIT)
    assert not second.is_alive()
    for model, alone in zip(found, expected, strict=True):
        assert model.keys() == alone.keys()
        for name, tensor in model.items():
            assert torch.equal(tensor, alone[name]), name
    assert not torch.equal(found[0]["head.weight"], found[1]["head.weight"])


def test_one_thread_may_nest_them_and_all_are_put_back():
    before = torch.random.get_rng_state()
    with draws.own_draws(1):
        first = torch.rand(2)
        with draws.own_draws(1):
            assert torch.equal(torch.rand(2), first)
        second = torch.rand(2)
    with draws.own_draws(1):
        assert torch.equal(torch.rand(4), torch.cat([first, second]))
    assert torch.equal(torch.random.get_rng_state(), before)
