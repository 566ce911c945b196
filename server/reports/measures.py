"""Numbers of a run: names, units by size, and intervals over seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# Student's t from here, as scipy.stats takes half a second longer to import.
from scipy.special import stdtrit

__all__ = [
    "BYTES",
    "JOULES",
    "MEASURES",
    "PERCENT",
    "SEEDS_FOR_INTERVAL",
    "Estimate",
    "Measure",
    "Scale",
    "available_measures",
    "duration",
    "energy",
    "estimate",
    "measure_named",
    "scale_for",
    "size",
]

SEEDS_FOR_INTERVAL = 3
"""Fewer values than these are shown one by one: an interval of two is too wide to say anything."""


class Scale(NamedTuple):
    """A unit: its size, its name, and its digits after the point."""

    size: float
    name: str
    digits: int = 1

    def text(self, value: float) -> str:
        """Write the number alone, in this unit."""
        number = f"{value / self.size:,.{self.digits}f}"
        is_zero = not number.strip("-0.,")
        # Never "-0.0", which a tiny loss would give.
        return number.removeprefix("-") if is_zero else number


Scales = tuple[Scale, ...]

PERCENT: Scales = (Scale(0.01, "%"),)
BYTES: Scales = (
    Scale(1, "B", 0),
    Scale(1e3, "kB"),
    Scale(1e6, "MB"),
    Scale(1e9, "GB"),
)
JOULES: Scales = (
    Scale(1, "J"),
    Scale(1e3, "kJ"),
    Scale(1e6, "MJ"),
)
_MEGABYTES: Scales = (Scale(1, "MB"), Scale(1e3, "GB"))
_COUNTS: Scales = (
    Scale(1, "", 0),
    Scale(1e3, "k"),
    Scale(1e6, "M"),
)
_SECONDS: Scales = (
    Scale(1e-3, "ms"),
    Scale(1, "s"),
    Scale(60, "min"),
    Scale(3600, "h"),
)
_OPERATIONS: Scales = (
    Scale(1, "", 0),
    Scale(1e3, "k"),
    Scale(1e6, "M"),
    Scale(1e9, "G"),
    Scale(1e12, "T"),
    Scale(1e15, "P"),
)


def scale_for(value: float, scales: Scales) -> Scale:
    """Choose the largest unit in which a value is one or more.

    A value that rounds to one of a larger unit is written in that one: 999,960 bytes are 1.0 MB.
    Zero has no size: it is written in the first unit of one or more.
    """
    # Zero has no size of its own: a plain unit and no prefix.
    if value == 0:
        return next((scale for scale in scales if scale.size >= 1), scales[0])
    largest = scales[0]
    for smaller, scale in itertools.pairwise(scales):
        # Rounded first, so that 999,960 B are 1.0 MB and not 1000.0 kB.
        rounded = round(abs(value) / smaller.size, smaller.digits) * smaller.size
        if rounded >= scale.size:
            largest = scale
    return largest


@dataclass(frozen=True)
class Measure:
    """A number of a run.

    Attributes
    ----------
    key : str
        Its name in files.
    title : str
        Its name for readers.
    scales : tuple of Scale
        The units it is written in, smallest first.
    short : str
        Heading of a narrow column; a measure without one is left to the wide tables.
    lowest, highest : float
        Bounds of the number, and so of its interval.
    """

    key: str
    title: str
    scales: Scales
    short: str = ""
    lowest: float = 0.0
    highest: float = math.inf

    @property
    def is_percentage(self) -> bool:
        """Whether it is a share of something."""
        return self.scales is PERCENT

    def text(
        self,
        value: float,
        half: float = math.nan,
        has_unit: bool = True,
    ) -> str:
        """Write ``value`` or ``value ± half`` in one unit; a dash for NaN."""
        if math.isnan(value):
            return "–"
        scale = scale_for(value, self.scales)
        margin = "" if math.isnan(half) else f" ± {scale.text(half)}"
        return f"{scale.text(value)}{margin}{_suffix(scale, has_unit)}"

    def texts(self, values: Iterable[float], has_unit: bool = True) -> str:
        """Write several values with commas between, in the unit of the largest."""
        numbers = list(values)
        # One unit for the row, or its numbers could not be compared.
        scale = scale_for(max(numbers, key=abs), self.scales)
        return f"{', '.join(map(scale.text, numbers))}{_suffix(scale, has_unit)}"


def _suffix(scale: Scale, has_unit: bool) -> str:
    return f" {scale.name}" if has_unit and scale.name else ""


MEASURES = (
    Measure("accuracy", "Average accuracy", PERCENT, "accuracy", highest=1),
    Measure(
        "accuracy_median",
        "Average accuracy, median client",
        PERCENT,
        highest=1,
    ),
    Measure(
        "accuracy_trimmed",
        "Average accuracy, trimmed mean",
        PERCENT,
        highest=1,
    ),
    Measure(
        "accuracy_global",
        "Average accuracy, global model",
        PERCENT,
        "global",
        highest=1,
    ),
    Measure("gap", "Personal minus global", PERCENT, lowest=-1, highest=1),
    Measure(
        "accuracy_held_out",
        "Average accuracy, people held out",
        PERCENT,
        "people",
        highest=1,
    ),
    Measure(
        "forgetting", "Forgetting", PERCENT, "forgotten", lowest=-1, highest=1
    ),
    Measure(
        "forgetting_relative",
        "Forgetting, relative",
        PERCENT,
        "relative",
        # An accuracy that was near 0 can grow by any factor.
        lowest=-math.inf,
        highest=1,
    ),
    Measure(
        "forgetting_global",
        "Forgetting, global model",
        PERCENT,
        lowest=-1,
        highest=1,
    ),
    Measure(
        "backward_transfer", "Backward transfer", PERCENT, lowest=-1, highest=1
    ),
    Measure(
        "forward_transfer", "Forward transfer", PERCENT, lowest=-1, highest=1
    ),
    Measure("bytes", "Training traffic", BYTES, "traffic"),
    Measure("bytes_extra", "of it beside the model", BYTES),
    Measure("bytes_evaluate", "Traffic of scoring", BYTES),
    Measure("knowledge_bytes", "Kept about past tasks, a client", BYTES, "kept"),
    Measure(
        "server_bytes", "Kept on the server about past tasks, at most", BYTES
    ),
    Measure(
        "samples",
        "Samples learned from, extra epochs and replay included",
        _COUNTS,
        "samples",
    ),
    Measure("flops", "Operations of clients' training", _OPERATIONS),
    Measure("seconds", "Time", _SECONDS, "time"),
    Measure(
        "peak_memory_mb", "Peak memory, all processes of the run", _MEGABYTES
    ),
    Measure(
        "client_memory_bytes",
        "Most memory that a client's training needed",
        BYTES,
    ),
    Measure("virtual_seconds", "Virtual time on the fleet", _SECONDS, "virtual"),
    Measure(
        "communication_seconds", "of it, waiting for messages under way", _SECONDS
    ),
    Measure("energy_joules", "Energy, all devices", JOULES),
)
_BY_KEY = {entry.key: entry for entry in MEASURES}


def measure_named(key: str) -> Measure:
    """Give one of :data:`MEASURES` by its key."""
    return _BY_KEY[key]


def available_measures(values: Iterable[Mapping[str, float]]) -> list[Measure]:
    """List the measures that at least one run has.

    Parameters
    ----------
    values : iterable of mapping
        The measures of each run by key (:meth:`Summary.measures`); NaN where it has none.
    """
    runs = list(values)

    def is_available(key: str) -> bool:
        return not all(math.isnan(run[key]) for run in runs)

    return [measure for measure in MEASURES if is_available(measure.key)]


@dataclass(frozen=True)
class Estimate:
    """A number over seeds.

    Attributes
    ----------
    mean : float
        NaN without a value.
    half : float
        Half the width of Student's 95 % interval; NaN with fewer than two values.
    count : int
        How many values there are.
    values : tuple of float
        The values, NaNs left out.
    """

    mean: float
    half: float
    count: int
    values: tuple[float, ...] = ()

    @property
    def has_interval(self) -> bool:
        """Whether there are enough values for an interval to be shown."""
        return self.count >= SEEDS_FOR_INTERVAL

    def interval(self, measure: Measure) -> tuple[float, float]:
        """Give the 95 % interval within bounds; NaNs where none is shown."""
        if not self.has_interval:
            return math.nan, math.nan
        # No interval says that an accuracy may be above 100 %.
        low = max(measure.lowest, self.mean - self.half)
        return low, min(measure.highest, self.mean + self.half)

    def text(self, measure: Measure, has_unit: bool = True) -> str:
        """Write the number as a person reads it.

        With fewer than three seeds each seed's value stands: ``"82.5, 97.5 %"``. With three or
        more it is ``"82.5 ± 4.0 %"``, or ``"97.5 (93.0 to 100.0) %"`` where a bound cuts it.
        """
        if not self.values:
            return measure.text(self.mean, has_unit=has_unit)
        if not self.has_interval:
            return measure.texts(self.values, has_unit)
        low, high = self.interval(measure)
        # An interval that no bound cuts is symmetric: "±" says all.
        if (low, high) == (self.mean - self.half, self.mean + self.half):
            return measure.text(self.mean, self.half, has_unit)
        scale = scale_for(self.mean, measure.scales)
        numbers = (
            f"{scale.text(self.mean)} ({scale.text(low)} to {scale.text(high)})"
        )
        return f"{numbers}{_suffix(scale, has_unit)}"


def estimate(values: Iterable[float]) -> Estimate:
    """Compute mean and Student's 95 % interval of independent values.

    ``half = t(0.975, n - 1) * s / sqrt(n)`` with the sample standard deviation ``s``. NaNs are
    left out.
    """
    # A seed without the measure says nothing about it.
    present = [value for value in values if not math.isnan(value)]
    numbers = np.asarray(present, dtype=np.float64)
    each = tuple(numbers.tolist())
    if numbers.size == 0:
        return Estimate(math.nan, math.nan, 0)
    if numbers.size == 1:
        return Estimate(each[0], math.nan, 1, each)
    # One degree of freedom less, as the mean comes from the same seeds.
    spread = numbers.std(ddof=1) / math.sqrt(numbers.size)
    # Student's t: for few seeds a normal interval is far too narrow.
    half = stdtrit(numbers.size - 1, 0.975) * spread
    return Estimate(float(numbers.mean()), float(half), numbers.size, each)


def size(count: float) -> str:
    """Write bytes as a person reads them, in powers of 1000.

    Examples
    --------
    >>> size(1_234_567)
    '1.2 MB'
    """
    return measure_named("bytes").text(count)


def energy(joules: float) -> str:
    """Write joules as a person reads them.

    Examples
    --------
    >>> energy(12_340)
    '12.3 kJ'
    """
    return measure_named("energy_joules").text(joules)


def duration(seconds: float) -> str:
    """Write seconds as a person reads them.

    Examples
    --------
    >>> duration(8.3), duration(125), duration(12_000)
    ('8.3 s', '2 min 5 s', '3 h 20 min')
    """
    if math.isnan(seconds):
        return "–"
    if 0 < seconds < 0.05:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    # Rounded before it is divided: 3599.6 s are an hour, not "59 min 60 s".
    total = round(seconds)
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600} h {total % 3600 // 60} min"
