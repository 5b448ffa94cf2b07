"""The measurements of section 4 of the paper, on any workers: phase transition, correlated boundaries, number of images.

Source: Moosavi-Dezfooli, Fawzi, Fawzi, Frossard, "Universal adversarial perturbations", CVPR 2017, figures 8, 9 and 6.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil

import numpy as np
import torch
from torch import Tensor

from uap_dist.compute import ComputeConfig, count_rounds
from uap_dist.compute import compute as compute_rounds
from uap_dist.dataset import Dataset, Workers
from uap_dist.errors import ConfigError, PerturbationError
from uap_dist.evaluate import measure_perturbations
from uap_dist.fooling import Rate
from uap_dist.norms import Norm, measure, random_perturbation
from uap_dist.perturbations import Perturbation
from uap_dist.spectrum import Sketch, Spectrum, count_rows
from uap_dist.together import compute_together
from uap_dist.worker import Normals

UNIVERSAL = "universal perturbation"
SPHERE = "random vector"
SIGNS = "random signs"
SINGLE = "DeepFool, one image"
SUM = "sum of DeepFool's"
MEAN = "mean image"
SUBSPACE = "random vector of the subspace"

BLOCK_SIZE = 24  # images whose normals or pixels are asked for at once; fixed, because bits depend on the batch
WAVE_SHARE = 0.25  # of the memory: normals on their way to the matrix
PAPER_NORM_L2, PAPER_NUM_VALUES = 2000.0, 3 * 224 * 224


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


@dataclass(frozen=True)
class GatheredNormals:
    """DeepFool's perturbations of many images.

    Attributes:
        spectrum: of the matrix whose rows are their unit normals.
        total: C×H×W float64, pixels: sum of the perturbations.
        num_left_out: images that gave none (see worker.Normals).
    """

    spectrum: Spectrum
    total: Tensor
    num_left_out: int


@dataclass(frozen=True)
class Boundaries:
    """How correlated the boundaries of many images are.

    Attributes:
        spectrum: of the matrix of their unit normals.
        random: of as many random unit vectors.
        num_left_out: images without a normal.
        points: fooling rates at one ℓ2 length of random vectors of the subspace of the first singular vectors, of random
            vectors of the whole space, and of the universal perturbation.
    """

    spectrum: Spectrum
    random: Spectrum
    num_left_out: int
    points: Sequence[Point]


@dataclass(frozen=True)
class NumberPoint:
    """A perturbation computed from so many images with a seed: its rates on held-out and on its training images, and its cost."""

    num_images: int
    seed: int
    val: Rate
    train: Rate
    num_evaluations: int

    def __str__(self) -> str:
        """One line for a log."""
        return f"{self.num_images} training images, seed {self.seed}: held-out {self.val}, training {self.train}"


@dataclass(frozen=True)
class Recipe:
    """How a perturbation was computed.

    Attributes:
        config: its own.
        num_evaluations: network evaluations that increments took; those for clean labels are not among them.
    """

    config: ComputeConfig
    num_evaluations: int

    @classmethod
    def of(cls, perturbation: Perturbation) -> "Recipe":
        """What the perturbation says of itself; PerturbationError where it says nothing."""
        said = perturbation.provenance
        try:
            config = ComputeConfig.from_provenance(said, perturbation.name)
            return cls(config, said["num_evaluations"] - said["num_train_images"])
        except (PerturbationError, KeyError) as error:
            raise PerturbationError(
                f"{perturbation.name} does not say how it was computed, so others cannot be computed likewise; leave images "
                "out of --analyses, or give a perturbation that jobs/compute.py has written"
            ) from error


def sum_steps(workers: Workers, dataset: Dataset, memory_bytes: int) -> Tensor:
    """Sum of DeepFool's perturbations of all examples, C×H×W float64, pixels; see `gather_normals`."""
    total = np.zeros(dataset.shape)
    for normals in _find_normals(workers, dataset, memory_bytes):
        total += normals.total
    return torch.from_numpy(total)


def gather_normals(workers: Workers, dataset: Dataset, num_singular: int, memory_bytes: int) -> GatheredNormals:
    """DeepFool's perturbations of all examples: their sum, and the spectrum of the matrix of unit normals.

    The normals stream to the caller block by block, each once, in waves that fit the memory. Were partial Gram matrices the
    workers' task, every block would have to meet every other: each worker would receive, or solve anew, the normals of all; and
    singular vectors would take them all once more.

    Args:
        workers: who solve; the result does not depend on their number.
        dataset: with its clean labels.
        num_singular: leading singular vectors to keep.
        memory_bytes: for normals in this process. Where they do not fit, the result depends on it (see `Sketch`).

    Raises:
        ConfigError: fewer normals than singular vectors, or normals that do not span so many dimensions.
    """
    num_values = int(np.prod(dataset.shape))
    sketch = Sketch(num_values, _sketch_bytes(memory_bytes))
    total, num_left_out = np.zeros(dataset.shape), 0
    for normals in _find_normals(workers, dataset, memory_bytes):
        sketch.add(normals.directions.reshape(-1, num_values))
        total += normals.total
        num_left_out += normals.num_left_out
    if sketch.num_rows < num_singular:
        raise ConfigError(
            f"{num_singular} singular vectors (--num-singular) asked for, but DeepFool found only {sketch.num_rows} normals; "
            f"{num_left_out} images have none"
        )
    return GatheredNormals(sketch.spectrum(num_singular), torch.from_numpy(total), num_left_out)


def check_subspace(num_singular: int, num_normals: int, shape: Sequence[int], memory_bytes: int) -> None:
    """Raise ConfigError where so many singular vectors cannot be had of so many normals (C×H×W) in that memory."""
    num_values = int(np.prod(shape))
    asked = f"{num_singular} singular vectors (--num-singular) asked for, but"
    if num_singular > num_normals:
        raise ConfigError(f"{asked} there are {num_normals} normals (--num-normals)")
    if num_singular > num_values:
        raise ConfigError(f"{asked} images have only {num_values} values")
    capacity = count_rows(num_values, _sketch_bytes(memory_bytes))
    if num_normals > capacity and num_singular > capacity // 2:
        raise ConfigError(
            f"{asked} {memory_bytes / 2**30:.3g} GiB (--memory-gib) hold {capacity} of the {num_normals} normals, which leaves "
            f"{capacity // 2}; give more memory"
        )


def mean_image(workers: Workers, dataset: Dataset) -> Tensor:
    """Mean of the examples' images, C×H×W float64, pixels.

    Raises:
        ConfigError: no example, or only black ones: no direction.
    """
    if dataset.num_examples == 0:
        raise ConfigError("there is no mean image of zero images")
    total: np.ndarray = sum(workers.map("sum_pixels", dataset.blocks(BLOCK_SIZE)))
    if not total.any():
        raise ConfigError(f"the mean image of {dataset.num_examples} images is black; it has no direction")
    return torch.from_numpy(total / dataset.num_examples)


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
        ConfigError: v is zero, or DeepFool found no perturbation.
    """
    if not v.any():
        raise ConfigError("the perturbation is zero; it has no direction")
    if not total.any():
        raise ConfigError(f"DeepFool finds no perturbation of any of the {train.num_examples} training images")
    singles = islice(_single_steps(workers, train, seed), num_draws)
    directions = [
        Direction(UNIVERSAL, 0, v),
        *_random_directions(v.shape, num_draws, seed),
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


def analyze_boundaries(
    workers: Workers,
    val: Dataset,
    v: Tensor,
    normals: GatheredNormals,
    *,
    norm_l2: float,
    num_draws: int,
    memory_bytes: int,
    seed: int,
) -> Boundaries:
    """Spectrum of the normals beside a random one, and fooling rates of random vectors of its subspace (figure 9 of the paper).

    Args:
        workers: who measure.
        val: held-out images, with their clean labels.
        v: the universal perturbation, C×H×W, pixels.
        normals: of other images than the held-out ones; their singular vectors span the subspace.
        norm_l2: length of all vectors that are measured, pixels.
        num_draws: random vectors of the subspace, and of the whole space.
        memory_bytes: for the random unit vectors; that of the normals.
        seed: of all random vectors.
    """
    subspace = torch.from_numpy(normals.spectrum.vectors)
    directions = [Direction(UNIVERSAL, 0, v)]
    for draw in range(num_draws):
        coefficients = random_perturbation((len(subspace),), norm="l2", radius=1.0, seed=seed + draw)
        directions.append(Direction(SUBSPACE, draw, (coefficients @ subspace).view(v.shape)))
    directions += [d for d in _random_directions(v.shape, num_draws, seed) if d.kind == SPHERE]
    length = measure(v, "l2")
    points = [point for d in directions for point in measure_along(workers, val, d, "l2", length, (norm_l2 / length,))]
    random = random_spectrum(normals.spectrum.num_rows, v.numel(), memory_bytes, seed)
    return Boundaries(normals.spectrum, random, normals.num_left_out, points)


def random_spectrum(num_rows: int, num_values: int, memory_bytes: int, seed: int) -> Spectrum:
    """Of random unit vectors, in the memory that `gather_normals` has for as many normals."""
    generator = torch.Generator().manual_seed(seed)
    sketch = Sketch(num_values, _sketch_bytes(memory_bytes))
    for start in range(0, num_rows, BLOCK_SIZE):
        rows = torch.randn(min(BLOCK_SIZE, num_rows - start), num_values, generator=generator)
        sketch.add((rows / rows.norm(dim=1, keepdim=True)).numpy())
    return sketch.spectrum(0)


def paper_norm_l2(shape: Sequence[int]) -> float:
    """ℓ2 length at an input size (C×H×W) that is per value as strong as the paper's 2000 on 3×224×224."""
    return PAPER_NORM_L2 * float(np.sqrt(np.prod(shape) / PAPER_NUM_VALUES))


def plan_numbers(
    train: Dataset, recipe: Recipe, numbers: Sequence[int], num_seeds: int
) -> dict[tuple[int, int], ComputeConfig]:
    """How a perturbation is computed from each number of images with each seed, by (number, seed).

    As the recipe says, with as many network evaluations for increments; those for clean labels come on top, so that fewer images
    do not buy more increments. All its images and its seed give its perturbation again, unless that had stopped at a target.

    Args:
        train: all training images.
        recipe: its seed is the first one.
        numbers: of training images, evenly spread over all.
        num_seeds: computations of each number.

    Raises:
        ConfigError: a number of images that is not there, is less than a block, or whose increments cannot be paid.
    """
    config = recipe.config
    for number in numbers:
        if not config.block_size <= number <= train.num_examples:
            raise ConfigError(
                f"a perturbation of {number} training images (--numbers) cannot be computed; give numbers between a block, "
                f"{config.block_size}, and all that there are, {train.num_examples}"
            )
    config = replace(config, max_passes=None, target_fooling_rate=1.0, evaluate_every=None)
    plan = {
        (number, config.seed + draw): replace(
            config, seed=config.seed + draw, max_evaluations=number + recipe.num_evaluations
        )
        for number in numbers
        for draw in range(num_seeds)
    }
    for (number, _), each in plan.items():
        count_rounds(train.thin(number).sizes, each)
    return plan


def default_numbers(num_train_images: int, block_size: int) -> tuple[int, ...]:
    """All training images, a quarter of them, a sixteenth, … a 256th, as far as those make a block."""
    return tuple(n for n in (num_train_images // 4**k for k in range(4, -1, -1)) if n >= block_size)


def compute_by_number(
    workers: Workers, train: Dataset, val: Dataset, plan: Mapping[tuple[int, int], ComputeConfig]
) -> Iterator[NumberPoint]:
    """A computation for each entry of a plan (see `plan_numbers`), several at a time, as they end (figure 6 of the paper)."""
    rounds = {
        f"{number} {seed}": compute_rounds(workers, train.thin(number), val, config)
        for (number, seed), config in plan.items()
    }
    config = next(iter(plan.values()))

    def at_once() -> int:  # one more than keep all workers busy
        return 1 + ceil(workers.num_workers * config.block_size / config.round_size)

    for name, report in compute_together(rounds, at_once=at_once):
        if report.is_last:
            assert report.evaluation is not None and report.evaluation.train is not None
            number, seed = map(int, name.split())
            yield NumberPoint(number, seed, report.evaluation.val, report.evaluation.train, report.num_evaluations)


def _find_normals(workers: Workers, dataset: Dataset, memory_bytes: int) -> Iterator[Normals]:
    """Of all examples, block by block, in waves of as many as a share of the memory holds."""
    blocks = dataset.blocks(BLOCK_SIZE)
    block_bytes = (4 * BLOCK_SIZE + 8) * int(np.prod(dataset.shape))
    wave_size = max(1, int(WAVE_SHARE * memory_bytes) // block_bytes)
    for start in range(0, len(blocks), wave_size):
        yield from workers.map("normals", blocks[start : start + wave_size])


def _sketch_bytes(memory_bytes: int) -> int:
    return int((1 - WAVE_SHARE) * memory_bytes)


def _random_directions(shape: Sequence[int], num_draws: int, seed: int) -> Iterator[Direction]:
    """Uniform on the sphere, and random signs."""
    kinds: dict[str, Norm] = {SPHERE: "l2", SIGNS: "linf"}
    for kind, norm in kinds.items():
        for draw in range(num_draws):
            yield Direction(kind, draw, random_perturbation(tuple(shape), norm=norm, radius=1.0, seed=seed + draw))


def _single_steps(workers: Workers, dataset: Dataset, seed: int) -> Iterator[Tensor]:
    """DeepFool's perturbations of examples at random, without those that it finds none of, as unit vectors."""
    for place in np.random.default_rng(seed).permutation(dataset.num_examples):
        shard = bisect_right(dataset.starts, place) - 1
        (found,) = workers.map("normals", [dataset.examples(shard, [place - dataset.starts[shard]])])
        yield from torch.tensor(found.directions)  # Ray's arrays are read-only
