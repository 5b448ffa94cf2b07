"""From a round's summed increments to the next perturbation: one pure function for each of the two rules.

The paper's rule adds the sum and projects. The log-odds rule, the default, takes steps along a momentum of the sums. Its
constants are all defined here; benchmarks/rules_tried.md says how they were chosen.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, reduce
from math import cos, exp, inf, pi

import torch
from torch import Tensor
from torch.nn.functional import pad

from uap_dist.method.norms import TINY, Norm, project, root_mean_square, spread

WIDTH = 0.5  # width of the boundary that `weigh` smooths, in units of the mean |log-odds|
REMEMBERED = 60  # images over which that mean runs
MOMENTUM = 0.9
FIRST_STEP = {"linf": 0.8, "l2": 1.2}  # root mean square, relative to that of a perturbation that fills the ball
FULL_STEPS = 125  # in longer runs the first step shrinks as 1/√steps: a random walk of all steps then goes equally far
AVERAGED = 2.0  # factor on the first step if blocks are averaged: a mean of signs is shorter than a sign
PERIOD = 32  # pixels; the total stride of most networks for photographs
DOUBLED_AT: dict[Norm, tuple[int, ...]] = {"linf": (), "l2": (1_500, 6_000)}  # images, see `default_period`
CORNER = 4.0  # for ℓ∞, P(4 v) is delivered instead of v: a perturbation in the corner of the ball fools more images


@dataclass(frozen=True)
class Iterate:
    """What a round starts from.

    Attributes:
        v: perturbation, C×H×W float64, pixels; the updates take M of them as well, M×C×H×W.
        momentum: float64, as many.
        scale: float64; running mean of |f| over the images seen, f being the log-odds of the clean label or of the target; infinite
            before the first image. For S networks S of them; of M perturbations M, or M×S.
    """

    v: Tensor
    momentum: Tensor
    scale: Tensor = torch.tensor(inf, dtype=torch.float64)

    def __iter__(self) -> Iterator[Tensor]:
        """Its three tensors."""
        return iter((self.v, self.momentum, self.scale))

    def at(self, place: int) -> "Iterate":
        """One of several perturbations."""
        return Iterate(self.v[place], self.momentum[place], self.scale[place])

    @classmethod
    def zero(cls, shape: tuple[int, ...], scale_shape: tuple[int, ...] = ()) -> "Iterate":
        """The start of a run: v = 0, no momentum, no statistics."""
        v, momentum = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        return cls(v, momentum, torch.full(scale_shape, inf, dtype=torch.float64))


@dataclass(frozen=True)
class Steps:
    """All steps of a run under the log-odds rule.

    Attributes:
        norm: of the ball that v is projected onto.
        radius: of the ball, pixels.
        period: pixels after which each step repeats itself, see `repeat_mean`.
        first_size: size of the first step: its root mean square in pixels.
        num_rounds: in the whole run.
        per_round: steps in each round: 1, or the local steps of a block.
        achromatic: whether steps are the same in all channels, see `channel_mean`.
    """

    norm: Norm
    radius: float
    period: int
    first_size: float
    num_rounds: int
    per_round: int = 1
    achromatic: bool = False

    def sizes(self, round_number: int) -> tuple[float, ...]:
        """Sizes of the steps in a round (from 0), in pixels: over the run, half a cosine from `first_size` to zero."""
        first = self.per_round * round_number
        count = self.per_round * self.num_rounds
        return tuple(cosine(self.first_size, step, count) for step in range(first, first + self.per_round))


def paper_update(iterate: Iterate, total: Tensor, *, gain: float, norm: Norm, radius: float) -> Iterate:
    """The paper's rule: v ← P(v + gain · Σ Δv_i).

    Args:
        iterate: before the round; its momentum is kept as it is.
        total: Σ Δv_i, …×C×H×W float64, the sum of the round's increments in pixels.
        gain: factor on the sum; 1 in the paper.
        norm: of the ball.
        radius: of the ball, pixels.

    Source: Moosavi-Dezfooli et al., "Universal adversarial perturbations", CVPR 2017, algorithm 1, except that it projects after
    each image and this projects after each round.
    """
    return replace(iterate, v=project(iterate.v + gain * total, norm=norm, radius=radius))


def log_odds_update(iterate: Iterate, total: Tensor, step_size: float | Tensor, steps: Steps) -> Iterate:
    """The log-odds rule: m ← 0.9 m + R(total), v ← P(v + step_size · d), with R the mean over periods (`repeat_mean`).

    Achromatic steps take the mean over channels as well. The direction d is sign(m) for ℓ∞, and m scaled to root mean square 1 for ℓ2.

    Args:
        iterate: before the step.
        total: …×C×H×W float64, weighted sum of increments (see `log_odds_sum` and `weigh`).
        step_size: pixels, one of `steps.sizes`; or such sizes for several perturbations, M×1×1×1.
        steps: gives the ball and the period.
    """
    total = channel_mean(total) if steps.achromatic else total
    momentum = MOMENTUM * iterate.momentum + repeat_mean(total, steps.period)
    direction = momentum.sign() if steps.norm == "linf" else _of_unit_size(momentum)
    return replace(
        iterate, v=project(iterate.v + step_size * direction, norm=steps.norm, radius=steps.radius), momentum=momentum
    )


def _of_unit_size(momentum: Tensor) -> Tensor:
    """…×C×H×W scaled to a root mean square of 1; zero stays zero."""
    return momentum / root_mean_square(momentum).clamp_min(TINY)[..., None, None, None]


def weigh(log_odds: Tensor, scale: float | Tensor) -> Tensor:
    """Weights of images in the sum, from the log-odds f of their clean labels (N): w = σ(f/s) σ(−f/s) with s = WIDTH · scale.

    This is, up to a constant, the derivative of σ(−f/s), a smoothed indicator of an image being fooled. So images near the
    boundary weigh most, on either side of it, while those far beyond it need nothing more, and those that nothing moves do not
    pull v toward them. Before any statistics exist (infinite scale), all weights are equal.
    """
    widths = log_odds / (WIDTH * scale)
    return widths.sigmoid() * (-widths).sigmoid()


def balance(scales: Tensor) -> Tensor:
    """Factors on the sums of several networks (M×S), from their scales: the mean scale by each one's own.

    A gradient of log-odds is as large as a network's logits happen to be. In units of its |log-odds|, that of each network's
    smoothed fooling rate (see `weigh`) counts alike. Before any statistics exist, sums are added as they are.
    """
    found = scales.mean(1, keepdim=True) / scales
    return found.where(found.isfinite(), 1.0)


def remember(iterate: Iterate, total_size: Tensor, num_images: Tensor, *, most_images: int) -> Iterate:
    """The iterate after some more images have entered its scale.

    The scale is an exponential moving average: after REMEMBERED more images an image's weight has fallen to 1/e.

    Args:
        iterate: before them.
        total_size: float64, the sum of their |f|, in the shape of the scale.
        num_images: float64, how many they are, at most `most_images`; likewise.
        most_images: a limit that is known without waiting for a GPU.
    """
    mean = total_size / num_images.clamp_min(1)
    moved = mean + _kept(most_images, mean.device)[num_images.long()] * (iterate.scale - mean)
    after = torch.where(iterate.scale.isinf(), mean, moved)
    return replace(iterate, scale=torch.where(num_images == 0, iterate.scale, after))


@cache
def _kept(most_images: int, device: torch.device) -> Tensor:
    """Weight that stays with earlier images after 0, 1, … more."""
    kept = [exp(-count / REMEMBERED) for count in range(most_images + 1)]  # here, because devices round exp differently
    return torch.tensor(kept, dtype=torch.float64, device=device)


def average_update(iterate: Iterate, mean: Tensor, steps: Steps) -> Iterate:
    """The log-odds rule with local steps: v and momentum become the means of those that the blocks ended with.

    Args:
        iterate: that all blocks started from.
        mean: 2×…×C×H×W float64, means over the blocks: how far they moved v, and the momentum at their end.
        steps: gives the ball.

    Source: Stich, "Local SGD converges fast and communicates little", ICLR 2019; Yu, Jin and Yang, "On the linear speedup
    analysis of communication efficient momentum SGD for distributed non-convex optimization", ICML 2019, average the momentum too.
    """
    moved, momentum = mean
    return replace(iterate, v=project(iterate.v + moved, norm=steps.norm, radius=steps.radius), momentum=momentum)


def repeat_mean(total: Tensor, period: int) -> Tensor:
    """Each pixel of …×C×H×W replaced by the mean of all pixels that are whole periods away from it, down and across.

    The result repeats itself with that period; a period of at least both sides changes nothing. Steps of this kind give v a
    texture that acts alike everywhere in every image, which is what the increments of few images agree on; benchmarks/rules.md,
    "Why", measures the effect.
    """
    *_, height, width = total.shape
    if period >= max(height, width):
        return total
    tile = _fold(total, period) / _counts(height, width, period, total.device)
    copies = -(-height // period), -(-width // period)
    return tile.repeat(*(1 for _ in total.shape[:-2]), *copies)[..., :height, :width]


def channel_mean(total: Tensor) -> Tensor:
    """Each channel of …×C×H×W replaced by the mean of all of them."""
    channels = total.unbind(-3)
    return (reduce(torch.add, channels) / len(channels)).unsqueeze(-3).expand_as(total)


def _fold(values: Tensor, period: int) -> Tensor:
    """The sum of all tiles of …×H×W, …×period×period; they are added one by one, with the same bits on every device."""
    height, width = values.shape[-2:]
    if width % period or height % period:
        values = pad(values, (0, -width % period, 0, -height % period))
    strips = reduce(torch.add, values.split(period, dim=-2))
    return reduce(torch.add, strips.split(period, dim=-1))


@cache
def _counts(height: int, width: int, period: int, device: torch.device) -> Tensor:
    """How many pixels of H×W are added up in each place of a tile; at least 1."""
    return _fold(torch.ones(height, width, dtype=torch.float64), period).clamp_min(1).to(device)


def cosine(start: float, step: int, num_steps: int) -> float:
    """Half a cosine over steps 0, 1, …, from `start` at step 0 to zero at `num_steps`."""
    return start * (1 + cos(pi * step / num_steps)) / 2


def finish(v: Tensor, *, norm: Norm, radius: float) -> Tensor:
    """The perturbation that the log-odds rule delivers: P(4 v) for ℓ∞, v itself for ℓ2 (C×H×W, pixels)."""
    return project(CORNER * v, norm=norm, radius=radius) if norm == "linf" else v


def default_period(*, norm: Norm, num_images: int) -> int:
    """Period of the steps in pixels, from the length of the run; benchmarks/rules_tried.md, "The period".

    For ℓ2 it doubles at 1,500 images (rounds times round size) and again at 6,000: the more gradients a run averages, the larger a
    tile they can determine. For ℓ∞ a longer period is no better, with 500 evaluations or with 16,000.
    """
    return PERIOD * 2 ** sum(num_images >= least for least in DOUBLED_AT[norm])


def default_step_size(*, norm: Norm, radius: float, num_values: int, num_steps: int) -> float:
    """Size of the first step (root mean square, pixels), from the ball, the number of entries of v and the length of the run."""
    return FIRST_STEP[norm] * min(1.0, (FULL_STEPS / num_steps) ** 0.5) * spread(norm, radius, num_values)
