"""The integrator against hand-solved cases, its defining properties, and SciPy's non-negative
least squares."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from fedknow.client.learners.frames import projection
from fedknow.client.learners.frames.projection import (
    integrate,
    integrate_one,
    solve_dual,
)


def project_by_nnls(g: np.ndarray, signature: np.ndarray) -> np.ndarray:
    """Eq. (3) by another road: the dual is ``min_{v >= 0} ||G^T v + g||``."""
    v, _ = nnls(signature.T, -g, maxiter=1000)
    return g + signature.T @ v


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    seed = draw(st.integers(0, 2**32 - 1))
    k, p = draw(st.integers(1, 12)), draw(st.integers(1, 60))
    rng = np.random.default_rng(seed)
    signature = rng.normal(size=(k, p)) * 10 ** rng.uniform(-6, 3, size=(k, 1))
    if draw(st.booleans()) and k > 1:
        signature[-1] = signature[0] * draw(
            st.sampled_from([1.0, 3.0, -1.0])
        )  # parallel or opposite
    if draw(st.booleans()):
        signature[0] = 0
    g = rng.normal(size=p) * 10 ** rng.uniform(-6, 3)
    if draw(st.booleans()):
        g = -signature.sum(0) + 0.1 * g  # opposes everything
    return g, signature


def test_sweeps_take_away_what_the_active_set_violates(monkeypatch) -> None:
    gram = np.array([[2.0, 1.0], [1.0, 2.0]])
    products = np.array([-1.0, -1.0])
    monkeypatch.setattr(projection, "_active_set", lambda q, b: 0 * b)
    # Without a multiplier both constraints are violated by one.
    assert (gram @ solve_dual(gram, products) + products >= -1e-9).all()


def test_no_violated_constraint_leaves_the_gradient_untouched() -> None:
    g = torch.tensor([1.0, 2.0])
    result = integrate(g, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert result.gradient is g
    assert result.violated == 0


def test_one_violated_constraint_by_hand() -> None:
    # g = (1, -1) against g_1 = (0, 2): the part along g_1 is removed, v = -<g, g_1> / |g_1|^2 =
    # 2 / 4.
    result = integrate(torch.tensor([1.0, -1.0]), torch.tensor([[0.0, 2.0]]))
    assert result.gradient.tolist() == [1.0, 0.0]
    assert result.multipliers.tolist() == [0.5]
    assert result.violated == 1


def test_two_constraints_of_which_one_becomes_idle_by_hand() -> None:
    # g = (-2, -1), g_1 = (1, 0), g_2 = (1, 1). Both are violated; projecting onto both
    # half-planes gives (0, 0): at g' = 0, v solves v_1 + v_2 = 2, v_2 = 1.
    result = integrate(
        torch.tensor([-2.0, -1.0]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    )
    assert result.gradient.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert result.multipliers == pytest.approx([1.0, 1.0])
    # g = (-2, 1): only g_1 and g_2 violated again, but removing g_1 alone gives (0, 1), which
    # g_2 accepts.
    result = integrate(
        torch.tensor([-2.0, 1.0]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    )
    assert result.gradient.tolist() == pytest.approx([0.0, 1.0], abs=1e-6)
    assert result.multipliers == pytest.approx([2.0, 0.0])
    assert result.violated == 2


def test_opposing_unit_gradients_end_at_zero_not_below() -> None:
    # The authors' added constant left <g', g_1> = -1e-3 here.
    result = integrate(torch.tensor([-1.0, 0.0]), torch.tensor([[1.0, 0.0]]))
    assert result.gradient.tolist() == [0.0, 0.0]


@settings(deadline=None, max_examples=300)
@given(problems())
def test_equals_scipys_nnls_and_satisfies_every_constraint(
    problem: tuple[np.ndarray, np.ndarray],
) -> None:
    g, signature = problem
    result = integrate(torch.from_numpy(g), torch.from_numpy(signature))
    ours = result.gradient.numpy()
    size = np.linalg.norm(g)
    assert ours == pytest.approx(project_by_nnls(g, signature), abs=1e-6 * size)
    assert (result.multipliers >= 0).all()
    lengths = np.linalg.norm(signature, axis=1) * size
    assert (signature @ ours >= -1e-7 * lengths).all()
    # Nearest: the step taken stands at a right angle to the result (complementary slackness).
    assert ours @ (ours - g) == pytest.approx(0, abs=1e-6 * size**2)


@settings(deadline=None, max_examples=100)
@given(problems(), st.sampled_from([1e-12, 1e-5, 1e5, 1e12]))
def test_answer_does_not_depend_on_scale(
    problem: tuple[np.ndarray, np.ndarray], scale: float
) -> None:
    g, signature = problem
    one = integrate(torch.from_numpy(g), torch.from_numpy(signature)).gradient
    other = integrate(
        torch.from_numpy(g), torch.from_numpy(signature * scale)
    ).gradient
    bigger = (
        integrate(
            torch.from_numpy(g * scale), torch.from_numpy(signature)
        ).gradient
        / scale
    )
    tolerance = 1e-6 * float(np.linalg.norm(g))
    assert torch.allclose(one, other, rtol=0, atol=tolerance)
    assert torch.allclose(one, bigger, rtol=0, atol=tolerance)


def test_single_precision_constraints_hold_at_the_size_of_a_network() -> None:
    generator = torch.Generator().manual_seed(0)
    signature = (
        torch.randn(10, 500_000, generator=generator)
        * torch.logspace(-4, 1, 10)[:, None]
    )
    g = -signature.sum(0) + torch.randn(500_000, generator=generator)
    result = integrate(g, signature)
    products = (signature.double() @ result.gradient.double()).numpy()
    lengths = (signature.norm(dim=1) * g.norm()).double().numpy()
    assert (products >= -1e-5 * lengths).all()


@pytest.mark.parametrize("g", [[1.0, 0.5], [-1.0, 0.5], [0.0, 0.0]])
def test_closed_form_for_one_constraint(g: list[float]) -> None:
    other = torch.tensor([2.0, 1.0])
    assert torch.allclose(
        integrate_one(torch.tensor(g), other),
        integrate(torch.tensor(g), other[None]).gradient,
        atol=1e-6,
    )


def test_vanishing_gradients_forbid_nothing() -> None:
    g = torch.tensor([1.0, -1.0])
    assert torch.equal(integrate(g, torch.zeros(3, 2)).gradient, g)
    assert torch.equal(integrate_one(g, torch.zeros(2)), g)
    assert solve_dual(np.zeros((2, 2)), np.zeros(2)).tolist() == [0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_refused(bad: float) -> None:
    g, odd = torch.tensor([1.0, -1.0]), torch.tensor([bad, 0.0])
    for call in (
        lambda: integrate(g, odd[None]),
        lambda: integrate(odd, g[None]),
        lambda: integrate_one(g, odd),
        lambda: integrate_one(odd, g),
        lambda: solve_dual(np.array([[bad]]), np.array([-1.0])),
    ):
        with pytest.raises(FloatingPointError, match="not finite"):
            call()


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1.0, 1e15])
def test_single_precision_scales(scale: float) -> None:
    """Down to where squares vanish the constraint holds; below, a gradient counts as none."""
    g, other = torch.tensor([1.0, -1.0]), torch.tensor([0.0, 2.0]) * scale
    expected = [1.0, -1.0] if scale < 1e-19 else [1.0, 0.0]
    assert integrate(g, other[None]).gradient.tolist() == pytest.approx(
        expected, abs=1e-6
    )
    assert integrate_one(g, other).tolist() == pytest.approx(expected, abs=1e-6)
