"""Solving one block of images against v: pure functions of the classifier, the images and the state of the run."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from uap_dist.method.augment import Augmentation
from uap_dist.method.deepfool import deepfool
from uap_dist.method.log_odds import log_odds_sum
from uap_dist.method.rates import FOOLING, UNTARGETED, Goal
from uap_dist.method.update import Iterate, Steps, log_odds_update, remember, weigh
from uap_dist.models.classifier import Classifier

LOG_ODDS_SIZE = "mean_log_odds_size"  # in `BlockResult.sums`: |log-odds|, which the next round's weights depend on

Rule = Literal["log-odds", "paper"]


@dataclass(frozen=True)
class Solver:
    """How blocks are solved in a round.

    Attributes:
        rule: how increments are computed and summed.
        augmentation: random views of the images.
        candidates: see `deepfool`; paper's rule.
        slope_ratio: see `deepfool`; paper's rule.
        scale: of the log-odds so far, see `Iterate`; log-odds rule.
        goal: what the images shall be taken for; log-odds rule.
    """

    rule: Rule
    augmentation: Augmentation
    candidates: int
    slope_ratio: float
    scale: float = inf
    goal: Goal = UNTARGETED


@dataclass(frozen=True)
class LocalSteps:
    """Steps that a block takes on its own copy of v and momentum.

    Attributes:
        momentum: C×H×W float32, that the block starts from.
        sizes: of the steps, in pixels; a block with fewer images than `batch_size` per step takes only the first steps.
        batch_size: images per step at most.
        steps: gives the ball and the period.
    """

    momentum: np.ndarray
    sizes: tuple[float, ...]
    batch_size: int
    steps: Steps


@dataclass(frozen=True)
class BlockResult:
    """What a worker returns for a block: one array to reduce, and counts.

    Attributes:
        total: sum over the block. Paper's rule: increments in pixels, C×H×W float64. Log-odds rule: weighted increments in logits
            per pixel value, C×H×W float32. After local steps: how far v moved (pixels), and the momentum at the end, 2×C×H×W float32.
        num_examples: images in the block.
        num_fooled: of them, by the v that each was solved against.
        num_evaluations: images passed through the network, forward and backward passes counted separately.
        sums: quantities of which a round reports the mean, by name: their sum, and the number of images summed over. Those of the
            goal's kinds of rates are hits, and the images that count.
        seconds: that it took, set by `Worker.solve`.
    """

    total: np.ndarray
    num_examples: int
    num_fooled: int
    num_evaluations: int
    sums: dict[str, tuple[float, int]]
    seconds: float = 0.0

    def digest(self) -> str:
        """SHA-256 (hex) over every bit of the result; the time it took is none."""
        counts = [value for name, value in vars(self).items() if name not in ("total", "seconds")]
        return hashlib.sha256(self.total.tobytes() + repr(counts).encode()).hexdigest()


def add_sums(results: Sequence[BlockResult]) -> dict[str, tuple[float, int]]:
    """`BlockResult.sums` added up over blocks."""
    pairs = {name: [result.sums[name] for result in results] for name in results[0].sums}
    return {name: (sum(s for s, _ in some), sum(n for _, n in some)) for name, some in pairs.items()}


def solve_block(
    classifier: Classifier, pixels: Tensor, perturbation: Tensor, labels: Tensor, solver: Solver
) -> BlockResult:
    """Increments of a block's images against v, summed.

    Args:
        classifier: on the device of the images.
        pixels: N×C×H×W, 0..255, augmented.
        perturbation: v, C×H×W float32, pixels.
        labels: N, the clean labels.
        solver: gives the rule.
    """
    solve = _solve_log_odds if solver.rule == "log-odds" else _solve_paper
    return solve(classifier, pixels, perturbation, labels, solver)


def take_local_steps(
    classifier: Classifier, pixels: Tensor, perturbation: Tensor, labels: Tensor, solver: Solver, local: LocalSteps
) -> BlockResult:
    """What local steps of the log-odds rule over a block's images make of v and momentum; arguments as for `solve_block`.

    The images are split into as few batches of nearly equal size as `local.batch_size` allows, one for each step.
    """
    v, momentum = (array.cpu().double() for array in (perturbation, torch.tensor(local.momentum)))
    start = end = Iterate(v, momentum, solver.scale)
    results = []
    num_batches = -(-len(pixels) // local.batch_size)
    batches = zip(pixels.tensor_split(num_batches), labels.tensor_split(num_batches), strict=True)
    for (some, some_labels), size in zip(batches, local.sizes, strict=False):
        now = replace(solver, scale=end.scale)
        found = _solve_log_odds(classifier, some, end.v.float().to(pixels.device), some_labels, now)
        end = log_odds_update(end, torch.from_numpy(found.total).double(), size, local.steps)
        end = remember(end, *found.sums[LOG_ODDS_SIZE])
        results.append(found)
    return BlockResult(
        total=torch.stack([end.v - start.v, end.momentum]).float().numpy(),
        num_examples=len(pixels),
        num_fooled=sum(result.num_fooled for result in results),
        num_evaluations=sum(result.num_evaluations for result in results),
        sums=add_sums(results),
    )


def _solve_log_odds(
    classifier: Classifier, pixels: Tensor, perturbation: Tensor, labels: Tensor, solver: Solver
) -> BlockResult:
    weights = partial(weigh, scale=solver.scale)
    found = log_odds_sum(classifier, pixels, perturbation, labels, weigh=weights, goal=solver.goal)
    hits = {
        kind: (int(hit.sum()), int(n.sum())) for kind, (hit, n) in solver.goal.hits(labels, found.predicted).items()
    }
    num_fooled, _ = hits.pop(FOOLING)
    return BlockResult(
        total=found.total.cpu().numpy(),
        num_examples=len(pixels),
        num_fooled=num_fooled,
        num_evaluations=found.num_evaluations,
        sums={"mean_log_odds": _sum_finite(found.log_odds), LOG_ODDS_SIZE: _sum_finite(found.log_odds.abs()), **hits},
    )


def _solve_paper(
    classifier: Classifier, pixels: Tensor, perturbation: Tensor, labels: Tensor, solver: Solver
) -> BlockResult:
    found = deepfool(
        classifier, pixels, perturbation, labels, candidates=solver.candidates, slope_ratio=solver.slope_ratio
    )
    lengths = found.steps.flatten(1).double().norm(dim=1)
    return BlockResult(
        total=found.steps.double().sum(0).cpu().numpy(),
        num_examples=len(pixels),
        num_fooled=int(found.is_fooled.sum()),
        num_evaluations=found.num_evaluations,
        sums={
            "mean_increment_norm": (float(lengths.sum()), int((lengths > 0).sum())),
            "deepfool_success": (float(found.is_solved.sum()), len(pixels)),
        },
    )


def _sum_finite(values: Tensor) -> tuple[float, int]:
    """Sum and number of the finite values."""
    finite = values[values.isfinite()].double()
    return float(finite.sum()), len(finite)
