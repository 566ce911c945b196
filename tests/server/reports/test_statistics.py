"""Statistics of comparisons, against SciPy's and published tables."""

import math

import numpy as np
import pytest
from scipy import stats

from fedknow.server.reports.statistics import (
    differences,
    holm,
    rank,
    t_test,
)

DRAWN = np.random.default_rng(0).normal(0.3, 1.0, (20, 5)).tolist()


@pytest.mark.parametrize("values", DRAWN)
def test_t_test_is_scipys(values) -> None:
    assert t_test(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue)


def test_t_test_at_its_ends() -> None:
    assert math.isnan(t_test([]))
    assert math.isnan(t_test([0.5]))
    assert t_test([0.0, 0.0, 0.0]) == 1
    assert t_test([0.5, 0.5, 0.5]) == 0


def test_holm_by_hand() -> None:
    # 4 * 0.01, 3 * 0.02, 2 * 0.025 held up by the one before it, 1 * 0.5.
    assert holm([0.5, 0.01, 0.025, 0.02]) == pytest.approx(
        [0.5, 0.04, 0.06, 0.06]
    )
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []


def test_holm_leaves_out_what_was_not_compared() -> None:
    corrected = holm([math.nan, 0.01, 0.2])
    assert math.isnan(corrected[0])
    assert corrected[1:] == pytest.approx([0.02, 0.2])


def test_differences_are_paired_by_seed() -> None:
    values = {
        "ours": {1: 0.5, 2: 0.7, 3: 0.9},
        # Another order of seeds, one that the reference lacks, and one that failed.
        "near": {3: 0.8, 2: 0.6, 1: 0.4, 4: 0.0},
        "far": {1: 0.1, 2: math.nan, 3: 0.4},
    }
    found = differences(values, "ours")
    assert list(found) == ["near", "far"]
    assert found["near"].estimate.mean == pytest.approx(-0.1)
    assert found["near"].estimate.count == 3
    assert found["far"].estimate.values == pytest.approx((-0.4, -0.5))
    raw = {name: each.p for name, each in found.items()}
    assert found["near"].corrected == pytest.approx(2 * raw["near"])
    assert found["near"].is_significant
    assert found["far"].corrected == pytest.approx(raw["far"])


def test_a_single_seed_decides_nothing() -> None:
    found = differences({"a": {0: 1.0}, "b": {0: 0.0}}, "a")["b"]
    assert math.isnan(found.p)
    assert not found.is_significant


@pytest.mark.parametrize(
    ("methods", "quantile"),
    [(2, 1.960), (5, 2.728), (7, 2.949), (10, 3.164)],
)
def test_critical_difference_is_demsars(methods: int, quantile: float) -> None:
    """Table 5 (a) of Demšar 2006."""
    streams = 6
    drawn = np.random.default_rng(1).random((methods, streams))
    scores = {str(place): row.tolist() for place, row in enumerate(drawn)}
    scale = math.sqrt(methods * (methods + 1) / (6 * streams))
    assert rank(scores).critical / scale == pytest.approx(quantile, abs=1e-3)


def test_ranks_are_friedmans_and_the_best_comes_in_front() -> None:
    drawn = np.random.default_rng(2).random((4, 6)) + np.arange(4)[:, None] / 4
    ranks = rank(dict(zip("abcd", drawn.tolist(), strict=True)))
    expected = stats.rankdata(-drawn, axis=0).mean(1)
    assert ranks.names[0] == "abcd"[int(expected.argmin())]
    assert ranks.means == pytest.approx(sorted(expected))
    assert ranks.p == pytest.approx(stats.friedmanchisquare(*drawn).pvalue)


def test_equals_share_a_rank() -> None:
    ranks = rank({"a": [1.0, 1.0], "b": [1.0, 1.0], "c": [0.0, 0.0]})
    assert ranks.means == pytest.approx((1.5, 1.5, 3))


def test_groups_that_are_alike() -> None:
    streams = 12
    scores = {name: [float(-ord(name))] * streams for name in "abcd"}
    ranks = rank(scores)
    # 2.569 * sqrt(4 * 5 / (6 * 12)) = 1.35: neighbours are alike, others are not.
    assert ranks.critical == pytest.approx(1.354, abs=2e-3)
    assert ranks.alike() == [(0, 1), (1, 2), (2, 3)]
    few = rank({name: each[:2] for name, each in scores.items()})
    assert few.alike() == [(0, 3)]


@pytest.mark.parametrize(
    "scores",
    [{}, {"a": [1.0, 2.0]}, {"a": [1.0], "b": [2.0]}],
)
def test_too_little_to_rank_is_refused(scores) -> None:
    with pytest.raises(ValueError, match="two methods and two streams"):
        rank(scores)


def test_a_missing_score_is_refused() -> None:
    with pytest.raises(ValueError, match="each method on each stream"):
        rank({"a": [1.0, math.nan], "b": [1.0, 2.0]})
