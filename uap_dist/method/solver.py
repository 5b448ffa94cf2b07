"""How workers solve a block of images, and the one sum that comes of it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

import numpy as np

from uap_dist.method.augment import Augmentation
from uap_dist.method.update import StepRule

LOG_ODDS_SIZE = "mean_log_odds_size"  # name of a sum, which the next round needs


Rule = Literal["log-odds", "paper"]


@dataclass(frozen=True)
class Solver:
    """How a block is solved: the rule, what it needs of the config, and the scale of the log-odds so far (see `Iterate`)."""

    rule: Rule
    augmentation: Augmentation
    candidates: int
    slope_ratio: float
    scale: float = inf


@dataclass(frozen=True)
class LocalSteps:
    """Steps that a block takes on its own copy of v and momentum.

    Attributes:
        momentum: C×H×W float32, that it starts from.
        sizes: of the steps, in pixels; a block of fewer examples than `batch_size` each takes the first ones.
        batch_size: examples of a step at most.
        rule: of every step.
    """

    momentum: np.ndarray
    sizes: tuple[float, ...]
    batch_size: int
    rule: StepRule


@dataclass(frozen=True)
class BlockResult:
    """One array for the driver's reduce, and counts.

    Attributes:
        total: C×H×W, summed over the block: increments in pixels under the paper's rule (float64), weighted ones
            under the log-odds rule (float32). After local steps 2×C×H×W float32: how far they moved v, in pixels,
            and the momentum at their end.
        num_examples, num_fooled: of the block, fooled by the v that they were solved against.
        num_evaluations: network evaluations spent.
        sums: what a round reports the mean of, by name: the sum over the block, and over how many examples.
    """

    total: np.ndarray
    num_examples: int
    num_fooled: int
    num_evaluations: int
    sums: dict[str, tuple[float, int]]

    def digest(self) -> str:
        """SHA-256 over every bit of it."""
        counts = [value for name, value in vars(self).items() if name != "total"]
        return hashlib.sha256(self.total.tobytes() + repr(counts).encode()).hexdigest()


def add_sums(results: Sequence[BlockResult]) -> dict[str, tuple[float, int]]:
    """What to report the mean of, over all of them."""
    pairs = {name: [result.sums[name] for result in results] for name in results[0].sums}
    return {name: (sum(s for s, _ in some), sum(n for _, n in some)) for name, some in pairs.items()}
