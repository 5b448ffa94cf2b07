"""Phase transition: fooling rate as a function of the norm, for a universal perturbation and for other directions.

Source: Moosavi-Dezfooli, Fawzi, Fawzi, Frossard, "Universal adversarial perturbations", CVPR 2017, section 4, figure 8.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from uap_dist.errors import ConfigError
from uap_dist.evaluation.evaluate import measure_perturbations
from uap_dist.method.norms import Norm, measure, random_perturbation
from uap_dist.method.rates import Rate
from uap_dist.perturbations.files import Perturbation
from uap_dist.workers.dataset import Dataset
from uap_dist.workers.local import Workers
from uap_dist.workers.messages import Examples
from uap_dist.workers.worker import Worker

UNIVERSAL = "universal perturbation"
SPHERE = "random vector"
SIGNS = "random signs"
SINGLE = "DeepFool perturbation of one image"
SUM = "sum of DeepFool perturbations"
MEAN = "mean image"

BLOCK_SIZE = 24  # images whose normals or pixels are asked for at once; fixed, because bits depend on the batch


@dataclass(frozen=True)
class Direction:
    """A direction in image space, to be scaled to a norm.

    Attributes:
        kind: one of the names above.
        draw: from 0, where there are several of a kind.
        v: C×H×W, of any length but zero.
    """

    kind: str
    draw: int
    v: Tensor

    def __post_init__(self) -> None:
        """Raise ConfigError for a zero vector."""
        if not self.v.any():
            raise ConfigError(f"the {self.kind} is zero everywhere; it has no direction")


@dataclass(frozen=True)
class Point:
    """Fooling rate of a direction at one norm.

    Attributes:
        kind, draw: of the direction.
        norm: the norm in which it is `scale` times as large as the universal perturbation.
        norm_l2, norm_linf: of what was added to the images, pixels.
        fooling: on the held-out images.
    """

    kind: str
    draw: int
    norm: Norm
    scale: float
    norm_l2: float
    norm_linf: float
    fooling: Rate

    def __str__(self) -> str:
        """One line for a log."""
        return f"{self.kind} {self.draw}, ℓ2 {self.norm_l2:.4g}, ℓ∞ {self.norm_linf:.4g}: {self.fooling}"


def phase_transition(
    workers: Workers,
    train: Dataset,
    val: Dataset,
    v: Tensor,
    total: Tensor,
    *,
    scales: Sequence[float],
    num_draws: int,
    seed: int,
) -> Iterator[Point]:
    """Measure several directions on a grid of ℓ2 norms, then of ℓ∞ norms (figure 8 of the paper).

    Args:
        workers: measure fooling rates.
        train: training images, for DeepFool perturbations of single images and for the mean image.
        val: held-out images with their clean labels.
        v: the universal perturbation, C×H×W float32, pixels; scale 1 measures it unchanged.
        total: sum of the DeepFool perturbations, C×H×W.
        scales: the grid, in multiples of the norm of v.
        num_draws: number of random vectors, of random signs and of randomly drawn single images.
        seed: of all three.

    Raises:
        ConfigError: v, the sum or the mean image is zero.
    """
    singles = islice(_single_steps(workers, train, seed), num_draws)
    directions = [
        Direction(UNIVERSAL, 0, v),
        *random_directions(v.shape, num_draws, seed),
        *(Direction(SINGLE, draw, step) for draw, step in enumerate(singles)),
        Direction(SUM, 0, total),
        Direction(MEAN, 0, mean_image(workers, train)),
    ]
    norms: tuple[Norm, ...] = ("l2", "linf")
    for norm in norms:
        for direction in directions:
            yield from measure_along(workers, val, direction, norm, measure(v, norm), scales)


def measure_along(
    workers: Workers, val: Dataset, direction: Direction, norm: Norm, length: float, scales: Sequence[float]
) -> Iterator[Point]:
    """Fooling rates on held-out images of a direction at norms of `length` (pixels) times each scale."""
    # a perturbation of that length already keeps its bits, as jobs/evaluate.py measures them
    v = (direction.v * (length / measure(direction.v, norm))).float()
    for m in measure_perturbations(workers, "", "", val, [Perturbation(direction.kind, v)], scales=scales):
        yield Point(direction.kind, direction.draw, norm, m.scale, m.norm_l2, m.norm_linf, m.fooling)


def random_directions(shape: Sequence[int], num_draws: int, seed: int) -> Iterator[Direction]:
    """Random vectors, uniform on the sphere, and random signs."""
    kinds: dict[str, Norm] = {SPHERE: "l2", SIGNS: "linf"}
    for kind, norm in kinds.items():
        for draw in range(num_draws):
            yield Direction(kind, draw, random_perturbation(tuple(shape), norm=norm, radius=1.0, seed=seed + draw))


def mean_image(workers: Workers, dataset: Dataset) -> Tensor:
    """Mean of the examples' images, C×H×W float64, pixels.

    Raises:
        ConfigError: no example.
    """
    if dataset.num_examples == 0:
        raise ConfigError("there is no mean image of zero images")
    total = sum(workers.map(_sum_pixels, dataset.blocks(BLOCK_SIZE)), np.zeros(dataset.shape, np.int64))
    return torch.from_numpy(total / dataset.num_examples)


def _single_steps(workers: Workers, dataset: Dataset, seed: int) -> Iterator[Tensor]:
    """DeepFool's unit normals of single examples in random order, without examples for which it finds none."""
    for place in np.random.default_rng(seed).permutation(dataset.num_examples):
        (found,) = workers.map(Worker.normals, dataset.take(np.array([place])).blocks(1))
        yield from torch.tensor(found.directions)  # Ray's arrays are read-only


def _sum_pixels(worker: Worker, examples: Examples) -> np.ndarray:
    """Sum of the examples' images, C×H×W int64."""
    total: np.ndarray = worker.pixels(examples).sum(0, dtype=np.int64)
    return total
