"""Every number here was worked out by hand from the formulas in the docstrings."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedknow.server.run import metrics

NAN = np.nan
# accuracy[client, seen, trained]: two clients, three tasks
A = np.array(
    [
        [[0.8, 0.6, 0.5], [NAN, 0.9, 0.7], [NAN, NAN, 1.0]],
        [[0.4, 0.4, 0.3], [NAN, 0.5, 0.6], [NAN, NAN, 0.2]],
    ]
)
W = np.array([[10.0, 20.0, 30.0], [30.0, 20.0, 10.0]])


def test_task_accuracy_pools_the_clients_samples():
    # task 0 after task 0: (10 * .8 + 30 * .4) / 40
    expected = [[0.5, 0.45, 0.35], [NAN, 0.7, 0.65], [NAN, NAN, 0.8]]
    np.testing.assert_allclose(metrics.task_accuracy(A, W), expected)
    np.testing.assert_allclose(metrics.learned(A, W), [0.5, 0.7, 0.8])


def test_average_accuracy_is_per_client_first():
    # after task 1: client 0 (.6 + .9) / 2 = .75 with 30 samples, client 1 (.4 + .5) / 2 = .45
    # with 50 after task 2: (.5 + .7 + 1) / 3 with 60 samples, (.3 + .6 + .2) / 3 with 60
    expected = [0.5, (30 * 0.75 + 50 * 0.45) / 80, (2.2 / 3 + 1.1 / 3) / 2]
    np.testing.assert_allclose(metrics.average_accuracy(A, W), expected)


def test_tasks_that_are_not_learned_yet_do_not_count_in_the_average():
    """Forward scoring measures them too."""
    with_later = A.copy()
    with_later[np.isnan(A)] = 0.123
    np.testing.assert_allclose(
        metrics.average_accuracy(with_later, W), metrics.average_accuracy(A, W)
    )


def test_the_margin_of_a_sample_by_hand():
    """Two of four clients; gaps are 10 (.8 - .5) / 20 = .15 and 30 (.4 - .5) / 20 = -.15."""
    margin = metrics.sampling_margin(A, W, 4)
    variance = 2 * 0.15**2
    expected = 1.96 * np.sqrt((1 - 2 / 4) * variance / 2)
    assert margin[0] == pytest.approx(expected)
    # All clients are no sample, and one client says nothing of others.
    np.testing.assert_allclose(metrics.sampling_margin(A, W, 2), 0, atol=1e-12)
    assert np.isnan(metrics.sampling_margin(A[:1], W[:1], 4)).all()


def test_nine_in_ten_samples_have_the_truth_within_their_margin():
    """95 % by design; 200 samples of 60 among 600 clients."""
    draw = np.random.default_rng(0)
    accuracy = draw.beta(4, 2, (600, 1, 1))
    weights = draw.integers(20, 80, (600, 1)).astype(float)
    truth = metrics.average_accuracy(accuracy, weights)[0]
    hits = 0
    for _ in range(200):
        chosen = draw.choice(600, 60, replace=False)
        sample = np.full_like(accuracy, NAN)
        sample[chosen] = accuracy[chosen]
        estimate = metrics.average_accuracy(sample, weights)[0]
        margin = metrics.sampling_margin(sample, weights, 600)[0]
        hits += abs(estimate - truth) <= margin
    assert 180 <= hits <= 199


def test_forgetting_in_three_forms():
    np.testing.assert_allclose(
        metrics.forgetting(A, W), [NAN, 0.05, (0.15 + 0.05) / 2]
    )
    np.testing.assert_allclose(
        metrics.relative_forgetting(A, W), [NAN, 0.1, (0.3 + 0.05 / 0.7) / 2]
    )
    np.testing.assert_allclose(
        metrics.max_forgetting(A, W), [NAN, 0.05, (0.15 + 0.05) / 2]
    )
    np.testing.assert_allclose(
        metrics.backward_transfer(A, W), [NAN, -0.05, -0.1]
    )


def test_forgetting_from_the_best_sees_a_peak_that_forgetting_does_not():
    a = np.array([[[0.5, 0.9, 0.6], [NAN, 1.0, 1.0], [NAN, NAN, 1.0]]])
    w = np.ones((1, 3))
    np.testing.assert_allclose(metrics.forgetting(a, w), [NAN, -0.4, -0.05])
    np.testing.assert_allclose(metrics.max_forgetting(a, w), [NAN, -0.4, 0.15])


def test_a_task_never_learned_has_nothing_to_lose_in_relative_terms():
    a = np.array([[[0.0, 0.2, 0.1], [NAN, 0.8, 0.4], [NAN, NAN, 1.0]]])
    np.testing.assert_allclose(
        metrics.relative_forgetting(a, np.ones((1, 3))), [NAN, NAN, 0.5]
    )


def test_forward_transfer():
    a = np.array([[[0.8, 0.8, 0.8], [0.4, 0.9, 0.9], [0.3, 0.5, 0.9]]])
    untrained = np.array([[0.1, 0.2, 0.25]])
    # a(0, 1) - b(1) = .2; a(1, 2) - b(2) = .25
    np.testing.assert_allclose(
        metrics.forward_transfer(a, np.ones((1, 3)), untrained), [NAN, 0.2, 0.225]
    )
    assert np.isnan(metrics.forward_transfer(A, W, np.full((2, 3), NAN))).all()


def test_local_global_gap():
    shared = A - 0.1
    np.testing.assert_allclose(
        metrics.local_global_gap(A, shared, W), [0.1, 0.1, 0.1]
    )


def test_a_client_that_was_not_scored_is_left_out():
    a = A.copy()
    a[1] = NAN
    np.testing.assert_allclose(
        metrics.average_accuracy(a, W), [0.8, 0.75, 2.2 / 3]
    )
    np.testing.assert_allclose(
        metrics.forgetting(a, W), [NAN, 0.2, (0.3 + 0.2) / 2]
    )
    assert np.isnan(metrics.average_accuracy(np.full_like(A, NAN), W)).all()


def test_unfinished_runs_have_numbers_up_to_where_they_are():
    a = A.copy()
    a[:, :, 2] = NAN
    np.testing.assert_allclose(
        metrics.average_accuracy(a, W)[:2], metrics.average_accuracy(A, W)[:2]
    )
    assert np.isnan(metrics.average_accuracy(a, W)[2])
    assert np.isnan(metrics.forgetting(a, W)[2])


@st.composite
def runs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    clients, tasks = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    weights = draw(
        hnp.arrays(
            np.float64, (clients, tasks), elements=st.integers(1, 50).map(float)
        )
    )
    correct = draw(
        hnp.arrays(np.float64, (clients, tasks, tasks), elements=st.floats(0, 1))
    )
    accuracy = np.floor(correct * weights[:, :, None]) / weights[:, :, None]
    accuracy[:, np.tril(np.ones((tasks, tasks), bool), -1)] = (
        np.nan
    )  # tasks that come later
    return accuracy, weights


@given(runs())
def test_averages_lie_between_the_extremes(run):
    a, w = run
    averages = metrics.average_accuracy(a, w)
    for m, value in enumerate(averages):
        seen = a[:, : m + 1, m]
        assert seen.min() - 1e-12 <= value <= seen.max() + 1e-12


@given(runs())
def test_order_of_clients_and_scale_of_weights_do_not_matter(run):
    a, w = run
    for metric in (
        metrics.average_accuracy,
        metrics.forgetting,
        metrics.relative_forgetting,
        metrics.max_forgetting,
    ):
        np.testing.assert_allclose(
            metric(a[::-1], w[::-1]), metric(a, w), atol=1e-12
        )
        np.testing.assert_allclose(metric(a, 3 * w), metric(a, w), atol=1e-12)


@given(runs())
def test_relations_between_the_metrics(run):
    a, w = run
    np.testing.assert_allclose(
        metrics.backward_transfer(a, w), -metrics.forgetting(a, w), atol=1e-12
    )
    later = slice(1, None)
    assert (
        metrics.max_forgetting(a, w)[later]
        >= metrics.forgetting(a, w)[later] - 1e-12
    ).all()
    assert np.isnan(metrics.forgetting(a, w)[0])
    constant = np.where(np.isnan(a), np.nan, 0.5)
    np.testing.assert_allclose(
        metrics.forgetting(constant, w)[later], 0, atol=1e-12
    )
    np.testing.assert_allclose(metrics.average_accuracy(constant, w), 0.5)


@given(runs(), st.floats(0.01, 1))
def test_relative_forgetting_does_not_depend_on_the_level(run, scale):
    a, w = run
    np.testing.assert_allclose(
        metrics.relative_forgetting(a * scale, w),
        metrics.relative_forgetting(a, w),
        rtol=1e-6,
        atol=1e-9,
    )


@pytest.mark.parametrize(
    "metric",
    [metrics.average_accuracy, metrics.task_accuracy, metrics.forgetting],
)
def test_inputs_are_left_alone(metric):
    a, w = A.copy(), W.copy()
    metric(a, w)
    np.testing.assert_array_equal(a, A)
    np.testing.assert_array_equal(w, W)


def test_robust_averages_believe_no_single_client():
    # Five clients, one task: four are right on 0.5 .. 0.8, and one claims 1.0 of 2**62 samples.
    a = np.array([0.5, 0.6, 0.7, 0.8, 1.0]).reshape(5, 1, 1)
    w = np.array([10.0, 10.0, 10.0, 10.0, 2.0**62]).reshape(5, 1)
    assert metrics.average_accuracy(a, w)[0] == pytest.approx(1.0)
    assert metrics.median_accuracy(a, w)[0] == pytest.approx(0.7)
    assert metrics.trimmed_accuracy(a, w)[0] == pytest.approx(0.7)
    nobody = np.full((2, 1, 1), np.nan)
    assert np.isnan(metrics.median_accuracy(nobody, np.ones((2, 1))))
    assert np.isnan(metrics.trimmed_accuracy(nobody, np.ones((2, 1))))


def test_robust_averages_leave_out_what_was_not_measured():
    a = np.array([[[0.2]], [[np.nan]], [[0.4]]])
    w = np.ones((3, 1))
    assert metrics.median_accuracy(a, w)[0] == pytest.approx(0.3)
    assert metrics.trimmed_accuracy(a, w)[0] == pytest.approx(0.3)
