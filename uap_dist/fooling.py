"""Fooling rates with their intervals."""

from dataclasses import dataclass
from math import sqrt

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
class FoolingRate:
    """Share of examples whose label under clip(x + v, 0, 255) is not their clean label."""

    num_fooled: int
    num_examples: int

    @property
    def rate(self) -> float:
        """Between 0 and 1."""
        return self.num_fooled / self.num_examples

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the rate."""
        return wilson_interval(self.num_fooled, self.num_examples)

    def metrics(self, name: str) -> dict[str, float]:
        """Rate, interval and count under the names that MLflow and the curve use."""
        low, high = self.interval
        return {
            f"fooling_rate/{name}": self.rate,
            f"fooling_rate/{name}_low": low,
            f"fooling_rate/{name}_high": high,
            f"num_images/{name}": float(self.num_examples),
        }

    def __str__(self) -> str:
        """Rate, interval and count, as it is printed everywhere."""
        low, high = self.interval
        return f"{self.rate:.3f} [{low:.3f}, {high:.3f}] of {self.num_examples}"
