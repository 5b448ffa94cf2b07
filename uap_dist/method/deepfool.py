"""DeepFool: for each image the smallest step, to first order, that takes it out of its clean label.

Moosavi-Dezfooli, Fawzi, Frossard, "DeepFool: a simple and accurate method to fool deep neural networks", CVPR 2016. The
boundary between label y and rival class k is where the gap z_y − z_k of their logits is zero. Linearised at the current
point, it lies at the distance gap / ‖∇gap‖2; each iteration steps onto the nearest of these boundaries, until the label changes.

Unlike the authors' code, this one knows that pixels end at 0 and 255 (see `Position`), and need not compute the gradients of
all candidate classes (see `find_nearest`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from uap_dist.errors import ConfigError

Logits = Callable[[Tensor], Tensor]

SLOPE_RATIO = 1.5  # benchmarks/deepfool.md measures how rarely it leaves out the nearest boundary
EDGE = 1e-3  # pixel values; a pixel this close to 0 or 255 counts as being there, whatever rounding has made of it
# A graph is rebuilt once fewer of its images need another gradient. A forward pass costs about half of a backward pass
REBUILD_BELOW = 2 / 3


@dataclass(frozen=True)
class Increments:
    """One step for each image, and what it cost.

    Attributes:
        steps: N×C×H×W, pixels; zero for images that are fooled already and for those without a direction to go.
        normals: N×C×H×W, unit normals of the boundaries that the last iteration stepped onto; zero where there was no step.
            They include the pixels that a step leaves alone because these are at 0 or 255.
        is_fooled: N, bool, whether x + v is fooled before any step.
        is_solved: N, bool, whether it is fooled after the step.
        num_evaluations: network evaluations spent: one for each image once forward or once backward.
    """

    steps: Tensor
    normals: Tensor
    is_fooled: Tensor
    is_solved: Tensor
    num_evaluations: int


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
    """DeepFool's increments Δv for images perturbed by v.

    Args:
        classifier: maps N×C×H×W pixels to N×K logits.
        pixels: N×C×H×W, 0..255.
        perturbation: v, C×H×W, pixels.
        labels: N, the clean labels.
        candidates: classes considered: the clean label and those with the largest logits at x + v; at least 2, at most K are used.
        max_iterations: linearisations at most.
        overshoot: each step is lengthened by this fraction, to end beyond the boundary.
        slope_ratio: largest ratio expected between the gradient norms of an image's candidates, or of one candidate in two
            iterations; candidates that cannot be the nearest under this assumption are skipped. Infinity skips none.

    Raises:
        ConfigError: an option outside its range.

    Source: DeepFool, algorithm 2. Skipping candidates and the treatment of 0 and 255 are ours.
    """
    if candidates < 2 or max_iterations < 1 or overshoot < 0 or not slope_ratio >= 1:
        raise ConfigError(
            f"deepfool got candidates {candidates}, max_iterations {max_iterations}, overshoot {overshoot}, slope_ratio "
            f"{slope_ratio}; they must be at least 2, 1, 0 and 1"
        )
    position = Position(pixels + perturbation, torch.zeros_like(pixels))
    graph = _forward(classifier, position, torch.ones_like(labels, dtype=torch.bool), with_graph=True)
    boundaries = Boundaries.at(graph, labels, candidates - 1)
    is_fooled = graph.logits.detach().argmax(1) != labels
    is_solved = is_fooled.clone()
    gradients = torch.zeros_like(pixels)
    num_evaluations = len(pixels)
    for iteration in range(1, max_iterations + 1):
        if is_solved.all():
            break
        nearest = find_nearest(classifier, position, graph, ~is_solved, boundaries, slope_ratio)
        has_step = nearest.rivals >= 0
        position = position.move((1 + overshoot) * nearest.steps).enter(~is_solved & ~has_step)
        gradients[has_step] = nearest.gradients[has_step]
        boundaries = replace(boundaries, slopes=nearest.slopes)
        graph = _forward(classifier, position, ~is_solved, with_graph=iteration < max_iterations)
        is_solved[graph.rows] = graph.logits.detach().argmax(1) != labels[graph.rows]
        num_evaluations += nearest.num_evaluations + len(graph.rows)
    return Increments(
        steps=position.steps,
        normals=_scale(-1 / gradients.double().flatten(1).norm(dim=1), gradients).to(pixels.dtype),
        is_fooled=is_fooled,
        is_solved=is_solved,
        num_evaluations=num_evaluations,
    )


@dataclass(frozen=True)
class Position:
    """N images at `start` + `steps` (N×C×H×W pixels each), where `start` is x + v; the network is shown them clipped to 0..255.

    Steps keep pixels within 0..255: a pixel at 0 or 255 takes no part in a step that leads outward. Nor does one that v has
    pushed out of the range take part in any: it would have to come back first before the network sees a change.
    """

    start: Tensor
    steps: Tensor

    def __getitem__(self, rows: Tensor) -> "Position":
        return Position(self.start[rows], self.steps[rows])

    @property
    def shown(self) -> Tensor:
        """What the network is shown."""
        return (self.start + self.steps).clamp(0, 255)

    @property
    def _range(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest steps that stay within 0..255."""
        return -self.start, 255 - self.start

    @property
    def _is_inside(self) -> Tensor:
        low, high = self._range
        return (self.steps >= low - EDGE) & (self.steps <= high + EDGE)

    def can_follow(self, direction: Tensor) -> Tensor:
        """Mask of the pixels (N×C×H×W, bool) for which the network sees a small step in that direction."""
        low, high = self._range
        can_rise, can_fall = self.steps < high - EDGE, self.steps > low + EDGE
        return torch.where(direction < 0, can_fall, can_rise) & self._is_inside

    def move(self, steps: Tensor) -> "Position":
        """The position after steps of the pixels within 0..255; each stops at the end of the range."""
        low, high = self._range
        return Position(self.start, torch.where(self._is_inside, (self.steps + steps).clamp(low, high), self.steps))

    def enter(self, which: Tensor) -> "Position":
        """The position with all pixels of some images (N, bool) clipped to 0..255, so that they can move again.

        The network sees no difference.
        """
        low, high = self._range
        return Position(self.start, torch.where(which.view(-1, 1, 1, 1), self.steps.clamp(low, high), self.steps))


@dataclass(frozen=True)
class Graph:
    """A forward pass of some images, kept for differentiation.

    Attributes:
        rows: M indices of the images in the batch.
        x: M×C×H×W pixels, clipped to 0..255; the leaf that gradients are taken at.
        logits: M×K.
    """

    rows: Tensor
    x: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Boundaries:
    """The boundaries between each image's label and R rival classes.

    Attributes:
        labels: N.
        rivals: N×R classes, those with the largest logits first.
        slopes: N×R, ‖∇(z_label − z_rival)‖2 over the pixels that can follow a step to that rival, when last computed; NaN
            before that.
    """

    labels: Tensor
    rivals: Tensor
    slopes: Tensor

    @classmethod
    def at(cls, graph: Graph, labels: Tensor, num_rivals: int) -> "Boundaries":
        """Those to the classes with the largest logits beside the label, at most K − 1, in a graph of all N images."""
        others = graph.logits.detach().scatter(1, labels[:, None], -torch.inf)
        rivals = others.topk(min(num_rivals, others.shape[1] - 1), dim=1).indices
        return cls(labels, rivals, torch.full(rivals.shape, torch.nan, dtype=graph.x.dtype, device=graph.x.device))

    def gaps(self, graph: Graph) -> Tensor:
        """z_label − z_rival for the M images of a graph, M×R."""
        return graph.logits.gather(1, self.labels[graph.rows, None]) - graph.logits.gather(1, self.rivals[graph.rows])


@dataclass(frozen=True)
class Nearest:
    """Steps just across each image's nearest linearised boundary, and what was learnt on the way.

    Attributes:
        steps: N×C×H×W, pixels; zero for pixels that cannot follow.
        gradients: N×C×H×W, logits per pixel value, of z_label − z_rival at the nearest boundary; zero if there is none.
        rivals: N, class across the nearest boundary, −1 if there is none.
        slopes: N×R, `Boundaries.slopes` with those computed here filled in.
        num_evaluations: images passed through the network, forward and backward passes counted separately.
    """

    steps: Tensor
    gradients: Tensor
    rivals: Tensor
    slopes: Tensor
    num_evaluations: int


def find_nearest(
    classifier: Logits, position: Position, graph: Graph, wanted: Tensor, boundaries: Boundaries, slope_ratio: float
) -> Nearest:
    """Find the nearest linearised boundary of each wanted image, and the step just across it.

    The distance to a boundary is gap/slope, and a slope costs a backward pass. Rivals are therefore visited in the order of
    their expected distances, computed with the slope last seen (or else the steepest seen for that image). An image is done
    once the next expected distance, divided by `slope_ratio`, exceeds the smallest distance found.

    Args:
        classifier: as in `deepfool`.
        position: of the N images.
        graph: of a forward pass at this position, with all wanted images at least.
        wanted: N, bool; other images get no step.
        boundaries: of the N images.
        slope_ratio: as in `deepfool`.
    """
    slopes = boundaries.slopes.clone()
    gaps = torch.full_like(slopes, torch.nan)
    gaps[graph.rows] = boundaries.gaps(graph).detach()
    # a shorter step might not change any pixel, and an image exactly on a boundary would never leave it
    least = 255 * torch.finfo(slopes.dtype).eps * position.start[0].numel() ** 0.5
    steps, gradients = torch.zeros_like(position.steps), torch.zeros_like(position.steps)
    distances = torch.full_like(gaps[:, 0], torch.inf)
    rivals = torch.full_like(boundaries.labels, -1)
    is_open = wanted[:, None] & gaps.isfinite()
    num_evaluations = 0
    while True:
        expected, column = _expected_distances(gaps, slopes, is_open).min(1)
        wanted = expected < slope_ratio * distances
        num_wanted = int(wanted.sum())
        if num_wanted == 0:
            return Nearest(steps, gradients, rivals, slopes, num_evaluations)
        if num_wanted <= REBUILD_BELOW * len(graph.rows):
            graph = _forward(classifier, position, wanted, with_graph=True)
            num_evaluations += num_wanted
        rows, k, is_wanted = graph.rows, column[graph.rows], wanted[graph.rows]
        chosen = boundaries.gaps(graph).gather(1, k[:, None]).squeeze(1)
        (gradient,) = torch.autograd.grad(chosen.where(is_wanted, 0.0).sum(), graph.x, retain_graph=True)
        num_evaluations += len(rows)
        slope = gradient * position[rows].can_follow(-gradient)
        squared = _squared_norms(slope)
        distance = gaps[rows, k] / squared.sqrt()
        is_nearer = is_wanted & (distance < distances[rows])  # false where the slope is zero or not finite
        step = _scale(-(distance + least) / squared.sqrt(), slope)
        distances[rows] = torch.where(is_nearer, distance, distances[rows])
        rivals[rows] = torch.where(is_nearer, boundaries.rivals[rows, k], rivals[rows])
        gradients[rows] = torch.where(is_nearer.view(-1, 1, 1, 1), gradient, gradients[rows])
        steps[rows] = torch.where(is_nearer.view(-1, 1, 1, 1), step, steps[rows])
        slopes[rows, k] = torch.where(is_wanted, squared.sqrt(), slopes[rows, k])
        is_open[rows, k] &= ~is_wanted


def _expected_distances(gaps: Tensor, slopes: Tensor, is_open: Tensor) -> Tensor:
    """Gap/slope, N×R; a slope not seen yet is taken to be the steepest seen for that image, infinite where not open."""
    steepest = slopes.nan_to_num(0.0).max(1, keepdim=True).values
    known = torch.where(slopes > 0, slopes, torch.where(steepest > 0, steepest, 1.0))
    return torch.where(is_open, gaps / known, torch.inf)


def _forward(classifier: Logits, position: Position, which: Tensor, *, with_graph: bool) -> Graph:
    rows = which.nonzero().squeeze(1)
    x = position[rows].shown.requires_grad_(with_graph)
    with torch.set_grad_enabled(with_graph):
        return Graph(rows, x, classifier(x))


def _squared_norms(slope: Tensor) -> Tensor:
    """‖∇f‖² of each image; NaN where it is zero or not finite, so that every comparison with it is false."""
    squared = slope.flatten(1).square().sum(1)
    return squared.where(squared.isfinite() & (squared > 0), torch.nan)


def _scale(factors: Tensor, slope: Tensor) -> Tensor:
    """Each image's slope times its factor; zero where the factor is not finite."""
    each = factors.view(-1, 1, 1, 1)
    return torch.where(each.isfinite(), each * slope, 0.0)
