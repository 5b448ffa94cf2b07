"""Sign-gradient ascent on the cross-entropy: as published (SGD-UAP), and with everything of our rule but its loss."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from uap_dist.augment import augment
from uap_dist.classifiers import Classifier
from uap_dist.deepfool import add_perturbation
from uap_dist.norms import Norm, measure, project
from uap_dist.worker import BlockResult, Examples, Solver, Worker

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
            slope = clamped_slope(classifier, pixels[rows], v, labels[rows], CLAMP)
            direction = slope.sign() if norm == "linf" else slope / max(measure(slope, "l2"), 1e-300)
            v = project(v + STEP_DECAY * radius * direction, norm=norm, radius=radius)
            yield v, 2 * len(rows)


def clamped_slope(classifier: Classifier, pixels: Tensor, v: Tensor, labels: Tensor, clamp: float) -> Tensor:
    """Gradient (C×H×W) of the images' cross-entropies, each clamped, summed."""
    with torch.enable_grad():
        logits, leaf = classifier.linearise(add_perturbation(pixels, v))
        losses = F.cross_entropy(logits, labels, reduction="none").clamp(max=clamp)
        (slopes,) = torch.autograd.grad(losses.sum(), leaf)
    return classifier.pull_back(slopes.sum(0, keepdim=True), pixels.shape[1:])


class CrossEntropyWorker(Worker):
    """Gives the clamped cross-entropy's gradient where ours gives increments: schedule, momentum, steps and corner are our rule's."""

    def solve(self, examples: Examples, perturbation: np.ndarray, solver: Solver) -> BlockResult:
        """See Worker."""
        views = augment(self.pixels(examples), solver.augmentation, np.random.default_rng(examples.seed))
        pixels, labels = torch.tensor(views, dtype=torch.float32), torch.tensor(examples.labels)
        slope = clamped_slope(self.classifier, pixels, torch.tensor(perturbation), labels, CLAMP)
        return BlockResult(
            total=slope.numpy(), num_examples=len(pixels), num_fooled=0, num_evaluations=2 * len(pixels), sums={}
        )
