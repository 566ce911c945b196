"""The integrators' arithmetic on matrices, against SciPy and by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from fedknow.client.learners.fedknow.integrator import (
    Bounded,
    ExactQp,
    LazyQp,
    Off,
    OnlineDual,
    Sum,
    Surrogate,
    integrator_for,
)
from fedknow.client.learners.fedknow.partial_duals import (
    integrate_lazily,
    integrate_surrogate,
    step_dual,
)
from fedknow.client.learners.fedknow.settings import FedKnowSettings
from fedknow.client.learners.frames.projection import integrate


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
        kind = draw(
            st.sampled_from(["own"] * 6 + ["parallel", "opposite", "zero"])
        )
        if kind != "own":
            signature[row] = (
                signature[0]
                * {"parallel": 3.0, "opposite": -1.0, "zero": 0.0}[kind]
            )
    g = rng.normal(size=p) * 10 ** rng.uniform(-6, 3)
    side = draw(
        st.sampled_from([0.0, 1.0, -1.0])
    )  # among all, with all, against all
    return g + side * 10 * signature.sum(0), signature


@settings(deadline=None, max_examples=300)
@given(problems())
def test_a_working_set_ends_at_the_solution_for_all(problem):
    g, signature = torch.from_numpy(problem[0]), Gradients(problem[1])
    result = integrate_lazily(
        g, len(problem[1]), signature.build, signature.products
    )
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
    assert (result.built, result.multiplied) == (
        len(signature.rows),
        signature.asked,
    )
    # One more than a product for each row: the worst there is. Few violated constraints cost
    # few rows.
    assert result.multiplied <= 1 + result.built <= 1 + len(problem[1])


def test_no_violated_constraint_costs_one_product():
    g = torch.ones(4, dtype=torch.float64)
    signature = Gradients(np.eye(4))
    result = integrate_lazily(g, 4, signature.build, signature.products)
    assert result.gradient is g
    assert (result.violated, result.built, result.multiplied) == (0, 0, 1)


def test_rows_are_built_as_they_are_found_violated():
    # g = (-1, 1, 1): e_1 is violated; without it, (0, 1, 1), all others hold. One row, found
    # and confirmed.
    signature = Gradients(np.eye(3))
    result = integrate_lazily(
        torch.tensor([-1.0, 1, 1]).double(),
        3,
        signature.build,
        signature.products,
    )
    assert (result.gradient.tolist(), signature.rows) == ([0, 1, 1], [0])
    assert (result.violated, result.built, result.multiplied) == (1, 1, 2)
    # (1, -1) against (1, 0), (1, 2) and (1, -1): turning from the second, to (6/5, -3/5),
    # leaves the others alone.
    matrix = np.array([[1.0, 0], [1, 2], [1, -1]])
    result = integrate_lazily(
        torch.tensor([1.0, -1]).double(),
        3,
        (s := Gradients(matrix)).build,
        s.products,
    )
    assert result.gradient.tolist() == pytest.approx([1.2, -0.6])
    assert s.rows == [1]
    # (-4, 1) violates (1, 0) alone; turned to (0, 1) it violates (-1, -1), which it did not. Of
    # the three nothing but 0 is left; the third is built, as asking for it would cost as much.
    matrix = np.array([[1.0, 0], [-1, -1], [0, 1]])
    result = integrate_lazily(
        torch.tensor([-4.0, 1]).double(),
        3,
        (s := Gradients(matrix)).build,
        s.products,
    )
    assert result.gradient.tolist() == pytest.approx([0, 0], abs=1e-12)
    assert s.rows == [0, 1, 2]
    assert (result.violated, result.built, result.multiplied) == (1, 3, 2)


def test_one_signature_gradient_is_built_without_asking():
    result = integrate_lazily(
        torch.tensor([-1.0, 1]),
        1,
        (s := Gradients(np.eye(2, dtype=np.float32)[:1])).build,
        s.products,
    )
    assert (result.gradient.tolist(), result.violated, result.multiplied) == (
        [0, 1],
        1,
        0,
    )


@settings(deadline=None, max_examples=200)
@given(problems())
def test_surrogate_never_opposes_the_sum_and_never_goes_farther_than_needed(
    problem,
):
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
    exact = integrate(
        torch.from_numpy(g), torch.from_numpy(matrix)
    ).gradient.numpy()
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
    assert (result.violated, result.built, result.multiplied) == (1, 1, 1)


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
            g,
            np.ones(2),
            np.array([-1.0, 0.0]),
            lambda w: torch.tensor([bad, 0.0]),
        )


@pytest.mark.parametrize(
    ("chosen", "kind"),
    [
        ({}, LazyQp),
        ({"path": "full"}, ExactQp),
        ({"integrator": "bounded"}, Bounded),
        ({"integrator": "surrogate"}, Surrogate),
        ({"integrator": "online"}, OnlineDual),
        ({"integrator": "sum"}, Sum),
        ({"integrator": "off", "path": "full"}, Off),
    ],
)
def test_settings_choose_the_integrator(chosen, kind):
    assert type(integrator_for(FedKnowSettings(**chosen))) is kind


def test_multipliers_are_kept_by_task():
    integrator = integrator_for(FedKnowSettings(integrator="online"))
    integrator.load({"3": 0.5})
    assert integrator.multipliers == {3: 0.5}
    assert integrator.state() == {"3": 0.5}
