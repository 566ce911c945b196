"""The integrator that computes what it needs, against plain references in double precision.

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

from fedknow.client.data.stream import Split
from fedknow.client.learners.fedknow.learner import FedKnow, FedKnowSettings
from fedknow.client.learners.fedknow.linearization import (
    Linearization,
    factorable,
    flatten,
    views,
)
from fedknow.client.learners.frames.learner import Batch, HeadSlice, Round
from fedknow.client.learners.frames.projection import (
    integrate,
    integrate_lazily,
    integrate_surrogate,
    step_dual,
)
from fedknow.protocols.config import ConfigError, TrainConfig

# --- the algorithm on matrices
# ------------------------------------------------------------------------------------


class Gradients:
    """Signature gradients that count what is asked of them."""

    def __init__(self, matrix):
        self.matrix = torch.from_numpy(matrix)
        self.rows, self.asked = [], 0

    def build(self, tasks):
        assert not set(tasks) & set(self.rows)
        self.rows += tasks
        return self.matrix[self.rows]

    def products(self, u):
        self.asked += 1
        values = (self.matrix @ u).numpy()
        return values, self.matrix.norm(dim=1).numpy() * float(u.norm())


@st.composite
def problems(draw):
    """Current and signature gradients of any size and number, some parallel, opposite or zero."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    k, p = draw(st.integers(1, 14)), draw(st.integers(1, 60))
    signature = rng.normal(size=(k, p)) * 10 ** rng.uniform(-6, 3, size=(k, 1))
    for row in range(1, k):
        kind = draw(st.sampled_from(["own"] * 6 + ["parallel", "opposite", "zero"]))
        if kind != "own":
            signature[row] = (
                signature[0] * {"parallel": 3.0, "opposite": -1.0, "zero": 0.0}[kind]
            )
    g = rng.normal(size=p) * 10 ** rng.uniform(-6, 3)
    side = draw(st.sampled_from([0.0, 1.0, -1.0]))  # among all, with all, against all
    return g + side * 10 * signature.sum(0), signature


@settings(deadline=None, max_examples=300)
@given(problems())
def test_a_working_set_ends_at_the_solution_for_all(problem):
    g, signature = torch.from_numpy(problem[0]), Gradients(problem[1])
    result = integrate_lazily(g, len(problem[1]), signature.build, signature.products)
    v, _ = nnls(problem[1].T, -problem[0], maxiter=1000)
    size = np.linalg.norm(problem[0])
    assert result.gradient.numpy() == pytest.approx(
        problem[0] + problem[1].T @ v, abs=1e-6 * size
    )
    assert (result.multipliers >= 0).all()
    assert (
        problem[1] @ result.gradient.numpy()
        >= -1e-7 * size * np.linalg.norm(problem[1], axis=1)
    ).all()
    assert (result.built, result.asked) == (len(signature.rows), signature.asked)
    # One more than a product for each row: the worst there is. Few violated constraints cost
    # few rows.
    assert result.asked <= 1 + result.built <= 1 + len(problem[1])


def test_no_violated_constraint_costs_one_product():
    g = torch.ones(4, dtype=torch.float64)
    signature = Gradients(np.eye(4))
    result = integrate_lazily(g, 4, signature.build, signature.products)
    assert result.gradient is g
    assert (result.violated, result.built, result.asked) == (0, 0, 1)


def test_rows_are_built_as_they_are_found_violated():
    # g = (-1, 1, 1): e_1 is violated; without it, (0, 1, 1), all others hold. One row, found
    # and confirmed.
    signature = Gradients(np.eye(3))
    result = integrate_lazily(
        torch.tensor([-1.0, 1, 1]).double(), 3, signature.build, signature.products
    )
    assert (result.gradient.tolist(), signature.rows) == ([0, 1, 1], [0])
    assert (result.violated, result.built, result.asked) == (1, 1, 2)
    # (1, -1) against (1, 0), (1, 2) and (1, -1): turning from the second, to (6/5, -3/5),
    # leaves the others alone.
    matrix = np.array([[1.0, 0], [1, 2], [1, -1]])
    result = integrate_lazily(
        torch.tensor([1.0, -1]).double(), 3, (s := Gradients(matrix)).build, s.products
    )
    assert result.gradient.tolist() == pytest.approx([1.2, -0.6])
    assert s.rows == [1]
    # (-4, 1) violates (1, 0) alone; turned to (0, 1) it violates (-1, -1), which it did not. Of
    # the three nothing but 0 is left; the third is built, as asking for it would cost as much.
    matrix = np.array([[1.0, 0], [-1, -1], [0, 1]])
    result = integrate_lazily(
        torch.tensor([-4.0, 1]).double(), 3, (s := Gradients(matrix)).build, s.products
    )
    assert result.gradient.tolist() == pytest.approx([0, 0], abs=1e-12)
    assert s.rows == [0, 1, 2]
    assert (result.violated, result.built, result.asked) == (1, 3, 2)


def test_one_signature_gradient_is_built_without_asking():
    result = integrate_lazily(
        torch.tensor([-1.0, 1]),
        1,
        (s := Gradients(np.eye(2, dtype=np.float32)[:1])).build,
        s.products,
    )
    assert (result.gradient.tolist(), result.violated, result.asked) == ([0, 1], 1, 0)


@settings(deadline=None, max_examples=200)
@given(problems())
def test_surrogate_never_opposes_the_sum_and_never_goes_farther_than_needed(problem):
    g, matrix = problem
    size = np.linalg.norm(g)
    result = integrate_surrogate(
        torch.from_numpy(g),
        np.linalg.norm(matrix, axis=1),
        matrix @ g,
        lambda w: torch.from_numpy(w @ matrix),
    )
    ours = result.gradient.numpy()
    assert (result.multipliers >= 0).all()
    assert ours == pytest.approx(g + result.multipliers @ matrix, abs=1e-9 * size)
    sum_ = result.multipliers @ matrix
    assert ours @ sum_ == pytest.approx(
        0, abs=1e-7 * size * max(np.linalg.norm(sum_), 1e-300)
    )
    # A consequence of the constraints: its nearest point is no farther off than theirs.
    exact = integrate(torch.from_numpy(g), torch.from_numpy(matrix)).gradient.numpy()
    assert np.linalg.norm(ours - g) <= np.linalg.norm(exact - g) + 1e-6 * size


def test_surrogate_is_exact_for_one_violated_constraint():
    g, matrix = np.array([-1.0, 1.0]), np.array([[1.0, 0.0], [0.0, 1.0]])
    result = integrate_surrogate(
        torch.from_numpy(g),
        np.ones(2),
        matrix @ g,
        lambda w: torch.from_numpy(w @ matrix),
    )
    assert result.gradient.tolist() == [0, 1]
    assert (result.violated, result.built, result.asked) == (1, 1, 1)


def test_a_dual_step_by_hand():
    """Largest eigenvalue of two unit vectors at cosine 1/2: 1.5."""
    v = step_dual(
        np.array([0.0, 1.0, 0.1]),
        np.array([-2.0, 0.5, 9.0]),
        np.array([1.0, 2.0, 0.0]),
        cosine=0.25,
    )
    assert v == pytest.approx([2 / 1.5, 1 - 0.5 / (1.5 * 4), 0])


@settings(deadline=None)
@given(problems(), st.integers(0, 2**32 - 1))
def test_a_dual_step_never_goes_uphill(problem, seed):
    """Where the cosine is 1 the eigenvalue, k, is the largest that k unit vectors can have."""
    g, signature = problem
    lengths = np.linalg.norm(signature, axis=1)
    unit = signature[lengths > 0] / lengths[lengths > 0, None]
    v = (
        np.random.default_rng(seed).exponential(size=len(signature))
        * np.linalg.norm(g)
        / np.maximum(lengths, 1e-9)
    )
    v[lengths == 0] = 0

    def dual(v):
        w = (v * lengths)[
            lengths > 0
        ]  # Eq. (4) in units in which all gradients have length 1
        return 0.5 * ((w @ unit) ** 2).sum() + w @ (unit @ g)

    for _ in range(5):
        after = step_dual(v, signature @ (g + v @ signature), lengths, cosine=1.0)
        assert (after >= 0).all()
        assert dual(after) <= dual(v) + 1e-9 * (g @ g)
        v = after


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_products_that_are_not_finite_are_refused(bad):
    g, odd = torch.tensor([1.0, -1.0]), np.array([bad, 0.0])
    with pytest.raises(FloatingPointError, match="not finite"):
        integrate_lazily(
            g, 2, lambda tasks: torch.eye(2)[tasks], lambda u: (odd, np.ones(2))
        )
    with pytest.raises(FloatingPointError, match="not finite"):
        integrate_surrogate(g, np.ones(2), odd, lambda w: g)
    with pytest.raises(FloatingPointError, match="not finite"):
        integrate_surrogate(
            g, np.ones(2), np.array([-1.0, 0.0]), lambda w: torch.tensor([bad, 0.0])
        )


# --- the body at a batch
# ------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Convolutions of every kind, and a way around some of them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(4, 4, (3, 1), padding=(1, 0), groups=2, bias=False)
        self.dilated = nn.Conv2d(4, 4, 3, padding="same", dilation=2)
        self.norm, self.plain, self.pool = (
            nn.BatchNorm2d(4),
            nn.BatchNorm2d(4, affine=False),
            nn.MaxPool2d(2),
        )
        self.drop, self.last = nn.Dropout(0.3), nn.Linear(16, 5)

    def forward(self, x):
        x = self.plain(self.stem(x)).relu()
        x = self.pool(self.norm(self.grouped(x)) + self.dilated(x).tanh())
        return self.last(self.drop(x.flatten(1)))


def at_batch(body, x, **kwargs):
    torch.manual_seed(7)
    return Linearization(body, x, **kwargs)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("factor", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_products_are_those_of_the_explicit_jacobian(channels_last, factor, training):
    torch.manual_seed(0)
    body = Residual().double()
    x = torch.randn(6, 2, 8, 8, dtype=torch.float64)
    if channels_last:
        body, x = (
            body.to(memory_format=torch.channels_last),
            x.to(memory_format=torch.channels_last),
        )
    parameters = list(body.parameters())
    factored = factorable(body, x[:2], threshold=1) if factor else frozenset()
    assert (body.last.weight in factored) is factor
    body.train(training)
    x = x[:4]
    statistics = copy.deepcopy(body.state_dict())

    torch.manual_seed(7)
    features = body(x)
    moved = copy.deepcopy(body.state_dict())
    rows = [
        torch.autograd.grad(f, parameters, retain_graph=True)
        for f in features.flatten()
    ]
    jacobian = torch.stack([flatten(row, parameters) for row in rows])

    body.load_state_dict(statistics)
    at = at_batch(body, x, factored=factored)
    assert torch.equal(at.features, features)
    c, d = torch.randn(2, 4, 5, dtype=torch.float64)
    g, h = (
        at.pullback(part, torch.empty(at.size, dtype=x.dtype), forward=part is c)
        for part in (c, d)
    )
    expected_g, expected_h = c.flatten() @ jacobian, d.flatten() @ jacobian
    assert torch.allclose(flatten(at.expand(g), parameters), expected_g, atol=1e-12)
    assert torch.allclose(
        g @ h, expected_g @ expected_h, rtol=1e-10
    )  # coordinates keep inner products
    assert torch.allclose(
        at.pushforward(h).flatten(), jacobian @ expected_h, atol=1e-11
    )
    assert torch.allclose(
        (at.pushforward(h) * c).sum(), g @ h, rtol=1e-10
    )  # the two are adjoint
    assert all(
        torch.equal(value, moved[name]) for name, value in body.state_dict().items()
    )  # statistics moved once
    assert (at.size < jacobian.shape[1]) is factor


def test_views_and_flatten_are_inverse_and_laid_out_as_the_parameters():
    parameters = [
        nn.Parameter(torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.zeros(5)),
    ]
    flat = torch.arange(53.0)
    parts = views(flat, parameters)
    assert [part.stride() for part in parts] == [
        parameter.stride() for parameter in parameters
    ]
    assert torch.equal(flatten(parts, parameters), flat)
    assert torch.equal(flatten([part.contiguous() for part in parts], parameters), flat)


class Shared(nn.Module):
    """One weight used twice, one also used for something else, one for sequences, one plainly."""

    def __init__(self):
        super().__init__()
        self.twice, self.tied, self.tokens, self.plain = (
            nn.Linear(4, 4) for _ in range(4)
        )

    def forward(self, x):
        x = self.twice(self.twice(x.flatten(1)).tanh())
        x = self.tied(x) @ self.tied.weight
        return self.plain(self.tokens(x.view(len(x), 1, 4)).flatten(1))


def test_weights_used_twice_are_not_factored():
    body = Shared()
    x = torch.randn(2, 1, 2, 2)
    assert factorable(body, x, threshold=1) == {body.plain.weight}
    assert factorable(body, x) == frozenset()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_single_and_half_precision_agree_with_double(precision):
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 6),
    )
    x, c = torch.randn(8, 2, 8, 8), torch.randn(8, 6)
    results = []
    for dtype in (torch.float64, torch.float32):
        body.to(dtype)
        context = (
            torch.autocast("cpu", torch.bfloat16)
            if (precision, dtype) == ("bf16", torch.float32)
            else None
        )
        factored = factorable(body, x[:2].to(dtype), threshold=1)
        at = Linearization(body.train(), x.to(dtype), context, factored)
        g = at.pullback(c.to(dtype), torch.empty(at.size, dtype=dtype), forward=True)
        results.append(
            (
                flatten(at.expand(g), list(body.parameters())).double(),
                at.pushforward(g).double(),
            )
        )
    tolerance = {"fp32": 1e-5, "bf16": 3e-2}[precision]
    for exact, ours in zip(*results, strict=True):
        assert float((ours - exact).norm() / exact.norm()) < tolerance


def test_pushforward_needs_a_pullback():
    body = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="pullback"):
        Linearization(body, torch.ones(1, 2)).pushforward(torch.ones(6))


# --- the client
# ---------------------------------------------------------------------------------------------------


def as_double(task):
    return replace(
        task,
        train=Split(task.train.x.double(), task.train.y),
        test=Split(task.test.x.double(), task.test.y),
    )


def client(model, **settings):
    kept = {"rho": 0.3, "finetune_epochs": 1} | settings
    return FedKnow(
        model, TrainConfig(epochs=1, batch_size=8, lr=0.01), FedKnowSettings(**kept)
    )


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
        return flatten(torch.autograd.grad(loss(model(x)), parameters), parameters)

    g = gradient(
        lambda z: F.cross_entropy(z[:, head], torch.searchsorted(torch.tensor(head), y))
    ).numpy()
    rows = []
    for task in tasks:
        knowledge, teacher = (
            learner._knowledge[task.task],
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
    return torch.from_numpy(g + signature.T @ nnls(signature.T, -g)[0]), signature, g


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
        as_double(tiny_task(task, samples=10, seed=seed)) for task in range(past + 1)
    ]
    learner = live(
        client(model, path=path, temperature=temperature, margin=margin), tasks[:-1]
    )
    with torch.no_grad():
        for parameter in model.body.parameters():
            parameter.mul_(scale)  # away from where the past tasks are content
    index = torch.tensor(batch)
    ours = step(learner, tasks[-1], index)
    expected, signature, g = reference(learner, model, tasks[:-1], tasks[-1], index)
    size = np.linalg.norm(g)
    assert ours.numpy() == pytest.approx(expected.numpy(), abs=1e-8 * size)
    assert (
        signature @ ours.numpy() >= -1e-8 * size * np.linalg.norm(signature, axis=1)
    ).all()


def test_a_step_by_coordinates_equals_the_plain_reference(
    tiny_model, tiny_task, monkeypatch
):
    """What large models have: gradients as coordinates of the batch's inputs, found out as they
    are needed."""
    monkeypatch.setattr(
        "fedknow.client.learners.fedknow.learner.factorable",
        functools.partial(factorable, threshold=1),
    )
    torch.manual_seed(0)
    model = tiny_model(hidden=8, classes=10).double()
    tasks = [as_double(tiny_task(number)) for number in range(5)]
    learner = live(client(model, margin=0.05), tasks[:-1], rounds=2)
    ours = step(learner, tasks[-1])
    assert learner._factored
    assert learner._lazy
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
    worst, original = [], FedKnow._integrated

    def watched(self, at_body, own, restored, past):
        result = original(self, at_body, own, restored, past)
        if len(past) > 1:
            head = self.head.weight.detach()
            rows = torch.stack(
                [
                    at_body.pullback(p @ head, torch.empty(at_body.size))
                    for p in restored
                ]
            )
            g = at_body.pullback(own, torch.empty(at_body.size))
            lengths = (rows.norm(dim=1) * g.norm()).clamp_min(1e-30)
            worst.append(((rows @ result.gradient) / lengths).min().item())
        return result

    monkeypatch.setattr(FedKnow, "_integrated", watched)
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
    learner.settings = FedKnowSettings(path="full")
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


def test_the_online_dual_costs_a_backward_pass_and_a_product(tiny_model, tiny_task):
    learner = live(
        client(tiny_model(classes=14), integrator="online"),
        [tiny_task(t) for t in range(6)],
        rounds=2,
    )
    report = learner.fit(tiny_task(6), Round(1, 1))
    assert (report["pullbacks"], report["pushforwards"], report["signature-tasks"]) == (
        1,
        1,
        6,
    )
    assert set(learner._multipliers) == set(range(6))
    again = client(tiny_model(classes=14), integrator="online")
    again.load_state_dict(learner.state_dict())
    assert again._multipliers == learner._multipliers
    again.begin(tiny_task(7), Round(1, 1))
    assert again._multipliers == {}  # another task's samples ask for others
    few = live(
        client(tiny_model(classes=12), integrator="online", k=2),
        [tiny_task(t) for t in range(5)],
    )
    step(few, tiny_task(5))
    assert sorted(few._multipliers) == sorted(few._chosen)
    assert few.counts()["signature-tasks"] == 2


@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_the_online_dual_ends_at_the_exact_gradient(tiny_model, tiny_task, margin):
    """Step after step at one batch and the same weights; the first has no multipliers but the margin."""
    learner, model, tasks = at_its_fifth_task(tiny_model, tiny_task)
    learner.settings = FedKnowSettings(integrator="online", margin=margin)
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
    learner.settings = FedKnowSettings(restore_from=part, margin=margin)
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
    learner.settings = FedKnowSettings(integrator="sum")
    assert step(learner, tasks[-1]).numpy() == pytest.approx(
        g + signature.sum(0), abs=1e-10
    )
    learner.settings = FedKnowSettings(integrator="surrogate", margin=margin)
    g = g + margin * signature.sum(0)
    ours = step(learner, tasks[-1]).numpy()
    assert learner.counts()["violated"] == (signature @ g < 0).sum()
    violated = signature @ g < 0
    assert violated.any()
    assert ours @ g < g @ g
    v = np.linalg.lstsq(signature[violated].T, ours - g, rcond=None)[0]
    assert (v > 0).all()
    assert g + signature[violated].T @ v == pytest.approx(ours, abs=1e-10)


@pytest.mark.parametrize("integrator", ["qp", "surrogate", "sum"])
def test_signature_tasks_are_chosen_before_they_are_integrated(
    tiny_model, tiny_task, integrator
):
    """The batch that chooses among all past tasks makes the step that the chosen ones alone would
    make."""
    tasks = [as_double(tiny_task(number)) for number in range(6)]
    learner = live(
        client(tiny_model(classes=12).double(), integrator=integrator, k=2), tasks[:-1]
    )
    ours = step(learner, tasks[-1])
    assert learner.counts()["signature-tasks"] == 2
    assert (
        1 + 5 <= learner.counts()["pullbacks"] <= 1 + 5 + 1 + 2
    )  # its own, all, the margin's, the built ones
    assert len(learner._chosen) == 2
    learner._answers = {task: learner._answers[task] for task in learner._chosen}
    assert torch.allclose(step_again(learner, tasks[-1]), ours, atol=1e-12)


def test_one_batch_in_so_many_is_integrated(tiny_model, tiny_task):
    """20 samples in batches of 8: three batches an epoch."""
    counted = []
    for every in (1, 2, 3, 4):
        learner = live(client(tiny_model(), every=every), [tiny_task(0)])
        learner.fit(tiny_task(1), Round(1, 1))
        counted.append(learner._steps)
    assert counted == [3, 1, 1, 0]


def test_memory_is_shared_by_clients_and_holds_nothing_of_theirs(tiny_model, tiny_task):
    """A learner that served others gives the same numbers as one that did not, whatever is left in
    memory."""
    shared = live(client(tiny_model(seed=1)), [tiny_task(0), tiny_task(1)], rounds=2)
    fresh = client(tiny_model(seed=1))
    fresh.load_state_dict(state := shared.state_dict())
    fresh.receive(body := shared.send())
    shared.load_state_dict({})
    shared.fit(tiny_task(2), Round(1, 3))
    shared.load_state_dict(state)
    shared.receive(body)
    assert torch.equal(step(fresh, tiny_task(2)), step(shared, tiny_task(2)))
