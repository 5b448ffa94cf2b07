"""Steps that carry images across a decision boundary: DeepFool, and one step toward the log-odds boundary.

Both start from clip(x + v, 0, 255) and return one increment per image, so that a round can sum either.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from uap_dist.errors import ConfigError

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Increments:
    """One step for each image, and what it cost.

    Attributes:
        steps: N×C×H×W, pixels; zero where there was nothing to do or no direction to go.
        is_fooled: N, whether x + v was fooled before any step.
        is_solved: N, whether it is after the step; None where nobody looked.
        num_evaluations: images through the network, forward and backward counted each.
    """

    steps: Tensor
    is_fooled: Tensor
    is_solved: Tensor | None
    num_evaluations: int


def add_perturbation(pixels: Tensor, perturbation: Tensor) -> Tensor:
    """clip(x + v, 0, 255), N×C×H×W: what the classifier is shown."""
    return (pixels + perturbation).clamp(0, 255)


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """z_y − logsumexp of the other logits = log p_y/(1 − p_y), for N×K logits and N labels."""
    own = labels[:, None]
    others = logits.scatter(1, own, -torch.inf).logsumexp(1)
    return logits.gather(1, own).squeeze(1) - others


def log_odds_increments(
    classifier: Logits, pixels: Tensor, perturbation: Tensor, labels: Tensor, *, margin: float
) -> Increments:
    """One DeepFool step toward the boundary between the clean label and everything else.

    With f the log-odds of the clean label at x + v: Δ = −(f + margin)/‖∇f‖² ∇f where f > −margin, else zero.
    One forward and one backward an image.

    Args:
        classifier: N×C×H×W pixels to N×K logits.
        pixels: N×C×H×W, 0..255.
        perturbation: C×H×W, pixels.
        labels: N, the clean labels.
        margin: how far beyond the boundary to aim, in logits.
    """
    x = add_perturbation(pixels, perturbation).requires_grad_()
    with torch.enable_grad():
        logits = classifier(x)
        gap = log_odds(logits, labels)
        (slope,) = torch.autograd.grad(gap.sum(), x)
    factors = (gap.detach() + margin).clamp(min=0) / _squared_norms(slope)
    return Increments(
        steps=_scale(-factors, slope),
        is_fooled=logits.detach().argmax(1) != labels,
        is_solved=None,
        num_evaluations=2 * len(pixels),
    )


def deepfool(
    classifier: Logits,
    pixels: Tensor,
    perturbation: Tensor,
    labels: Tensor,
    *,
    candidates: int = 10,
    max_iterations: int = 10,
    overshoot: float = 0.02,
) -> Increments:
    """The smallest ℓ2 step, to first order, that takes each perturbed image out of its clean label.

    Images that x + v fools already get a zero step. As in the authors' code the candidates are fixed at x + v; unlike it
    the network always sees values clipped to 0..255.

    Args:
        classifier: N×C×H×W pixels to N×K logits.
        pixels: N×C×H×W, 0..255.
        perturbation: C×H×W, pixels.
        labels: N, the clean labels.
        candidates: classes looked at, the clean label included (K where there are fewer); at least 2.
        max_iterations: linearisations at most.
        overshoot: the step is lengthened by this share of itself, to end beyond the boundary.

    Raises:
        ConfigError: an option outside its range.

    Source: Moosavi-Dezfooli, Fawzi, Frossard, "DeepFool", CVPR 2016, algorithm 2.
    """
    if candidates < 2 or max_iterations < 1 or overshoot < 0:
        raise ConfigError(
            f"deepfool got candidates {candidates}, max_iterations {max_iterations}, overshoot {overshoot}; "
            "they must be at least 2, 1 and 0"
        )
    start = pixels + perturbation
    steps = torch.zeros_like(pixels)
    is_solved = torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device)
    active = torch.arange(len(pixels), device=pixels.device)
    rivals, num_evaluations = torch.empty(0), 0
    for iteration in range(max_iterations + 1):
        last = iteration == max_iterations
        x, logits = _forward(classifier, start[active] + steps[active], with_graph=not last)
        num_evaluations += len(active)
        done = logits.detach().argmax(1) != labels[active]
        is_solved[active[done]] = True
        if iteration == 0:
            is_fooled = is_solved.clone()
            rivals = _rivals(logits.detach(), labels, candidates - 1)
        if last or done.all():
            break
        if done.any():
            # one more forward of the rest is cheaper than `candidates` backwards of those that are done
            active, rivals = active[~done], rivals[~done]
            x, logits = _forward(classifier, start[active] + steps[active], with_graph=True)
            num_evaluations += len(active)
        steps[active] += (1 + overshoot) * _nearest_step(x, logits, labels[active], rivals)
        num_evaluations += rivals.shape[1] * len(active)
    return Increments(steps=steps, is_fooled=is_fooled, is_solved=is_solved, num_evaluations=num_evaluations)


def _forward(classifier: Logits, x: Tensor, *, with_graph: bool) -> tuple[Tensor, Tensor]:
    x = x.clamp(0, 255).requires_grad_(with_graph)
    with torch.set_grad_enabled(with_graph):
        return x, classifier(x)


def _rivals(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.topk(min(count, logits.shape[1] - 1), dim=1).indices


def _nearest_step(x: Tensor, logits: Tensor, labels: Tensor, rivals: Tensor) -> Tensor:
    """Step onto the nearest of the linearised boundaries between each label and its rivals."""
    gaps = logits.gather(1, labels[:, None]) - logits.gather(1, rivals)
    nearest = torch.full_like(gaps[:, 0], torch.inf)
    step = torch.zeros_like(x)
    for k in range(gaps.shape[1]):
        (slope,) = torch.autograd.grad(gaps[:, k].sum(), x, retain_graph=k + 1 < gaps.shape[1])
        squared = _squared_norms(slope)
        distance = gaps[:, k].detach() / squared.sqrt()
        nearer = distance < nearest  # never where a slope is zero or not finite
        nearest = torch.where(nearer, distance, nearest)
        step = torch.where(nearer.view(-1, 1, 1, 1), _scale(-gaps[:, k].detach() / squared, slope), step)
    return step


def _squared_norms(slope: Tensor) -> Tensor:
    """‖∇f‖² of each image; NaN where there is no direction to go, so that every comparison with it fails."""
    squared = slope.flatten(1).square().sum(1)
    return squared.where(squared.isfinite() & (squared > 0), torch.nan)


def _scale(factors: Tensor, slope: Tensor) -> Tensor:
    """Each image's slope times its factor; zero where the factor is not finite."""
    each = factors.view(-1, 1, 1, 1)
    return torch.where(each.isfinite(), each * slope, 0.0)
