"""Which past tasks FedKNOW's signature tasks are chosen from, and that the choice is the farthest
ones."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from fedknow.client.data.stream import Split
from fedknow.client.learners.fedknow import selection
from fedknow.client.learners.fedknow.learner import FedKnow
from fedknow.client.learners.fedknow.restorer import Restorer
from fedknow.client.learners.fedknow.selection import most_dissimilar, wasserstein
from fedknow.client.learners.fedknow.settings import FedKnowPlusSettings
from fedknow.client.learners.frames.learner import Batch, HeadSlice, Round
from fedknow.client.state import load_state, save_state
from fedknow.protocols.config import TrainConfig

TASKS = 9


def client(model, **settings):
    kept = {"rho": 0.3, "finetune_epochs": 1, "k": 2} | settings
    return FedKnow(
        model,
        TrainConfig(epochs=1, batch_size=8, lr=0.01),
        FedKnowPlusSettings(**kept),
    )


def live(learner, tasks, rounds=1):
    """Train and end tasks; what each round reported."""
    reports = []
    for task in tasks:
        reports += [
            learner.fit(task, Round(number, 31 * task.task + number))
            for number in range(1, rounds + 1)
        ]
        learner.end_task(task, Round(0, 99 + task.task))
    return reports


def as_double(task):
    return replace(
        task,
        train=Split(task.train.x.double(), task.train.y),
        test=Split(task.test.x.double(), task.test.y),
    )


def distances(learner, model, tasks, current, form):
    """From the gradient of a batch to what each past task asks of it, plainly."""
    index, head = torch.arange(8), list(current.classes)
    x, y = current.train.x[index], current.train.y[index] - head[0]

    def gradient(loss):
        return torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(
                    loss(model(x)), list(model.body.parameters())
                )
            ]
        )

    def apart(a, b):
        if form == "values":
            return wasserstein_distance(a, b)
        return np.abs(
            np.cumsum(np.abs(a)) / np.abs(a).sum()
            - np.cumsum(np.abs(b)) / np.abs(b).sum()
        ).mean()

    g = gradient(
        lambda z: torch.nn.functional.cross_entropy(z[:, head], y)
    ).numpy()
    found = []
    for task in tasks:
        target, classes = (
            learner._restorer.answers[task.task][index],
            list(task.classes),
        )
        asked = gradient(
            lambda z, c=classes, p=target: (
                -(p * z[:, c].log_softmax(1)).sum(1).mean()
            )
        )  # T = 1
        found.append(apart(g, asked.numpy()))
    return np.array(found)


@settings(
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 1000),
    past=st.integers(2, 6),
    k=st.integers(1, 3),
    form=st.sampled_from(["values", "positions"]),
)
def test_signature_tasks_are_the_farthest_by_a_plain_reference(
    tiny_model, tiny_task, seed, past, k, form
):
    model = tiny_model(seed, classes=2 * past + 2).double()
    tasks = [
        as_double(tiny_task(task, samples=10, seed=seed))
        for task in range(past + 1)
    ]
    learner = client(model, k=k, wasserstein=form)
    live(learner, tasks[:-1])
    current = tasks[-1]
    learner.begin(current, Round(1, 5))
    expected = distances(learner, model, tasks[:-1], current, form)
    index, head = (
        torch.arange(8),
        HeadSlice(current.head, learner.head.out_features),
    )
    learner.gradient(
        Batch(
            current.train.x[index],
            head.labels(current.train.y[index]),
            index,
            head,
        )
    )
    if past > k:
        chosen = learner._selection.chosen
        others = np.setdiff1d(np.arange(past), chosen)
        assert len(chosen) == k
        assert chosen == sorted(chosen)
        assert expected[chosen].min() >= expected[others].max() * (1 - 1e-12)
    else:
        assert learner._selection.chosen is None


@pytest.mark.parametrize("select", ["round", "batch"])
def test_enough_candidates_change_nothing(tiny_model, tiny_task, select):
    tasks = [tiny_task(task) for task in range(7)]
    exact, enough, few = (
        client(tiny_model(classes=14), select=select, candidates=candidates)
        for candidates in (0, 4, 1)
    )
    for learner in (exact, enough, few):
        live(learner, tasks, rounds=2)
    assert all(
        torch.equal(value, enough.send()[name])
        for name, value in exact.send().items()
    )
    assert any(
        not torch.equal(value, few.send()[name])
        for name, value in exact.send().items()
    )


def test_candidates_are_those_chosen_last_and_others_at_random(
    tiny_model, tiny_task
):
    learner = client(tiny_model(classes=2 * TASKS), candidates=3)
    live(learner, [tiny_task(task) for task in range(TASKS - 1)])
    last, seen = learner._selection.signature, set()
    assert len(last) == 2
    for seed in range(10):
        learner.begin(tiny_task(TASKS - 1), Round(1, seed))
        drawn = learner._selection.candidates
        assert len(set(drawn)) == 2 + 3
        assert drawn == sorted(drawn)
        assert set(last) < set(drawn)
        assert set(drawn) <= learner._restorer.answers.keys()
        seen |= set(drawn)
        learner.begin(tiny_task(TASKS - 1), Round(1, seed))
        assert learner._selection.candidates == drawn
    assert seen == set(range(TASKS - 1))


def test_tasks_of_which_none_was_left_out_are_those_chosen_last(
    tiny_model, tiny_task
):
    learner = client(tiny_model(classes=10), candidates=1)
    live(learner, [tiny_task(task) for task in range(3)])
    assert learner._selection.signature == [0, 1]
    client_who_missed_all = client(tiny_model(classes=10), candidates=1)
    client_who_missed_all.load_state_dict(
        learner.state_dict() | {"signature": []}
    )
    client_who_missed_all.end_task(tiny_task(3), Round(0, 1))
    client_who_missed_all.begin(tiny_task(4), Round(1, 1))
    assert len(client_who_missed_all._selection.candidates) == 3


def test_a_round_costs_the_same_however_many_tasks_there_are(
    tiny_model, tiny_task, monkeypatch
):
    """``sum`` does the same in each step, whatever the gradients are."""
    asked, answer = [], Restorer._answer
    monkeypatch.setattr(
        Restorer, "_answer", lambda *args: asked.append(1) or answer(*args)
    )

    def flops(candidates):
        learner, found = (
            client(
                tiny_model(classes=2 * TASKS),
                candidates=candidates,
                integrator="sum",
            ),
            [],
        )
        for number in range(TASKS):
            asked.clear()
            with learner.meter.message():
                learner.fit(tiny_task(number), Round(1, number))
            found.append((learner.meter.cost.flops, len(asked)))
            learner.end_task(tiny_task(number), Round(0, number))
        return found

    flat, linear = flops(2), flops(0)
    assert flat[:5] == linear[:5]
    assert len(set(flat[4:])) == 1
    assert flat[-1][1] == 4
    steps = np.diff([cost for cost, _ in linear[3:]])
    assert steps.min() == steps.max() > 0
    assert linear[-1][1] == TASKS - 1


def test_offered_are_the_candidates_alone(tiny_model, tiny_task, monkeypatch):
    offered, choose = [], selection.most_dissimilar
    monkeypatch.setattr(
        selection,
        "most_dissimilar",
        lambda g, rows, k, form: (
            offered.append(len(rows := list(rows))) or choose(g, rows, k, form)
        ),
    )
    for select, times in (("batch", 3), ("round", 1)):
        learner = client(
            tiny_model(classes=2 * TASKS), candidates=2, select=select
        )
        live(learner, [tiny_task(task) for task in range(TASKS - 1)])
        offered.clear()
        learner.fit(tiny_task(TASKS - 1), Round(1, 1))
        assert offered == [4] * times


@pytest.mark.parametrize("select", ["round", "batch"])
def test_a_client_goes_on_from_its_state_as_if_never_interrupted(
    tiny_model, tiny_task, tmp_path, select
):
    learner = client(tiny_model(classes=2 * TASKS), candidates=2, select=select)
    live(learner, [tiny_task(task) for task in range(TASKS - 2)])
    last = tiny_task(TASKS - 2)
    learner.fit(last, Round(1, 1))
    body = learner.send()
    save_state(tmp_path / "state.safetensors", learner.state_dict())
    other = client(tiny_model(classes=2 * TASKS), candidates=2, select=select)
    live(
        other, [tiny_task(task) for task in range(4)]
    )  # somebody else was here before
    other.load_state_dict(load_state(tmp_path / "state.safetensors"))
    for one in (learner, other):
        one.receive(body)
        one.fit(last, Round(2, 2))
        one.end_task(last, Round(0, 3))
        one.fit(tiny_task(TASKS - 1), Round(1, 4))
    assert other._selection.candidates == learner._selection.candidates
    assert other._selection.signature == learner._selection.signature
    assert all(
        torch.equal(value, other.send()[name])
        for name, value in learner.send().items()
    )


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 50))
def test_wasserstein_of_values_is_scipys(seed: int, p: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, p))
    assert wasserstein(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(
        wasserstein_distance(a, b)
    )


def test_wasserstein_of_positions_by_hand() -> None:
    # Mass (1/2, 1/2, 0) against (0, 0, 1): cdfs (.5, 1, 1) and (0, 0, 1) differ by .5, 1, 0.
    a, b = torch.tensor([1.0, -1.0, 0.0]), torch.tensor([0.0, 0.0, 3.0])
    assert wasserstein(a, b, "positions") == pytest.approx(0.5)


def test_most_dissimilar_are_chosen_in_the_order_of_tasks() -> None:
    g = torch.tensor([0.0, 0.0])
    candidates = torch.tensor([[1.0, 1.0], [5.0, 5.0], [0.1, 0.1], [-3.0, -3.0]])
    assert most_dissimilar(g, candidates, 2) == [1, 3]
    assert most_dissimilar(g, candidates, 4) == [0, 1, 2, 3]
