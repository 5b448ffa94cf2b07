"""Increments of the default rule: one step of each image against its log-odds, summed over the images.

The log-odds of image x's clean label y are f(x) = z_y − log Σ_{k≠y} exp z_k = log p_y / (1 − p_y), for logits z and softmax
probabilities p. The surface f = 0 is the boundary between y and all other classes taken together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from uap_dist.method.norms import add_perturbation
from uap_dist.models.classifier import Classifier


@dataclass(frozen=True)
class LogOddsSum:
    """Weighted increments of several images as one sum, and what it cost.

    Attributes:
        total: C×H×W, logits per pixel value.
        log_odds: N, of the clean labels at clip(x + v, 0, 255).
        is_fooled: N, bool, whether v fools the image.
        num_evaluations: images passed through the network, forward and backward passes counted separately.
    """

    total: Tensor
    log_odds: Tensor
    is_fooled: Tensor
    num_evaluations: int


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-odds of the labels, N, from N×K logits and N labels."""
    own = labels[:, None]
    others = logits.scatter(1, own, -torch.inf).logsumexp(1)
    return logits.gather(1, own).squeeze(1) - others


def log_odds_sum(
    classifier: Classifier, pixels: Tensor, perturbation: Tensor, labels: Tensor, *, weigh: Callable[[Tensor], Tensor]
) -> LogOddsSum:
    """The sum −Σ w(f) ∇f over the images, with f the log-odds of the clean label at clip(x + v, 0, 255).

    −∇f is the direction of DeepFool's step to the boundary f = 0. Since only the sum is needed, the gradients of all images go
    backward through the classifier's first layer at once (see `Classifier.linearise`). Images whose gradient is not finite are
    left out. The cost is one forward and one backward pass per image.

    Args:
        classifier: as returned by `load_classifier`; faster after `accelerate`.
        pixels: N×C×H×W, 0..255.
        perturbation: v, C×H×W, pixels.
        labels: N, the clean labels.
        weigh: w, maps N log-odds to N weights.
    """
    with torch.enable_grad():
        logits, leaf = classifier.linearise(add_perturbation(pixels, perturbation))
        gaps = log_odds(logits, labels)
        (slopes,) = torch.autograd.grad((weigh(gaps.detach()) * gaps).sum(), leaf)
    return LogOddsSum(
        total=-classifier.pull_back(_sum_finite(slopes), pixels.shape[1:]),
        log_odds=gaps.detach(),
        is_fooled=logits.detach().argmax(1) != labels,
        num_evaluations=2 * len(pixels),
    )


def _sum_finite(slopes: Tensor) -> Tensor:
    """Sum of N gradients with a leading dimension of 1; those that are not finite are left out."""
    total = reduce(torch.add, slopes)  # Tensor.sum takes ten times as long on channels-last memory
    if not total.sum().isfinite():  # much quicker than looking at each entry
        total = slopes[slopes.flatten(1).isfinite().all(1)].sum(0)
    return total[None]
