"""From the increments of a round to the next perturbation: two rules, one pure function each.

The constants of the log-odds rule stand here and nowhere else; benchmarks/main_job.md says how they were chosen.
"""

from dataclasses import dataclass
from math import cos, pi

import torch
from torch import Tensor

from uap_dist.norms import Norm, mean_absolute, project, root_mean_square, spread

MARGIN = 500.0  # logits; so far beyond the boundary that no example is ever done and weights 1/(f + margin) stay even
MOMENTUM = 0.9
FIRST_STEP = {"linf": 0.8, "l2": 1.2}  # of the radius, as root mean square of a perturbation that fills the ball
FULL_STEP_ROUNDS = 125  # beyond them the first step falls as 1/rounds: all steps together stay as long
CORNER = 4.0  # P(4 v): a v in the corner of the ℓ∞ ball fools more


@dataclass(frozen=True)
class Iterate:
    """What a round starts from: v and the momentum, both C×H×W float64 (v in pixels)."""

    v: Tensor
    momentum: Tensor

    @classmethod
    def zero(cls, shape: tuple[int, ...]) -> "Iterate":
        """The start: nothing added to any image."""
        return cls(torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64))


def paper_update(iterate: Iterate, total: Tensor, *, gain: float, norm: Norm, radius: float) -> Iterate:
    """The paper: v ← P(v + gain · ΣΔ).

    Args:
        iterate: v before the round; its momentum is left alone.
        total: C×H×W float64, sum of the round's increments in pixels.
        gain: factor on the sum; 1 is the paper.
        norm: of the ball.
        radius: of the ball, pixels.

    Source: Moosavi-Dezfooli et al., "Universal adversarial perturbations", CVPR 2017, algorithm 1, with one projection a
    round where the paper has one an image.
    """
    return Iterate(project(iterate.v + gain * total, norm=norm, radius=radius), iterate.momentum)


def log_odds_update(iterate: Iterate, total: Tensor, *, step_size: float, norm: Norm, radius: float) -> Iterate:
    """Momentum of the round's sum at mean absolute value 1; a sign step for ℓ∞, a step of root mean square 1 for ℓ2.

    Args:
        iterate: v and momentum before the round.
        total: C×H×W float64, sum of the increments, each divided by its squared length.
        step_size: of this round, pixels (see `cosine`).
        norm: of the ball.
        radius: of the ball, pixels.
    """
    momentum = MOMENTUM * iterate.momentum + total / max(mean_absolute(total), 1e-300)
    direction = momentum.sign() if norm == "linf" else momentum / max(root_mean_square(momentum), 1e-300)
    return Iterate(project(iterate.v + step_size * direction, norm=norm, radius=radius), momentum)


def cosine(start: float, round_number: int, num_rounds: int) -> float:
    """Half a cosine from `start` in round 0 to zero after the last round."""
    return start * (1 + cos(pi * round_number / num_rounds)) / 2


def finish(v: Tensor, *, norm: Norm, radius: float) -> Tensor:
    """What the log-odds rule delivers of an iterate: for ℓ∞ P(4 v), for ℓ2 v itself."""
    return project(CORNER * v, norm=norm, radius=radius) if norm == "linf" else v


def default_step_size(*, norm: Norm, radius: float, num_values: int, num_rounds: int) -> float:
    """First step of the log-odds rule in pixels (root mean square for ℓ2), from what is known before the run."""
    return FIRST_STEP[norm] * min(1.0, FULL_STEP_ROUNDS / num_rounds) * spread(norm, radius, num_values)
