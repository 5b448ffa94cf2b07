"""Phase transition: fooling rate against norm, of a universal perturbation and of other directions, on any workers.

Source: Moosavi-Dezfooli, Fawzi, Fawzi, Frossard, "Universal adversarial perturbations", CVPR 2017, section 4, figure 8.
"""

from bisect import bisect_right
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
    """A perturbation whose length is still open.

    Attributes:
        kind: one of the names above.
        draw: from 0, where there are several of a kind.
        v: C×H×W, of any length but zero.
    """

    kind: str
    draw: int
    v: Tensor

    def __post_init__(self) -> None:
        """Raise ConfigError where it points nowhere."""
        if not self.v.any():
            raise ConfigError(f"the {self.kind} is zero everywhere; it has no direction")


@dataclass(frozen=True)
class Point:
    """Fooling rate of a direction at one length.

    Attributes:
        kind, draw: of the direction.
        norm: in which it is `scale` times as long as the universal perturbation.
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
    """Fooling rates of several directions on one grid of norms, ℓ2 first, then ℓ∞ (figure 8 of the paper).

    Args:
        workers: who measure.
        train: images that single DeepFool perturbations and the mean image are of.
        val: held-out images, with their clean labels.
        v: the universal perturbation, C×H×W float32, pixels; at scale 1 it is measured as it is.
        total: sum of the DeepFool perturbations, C×H×W.
        scales: the grid, in multiples of v's norm.
        num_draws: random vectors, random signs, and single images at random.
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
    """Fooling rates on held-out images of a direction whose norm is each multiple of `length` (pixels)."""
    # a perturbation of that length already keeps its bits, as jobs/evaluate.py measures them
    v = (direction.v * (length / measure(direction.v, norm))).float()
    for m in measure_perturbations(workers, "", "", val, [Perturbation(direction.kind, v)], scales=scales):
        yield Point(direction.kind, direction.draw, norm, m.scale, m.norm_l2, m.norm_linf, m.fooling)


def random_directions(shape: Sequence[int], num_draws: int, seed: int) -> Iterator[Direction]:
    """Uniform on the sphere, and random signs."""
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
    total = sum(workers.map(Worker.sum_pixels, dataset.blocks(BLOCK_SIZE)), np.zeros(dataset.shape, np.int64))
    return torch.from_numpy(total / dataset.num_examples)


def _single_steps(workers: Workers, dataset: Dataset, seed: int) -> Iterator[Tensor]:
    """DeepFool's perturbations of examples at random, without those that it finds none of, as unit vectors."""
    for place in np.random.default_rng(seed).permutation(dataset.num_examples):
        shard = bisect_right(dataset.starts, place) - 1
        (found,) = workers.map(Worker.normals, [dataset.examples(shard, [place - dataset.starts[shard]])])
        yield from torch.tensor(found.directions)  # Ray's arrays are read-only
