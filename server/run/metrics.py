"""Metrics of continual learning, computed from raw accuracies alone.

Everything starts from one array, ``accuracy[client, seen, trained]``: the share of client
``i``'s test samples of task ``u`` that it classified rightly after task ``m`` was finished
(float64; NaN: not measured). ``weights[client, seen]`` are the sizes of those test sets. Tasks
count from 0. Two ways of averaging over clients are used, and no others:

* the accuracy of one task, ``a(m, u) = sum_i n_i(u) a_i(m, u) / sum_i n_i(u)``, is the accuracy
  over the test samples of all clients taken together (:func:`task_accuracy`); forgetting and
  transfer are defined on it;
* the average accuracy is taken per client first and then over clients, as the FedKNOW paper does it
  (:func:`average_accuracy`).

What was not measured is left out of a mean; a mean of nothing is NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "average_accuracy",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "learned",
    "local_global_gap",
    "max_forgetting",
    "median_accuracy",
    "relative_forgetting",
    "sampling_margin",
    "task_accuracy",
    "trimmed_accuracy",
]

TRIMMED = 0.2
"""Share of clients that :func:`trimmed_accuracy` leaves out at either end."""

Floats = NDArray[np.float64]
_Term = Callable[[Floats, int, int], float]


def average_accuracy(accuracy: Floats, weights: Floats) -> Floats:
    """Average accuracy on all tasks so far, after each task.

    ``A_i(m) = mean over u <= m of a_i(m, u)`` for each client, then ``A(m) = sum_i n_i(m)
    A_i(m) / sum_i n_i(m)`` with ``n_i(m) = sum over u <= m of n_i(u)``, the client's test
    samples of the tasks seen. Source: FedKNOW (Luopan et al., ICDE 2023), as its authors' code
    computes it; without the weights it is ACC of Lopez-Paz and Ranzato, "Gradient Episodic
    Memory" (NeurIPS 2017).

    Parameters
    ----------
    accuracy : float64 [client, seen, trained]
        Values in 0..1.
    weights : float64 [client, seen]
        Test samples.

    Returns
    -------
    float64 [trained]
    """
    means, sizes = _client_means(accuracy, weights)
    return _weighted_mean(means, sizes)


def median_accuracy(accuracy: Floats, weights: Floats) -> Floats:
    """Median over clients of :func:`average_accuracy`'s ``A_i(m)``.

    Each client counts once, so that no claim of a client moves it far.

    Returns
    -------
    float64 [trained]
        NaN where no client was scored.
    """
    return _robust(accuracy, weights, _median)


def sampling_margin(accuracy: Floats, weights: Floats, clients: int) -> Floats:
    """Half the 95 % interval of :func:`average_accuracy` of a sample.

    ``1.96 sqrt((1 - n/N) s^2 / n)`` for ``n`` of ``N`` clients, with the variance ``s^2`` of
    ``d_i = n_i (A_i - A) / mean(n_i)``, as the accuracy is a ratio of two sums. Source: Cochran,
    "Sampling Techniques" (3rd edition, 1977), section 6.4.

    Parameters
    ----------
    accuracy, weights
        As in :func:`average_accuracy`; NaN for clients that are not in the sample.
    clients : int
        All clients, ``N``.

    Returns
    -------
    float64 [trained]
        NaN with fewer than two clients.
    """
    means, sizes = _client_means(accuracy, weights)
    average = _weighted_mean(means, sizes)
    margins = np.full(len(average), np.nan)
    for task, mean in enumerate(average):
        measured = np.isfinite(means[:, task])
        count = int(measured.sum())
        # One client has no spread.
        if count > 1:
            size = sizes[measured, task]
            gaps = size * (means[measured, task] - mean) / size.mean()
            # With all clients measured nobody is left to guess about.
            error = np.sqrt((1 - count / clients) * gaps.var(ddof=1) / count)
            margins[task] = 1.96 * error
    return margins


def trimmed_accuracy(accuracy: Floats, weights: Floats) -> Floats:
    """Mean over clients of ``A_i(m)`` without the extremes.

    A fifth of the clients (:data:`TRIMMED`), rounded down, is left out at either end. Each other
    client counts once.

    Returns
    -------
    float64 [trained]
        NaN where no client was scored.
    """
    return _robust(accuracy, weights, _trimmed_mean)


def _client_means(accuracy: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Average accuracies and test samples, both float64 [client, trained]."""
    seen, trained = accuracy.shape[1:]
    # Only tasks learned so far: with forward scoring there are accuracies of later ones too.
    measured = np.isfinite(accuracy) & (
        np.arange(seen)[:, None] <= np.arange(trained)
    )
    sizes = (measured * weights[:, :, None]).sum(1)
    means = _divide(
        np.where(measured, accuracy, 0.0).sum(1),
        measured.sum(1),
    )
    return means, sizes


def task_accuracy(accuracy: Floats, weights: Floats) -> Floats:
    """Accuracy of each task after each task.

    ``a(m, u) = sum_i n_i(u) a_i(m, u) / sum_i n_i(u)``.

    Returns
    -------
    float64 [seen, trained]
        NaN where no client was scored.
    """
    return _weighted_mean(
        accuracy,
        np.broadcast_to(weights[:, :, None], accuracy.shape),
    )


def learned(accuracy: Floats, weights: Floats) -> Floats:
    """Accuracy of each task when it had just been learned, float64 [seen].

    It is ``a(u, u)``; mammoth calls it A-diag.
    """
    return np.array(np.diagonal(task_accuracy(accuracy, weights)))


def forgetting(accuracy: Floats, weights: Floats) -> Floats:
    """Absolute forgetting after each task.

    ``F(m) = mean over u < m of (a(u, u) - a(m, u))``.

    It is the fall from the accuracy a task had when it was learned (Avalanche's definition),
    hence the negative of :func:`backward_transfer`; below zero, old tasks have become better.

    Returns
    -------
    float64 [trained]
        NaN after the first task, when there is nothing to forget.
    """
    return _over_earlier(accuracy, weights, lambda a, u, m: a[u, u] - a[u, m])


def relative_forgetting(accuracy: Floats, weights: Floats) -> Floats:
    """Relative forgetting after each task.

    ``F(m) = mean over u < m of (a(u, u) - a(m, u)) / a(u, u)``.

    The form that FedKNOW's plots follow (the paper gives no code for it). A task whose accuracy
    was 0 when it was learned has nothing to lose and is left out.

    Returns
    -------
    float64 [trained]
        NaN after the first task.
    """
    return _over_earlier(
        accuracy,
        weights,
        lambda a, u, m: (
            (a[u, u] - a[u, m]) / a[u, u] if a[u, u] else float("nan")
        ),
    )


def max_forgetting(accuracy: Floats, weights: Floats) -> Floats:
    """Forgetting from the best accuracy before, after each task.

    ``F(m) = mean over u < m of (max over u <= l < m of a(l, u) - a(m, u))``.

    Source: Chaudhry et al., "Riemannian Walk for Incremental Learning" (ECCV 2018); mammoth
    reports this one.

    Returns
    -------
    float64 [trained]
        NaN after the first task; never below :func:`forgetting`.
    """
    return _over_earlier(
        accuracy,
        weights,
        lambda a, u, m: _max(a[u, u:m]) - a[u, m],
    )


def backward_transfer(accuracy: Floats, weights: Floats) -> Floats:
    """Backward transfer after each task.

    ``BWT(m) = mean over u < m of (a(m, u) - a(u, u))``.

    Source: Lopez-Paz and Ranzato, "Gradient Episodic Memory" (NeurIPS 2017). Negative: forgetting.

    Returns
    -------
    float64 [trained]
        NaN after the first task.
    """
    return _over_earlier(accuracy, weights, lambda a, u, m: a[u, m] - a[u, u])


def forward_transfer(
    accuracy: Floats, weights: Floats, untrained: Floats
) -> Floats:
    """Forward transfer after each task.

    ``FWT(m) = mean over 1 <= u <= m of (a(u - 1, u) - b(u))``.

    How much better a task goes before it is learned than with the untrained model, whose
    accuracy is ``b(u)``. Source: Lopez-Paz and Ranzato, "Gradient Episodic Memory" (NeurIPS
    2017).

    Parameters
    ----------
    accuracy : float64 [client, seen, trained]
        With the tasks not learned yet (``seen > trained``) measured, which
        ``evaluation.forward`` does.
    weights : float64 [client, seen]
    untrained : float64 [client, seen]
        Accuracy of the model before any training.

    Returns
    -------
    float64 [trained]
        NaN after the first task, and wherever tasks were not scored before they were learned.
    """
    a = task_accuracy(accuracy, weights)
    b = _weighted_mean(untrained, weights)
    # Before a task's own training, and against a model that has had none.
    terms = [a[u, u - 1] - b[u] for u in range(1, a.shape[1])]
    return np.array([_mean(terms[:m]) for m in range(a.shape[1])])


def local_global_gap(personal: Floats, shared: Floats, weights: Floats) -> Floats:
    """Average accuracy of clients' own models minus the global model's.

    It says what personalisation is worth.

    Parameters
    ----------
    personal, shared : float64 [client, seen, trained]
        Accuracy with the parameters a client keeps to itself, and with their mean in their place.

    Returns
    -------
    float64 [trained]
    """
    return average_accuracy(personal, weights) - average_accuracy(shared, weights)


def _over_earlier(accuracy: Floats, weights: Floats, term: _Term) -> Floats:
    """Average ``term(a, u, m)`` over the tasks ``u`` before each ``m``.

    Here ``a[u, m]`` is the task accuracy.
    """
    a = task_accuracy(accuracy, weights)
    means = []
    for m in range(a.shape[1]):
        means.append(_mean([term(a, u, m) for u in range(m)]))
    return np.array(means)


def _robust(
    accuracy: Floats,
    weights: Floats,
    average: Callable[[Floats], float],
) -> Floats:
    """Average the clients' accuracies that were measured, after each task."""
    means, _ = _client_means(accuracy, weights)
    measured = [column[np.isfinite(column)] for column in means.T]
    return np.array(
        [average(column) if len(column) else np.nan for column in measured]
    )


def _median(values: Floats) -> float:
    return float(np.median(values))


def _trimmed_mean(values: Floats) -> float:
    # Rounded down, so that of few clients none is left out.
    left_out = int(TRIMMED * len(values))
    ordered = np.sort(values)
    return float(ordered[left_out : len(values) - left_out].mean())


def _weighted_mean(values: Floats, weights: Floats) -> Floats:
    """Mean over axis 0 of what is measured."""
    # What was not measured must not weigh.
    weights = np.where(np.isfinite(values), weights, 0.0)
    return _divide(
        (np.nan_to_num(values) * weights).sum(0),
        weights.sum(0),
    )


def _divide(numerator: Floats, denominator: NDArray[np.generic]) -> Floats:
    out = np.full(numerator.shape, np.nan)
    # A mean of nothing is NaN, without NumPy's warning of a division by zero.
    np.divide(
        numerator,
        denominator,
        out=out,
        where=denominator != 0,
    )
    return out


def _mean(terms: list[float]) -> float:
    measured = [float(x) for x in terms if np.isfinite(x)]
    return sum(measured) / len(measured) if measured else float("nan")


def _max(values: Floats) -> float:
    measured = values[np.isfinite(values)]
    return float(measured.max()) if len(measured) else float("nan")
