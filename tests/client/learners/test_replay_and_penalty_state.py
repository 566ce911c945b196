"""GEM, A-GEM, ER, EWC, online EWC, MAS, LwF: all a client is stands in its state, and nothing of
it in another's."""

import pytest
import torch

from fedknow.client.learners import learner_class
from fedknow.client.learners.frames.learner import Round
from fedknow.client.state import load_state, save_state
from fedknow.protocols.config import TrainConfig

METHODS = ["gem", "agem", "er", "ewc", "online-ewc", "mas", "lwf"]
EXCHANGES = ["all", "body", "none"]


def build(tiny_model, name, **settings):
    kind = learner_class(name)
    train = TrainConfig(epochs=2, batch_size=8, lr=0.01)
    return kind(
        tiny_model(dropout=0.5, norm=True), train, kind.Settings(**settings)
    )


def live(learner, tasks, between):
    """Two rounds a task; ``between`` is called before each message and gives the learner that
    answers it."""
    reports = []
    for task in tasks:
        for number in (1, 2):
            shared = learner.send()
            learner = between(learner)
            learner.receive(shared)
            reports.append(
                learner.fit(task, Round(number, 10 * task.task + number))
            )
        shared = learner.send()
        learner = between(learner)
        learner.receive(shared)
        reports.append(learner.end_task(task, Round(0, 77 + task.task)))
    return learner, reports


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("name", METHODS)
def test_state_on_disk_between_messages_gives_the_same_bits(
    tiny_model, tiny_task, tmp_path, name, exchange
):
    tasks = [tiny_task(t) for t in range(3)]

    def stay(learner):
        state = learner.state_dict()
        learner.load_state_dict(state)  # as a node does before each message
        return learner

    def through_disk(learner):
        save_state(tmp_path / "state", learner.state_dict())
        other = build(tiny_model, name, exchange=exchange)  # on another worker
        other.load_state_dict(load_state(tmp_path / "state"))
        return other

    (a, undisturbed), (b, moved) = (
        live(build(tiny_model, name, exchange=exchange), tasks, b)
        for b in (stay, through_disk)
    )
    assert undisturbed == moved
    assert same(a.state_dict(), b.state_dict())
    assert same(a.send(), b.send())
    assert (
        len({tuple(report) for report in undisturbed}) == 2
    )  # keys never change


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("name", METHODS)
def test_nothing_leaks_from_one_client_to_the_next(
    tiny_model, tiny_task, name, exchange
):
    def one_client(learner):
        state, shared = {}, initial
        reports = []
        for t in range(2):
            for work in (learner.fit, learner.end_task):
                learner.load_state_dict(state)
                learner.receive(shared)
                reports.append(work(tiny_task(t), Round(1, t)))
                state = learner.state_dict()
        return state, reports

    learner = build(tiny_model, name, exchange=exchange)
    initial = learner.send()
    expected = one_client(learner)
    for t in range(3):  # somebody else, with other data
        learner.fit(tiny_task(t, seed=5), Round(1, t))
        learner.end_task(tiny_task(t, seed=5), Round(0, t))
    state, reports = one_client(learner)
    assert reports == expected[1]
    assert same(state, expected[0])


@pytest.mark.parametrize("name", METHODS)
def test_a_state_handed_out_does_not_change(tiny_model, tiny_task, name):
    learner = build(tiny_model, name)
    live(learner, [tiny_task(0)], lambda learner: learner)
    state = learner.state_dict()
    copy = {"/".join(path): value.clone() for path, value in leaves(state)}
    learner.load_state_dict(state)
    live(learner, [tiny_task(1)], lambda learner: learner)
    assert {"/".join(path) for path, _ in leaves(state)} == copy.keys()
    assert all(
        torch.equal(value, copy["/".join(path)]) for path, value in leaves(state)
    )


def leaves(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        elif isinstance(value, torch.Tensor):
            yield (*path, key), value


@pytest.mark.parametrize("name", METHODS)
def test_the_method_tells_its_own_task_end_and_what_it_keeps(
    tiny_model, tiny_task, name
):
    for exchange in EXCHANGES:
        learner = build(tiny_model, name, exchange=exchange)
        assert learner.ends_task
        report = learner.end_task(tiny_task(0), Round(0, 1))
        assert list(report) == ["knowledge-bytes"]
        assert report["knowledge-bytes"] > 0
