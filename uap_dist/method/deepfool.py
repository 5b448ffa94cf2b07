"""Increments: DeepFool's, image by image, and the sum of one step toward each image's log-odds boundary.

Both start from clip(x + v, 0, 255), which is what the network is shown.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from uap_dist.errors import ConfigError
from uap_dist.models.classifier import Classifier

Logits = Callable[[Tensor], Tensor]

SLOPE_RATIO = 1.5  # benchmarks/deepfool.md says what it leaves out
EDGE = 1e-3  # pixels: so near to 0 or 255 a pixel counts as there, whatever rounding has made of it
CROWDED = 2 / 3  # a graph of which fewer images go on is built anew for those: a forward costs about half of a backward


@dataclass(frozen=True)
class Increments:
    """One step for each image, and what it cost.

    Attributes:
        steps: N×C×H×W, pixels; zero where there was nothing to do or no direction to go.
        normals: N×C×H×W of length 1: the normal of the boundary that each step leads to, at the last linearisation. Zero
            where there is no step. Beside a step it also has the pixels that cannot follow it, because they are at 0 or 255.
        is_fooled: N, whether x + v was fooled before any step.
        is_solved: N, whether it is after the step.
        num_evaluations: images through the network, forward and backward counted each.
    """

    steps: Tensor
    normals: Tensor
    is_fooled: Tensor
    is_solved: Tensor
    num_evaluations: int


@dataclass(frozen=True)
class LogOddsSum:
    """Weighted increments of all images in one, and what they cost.

    Attributes:
        total: C×H×W, logits/pixels.
        log_odds: N, of the clean labels at x + v.
        is_fooled: N, whether x + v was fooled.
        num_evaluations: images through the network, forward and backward counted each.
    """

    total: Tensor
    log_odds: Tensor
    is_fooled: Tensor
    num_evaluations: int


def add_perturbation(pixels: Tensor, perturbation: Tensor) -> Tensor:
    """clip(x + v, 0, 255), N×C×H×W: what the classifier is shown."""
    return (pixels + perturbation).clamp(0, 255)


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """z_y − logsumexp of the other logits = log p_y/(1 − p_y), for N×K logits and N labels."""
    own = labels[:, None]
    others = logits.scatter(1, own, -torch.inf).logsumexp(1)
    return logits.gather(1, own).squeeze(1) - others


def log_odds_sum(
    classifier: Classifier, pixels: Tensor, perturbation: Tensor, labels: Tensor, *, weigh: Callable[[Tensor], Tensor]
) -> LogOddsSum:
    """Directions of one DeepFool step of each image toward the boundary between its clean label and everything else, weighted, in one sum.

    With f the log-odds of the clean label at x + v: Σ −w(f) ∇f. No image's gradient is needed by itself, so the classifier's first layer is
    passed backward once for all of them. One forward and one backward an image.

    Args:
        classifier: as `load_classifier` gives it; faster after `accelerate`.
        pixels: N×C×H×W, 0..255.
        perturbation: C×H×W, pixels.
        labels: N, the clean labels.
        weigh: N log-odds to N weights.
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


def deepfool(
    classifier: Logits,
    pixels: Tensor,
    perturbation: Tensor,
    labels: Tensor,
    *,
    candidates: int = 10,
    max_iterations: int = 10,
    overshoot: float = 0.02,
    slope_ratio: float = SLOPE_RATIO,
) -> Increments:
    """The smallest ℓ2 step inside 0..255, to first order, that takes each perturbed image out of its clean label.

    Images that x + v fools already get a zero step. As in the authors' code the candidates are fixed at x + v; unlike there
    the network always sees values clipped to 0..255, and the step knows it: pixels that could not follow it do not count
    towards the distance to a boundary, and stay where they are (see `Position`).

    Args:
        classifier: N×C×H×W pixels to N×K logits.
        pixels: N×C×H×W, 0..255.
        perturbation: C×H×W, pixels.
        labels: N, the clean labels.
        candidates: classes looked at, the clean label included (K where there are fewer); at least 2.
        max_iterations: linearisations at most.
        overshoot: the step is lengthened by this share of itself, to end beyond the boundary.
        slope_ratio: by which the slopes of an image's candidates are taken to differ at most, and a slope from one iteration
            to the next. Candidates that cannot be the nearest then are left out, most of them; infinity looks at all.

    Raises:
        ConfigError: an option outside its range.

    Source: Moosavi-Dezfooli, Fawzi, Frossard, "DeepFool", CVPR 2016, algorithm 2; leaving candidates out is ours.
    """
    if candidates < 2 or max_iterations < 1 or overshoot < 0 or not slope_ratio >= 1:
        raise ConfigError(
            f"deepfool got candidates {candidates}, max_iterations {max_iterations}, overshoot {overshoot}, slope_ratio "
            f"{slope_ratio}; they must be at least 2, 1, 0 and 1"
        )
    position = Position(pixels + perturbation, torch.zeros_like(pixels))
    gradients = torch.zeros_like(pixels)
    is_solved = torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device)
    num_evaluations = 0
    for iteration in range(max_iterations + 1):
        graph = _forward(classifier, position, ~is_solved, with_graph=iteration < max_iterations)
        num_evaluations += len(graph.rows)
        is_solved[graph.rows] = graph.logits.detach().argmax(1) != labels[graph.rows]
        if iteration == 0:
            is_fooled = is_solved.clone()
            rivals = _rivals(graph.logits.detach(), labels, candidates - 1)
            slopes = torch.full(rivals.shape, torch.nan, dtype=pixels.dtype, device=pixels.device)
        if iteration == max_iterations or is_solved.all():
            break
        nearest = find_nearest(classifier, position, graph, ~is_solved, labels, rivals, slopes, slope_ratio)
        has_step = nearest.rivals >= 0
        position = position.move((1 + overshoot) * nearest.steps).enter(~is_solved & ~has_step)
        gradients[has_step] = nearest.gradients[has_step]
        slopes = nearest.slopes
        num_evaluations += nearest.num_evaluations
    lengths = gradients.double().flatten(1).norm(dim=1)
    return Increments(
        steps=position.steps,
        normals=_scale(-1 / lengths, gradients).to(pixels.dtype),
        is_fooled=is_fooled,
        is_solved=is_solved,
        num_evaluations=num_evaluations,
    )


@dataclass(frozen=True)
class Position:
    """Where images stand: at x + v (`start`) + `steps`, N×C×H×W pixels each, of which the network is shown what is clipped to 0..255.

    Pixels inside 0..255 never leave it. One that v has pushed beyond would have to come back before the network sees anything of its
    step: it takes part in none, as one at the edge takes part in none that leads outward.
    """

    start: Tensor
    steps: Tensor

    def __getitem__(self, rows: Tensor) -> "Position":
        return Position(self.start[rows], self.steps[rows])

    @property
    def shown(self) -> Tensor:
        """What the network sees."""
        return (self.start + self.steps).clamp(0, 255)

    @property
    def _range(self) -> tuple[Tensor, Tensor]:
        """The lowest and the highest step that is inside 0..255."""
        return -self.start, 255 - self.start

    @property
    def _is_inside(self) -> Tensor:
        low, high = self._range
        return (self.steps >= low - EDGE) & (self.steps <= high + EDGE)

    def can_follow(self, direction: Tensor) -> Tensor:
        """Pixels that the network sees move when they take a small step in that direction."""
        low, high = self._range
        can_rise, can_fall = self.steps < high - EDGE, self.steps > low + EDGE
        return torch.where(direction < 0, can_fall, can_rise) & self._is_inside

    def move(self, steps: Tensor) -> "Position":
        """After steps of pixels that can follow them; each ends at the edge of 0..255 at the latest."""
        low, high = self._range
        return Position(self.start, torch.where(self._is_inside, (self.steps + steps).clamp(low, high), self.steps))

    def enter(self, which: Tensor) -> "Position":
        """With all pixels of some images (N, bool) inside 0..255: the network sees no difference, but now they can move."""
        low, high = self._range
        return Position(self.start, torch.where(which.view(-1, 1, 1, 1), self.steps.clamp(low, high), self.steps))


@dataclass(frozen=True)
class Graph:
    """A forward pass of some rows (M indices) of a batch, to be differentiated at `x` (M×C×H×W pixels, clipped); logits are M×K."""

    rows: Tensor
    x: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Nearest:
    """Steps just over each image's nearest linearised boundary, and what was learnt on the way.

    Attributes:
        steps: N×C×H×W, pixels, of those that can follow.
        gradients: N×C×H×W, logits/pixels, of z_label − z_rival at the nearest boundary; zero where there is none.
        rivals: N, class of the nearest boundary, −1 if there is none.
        slopes: N×R, as in `find_nearest`, as last seen.
        num_evaluations: images through the network, forward and backward counted each.
    """

    steps: Tensor
    gradients: Tensor
    rivals: Tensor
    slopes: Tensor
    num_evaluations: int


def find_nearest(
    classifier: Logits,
    position: Position,
    graph: Graph,
    wanted: Tensor,
    labels: Tensor,
    rivals: Tensor,
    slopes: Tensor,
    slope_ratio: float,
) -> Nearest:
    """Steps from a position just over the nearest of the linearised boundaries between each label and its rivals.

    A rival's distance is gap/slope. Rivals are looked at in the order of the distance that is expected with the slope last
    seen (with the steepest seen of that image where none was), and no longer once that distance, divided by `slope_ratio`,
    is beyond the nearest found.

    Args:
        classifier: as in `deepfool`.
        position: of N images.
        graph: at this position, of all wanted images at least.
        wanted: N, bool; the others get no step.
        labels: N.
        rivals: N×R classes.
        slopes: N×R, ‖∇(z_label − z_rival)‖ over the pixels that can follow a step to that rival, as last seen; NaN before that.
        slope_ratio: as in `deepfool`.
    """
    # no shorter step is sure to change a pixel; without it an image that stands on a boundary would never leave it
    least = 255 * torch.finfo(slopes.dtype).eps * position.start[0].numel() ** 0.5
    gaps = torch.full_like(slopes, torch.nan)
    gaps[graph.rows] = _gaps(graph, labels, rivals).detach()
    steps, gradients = torch.zeros_like(position.steps), torch.zeros_like(position.steps)
    slopes = slopes.clone()
    is_open = wanted[:, None] & gaps.isfinite()
    nearest = torch.full_like(gaps[:, 0], torch.inf)
    which = torch.full_like(labels, -1)
    num_evaluations = 0
    while True:
        steepest = slopes.nan_to_num(0.0).max(1, keepdim=True).values
        known = torch.where(slopes > 0, slopes, torch.where(steepest > 0, steepest, 1.0))
        expected = torch.where(is_open, gaps / known, torch.inf)
        column = expected.argmin(1)
        wanted = expected.gather(1, column[:, None]).squeeze(1) < slope_ratio * nearest
        num_wanted = int(wanted.sum())
        if num_wanted == 0:
            return Nearest(steps, gradients, which, slopes, num_evaluations)
        if num_wanted <= CROWDED * len(graph.rows):
            graph = _forward(classifier, position, wanted, with_graph=True)
            num_evaluations += num_wanted
        rows, k = graph.rows, column[graph.rows]
        chosen = _gaps(graph, labels, rivals).gather(1, k[:, None]).squeeze(1)
        (gradient,) = torch.autograd.grad(chosen.where(wanted[rows], 0.0).sum(), graph.x, retain_graph=True)
        num_evaluations += len(rows)
        slope = gradient * position[rows].can_follow(-gradient)
        squared = _squared_norms(slope)
        gap = gaps[rows, k]
        distance = gap / squared.sqrt()
        nearer = wanted[rows] & (distance < nearest[rows])  # never where a slope is zero or not finite
        nearest[rows] = torch.where(nearer, distance, nearest[rows])
        which[rows] = torch.where(nearer, rivals[rows, k], which[rows])
        gradients[rows] = torch.where(nearer.view(-1, 1, 1, 1), gradient, gradients[rows])
        steps[rows] = torch.where(
            nearer.view(-1, 1, 1, 1), _scale(-(distance + least) / squared.sqrt(), slope), steps[rows]
        )
        slopes[rows, k] = torch.where(wanted[rows], squared.sqrt(), slopes[rows, k])
        is_open[rows, k] &= ~wanted[rows]


def _sum_finite(slopes: Tensor) -> Tensor:
    """Over the images (first dimension, which stays, as 1), without those whose slope is not finite."""
    total = reduce(torch.add, slopes)  # torch's own sum takes ten times as long on channels-last memory
    if not total.isfinite().all():
        total = slopes[slopes.flatten(1).isfinite().all(1)].sum(0)
    return total[None]


def _forward(classifier: Logits, position: Position, which: Tensor, *, with_graph: bool) -> Graph:
    rows = which.nonzero().squeeze(1)
    x = position[rows].shown.requires_grad_(with_graph)
    with torch.set_grad_enabled(with_graph):
        return Graph(rows, x, classifier(x))


def _rivals(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.topk(min(count, logits.shape[1] - 1), dim=1).indices


def _gaps(graph: Graph, labels: Tensor, rivals: Tensor) -> Tensor:
    return graph.logits.gather(1, labels[graph.rows, None]) - graph.logits.gather(1, rivals[graph.rows])


def _squared_norms(slope: Tensor) -> Tensor:
    """‖∇f‖² of each image; NaN where there is no direction to go, so that every comparison with it fails."""
    squared = slope.flatten(1).square().sum(1)
    return squared.where(squared.isfinite() & (squared > 0), torch.nan)


def _scale(factors: Tensor, slope: Tensor) -> Tensor:
    """Each image's slope times its factor; zero where the factor is not finite."""
    each = factors.view(-1, 1, 1, 1)
    return torch.where(each.isfinite(), each * slope, 0.0)
