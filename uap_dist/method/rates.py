"""Fooling rates and other proportions of examples, with 95 % intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from uap_dist.errors import ConfigError


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion.

    Raises:
        ConfigError: `total` is not positive, or `successes` is outside 0..total.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    from scipy.stats import binomtest  # imported here because it takes half a second

    if not 0 <= successes <= total or total == 0:
        raise ConfigError(f"{successes} of {total} is not a share")
    interval = binomtest(successes, total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Rate:
    """A share of examples, such as that of the fooled ones (label of clip(x + v, 0, 255) ≠ clean label).

    Attributes:
        num_hits: number of examples that are fooled, or classified correctly.
        num_examples: number of all examples.
    """

    num_hits: int
    num_examples: int

    @property
    def rate(self) -> float:
        """The proportion, between 0 and 1."""
        return self.num_hits / self.num_examples

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson score interval."""
        return wilson_interval(self.num_hits, self.num_examples)

    def metrics(self, name: str) -> dict[str, float]:
        """A fooling rate, its interval and its count, by the names that MLflow and the plots use."""
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
        """Rate, interval and count, as printed everywhere."""
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
    """What the classifier says of N images.

    Attributes:
        labels: N, int64, the classes with the largest logits.
        confidences: N, float32, their softmax probabilities.
    """

    labels: np.ndarray
    confidences: np.ndarray
