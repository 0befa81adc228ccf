"""A figure over seeds: its mean, and how sure three of them can make one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Spread:
    """Some values of one figure, one a seed.

    Attributes:
        values: those that are known; at least one.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("a spread of no values has no mean; give at least one")

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Their standard deviation with n - 1; None of a single value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def half(self) -> float | None:
        """Half the width of the 95 % confidence interval of the mean; None of a single value.

        Student's t, so that few seeds give a wide interval: with three it is 2.48 deviations.
        """
        if self.deviation is None:
            return None
        from scipy.special import stdtrit

        quantile = float(stdtrit(len(self.values) - 1, (1 + LEVEL) / 2))
        return quantile * self.deviation / math.sqrt(len(self.values))


def spread(values: Sequence[float | None]) -> Spread | None:
    """The spread of what is known; None if nothing is."""
    known = tuple(value for value in values if value is not None and math.isfinite(value))
    return Spread(known) if known else None
