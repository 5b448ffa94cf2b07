"""Fooling rates, and other shares of examples, with their intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from uap_dist.errors import ConfigError

Z_95 = 1.959963984540054  # two-sided 95 % of the normal distribution


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """95 % interval of a share.

    Raises:
        ConfigError: `total` is not positive, or `successes` lies outside 0..total.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    if not 0 <= successes <= total or total == 0:
        raise ConfigError(f"{successes} of {total} is not a share")
    share, z2 = successes / total, Z_95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 / (1 + z2 / total) * sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Rate:
    """A share of examples: of those fooled (label of clip(x + v, 0, 255) ≠ clean label), or of those named rightly."""

    num_hits: int
    num_examples: int

    @property
    def rate(self) -> float:
        """Between 0 and 1."""
        return self.num_hits / self.num_examples

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the rate."""
        return wilson_interval(self.num_hits, self.num_examples)

    def metrics(self, name: str) -> dict[str, float]:
        """A fooling rate, its interval and count under the names that MLflow and the curve use."""
        low, high = self.interval
        return {
            f"fooling_rate/{name}": self.rate,
            f"interval/{name}_low": low,
            f"interval/{name}_high": high,
            f"num_images/{name}": float(self.num_examples),
        }

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, float], name: str) -> "Rate":
        """The fooling rate that stands in metrics under that name."""
        num_examples = int(metrics[f"num_images/{name}"])
        return cls(round(metrics[f"fooling_rate/{name}"] * num_examples), num_examples)

    def __str__(self) -> str:
        """Rate, interval and count, as it is printed everywhere."""
        low, high = self.interval
        return f"{self.rate:.3f} [{low:.3f}, {high:.3f}] of {self.num_examples}"


def rate_columns(name: str, rate: Rate | None) -> dict[str, Any]:
    """Table columns NAME (the rate), NAME_low, NAME_high (its interval) and NAME_num_images; all None without a rate."""
    values = (None,) * 4 if rate is None else (rate.rate, *rate.interval, rate.num_examples)
    return dict(zip((name, f"{name}_low", f"{name}_high", f"{name}_num_images"), values, strict=True))


def flatten_rates(row: Mapping[str, Any]) -> dict[str, Any]:
    """A table row with `rate_columns` in place of each rate."""
    columns: dict[str, Any] = {}
    for name, value in row.items():
        columns |= rate_columns(name, value) if isinstance(value, Rate) else {name: value}
    return columns


def running_rates(rates: Sequence[Rate], num_examples: int) -> list[Rate]:
    """Running mean of consecutive rates, each pooled with the ones before it until it covers `num_examples` examples.

    Every result pools as few rates as that takes; the first ones, which have too few before them, pool all so far.
    """
    hits, examples = (np.cumsum([0, *(getattr(rate, name) for rate in rates)]) for name in ("num_hits", "num_examples"))
    starts = np.maximum(np.searchsorted(examples, examples[1:] - num_examples, side="right") - 1, 0)
    pooled = zip(hits[1:] - hits[starts], examples[1:] - examples[starts], strict=True)
    return [Rate(int(some_hits), int(some_examples)) for some_hits, some_examples in pooled]


@dataclass(frozen=True)
class Predictions:
    """Labels (N, int64) and the softmax probability of each (N, float32)."""

    labels: np.ndarray
    confidences: np.ndarray
