"""SGA and DM-UAP with the constants that their authors published, for ℓ∞.

Written again here from the papers; where a paper leaves a detail open, it is that of the authors' published code. Evaluations are
counted as everywhere: one image once forward or once backward, clean labels once (the authors compute them again in every batch).
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comparison.opponents import clamped_cross_entropy
from uap_dist.method.norms import PAPER_NUM_VALUES
from uap_dist.models.classifier import Classifier

EPOCHS, CLAMP = 20, 9.0  # of both; the cross-entropy of an image counts up to the clamp
# SGA: large batches, small ones drawn from each, passes over the large one that these make, and a step as a share of the radius
LARGE_BATCH, SMALL_BATCH, INNER_PASSES, STEP_SHARE = 250, 10, 4, 0.1
# DM-UAP, images and perturbations in 0..1: how far weights and images go (ℓ2) in the last epoch, in how many steps
DM_BATCH, WEIGHT_RADIUS, WEIGHT_STEPS, IMAGE_RADIUS, IMAGE_STEPS = 125, 4.0, 10, 25.0, 10
IMAGE_STEP_SHARE, SMOOTHING, LEARNING_RATE = 0.125, 0.2, 0.1


def sga(
    classifier: Classifier, pixels: Tensor, labels: Tensor, *, seeds: Sequence[int], radius: float
) -> tuple[Tensor, int]:
    """Perturbations of several seeds at once (S×C×H×W, pixels), and the network evaluations of each.

    From each large batch small ones are drawn, along whose gradients a copy of v takes sign steps; v itself then takes one sign
    step along the mean of these gradients.

    Args:
        classifier: in evaluation mode.
        pixels: N×C×H×W float32, 0..255.
        labels: N, what the classifier says of them.
        seeds: of the batches.
        radius: pixels.

    Source: Liu, Zhong, Zhang, Qin and Deng, "Enhancing generalization of universal adversarial perturbation through gradient
    aggregation", ICCV 2023, algorithm 1, without momentum and with the clamped cross-entropy. The size of the large batch, the clamp
    and the step are those of gen_sga.sh in github.com/liuxuannan/Stochastic-Gradient-Aggregation.
    """
    rngs = [np.random.default_rng(seed) for seed in seeds]
    step, num_solves = STEP_SHARE * radius, 0
    v = torch.zeros(len(rngs), *pixels.shape[1:], device=pixels.device)
    for _ in range(EPOCHS):
        orders = np.stack([rng.permutation(len(pixels)) for rng in rngs])
        for large in np.split(orders, range(LARGE_BATCH, len(pixels), LARGE_BATCH), axis=1):
            inner, total = v, torch.zeros_like(v)
            small = torch.from_numpy(np.stack([_draw(rng, rows) for rng, rows in zip(rngs, large, strict=True)], 1))
            for rows in small.to(pixels.device, non_blocking=True):
                slopes = _slopes(classifier, pixels[rows], labels[rows], inner)
                inner = (inner + step * slopes.sign()).clamp(-radius, radius)
                total += slopes
            num_solves += small[:, 0].numel()
            v = (v + step * total.sign()).clamp(-radius, radius)
    return v, len(pixels) + 2 * num_solves


def _draw(rng: np.random.Generator, rows: np.ndarray) -> np.ndarray:
    """Small batches of a large one (M×B), each without repetition."""
    size = min(SMALL_BATCH, len(rows))
    return np.stack([rng.choice(rows, size, replace=False) for _ in range(INNER_PASSES * len(rows) // size)])


def _slopes(classifier: Classifier, pixels: Tensor, labels: Tensor, v: Tensor) -> Tensor:
    """Gradients of the clamped cross-entropy (S×C×H×W), summed over S×B×C×H×W images; zero where clip(x + v, 0, 255) clips."""
    leaf = v.detach().requires_grad_()
    logits = classifier((pixels + leaf[:, None]).clamp(0, 255).flatten(0, 1))
    loss = clamped_cross_entropy(logits, labels.flatten(), CLAMP).sum()
    return torch.autograd.grad(loss, leaf)[0]


def dm_uap(classifier: Classifier, pixels: Tensor, labels: Tensor, *, seed: int, radius: float) -> tuple[Tensor, int]:
    """A perturbation (C×H×W, pixels), and the network evaluations that it took.

    For each batch the network's weights and then the images move to where the cross-entropy of the clean labels is small, farther
    in each epoch; there v takes a step that raises it.

    Args:
        classifier: not accelerated, so that it has the authors' weights to move; a copy is changed.
        pixels: N×C×H×W float32, 0..255.
        labels: N, what the classifier says of them.
        seed: of the batches, the start and dropout.
        radius: pixels.

    Source: Zhang, Xu, Shi, Zhang, Hu, Li and Zhang, "Improving generalization of universal adversarial perturbation via dynamic
    maximin optimization", AAAI 2025, algorithm 1, with the command of github.com/yechao-zhang/DM-UAP for 500 images: weights move in
    training mode (dropout, batch norm by batch), v starts at random and moves by AdamW, and x + v is not clipped. The radius for
    images is theirs at 224×224, and for other sizes alike for each pixel.
    """
    torch.manual_seed(seed)
    network = copy.deepcopy(classifier)
    published = copy.deepcopy(classifier.state_dict())
    bound = radius / 255
    v = nn.Parameter(bound * (2 * torch.rand(pixels.shape[1:], device=pixels.device) - 1))
    optimizer = torch.optim.AdamW([v], lr=LEARNING_RATE)
    image_radius = IMAGE_RADIUS * (v.numel() / PAPER_NUM_VALUES) ** 0.5
    for epoch in range(1, EPOCHS + 1):
        for rows in torch.randperm(len(pixels), device=pixels.device).split(DM_BATCH):
            x, y = pixels[rows] / 255, labels[rows]
            _move_weights(network, x, y, WEIGHT_RADIUS * epoch / EPOCHS)
            near = _move_images(network, x, y, image_radius * epoch / EPOCHS)
            loss = -clamped_cross_entropy(network(255 * (near + v)), y, CLAMP).mean()
            (v.grad,) = torch.autograd.grad(loss, v)
            optimizer.step()
            v.data.clamp_(-bound, bound)
            network.load_state_dict(published)
    return 255 * v.detach(), len(pixels) * (1 + 2 * EPOCHS * (WEIGHT_STEPS + IMAGE_STEPS + 1))


def _move_weights(network: Classifier, x: Tensor, labels: Tensor, radius: float) -> None:
    """The network's weights, in place: steps of equal length down the smoothed cross-entropy of images (0..1), `radius` together."""
    weights = list(network.train().requires_grad_(True).parameters())
    for _ in range(WEIGHT_STEPS):
        loss = F.cross_entropy(network(255 * x), labels, label_smoothing=SMOOTHING)
        slopes = torch.autograd.grad(loss, weights, allow_unused=True)
        moved = [(weight.data, slope) for weight, slope in zip(weights, slopes, strict=True) if slope is not None]
        length = torch.stack([slope.norm() for _, slope in moved]).norm()
        for weight, slope in moved:
            weight -= slope * (radius / WEIGHT_STEPS / (length + 1e-12))
    network.eval().requires_grad_(False)


def _move_images(network: Classifier, x: Tensor, labels: Tensor, radius: float) -> Tensor:
    """Images (0..1) within ℓ2 `radius` of x, after steps of an eighth of it down the cross-entropy."""
    near = x
    for _ in range(IMAGE_STEPS):
        leaf = near.detach().requires_grad_()
        (slopes,) = torch.autograd.grad(F.cross_entropy(network(255 * leaf), labels), leaf)
        moved = near - x - IMAGE_STEP_SHARE * radius * slopes / (_lengths(slopes) + 1e-10)
        near = (x + moved * (radius / _lengths(moved)).clamp(max=1)).clamp(0, 1)
    return near


def _lengths(images: Tensor) -> Tensor:
    """N×1×1×1 ℓ2 norms."""
    return images.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
