"""Amounts with their likely range."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

ONCE_LOW, ONCE_HIGH = 0.8, 1.25  # range of what was measured once, relative to it
QUANTILES = (0.1, 0.9)  # range of what was measured several times


@dataclass(frozen=True)
class Range:
    """An amount and its likely range. A number counts as one without any; `*` is for amounts that are not negative."""

    expected: float
    low: float
    high: float

    @classmethod
    def exactly(cls, amount: float) -> "Range":
        """An amount that is known exactly."""
        return cls(amount, amount, amount)

    @classmethod
    def once(cls, amount: float) -> "Range":
        """An amount that was measured once."""
        return cls(amount, ONCE_LOW * amount, ONCE_HIGH * amount)

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Range":
        """An amount that was measured several times, at least once."""
        if len(samples) == 1:
            return cls.once(samples[0])
        low, high = (float(value) for value in np.quantile(samples, QUANTILES))
        return cls(median(samples), low, high)

    def __add__(self, other: "Range | float") -> "Range":
        other = other if isinstance(other, Range) else Range.exactly(other)
        return Range(self.expected + other.expected, self.low + other.low, self.high + other.high)

    __radd__ = __add__

    def __mul__(self, other: "Range | float") -> "Range":
        other = other if isinstance(other, Range) else Range.exactly(other)
        return Range(self.expected * other.expected, self.low * other.low, self.high * other.high)

    def at_least(self, other: "Range") -> "Range":
        """The larger of both, end by end."""
        return Range(max(self.expected, other.expected), max(self.low, other.low), max(self.high, other.high))
