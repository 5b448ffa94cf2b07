"""Increments of the default rule: one step of each image against its log-odds, summed over the images.

The log-odds of image x's clean label y are f(x) = z_y − log Σ_{k≠y} exp z_k = log p_y / (1 − p_y), for logits z and softmax
probabilities p. The surface f = 0 is the boundary between y and all other classes taken together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from math import isfinite

import torch
from torch import Tensor

from uap_dist.method.norms import add_perturbation
from uap_dist.method.rates import UNTARGETED, Goal
from uap_dist.models.classifier import Classifier


@dataclass(frozen=True)
class LogOddsSum:
    """Weighted increments of several images as one sum, and what it cost.

    Attributes:
        total: C×H×W, logits per pixel value; of M perturbations M×C×H×W.
        log_odds: N, of the clean labels, or of the target, at clip(x + v, 0, 255); NaN for images that take no part.
        predicted: N, the labels at clip(x + v, 0, 255).
        num_evaluations: images passed through the network, forward and backward passes counted separately.
    """

    total: Tensor
    log_odds: Tensor
    predicted: Tensor
    num_evaluations: int


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-odds of the labels, N, from N×K logits and N labels."""
    own = labels[:, None]
    others = logits.scatter(1, own, -torch.inf).logsumexp(1)
    return logits.gather(1, own).squeeze(1) - others


def log_odds_sum(
    classifier: Classifier,
    pixels: Tensor,
    perturbation: Tensor,
    labels: Tensor,
    *,
    weigh: Callable[[Tensor], Tensor],
    goal: Goal = UNTARGETED,
    view: Callable[[Tensor], Tensor] | None = None,
) -> LogOddsSum:
    """The sum −Σ w(f) ∇f over the images, with f the log-odds of the clean label at clip(x + v, 0, 255).

    −∇f is the direction of DeepFool's step to the boundary f = 0. With a target, f is the target's log-odds, and the sum is
    Σ w(f) ∇f over the images whose clean label is another. Images of spared classes add w(f) ∇f with their clean label's f, times
    their weight. Since only the sum is needed, the gradients of all images go
    backward through the classifier's first layer at once (see `Classifier.linearise`), unless each image has a view of its own.
    Images whose gradient is not finite are left out. The cost is one forward and one backward pass per image.

    Args:
        classifier: as returned by `load_classifier`; faster after `accelerate`.
        pixels: N×C×H×W, 0..255.
        perturbation: v, C×H×W, pixels; or M of them, M×C×H×W, each for its own N/M consecutive images, and with its own sum.
        labels: N, the clean labels.
        weigh: w, maps N log-odds to N weights.
        goal: what the images shall be taken for.
        view: of the perturbed images (N×C×H×W), which the classifier is shown in their place; differentiable.
    """
    aims, factors = goal.aims(labels)
    of_all = perturbation.view(-1, 1, *pixels.shape[1:])
    shown = add_perturbation(pixels.view(len(of_all), -1, *pixels.shape[1:]), of_all).view_as(pixels)
    with torch.enable_grad():
        if view is None:
            logits, leaf = classifier.linearise(shown)
        else:
            logits, leaf = classifier(view(shown.requires_grad_())), [shown]
        gaps = log_odds(logits, aims)
    found = gaps.detach()
    (slopes,) = torch.autograd.grad(gaps, leaf, factors * weigh(found))
    totals = _sum_finite(_widen(slopes), len(of_all))
    if view is None:
        totals = classifier.pull_back(totals, pixels.shape[1:])
    return LogOddsSum(
        total=_widen(totals).view_as(perturbation),
        log_odds=found.where(factors != 0, torch.nan),
        predicted=logits.detach().argmax(1),
        num_evaluations=2 * len(pixels),
    )


def _widen(values: Tensor) -> Tensor:
    """In float32 at least: the network may compute in bfloat16."""
    return values.float() if values.dtype.itemsize < torch.float32.itemsize else values


def _sum_finite(slopes: Tensor, num_sums: int) -> Tensor:
    """Sums of N gradients, so many for as many equal parts of them; those that are not finite are left out."""
    totals = _sum(slopes, num_sums)
    # on the CPU it is much quicker to look at the sums first; a GPU would have to be waited for
    if slopes.is_cuda or not isfinite(totals.sum()):
        is_finite = slopes.flatten(1).isfinite().all(1)
        totals = _sum(slopes.where(is_finite.view(-1, *(1 for _ in slopes.shape[1:])), 0), num_sums)
    return totals


def _sum(slopes: Tensor, num_sums: int) -> Tensor:
    # Tensor.sum takes ten times as long on channels-last memory
    return reduce(torch.add, slopes.view(num_sums, -1, *slopes.shape[1:]).unbind(1))
