"""Gradient ascent on the cross-entropy: SGD-UAP as published, and in the place of our increments."""

from collections.abc import Iterator
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from uap_dist.method.norms import Norm, add_perturbation, measure, project
from uap_dist.method.solver import Batch, Solver
from uap_dist.models.classifier import Classifier
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.solving import block_solver
from uap_dist.workers.worker import Worker

BATCH, CLAMP, STEP_DECAY = 100, 12.0, 0.8


def sgd_uap(
    classifier: Classifier, pixels: Tensor, labels: Tensor, *, seed: int, norm: Norm, radius: float
) -> Iterator[tuple[Tensor, int]]:
    """Without end: v (C×H×W, pixels) after each batch, and the network evaluations that the batch took.

    Shafahi et al., "Universal adversarial training", AAAI 2020, with the constants of github.com/kenny-co/sgd-uap-torch
    (batches of 100, cross-entropy clamped at 12, steps of 0.8 of the radius, start at zero), written again here. That has ℓ∞
    only; for ℓ2 the step is along the gradient, as long.
    """
    generator = torch.Generator().manual_seed(seed)
    v = torch.zeros_like(pixels[0])
    while True:
        for rows in torch.randperm(len(pixels), generator=generator).split(BATCH):
            leaf = (
                v.detach().requires_grad_()
            )  # through the clip, as published: ours takes slopes at the clipped pixels
            losses = clamped_cross_entropy(classifier(add_perturbation(pixels[rows], leaf)), labels[rows])
            (slope,) = torch.autograd.grad(losses.sum(), leaf)
            direction = slope.sign() if norm == "linf" else slope / max(measure(slope, "l2"), 1e-300)
            v = project(v + STEP_DECAY * radius * direction, norm=norm, radius=radius)
            yield v, 2 * len(rows)


def clamped_cross_entropy(logits: Tensor, labels: Tensor, clamp: float = CLAMP) -> Tensor:
    """N losses that grow no further beyond the clamp."""
    return F.cross_entropy(logits, labels, reduction="none").clamp(max=clamp)


class EntropyWorkers(LocalWorkers):
    """Gives the gradient of the clamped cross-entropy where ours gives increments: schedule, momentum, steps and corner are our rule's.

    With a target it is that of the target's cross-entropy, which falls.
    """

    def __init__(self, worker: Worker, clamp: float = CLAMP) -> None:
        own = Worker(worker.classifier, cache_bytes=0, num_threads=1)
        own.adopt(worker)
        super().__init__(own)
        self.clamp = clamp

    def map(self, method, tasks, *shared):  # type: ignore[no-untyped-def]
        """As a worker."""
        with patch.object(block_solver, "solve_block", self._solve_block):
            return iter(list(super().map(method, tasks, *shared)))

    def _solve_block(
        self, classifier: Classifier, batch: Batch, perturbation: Tensor, scales: Tensor, solver: Solver
    ) -> tuple[Tensor, Tensor]:
        aims, factors = solver.goal.aims(batch.labels)
        with torch.enable_grad():
            logits, leaf = classifier.linearise(add_perturbation(batch.pixels, perturbation))
            losses = clamped_cross_entropy(logits, aims, self.clamp)
            (slopes,) = torch.autograd.grad(-(factors * losses).sum(), leaf)
        slope = classifier.pull_back(slopes.sum(0, keepdim=True), batch.pixels.shape[1:])
        slope /= slope.abs().mean().clamp(min=1e-30)  # as when its constants were searched, a round being a block
        return slope, torch.zeros(1, len(solver.names), 2, dtype=torch.float64)
