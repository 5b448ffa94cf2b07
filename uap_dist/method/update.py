"""From the increments of a round to the next perturbation: two rules, one pure function each.

The constants of the log-odds rule stand here and nowhere else; benchmarks/rules_tried.md says how they were chosen.
"""

from dataclasses import dataclass, replace
from math import cos, exp, inf, pi

import numpy as np
import torch
from torch import Tensor

from uap_dist.method.norms import Norm, project, root_mean_square, spread

WIDTH = 0.5  # of the boundary, in units of the mean size of log-odds: images whose log-odds lie there weigh most
REMEMBERED = 60  # images, by that mean
MOMENTUM = 0.9
FIRST_STEP = {"linf": 0.8, "l2": 1.2}  # of the radius, as root mean square of a perturbation that fills the ball
FULL_STEPS = 125  # beyond so many the first step falls as 1/√steps: by chance all steps together lead as far
AVERAGED = 2.0  # times the first step where blocks are averaged: a mean of signs is shorter than a sign
PERIOD = 32  # pixels; the total stride of most networks for photographs
DOUBLED_AT: dict[Norm, tuple[int, ...]] = {"linf": (), "l2": (1_500, 6_000)}  # images: see `default_period`
CORNER = 4.0  # P(4 v): a v in the corner of the ℓ∞ ball fools more


@dataclass(frozen=True)
class Iterate:
    """What a round starts from.

    Attributes:
        v, momentum: C×H×W float64 (v in pixels).
        scale: of the log-odds: running mean of |f|; infinite before the first image.
    """

    v: Tensor
    momentum: Tensor
    scale: float = inf

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
    return replace(iterate, v=project(iterate.v + gain * total, norm=norm, radius=radius))


@dataclass(frozen=True)
class StepRule:
    """What all steps of the log-odds rule have in common.

    Attributes:
        norm, radius: of the ball, pixels.
        period: pixels after which a step repeats itself, see `repeat_mean`.
    """

    norm: Norm
    radius: float
    period: int


def log_odds_update(iterate: Iterate, total: Tensor, step_size: float, rule: StepRule) -> Iterate:
    """Momentum of periodic sums; a sign step for ℓ∞, a step of root mean square 1 for ℓ2.

    Args:
        iterate: before the step.
        total: C×H×W float64, sum of the weighted increments (see `weigh`).
        step_size: pixels (see `cosine`).
        rule: what it shares with all other steps.
    """
    momentum = MOMENTUM * iterate.momentum + repeat_mean(total, rule.period)
    direction = momentum.sign() if rule.norm == "linf" else momentum / max(root_mean_square(momentum), 1e-300)
    return replace(
        iterate, v=project(iterate.v + step_size * direction, norm=rule.norm, radius=rule.radius), momentum=momentum
    )


def weigh(log_odds: Tensor, scale: float) -> Tensor:
    """Weights of images by the log-odds f of their clean labels (N): how steep a smoothed fooling rate is there.

    That rate is the mean of σ(−f/(WIDTH scale)). So images near the boundary count, on either side: those far beyond it are done, and
    those that nothing moves do not draw v toward them. All are even where the scale is infinite.
    """
    widths = log_odds / (WIDTH * scale)
    return widths.sigmoid() * (-widths).sigmoid()


def remember(iterate: Iterate, total_size: float, num_images: int) -> Iterate:
    """With the |f| of so many images, given in sum, in the scale; REMEMBERED images later it has forgotten all but 1/e of them."""
    if num_images == 0:
        return iterate
    mean = total_size / num_images
    kept = exp(-num_images / REMEMBERED)
    return replace(iterate, scale=mean if iterate.scale == inf else mean + kept * (iterate.scale - mean))


def average_update(iterate: Iterate, mean: Tensor, rule: StepRule) -> Iterate:
    """What blocks made of v and momentum in local steps, averaged.

    Args:
        iterate: that all blocks started from.
        mean: 2×C×H×W float64, over the blocks: how far they moved v, and the momentum at their end.
        rule: of their steps.

    Source: Stich, "Local SGD converges fast and communicates little", ICLR 2019; averaging the momentum too is Yu, Jin and Yang's,
    "On the linear speedup analysis of communication efficient momentum SGD", ICML 2019.
    """
    moved, momentum = mean
    return replace(iterate, v=project(iterate.v + moved, norm=rule.norm, radius=rule.radius), momentum=momentum)


def repeat_mean(total: Tensor, period: int) -> Tensor:
    """Each pixel becomes the mean of all that lie whole periods away from it, so C×H×W repeats itself; unchanged below one period.

    Steps of such a kind lead v to textures that move every place of every image the same way, where the increments of few images
    agree; benchmarks/rules.md, "Why", has what that is worth.
    """
    _, height, width = total.shape
    if period >= max(height, width):
        return total
    rows, columns = -(-height // period), -(-width // period)

    def fold(values: np.ndarray) -> np.ndarray:
        whole = np.pad(values, ((0, 0), (0, -height % period), (0, -width % period)))
        return whole.reshape(-1, rows, period, columns, period).sum((1, 3))

    tile = fold(total.numpy()) / np.maximum(fold(np.ones((1, height, width))), 1)
    return torch.from_numpy(np.tile(tile, (rows, columns))[:, :height, :width].copy())


def cosine(start: float, round_number: int, num_rounds: int) -> float:
    """Half a cosine from `start` in round 0 to zero after the last round."""
    return start * (1 + cos(pi * round_number / num_rounds)) / 2


def finish(v: Tensor, *, norm: Norm, radius: float) -> Tensor:
    """What the log-odds rule delivers of an iterate: for ℓ∞ P(4 v), for ℓ2 v itself."""
    return project(CORNER * v, norm=norm, radius=radius) if norm == "linf" else v


def default_period(*, norm: Norm, num_images: int) -> int:
    """Pixels after which steps repeat themselves, from what is known before the run; benchmarks/rules_tried.md, "The period".

    For ℓ2 it doubles with 1,500 images (rounds times round size) and again with 6,000: what a tile holds grows as what is known
    of it. For ℓ∞ a longer period is no better with 500 nor with 16,000 evaluations.
    """
    return PERIOD * 2 ** sum(num_images >= least for least in DOUBLED_AT[norm])


def default_step_size(*, norm: Norm, radius: float, num_values: int, num_steps: int) -> float:
    """First step of the log-odds rule in pixels (root mean square for ℓ2), from what is known before the run."""
    return FIRST_STEP[norm] * min(1.0, (FULL_STEPS / num_steps) ** 0.5) * spread(norm, radius, num_values)
