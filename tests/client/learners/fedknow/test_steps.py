"""Steps of a client that computes what it needs, against a plain reference in float64.

The reference forms every gradient by a forward and a backward pass of its own, and solves Eq.
(3) with SciPy.
"""

import copy
import functools
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import nn
from torch.autograd import Function
from torch.nn import functional as F

from fedknow.client.data.samples import SampleSpec
from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners.fedknow.flat import flatten
from fedknow.client.learners.fedknow.integrator import LazyQp
from fedknow.client.learners.fedknow.learner import FedKnow
from fedknow.client.learners.fedknow.linearization import factorable
from fedknow.client.learners.fedknow.settings import FedKnowPlusSettings
from fedknow.client.learners.frames.learner import Batch, HeadSlice, Round
from fedknow.client.models import build_model
from fedknow.protocols.config import ConfigError, ModelConfig, TrainConfig


def as_double(task):
    return replace(
        task,
        train=Split(task.train.x.double(), task.train.y),
        test=Split(task.test.x.double(), task.test.y),
    )


def client(model, **settings):
    kept = {"rho": 0.3, "finetune_epochs": 1} | settings
    return FedKnow(
        model,
        TrainConfig(epochs=1, batch_size=8, lr=0.01),
        FedKnowPlusSettings(**kept),
    )


def heir(learner, **settings):
    """The same client under other settings, with the same model."""
    other = FedKnow(learner.model, learner.train, FedKnowPlusSettings(**settings))
    other.load_state_dict(learner.state_dict())
    return other


def live(learner, tasks, rounds=1):
    for task in tasks:
        for number in range(1, rounds + 1):
            learner.fit(task, Round(number, 31 * task.task + number))
        learner.end_task(task, Round(0, 99 + task.task))
    return learner


FIRST = torch.arange(8)


def step(learner, task, index=FIRST):
    """One integrated step; the gradient of the body."""
    learner.begin(task, Round(1, 5))
    return step_again(learner, task, index)


def step_again(learner, task, index=FIRST):
    """The same, later in the round."""
    learner.model.train()
    head = HeadSlice(task.head, learner.head.out_features)
    torch.manual_seed(1)
    learner.optimizer.zero_grad()
    learner.gradient(
        Batch(task.train.x[index], head.labels(task.train.y[index]), index, head)
    )
    return flatten(
        [parameter.grad for parameter in learner.body.parameters()],
        list(learner.body.parameters()),
    )


def at_its_fifth_task(tiny_model, tiny_task):
    """A client in double precision, its model and its tasks; it has made a step of the last."""
    torch.manual_seed(0)
    model = tiny_model(classes=10).double()
    tasks = [as_double(tiny_task(number)) for number in range(5)]
    learner = live(client(model, margin=0.0), tasks[:-1], rounds=2)
    step(learner, tasks[-1])
    return learner, model, tasks


def reference(learner, model, tasks, current, index=FIRST):
    """The gradient of one integrated step, plainly, in float64.

    Forward passes of student and teacher and a backward pass for each past task, and all
    constraints.
    """
    head = list(current.classes)
    parameters, t = list(model.body.parameters()), learner.settings.temperature
    x, y = current.train.x[index], current.train.y[index]

    def gradient(loss):
        torch.manual_seed(1)  # the same dropout mask
        return flatten(
            torch.autograd.grad(loss(model(x)), parameters), parameters
        )

    g = gradient(
        lambda z: F.cross_entropy(
            z[:, head], torch.searchsorted(torch.tensor(head), y)
        )
    ).numpy()
    rows = []
    for task in tasks:
        knowledge, teacher = (
            learner._restorer.knowledge[task.task],
            copy.deepcopy(model.body).eval(),
        )
        knowledge.restore_into(teacher)
        target = (F.linear(teacher(x), *knowledge.head) / t).softmax(1).detach()
        classes = list(knowledge.classes)
        rows.append(
            gradient(
                lambda z, c=classes, p=target: (
                    -(p * (z[:, c] / t).log_softmax(1)).sum(1).mean()
                )
            )
        )
    signature = torch.stack(rows).numpy()
    g = g + learner.settings.margin * signature.sum(
        0
    )  # v >= margin is v = margin + w, w >= 0
    return (
        torch.from_numpy(g + signature.T @ nnls(signature.T, -g)[0]),
        signature,
        g,
    )


@settings(
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 10_000),
    past=st.integers(1, 6),
    hidden=st.sampled_from([4, 8]),
    dropout=st.sampled_from([0.0, 0.5]),
    norm=st.booleans(),
    path=st.sampled_from(["adaptive", "full"]),
    temperature=st.sampled_from([1.0, 2.0]),
    margin=st.sampled_from([0.0, 0.5]),
    scale=st.sampled_from([0.3, 1.0, 3.0]),
    batch=st.lists(st.integers(0, 9), min_size=2, max_size=10, unique=True),
)
def test_step_equals_the_plain_reference(
    tiny_model,
    tiny_task,
    seed,
    past,
    hidden,
    dropout,
    norm,
    path,
    temperature,
    margin,
    scale,
    batch,
):
    model = tiny_model(
        seed, hidden=hidden, classes=2 * past + 2, dropout=dropout, norm=norm
    ).double()
    tasks = [
        as_double(tiny_task(task, samples=10, seed=seed))
        for task in range(past + 1)
    ]
    learner = live(
        client(model, path=path, temperature=temperature, margin=margin),
        tasks[:-1],
    )
    with torch.no_grad():
        for parameter in model.body.parameters():
            parameter.mul_(scale)  # away from where the past tasks are content
    index = torch.tensor(batch)
    ours = step(learner, tasks[-1], index)
    expected, signature, g = reference(
        learner, model, tasks[:-1], tasks[-1], index
    )
    size = np.linalg.norm(g)
    assert ours.numpy() == pytest.approx(expected.numpy(), abs=1e-8 * size)
    assert (
        signature @ ours.numpy()
        >= -1e-8 * size * np.linalg.norm(signature, axis=1)
    ).all()


def sentences(task, samples=10):
    """Task t has classes 2t and 2t + 1, told apart by one word among others."""
    draws = torch.Generator().manual_seed(task)

    def split():
        y = 2 * task + torch.arange(samples) % 2
        x = torch.randint(1, 4, (samples, 5), generator=draws)
        x[:, 1] = 4 + y
        # Shorter texts are filled up by 0, which is no token.
        x[::3, 3:] = 0
        return Split(x, y)

    classes = (2 * task, 2 * task + 1)
    seen = tuple(range(2 * task + 2))
    return TaskData(task, classes, seen, split(), split())


@pytest.mark.parametrize(
    "network",
    [
        {"name": "transformer", "dim": 4, "heads": 2, "layers": 1},
        {"name": "gru", "hidden": 4, "embedding": 3},
    ],
    ids=lambda network: network["name"],
)
@pytest.mark.parametrize("path", ["adaptive", "full"])
def test_a_step_through_embedding_and_attention_equals_the_plain_reference(
    network, path
):
    torch.manual_seed(0)
    sample = SampleSpec("tokens", (5,), "int32", vocabulary=12)
    model = build_model(ModelConfig(**network), sample, 8, seed=2).double()
    tasks = [sentences(number) for number in range(4)]
    learner = live(client(model, path=path, margin=0.5), tasks[:-1])
    ours = step(learner, tasks[-1])
    expected, signature, g = reference(learner, model, tasks[:-1], tasks[-1])
    size = np.linalg.norm(g)
    assert ours.numpy() == pytest.approx(expected.numpy(), abs=1e-8 * size)
    # The past tasks do turn this step, else nothing was integrated.
    assert np.linalg.norm(expected.numpy() - g) > 0.1 * size
    assert len(signature) == len(tasks) - 1


def test_a_step_by_coordinates_equals_the_plain_reference(
    tiny_model, tiny_task, monkeypatch
):
    """What large models have: gradients as coordinates of the batch's inputs, found out as they
    are needed."""
    monkeypatch.setattr(
        "fedknow.client.learners.fedknow.traits.factorable",
        functools.partial(factorable, threshold=1),
    )
    torch.manual_seed(0)
    model = tiny_model(hidden=8, classes=10).double()
    tasks = [as_double(tiny_task(number)) for number in range(5)]
    learner = live(client(model, margin=0.05), tasks[:-1], rounds=2)
    ours = step(learner, tasks[-1])
    assert learner._student.traits.factored
    assert learner._student.traits._can_push_forward
    expected, signature, g = reference(learner, model, tasks[:-1], tasks[-1])
    assert (signature @ g < 0).any()
    assert ours.numpy() == pytest.approx(expected.numpy(), abs=1e-10)


@pytest.mark.parametrize("kind", [{}, {"norm": True, "dropout": 0.5}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_paths_train_the_same_client(tiny_model, tiny_task, dtype, kind):
    """In double precision for all its life; in single, where roundings grow from step to step, in
    the next step."""
    reports = {}
    for path in ("full", "adaptive"):
        before = path if dtype is torch.float64 else "full"
        lived = client(tiny_model(classes=14, **kind).to(dtype), path=before)
        task = as_double if dtype is torch.float64 else lambda task: task
        live(lived, [task(tiny_task(number)) for number in range(6)], rounds=2)
        learner = client(tiny_model(classes=14, **kind).to(dtype), path=path)
        learner.load_state_dict(lived.state_dict())
        learner.receive(lived.send())
        reports[path] = step(learner, task(tiny_task(6))), learner.counts()
    (full, all_), (lazy, some) = reports["full"], reports["adaptive"]
    assert (
        float((full - lazy).norm() / full.norm())
        < {torch.float64: 1e-8, torch.float32: 1e-3}[dtype]
    )
    assert (all_["pullbacks"], all_["pushforwards"]) == (7, 0)
    assert some["pullbacks"] <= 7
    assert some["pushforwards"] >= 1
    assert all_.keys() == some.keys()
    assert {name: all_[name] for name in ("violated", "active")} == {
        name: some[name] for name in ("violated", "active")
    }


def test_every_adaptive_step_of_a_training_satisfies_every_task(
    tiny_model, tiny_task, monkeypatch
):
    learner = client(tiny_model(classes=10))
    worst, original = [], LazyQp._turn

    def watched(self, gradient, restored):
        result = original(self, gradient, restored)
        at_body = gradient.at_body
        rows = torch.stack(
            [
                at_body.pullback(p @ restored._head, torch.empty(at_body.size))
                for p in restored._at_logits
            ]
        )
        g = at_body.pullback(gradient._cotangent, torch.empty(at_body.size))
        lengths = (rows.norm(dim=1) * g.norm()).clamp_min(1e-30)
        worst.append(((rows @ result.gradient) / lengths).min().item())
        return result

    monkeypatch.setattr(LazyQp, "_turn", watched)
    live(learner, [tiny_task(number) for number in range(5)], rounds=3)
    assert len(worst) == 3 * 3 * 3  # tasks 2 to 4, rounds, batches
    assert min(worst) >= -1e-5


class _Once(Function):
    """Twice its input; its own derivative cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, at_y):
        return 2 * at_y


class _Opaque(Function):
    """Twice its input; its derivative is computed where autograd does not see it."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, at_y):
        return at_y + torch.from_numpy(at_y.detach().numpy())


@pytest.mark.parametrize("function", [_Once, _Opaque])
def test_bodies_that_cannot_be_asked_are_integrated_in_full(
    tiny_model, tiny_task, caplog, function
):
    class Odd(nn.Module):
        def forward(self, x):
            return function.apply(x)

    model = tiny_model(classes=10)
    model.body.append(Odd())
    learner = client(model)
    with caplog.at_level(logging.WARNING):
        live(learner, [tiny_task(number) for number in range(4)], rounds=2)
    assert (
        len(
            [
                r
                for r in caplog.records
                if "all restored gradients will be computed" in r.message
            ]
        )
        == 1
    )
    adaptive = step(learner, tiny_task(4))
    assert learner.counts()["pullbacks"] == 5
    learner = heir(learner, path="full")
    assert torch.equal(step(learner, tiny_task(4)), adaptive)


def test_an_approximation_costs_three_products_at_most(tiny_model, tiny_task):
    learner = live(
        client(tiny_model(classes=14), integrator="surrogate"),
        [tiny_task(t) for t in range(6)],
        rounds=2,
    )
    report = learner.fit(tiny_task(6), Round(1, 1))
    assert 1 <= report["pullbacks"] <= 2
    assert report["pushforwards"] == 1
    assert report["signature-tasks"] == 6


def test_the_online_dual_costs_a_backward_pass_and_a_product(
    tiny_model, tiny_task
):
    learner = live(
        client(tiny_model(classes=14), integrator="online"),
        [tiny_task(t) for t in range(6)],
        rounds=2,
    )
    report = learner.fit(tiny_task(6), Round(1, 1))
    assert (
        report["pullbacks"],
        report["pushforwards"],
        report["signature-tasks"],
    ) == (
        1,
        1,
        6,
    )
    assert set(learner._integrator.multipliers) == set(range(6))
    again = client(tiny_model(classes=14), integrator="online")
    again.load_state_dict(learner.state_dict())
    assert again._integrator.multipliers == learner._integrator.multipliers
    again.begin(tiny_task(7), Round(1, 1))
    assert (
        again._integrator.multipliers == {}
    )  # another task's samples ask for others
    few = live(
        client(tiny_model(classes=12), integrator="online", k=2),
        [tiny_task(t) for t in range(5)],
    )
    step(few, tiny_task(5))
    assert sorted(few._integrator.multipliers) == sorted(few._selection.chosen)
    assert few.counts()["signature-tasks"] == 2


@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_the_online_dual_ends_at_the_exact_gradient(
    tiny_model, tiny_task, margin
):
    """Steps at one batch and the same weights; the first has only the margin."""
    learner, model, tasks = at_its_fifth_task(tiny_model, tiny_task)
    learner = heir(learner, integrator="online", margin=margin)
    expected, signature, g = reference(learner, model, tasks[:-1], tasks[-1])
    assert (signature @ g < 0).any()
    assert step(learner, tasks[-1]).numpy() == pytest.approx(g, abs=1e-12)
    for _ in range(300):
        ours = step_again(learner, tasks[-1])
    assert torch.allclose(ours, expected, atol=1e-4 * float(np.linalg.norm(g)))


@pytest.mark.parametrize("margin", [0.0, 0.1])
@pytest.mark.parametrize("part", [0.5, 0.6])
def test_gradients_restored_from_a_part_of_the_batch(
    tiny_model, tiny_task, part, margin
):
    """The batch's gradient, integrated with what past tasks ask of its first samples."""
    learner, model, tasks = at_its_fifth_task(tiny_model, tiny_task)
    few = FIRST[: math.ceil(part * len(FIRST))]
    _, _, g = reference(learner, model, tasks[:-1], tasks[-1])
    _, signature, _ = reference(learner, model, tasks[:-1], tasks[-1], few)
    towards = g + margin * signature.sum(0)
    expected = towards + signature.T @ nnls(signature.T, -towards)[0]
    learner = heir(learner, restore_from=part, margin=margin)
    assert step(learner, tasks[-1]).numpy() == pytest.approx(expected, abs=1e-9)


def test_a_part_of_the_batch_is_refused_where_it_would_be_wrong(tiny_model):
    with pytest.raises(ConfigError, match="BatchNorm statistics twice"):
        client(tiny_model(norm=True), restore_from=0.5)
    with pytest.raises(ConfigError, match="set restore_from to 1"):
        client(tiny_model(), restore_from=0.5, integrator="online")


@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_other_integrators_by_their_definition(tiny_model, tiny_task, margin):
    """``sum`` is distillation, ``surrogate`` the nearest gradient that the violated constraints'
    sum allows."""
    learner, model, tasks = at_its_fifth_task(tiny_model, tiny_task)
    _, signature, g = reference(learner, model, tasks[:-1], tasks[-1])
    learner = heir(learner, integrator="sum")
    assert step(learner, tasks[-1]).numpy() == pytest.approx(
        g + signature.sum(0), abs=1e-10
    )
    learner = heir(learner, integrator="surrogate", margin=margin)
    g = g + margin * signature.sum(0)
    ours = step(learner, tasks[-1]).numpy()
    assert learner.counts()["violated"] == (signature @ g < 0).sum()
    violated = signature @ g < 0
    assert violated.any()
    assert ours @ g < g @ g
    v = np.linalg.lstsq(signature[violated].T, ours - g, rcond=None)[0]
    assert (v > 0).all()
    assert g + signature[violated].T @ v == pytest.approx(ours, abs=1e-10)


@pytest.mark.parametrize("integrator", ["qp", "bounded", "surrogate", "sum"])
def test_signature_tasks_are_chosen_before_they_are_integrated(
    tiny_model, tiny_task, integrator
):
    """The batch that chooses among all past tasks makes the step that the chosen ones alone would
    make."""
    tasks = [as_double(tiny_task(number)) for number in range(6)]
    learner = live(
        client(tiny_model(classes=12).double(), integrator=integrator, k=2),
        tasks[:-1],
    )
    ours = step(learner, tasks[-1])
    assert learner.counts()["signature-tasks"] == 2
    assert (
        1 + 5 <= learner.counts()["pullbacks"] <= 1 + 5 + 1 + 2
    )  # its own, all, the margin's, the built ones
    assert len(learner._selection.chosen) == 2
    learner._restorer.answers = {
        task: learner._restorer.answers[task]
        for task in learner._selection.chosen
    }
    assert torch.allclose(step_again(learner, tasks[-1]), ours, atol=1e-12)


def test_one_batch_in_so_many_is_integrated(tiny_model, tiny_task):
    """20 samples in batches of 8: three batches an epoch."""
    counted = []
    for every in (1, 2, 3, 4):
        learner = live(client(tiny_model(), every=every), [tiny_task(0)])
        learner.fit(tiny_task(1), Round(1, 1))
        counted.append(learner._counts.steps)
    assert counted == [3, 1, 1, 0]


def test_memory_is_shared_by_clients_and_holds_nothing_of_theirs(
    tiny_model, tiny_task
):
    """A learner that served others gives the same numbers as one that did not, whatever is left in
    memory."""
    shared = live(
        client(tiny_model(seed=1)), [tiny_task(0), tiny_task(1)], rounds=2
    )
    fresh = client(tiny_model(seed=1))
    fresh.load_state_dict(state := shared.state_dict())
    fresh.receive(body := shared.send())
    shared.load_state_dict({})
    shared.fit(tiny_task(2), Round(1, 3))
    shared.load_state_dict(state)
    shared.receive(body)
    assert torch.equal(step(fresh, tiny_task(2)), step(shared, tiny_task(2)))
