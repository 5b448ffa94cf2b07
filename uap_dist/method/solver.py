"""Solving one block of images against v: pure functions of the classifier, the images and the state of the run.

Several perturbations can be solved at once, each against its own images: where a shape begins with M, their number.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from itertools import repeat
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from uap_dist.method.augment import Augmentation, zoom
from uap_dist.method.deepfool import Increments, deepfool
from uap_dist.method.log_odds import LogOddsSum, log_odds_sum
from uap_dist.method.rates import UNTARGETED, Goal
from uap_dist.method.update import Iterate, Steps, balance, log_odds_update, remember, weigh
from uap_dist.models.classifier import Classifier

EVALUATIONS_PER_LOG_ODDS_SOLVE = 2
EVALUATIONS = "evaluations"  # of the network, where they depend on the images: under the paper's rule
LOG_ODDS_SIZE = "mean_log_odds_size"  # |log-odds|, which the next round's weights depend on

Rule = Literal["log-odds", "paper"]
Result = TypeVar("Result")

MEANS: dict[Rule, tuple[str, str]] = {
    "log-odds": ("mean_log_odds", LOG_ODDS_SIZE),
    "paper": ("mean_increment_norm", "deepfool_success"),
}


@dataclass(frozen=True)
class Solver:
    """How blocks are solved in a round.

    Attributes:
        rule: how increments are computed and summed.
        augmentation: random views of the images.
        candidates: see `deepfool`; paper's rule.
        slope_ratio: see `deepfool`; paper's rule.
        goal: what the images shall be taken for; log-odds rule.
        max_zoom: of the perturbed images, see `draw_views`; log-odds rule.
    """

    rule: Rule
    augmentation: Augmentation
    candidates: int
    slope_ratio: float
    goal: Goal = UNTARGETED
    max_zoom: float = 0.0

    @property
    def evaluations_per_solve(self) -> int:
        """Of all networks for one image, under the log-odds rule."""
        return EVALUATIONS_PER_LOG_ODDS_SOLVE * self.goal.num_networks

    @cached_property
    def names(self) -> tuple[str, ...]:
        """K names of the sums over images: hits by kind of rate, and quantities of which a round reports means."""
        means = [each for mean in MEANS[self.rule] for each in self.goal.of_each(mean)]
        return (*self.goal.kinds, *means, *([EVALUATIONS] if self.rule == "paper" else []))

    def sizes(self, sums: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of |log-odds| and the number of images, each in the shape of the scale, from `BlockResult.sums`."""
        each = self.goal.of_each(LOG_ODDS_SIZE)
        first = self.names.index(each[0])
        of_networks = sums[:, first : first + len(each)]
        return of_networks[..., 0].view_as(scale), of_networks[..., 1].view_as(scale)


@dataclass(frozen=True)
class LocalSteps:
    """Steps that a block takes on its own copy of v and momentum.

    Attributes:
        momentum: 1×C×H×W float32, that the block starts from.
        sizes: of the steps, in pixels; a block with fewer images than `batch_size` per step takes only the first steps.
        batch_size: images per step at most.
        steps: gives the ball and the period.
    """

    momentum: np.ndarray | Tensor
    sizes: tuple[float, ...]
    batch_size: int
    steps: Steps


@dataclass(frozen=True)
class Batch:
    """Images that are solved together.

    Attributes:
        pixels: N×C×H×W float32, 0..255, augmented; N/M consecutive ones for each perturbation.
        labels: N, the clean labels; of several networks N×S.
        is_real: N, bool; the other images only fill the batch and count for nothing. None if all are real.
        zooms: N×3 int64, of the perturbed images, see `zoom`; None for none.
    """

    pixels: Tensor
    labels: Tensor
    is_real: Tensor | None = None
    zooms: Tensor | None = None

    def split(self, num_parts: int) -> Iterator["Batch"]:
        """Parts of nearly equal size; for images that are all real."""
        zooms = repeat(None) if self.zooms is None else self.zooms.tensor_split(num_parts)
        parts = zip(self.pixels.tensor_split(num_parts), self.labels.tensor_split(num_parts), zooms, strict=False)
        return (Batch(pixels, labels, zooms=own) for pixels, labels, own in parts)


@dataclass(frozen=True)
class BlockResult:
    """What a worker returns for a block: one array to reduce, and sums.

    Attributes:
        total: sum over the images of each perturbation, in the perturbations' shape. Paper's rule: increments in pixels, float64.
            Log-odds rule: weighted increments in logits per pixel value, float32. After local steps: how far v moved (pixels), and
            the momentum at the end, with a leading dimension of 2, float32.
        sums: M×K×2 float64; for each of `Solver.names` the sum over the images, and the number of images summed over.
        seconds: that it took, set by `Worker.solve`.
    """

    total: np.ndarray | Tensor
    sums: np.ndarray | Tensor
    seconds: float = 0.0

    def digest(self) -> str:
        """SHA-256 (hex) over every bit of the result; the time it took is none."""
        return hashlib.sha256(np.asarray(self.total).tobytes() + np.asarray(self.sums).tobytes()).hexdigest()


def solve_block(
    classifier: Classifier, batch: Batch, perturbation: Tensor, scales: Tensor, solver: Solver
) -> tuple[Tensor, Tensor]:
    """Increments of a block's images against v, summed: `BlockResult.total` and `sums`. Nothing in it waits for a GPU, except DeepFool.

    Args:
        classifier: on the device of the images.
        batch: the images.
        perturbation: v, M×C×H×W float32, pixels; the paper's rule takes one only.
        scales: M float64, `Iterate.scale`, or M×S; log-odds rule.
        solver: gives the rule.
    """
    if solver.rule == "paper":
        return _solve_paper(classifier, batch, perturbation, solver)
    return _solve_log_odds(classifier, batch, perturbation, scales, solver)


def take_local_steps(
    classifier: Classifier, batch: Batch, perturbation: Tensor, scales: Tensor, solver: Solver, local: LocalSteps
) -> tuple[Tensor, Tensor]:
    """What local steps of the log-odds rule over a block's images make of v and momentum; arguments as for `solve_block`.

    The images are split into as few batches of nearly equal size as `local.batch_size` allows, one for each step.
    """
    momentum = local.momentum
    if not isinstance(momentum, Tensor):
        momentum = torch.tensor(momentum, device=perturbation.device)
    start = end = Iterate(perturbation.double(), momentum.double(), scales)
    found = []
    num_batches = -(-len(batch.pixels) // local.batch_size)
    for part, size in zip(batch.split(num_batches), local.sizes, strict=False):
        total, sums = _solve_log_odds(classifier, part, end.v.float(), end.scale, solver)
        end = log_odds_update(end, total.double(), size, local.steps)
        end = remember(end, *solver.sizes(sums, end.scale), most_images=local.batch_size)
        found.append(sums)
    return torch.stack([end.v - start.v, end.momentum]).float(), reduce(torch.add, found)


def _solve_log_odds(
    classifier: Classifier, batch: Batch, perturbation: Tensor, scales: Tensor, solver: Solver
) -> tuple[Tensor, Tensor]:
    goal, is_real, num_sums = solver.goal, batch.is_real, len(scales)
    widths = scales.view(num_sums, -1)
    view = None if batch.zooms is None else partial(zoom, zooms=batch.zooms)

    def solve(network: int, member: Classifier, labels: Tensor) -> LogOddsSum:
        own_widths = widths[:, network, None].to(perturbation.dtype)

        def weigh_all(log_odds: Tensor) -> Tensor:
            weights = weigh(log_odds.view(num_sums, -1), own_widths).flatten()
            return weights if is_real is None else weights.where(is_real, 0)

        return log_odds_sum(member, batch.pixels, perturbation, labels, weigh=weigh_all, goal=goal, view=view)

    found = _for_each(classifier, batch.labels, solve)
    total = _add_up([each.total for each in found], widths)
    log_odds = [each.log_odds for each in found]
    counted = [each.isfinite() for each in log_odds]
    values = [each.where(known, 0).double() for each, known in zip(log_odds, counted, strict=True)]
    hits = goal.hits(batch.labels, _beside([each.predicted for each in found]))
    pairs = [each.double() for kind in goal.kinds for each in hits[kind]]
    means = [(each, known.double()) for each, known in zip(values, counted, strict=True)]
    sizes = [(each.abs(), known) for each, known in means]
    rows = torch.stack([*pairs, *(each for pair in (*means, *sizes) for each in pair)])
    if is_real is not None:
        rows = rows * is_real
    # one by one, so that the order is known
    sums = reduce(torch.add, rows.view(len(rows), num_sums, -1).unbind(2))
    return total, sums.T.reshape(num_sums, -1, 2)


def _solve_paper(classifier: Classifier, batch: Batch, perturbation: Tensor, solver: Solver) -> tuple[Tensor, Tensor]:
    def solve(_: int, member: Classifier, labels: Tensor) -> Increments:
        return deepfool(
            member,
            batch.pixels,
            perturbation,
            labels,
            candidates=solver.candidates,
            slope_ratio=solver.slope_ratio,
        )

    found, count = _for_each(classifier, batch.labels, solve), len(batch.pixels)
    is_fooled = _beside([each.is_fooled for each in found])
    hits = solver.goal.hits(torch.zeros_like(is_fooled), is_fooled)  # this rule knows no classes
    lengths = [each.steps.flatten(1).double().norm(dim=1) for each in found]
    pairs = [
        *((float(masks[0].sum()), count) for masks in hits.values()),
        *((float(each.sum()), int((each > 0).sum())) for each in lengths),
        *((float(each.is_solved.sum()), count) for each in found),
        (sum(each.num_evaluations for each in found), count),
    ]
    total = reduce(torch.add, [each.steps.double().sum(0, keepdim=True) for each in found])
    return total, torch.tensor([pairs], dtype=torch.float64, device=total.device)


def _for_each(
    classifier: Classifier, labels: Tensor, solve: Callable[[int, Classifier, Tensor], Result]
) -> list[Result]:
    """What is found for each network, given its number and its clean labels."""
    columns = labels.view(len(labels), -1).unbind(1)
    return [solve(number, *each) for number, each in enumerate(zip(classifier.members, columns, strict=True))]


def _add_up(totals: list[Tensor], scales: Tensor) -> Tensor:
    """The sum of the totals of all networks, each M×C×H×W, by their scales (M×S)."""
    if len(totals) == 1:
        return totals[0]
    shares = balance(scales).to(totals[0].dtype)[..., None, None, None].unbind(1)
    return reduce(torch.add, [total * share for total, share in zip(totals, shares, strict=True)])


def _beside(labels: list[Tensor]) -> Tensor:
    """Values of images (N each) as labels are: N of one network, N×S of several."""
    return labels[0] if len(labels) == 1 else torch.stack(labels, 1)
