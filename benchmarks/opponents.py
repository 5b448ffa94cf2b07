"""Gradient ascent on a loss: SGD-UAP as published, and our rule with another loss."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from uap_dist.augment import augment
from uap_dist.classifiers import Classifier
from uap_dist.deepfool import add_perturbation, log_odds
from uap_dist.norms import Norm, measure, project
from uap_dist.worker import BlockResult, Examples, Solver, Worker

Loss = Callable[[Tensor, Tensor], Tensor]

BATCH, CLAMP, STEP_DECAY = 100, 12.0, 0.8
WIDTH = 10.0  # logits


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


def clamped_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """N losses that grow no further beyond CLAMP."""
    return F.cross_entropy(logits, labels, reduction="none").clamp(max=CLAMP)


def smooth_fooling(logits: Tensor, labels: Tensor) -> Tensor:
    """N shares, σ(−f/WIDTH) of the log-odds f: the fooling rate, smoothed; far on either side of the boundary it is flat."""
    return torch.sigmoid(-log_odds(logits, labels) / WIDTH)


def ascend(classifier: Classifier, pixels: Tensor, v: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    """Gradient (C×H×W) of the images' summed losses at clip(x + v, 0, 255)."""
    with torch.enable_grad():
        logits, leaf = classifier.linearise(add_perturbation(pixels, v))
        (slopes,) = torch.autograd.grad(loss(logits, labels).sum(), leaf)
    return classifier.pull_back(slopes.sum(0, keepdim=True), pixels.shape[1:])


class LossWorker(Worker):
    """Gives the gradient of a loss where ours gives increments: schedule, momentum, steps and corner are our rule's."""

    def __init__(self, worker: Worker, loss: Loss) -> None:
        super().__init__(worker.classifier, cache_bytes=0, num_threads=1)
        self.adopt(worker)
        self.loss = loss

    def solve(self, examples: Examples, perturbation: np.ndarray, solver: Solver) -> BlockResult:
        """See Worker."""
        views = augment(self.pixels(examples), solver.augmentation, np.random.default_rng(examples.seed))
        pixels, labels = torch.tensor(views, dtype=torch.float32), torch.tensor(examples.labels)
        slope = ascend(self.classifier, pixels, torch.tensor(perturbation), labels, self.loss)
        return BlockResult(
            total=slope.numpy(), num_examples=len(pixels), num_fooled=0, num_evaluations=2 * len(pixels), sums={}
        )
