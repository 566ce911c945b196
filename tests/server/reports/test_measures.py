"""Units by size, and intervals that say no more than the seeds do."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from fedknow.server.reports.groups import Group, interval_note
from fedknow.server.reports.measures import (
    MEASURES,
    duration,
    energy,
    estimate,
    measure_named,
    size,
)

ACCURACY = measure_named("accuracy")


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("knowledge_bytes", 15_500, "15.5 kB"),
        ("knowledge_bytes", 15, "15 B"),
        ("knowledge_bytes", 0, "0 B"),
        ("knowledge_bytes", 999_960, "1.0 MB"),
        ("knowledge_bytes", 999_940, "999.9 kB"),
        ("samples", 12, "12"),
        ("samples", 12_345, "12.3 k"),
        ("flops", 12, "12"),
        ("flops", 4.2e7, "42.0 M"),
        ("flops", 4.2e13, "42.0 T"),
        ("seconds", 0.0042, "4.2 ms"),
        ("seconds", 0.0, "0.0 s"),
        ("seconds", 59.99, "1.0 min"),
        ("seconds", 7200, "2.0 h"),
        ("peak_memory_mb", 302, "302.0 MB"),
        ("peak_memory_mb", 13_100, "13.1 GB"),
        ("energy_joules", 12, "12.0 J"),
        ("accuracy", 0.825, "82.5 %"),
        ("forgetting", -0.1, "-10.0 %"),
        ("forgetting", -0.0001, "0.0 %"),
        ("accuracy", math.nan, "–"),
    ],
)
def test_a_number_is_written_in_a_unit_of_its_size(
    key: str, value: float, text: str
) -> None:
    assert measure_named(key).text(value) == text


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.key)
@pytest.mark.parametrize("exponent", range(13))
def test_no_number_is_written_as_zero(measure, exponent: int) -> None:
    if not measure.is_percentage:
        assert (
            float(measure.text(10.0**exponent).split()[0].replace(",", "")) >= 1
        )


def test_sizes_durations_and_energies() -> None:
    assert (size(0), size(640), size(1_234_567)) == ("0 B", "640 B", "1.2 MB")
    assert (energy(10), energy(12_340)) == ("10.0 J", "12.3 kJ")
    assert [duration(seconds) for seconds in (0.004, 8.3, 125, 12_000)] == [
        "4.0 ms", "8.3 s", "2 min 5 s", "3 h 20 min",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], "–"),
        ([math.nan], "–"),
        ([0.825], "82.5 %"),
        (
            [0.695, 0.955],
            "69.5, 95.5 %",
        ),  # Student's interval would be 82.5 ± 165.2 %
        ([0.695, math.nan, 0.955], "69.5, 95.5 %"),
        ([0.5, 0.51, 0.52], "51.0 ± 2.5 %"),
        ([0.7, 0.9, 0.95], "85.0 (52.1 to 100.0) %"),
        ([0.02, 0.0, 0.01], "1.0 (0.0 to 3.5) %"),
    ],
)
def test_fewer_than_three_seeds_are_shown_one_by_one(
    values: list[float], text: str
) -> None:
    assert estimate(values).text(ACCURACY) == text


def test_an_interval_stays_within_what_the_measure_can_be() -> None:
    point = estimate([0.0, 0.9, 1.0])
    assert point.interval(ACCURACY) == (0.0, 1.0)
    assert (
        point.interval(measure_named("forgetting"))[0] < 0
    )  # tasks may get better
    assert point.interval(measure_named("forgetting"))[1] == 1.0
    assert estimate([1e3, 5e6, 1e3]).interval(measure_named("bytes"))[0] == 0.0
    assert np.isnan(estimate([0.2, 0.9]).interval(ACCURACY)).all()


def test_the_interval_is_students() -> None:
    point = estimate([0.68, 0.69, 0.70])
    assert point.half == pytest.approx(4.302653 * 0.01 / math.sqrt(3))
    assert point.values == (0.68, 0.69, 0.70)


@pytest.mark.parametrize(
    ("counts", "said", "unsaid"),
    [
        ([1, 1], "one seed: no interval", "±"),
        ([2, 2], "below 3 seeds each seed's value", "±"),
        ([3, 4], "mean ± 95 % interval", "below"),
        ([1, 3], "±", "one seed"),
    ],
)
def test_what_stands_for_several_seeds_is_said(
    counts, said: str, unsaid: str
) -> None:
    note = interval_note(
        [Group("a", [SimpleNamespace()] * count) for count in counts]
    )
    assert said in note
    assert unsaid not in note
