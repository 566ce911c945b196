"""Eq. (3) up to a bound: against SciPy, by hand, in a client's steps, and what memory it takes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from fedknow.client.compute.cost import Meter
from fedknow.client.data.stream import Split, TaskData
from fedknow.client.learners.fedknow.bounded_dual import integrate_within
from fedknow.client.learners.fedknow.learner import FedKnow
from fedknow.client.learners.fedknow.settings import FedKnowSettings
from fedknow.client.learners.frames.learner import Batch, HeadSlice, Round
from fedknow.client.models import build_model
from fedknow.protocols.config import ModelConfig, TrainConfig


class Gradients:
    """Signature gradients that count the sums and products asked of them."""

    def __init__(self, matrix, dtype=torch.float64):
        self.matrix = torch.from_numpy(matrix).to(dtype)
        self.combined = self.multiplied = 0

    def combine(self, weights):
        self.combined += 1
        return torch.from_numpy(weights).to(self.matrix) @ self.matrix

    def products(self, u):
        self.multiplied += 1
        sizes = self.matrix.norm(dim=1) * u.norm()
        return (self.matrix @ u).double().numpy(), sizes.double().numpy()


def solve(tolerance, g, matrix, model, dtype=torch.float64):
    rows = Gradients(matrix, dtype)
    result = integrate_within(
        tolerance,
        torch.from_numpy(g).to(dtype),
        lambda: model,
        rows.combine,
        rows.products,
    )
    assert (result.built, result.multiplied) == (
        rows.combined,
        rows.multiplied,
    )
    return result


@st.composite
def problems(draw):
    """Gradients of any number and length, some parallel, opposite or zero; and a model of them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    k, p = draw(st.integers(1, 14)), draw(st.integers(1, 60))
    lengths = 10 ** rng.uniform(-3, 3, size=(k, 1))
    matrix = rng.normal(size=(k, p)) * lengths
    for row in range(1, k):
        kind = draw(st.sampled_from(["own"] * 6 + [3.0, -1.0, 0.0]))
        if kind != "own":
            matrix[row] = matrix[0] * kind
    g = rng.normal(size=p) * 10 ** rng.uniform(-3, 3)
    g += draw(st.sampled_from([0.0, 1.0, -1.0])) * 10 * matrix.sum(0)
    # The true matrix, one that knows the lengths, one that knows nothing, and one that is wrong.
    other = rng.normal(size=(k, p))
    models = [
        matrix @ matrix.T,
        np.diag((matrix**2).sum(1)),
        np.eye(k),
        other @ other.T,
    ]
    return g, matrix, draw(st.sampled_from(models))


@settings(deadline=None, max_examples=300)
@given(problems(), st.floats(1e-3, 0.999), st.booleans())
def test_no_constraint_is_violated_beyond_the_bound(problem, tolerance, single):
    g, matrix, model = problem
    dtype = torch.float32 if single else torch.float64
    result = solve(tolerance, g, matrix, model, dtype)
    ours = result.gradient.double().numpy()
    rounding = 1e-4 if single else 1e-10
    size = np.linalg.norm(g)
    lengths = np.linalg.norm(matrix, axis=1)
    allowed = tolerance * max(0.0, -(matrix @ g).min())
    assert (matrix @ ours >= -allowed - rounding * lengths * size).all()
    # Eq. (5), with multipliers that Eq. (4) allows.
    assert (result.multipliers >= 0).all()
    terms = size + (result.multipliers * lengths).sum()
    assert ours == pytest.approx(
        g + result.multipliers @ matrix, abs=rounding * terms
    )
    assert result.violated == int((matrix @ g < 0).sum()) or single


@settings(deadline=None, max_examples=300)
@given(problems(), st.floats(1e-3, 0.999))
def test_it_is_as_near_the_exact_result_as_stated(problem, tolerance):
    g, matrix, model = problem
    result = solve(tolerance, g, matrix, model)
    v, _ = nnls(matrix.T, -g, maxiter=1000)
    exact = g + v @ matrix
    off = result.gradient.numpy() - exact
    allowed = tolerance * max(0.0, -(matrix @ g).min())
    slack = result.multipliers @ (matrix @ result.gradient.numpy())
    size = np.linalg.norm(g) ** 2
    assert off @ off <= slack + allowed * v.sum() + 1e-6 * size
    # Never farther from g than it has to be: Eq. (4) falls from round to round, from 0.
    assert np.linalg.norm(result.gradient.numpy() - g) <= 2 * np.linalg.norm(
        exact - g
    ) + 1e-6 * np.linalg.norm(g)


def test_a_gradient_that_violates_nothing_is_left_alone():
    g = torch.ones(4, dtype=torch.float64)
    rows = Gradients(np.eye(4))
    result = integrate_within(0.1, g, None, rows.combine, rows.products)
    assert result.gradient is g
    assert (result.violated, result.built, result.multiplied) == (0, 0, 1)


def test_a_true_model_needs_one_round_and_ends_at_the_exact_result():
    rng = np.random.default_rng(0)
    matrix, g = rng.normal(size=(40, 300)), rng.normal(size=300)
    g -= matrix[:9].sum(0) / 10
    # The model is true up to a factor, as features tell it.
    result = solve(1e-3, g, matrix, 7 * matrix @ matrix.T)
    v, _ = nnls(matrix.T, -g)
    assert (result.built, result.multiplied) == (1, 2)
    assert result.gradient.numpy() == pytest.approx(g + v @ matrix, abs=1e-9)


def test_one_round_by_hand():
    """g = (-4, -3, 1) opposes e_1 and 2 e_2 by 4 and 6. The model goes in the direction (4, 6),
    which makes d = (4, 12, 0) of them."""
    g, matrix = np.array([-4.0, -3.0, 1.0]), np.diag([1.0, 2.0])
    matrix = np.hstack([matrix, np.zeros((2, 1))])
    result = solve(0.7, g, matrix, np.eye(2))
    # <g, d> = -16 - 36 = -52 and <d, d> = 16 + 144 = 160.
    length = 52 / 160
    assert result.gradient.numpy() == pytest.approx(
        [-4 + 4 * length, -3 + 12 * length, 1]
    )
    assert result.multipliers == pytest.approx([4 * length, 6 * length])
    assert (result.violated, result.built) == (2, 1)


def test_a_model_of_nothing_ends_all_the_same():
    """It proposes nothing, so that each round relieves the worst constraint."""
    rng = np.random.default_rng(1)
    matrix, g = rng.normal(size=(6, 20)), rng.normal(size=20)
    result = solve(0.01, g, matrix, np.zeros((6, 6)))
    assert (matrix @ result.gradient.numpy()).min() >= 0.01 * (matrix @ g).min()


def test_a_gradient_whose_square_vanishes_forbids_nothing():
    matrix = np.array([[1e-30, 0.0], [0.0, 1.0]])
    result = solve(0.1, np.array([-1.0, -1.0]), matrix, np.eye(2), torch.float32)
    assert result.gradient.tolist() == [-1.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad):
    g = torch.tensor([1.0, -1.0])
    odd = np.array([bad, -1.0]), np.ones(2)
    with pytest.raises(FloatingPointError, match="not finite"):
        integrate_within(0.1, g, lambda: np.eye(2), None, lambda u: odd)
    fine = np.array([1.0, -1.0]), np.ones(2)
    with pytest.raises(FloatingPointError, match="not finite"):
        integrate_within(
            0.1,
            g,
            lambda: np.eye(2),
            lambda w: torch.tensor([bad, 0.0]),
            lambda u: fine,
        )


def a_client(past, integrator, batch=40):
    """A client with the 6-layer CNN of 100 classes, and so many past tasks that it opposes."""
    model = build_model(ModelConfig(name="cnn6"), (3, 32, 32), 100, 0)
    with torch.no_grad():
        # Undecided, so that all ask for much.
        model.head.weight.mul_(1e-4)
    train = TrainConfig(epochs=1, batch_size=batch, lr=0.01)
    chosen = FedKnowSettings(
        k=100, integrator=integrator, finetune_epochs=0, post_aggregation="off"
    )
    learner = FedKnow(model, train, chosen)
    draws = torch.Generator().manual_seed(past)
    labels = 2 * (torch.arange(batch) % 4 == 3).long()
    images = torch.randn(2, batch, 3, 32, 32, generator=draws)
    splits = [Split(x, labels) for x in images]
    learner.load_state_dict({})
    first = TaskData(0, (0, 1, 2), (0, 1, 2), *splits)
    learner.begin(first, Round(1, 0))
    learner.end_task(first, Round(0, 0))
    known = learner._restorer.knowledge[0]
    for number in range(past):
        # One knowledge serves all: it is not what they know that is measured.
        learner._restorer.knowledge[number] = replace(
            known, classes=(0, 3 + number)
        )
        # The current task is mostly class 0, which each of them finds nowhere.
        doubt = 0.2 * torch.rand(batch, 1, generator=draws)
        learner._restorer.answers[number] = torch.hstack([doubt, 1 - doubt])
    learner._restorer._task = past
    return learner, replace(first, task=past)


def peak(past, integrator):
    """Most bytes of one step's tensors, and how many restored gradients it built."""
    learner, task = a_client(past, integrator)
    learner.begin(task, Round(1, 1))
    learner.model.train()
    head = HeadSlice(task.head, 100)
    index = torch.arange(len(task.train.y))
    batch = Batch(task.train.x, head.labels(task.train.y), index, head)
    torch.manual_seed(0)
    meter = Meter()
    with meter.message(), meter.part():
        learner.gradient(batch)
    return meter.cost.peak, learner.counts()


def test_memory_does_not_grow_with_past_tasks():
    few, counts_few = peak(20, "bounded")
    many, counts_many = peak(80, "bounded")
    assert (counts_few["signature-tasks"], counts_many["signature-tasks"]) == (
        20,
        80,
    )
    # Each of them turned its gradient, else nothing was measured.
    assert counts_few["active"] > 1 < counts_many["active"]
    assert many == pytest.approx(few, rel=0.03)


def test_a_clients_step_keeps_the_bound():
    """All restored gradients are computed for comparison, at the same weights and batch."""
    found = {}
    for integrator in ("bounded", "off"):
        learner, task = a_client(12, integrator, batch=8)
        learner.begin(task, Round(1, 1))
        # No dropout, so that one more pass sees the same body.
        learner.model.eval()
        head = HeadSlice(task.head, 100)
        index = torch.arange(8)
        batch = Batch(task.train.x, head.labels(task.train.y), index, head)
        learner.optimizer.zero_grad()
        learner.gradient(batch)
        body = list(learner.body.parameters())
        found[integrator] = torch.cat([p.grad.flatten() for p in body])
    rows = []
    for number in range(12):
        z = learner.model(task.train.x)
        classes = list(learner._restorer.knowledge[number].classes)
        target = learner._restorer.answers[number]
        loss = -(target * (z[:, classes] / 2).log_softmax(1)).sum(1).mean()
        gradients = torch.autograd.grad(loss, body)
        rows.append(torch.cat([part.flatten() for part in gradients]))
    matrix = torch.stack(rows).double()
    before = matrix @ found["off"].double()
    after = matrix @ found["bounded"].double()
    assert before.min() < 0
    rounding = 1e-5 * matrix.norm(dim=1) * found["off"].double().norm()
    assert (after >= 0.25 * before.min() - rounding).all()


def test_a_tolerance_that_rounding_cannot_keep_is_refused():
    with pytest.raises(ValueError, match="tolerance"):
        FedKnowSettings(tolerance=0.0)
    assert FedKnowSettings(integrator="bounded").tolerance == 0.25
