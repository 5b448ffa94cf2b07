"""Correlated boundaries: the spectrum of the normals of many images' nearest boundaries, and what their subspace fools, on any workers.

Source: Moosavi-Dezfooli, Fawzi, Fawzi, Frossard, "Universal adversarial perturbations", CVPR 2017, section 4, figure 9.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uap_dist.analysis.phase_transition import (
    BLOCK_SIZE,
    SPHERE,
    UNIVERSAL,
    Direction,
    Point,
    measure_along,
    random_directions,
)
from uap_dist.analysis.spectrum import Sketch, Spectrum, count_rows
from uap_dist.errors import ConfigError
from uap_dist.method.norms import measure, random_perturbation
from uap_dist.workers.dataset import Dataset
from uap_dist.workers.local import Workers
from uap_dist.workers.messages import Normals
from uap_dist.workers.worker import Worker

SUBSPACE = "random vector of the subspace"
WAVE_SHARE = 0.25  # of the memory: normals on their way to the matrix
PAPER_NORM_L2, PAPER_NUM_VALUES = 2000.0, 3 * 224 * 224


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
    directions = [
        Direction(UNIVERSAL, 0, v),
        *subspace_directions(normals.spectrum.vectors, v.shape, num_draws, seed),
        *(direction for direction in random_directions(v.shape, num_draws, seed) if direction.kind == SPHERE),
    ]
    length = measure(v, "l2")
    points = [point for d in directions for point in measure_along(workers, val, d, "l2", length, (norm_l2 / length,))]
    random = random_spectrum(normals.spectrum.num_rows, v.numel(), memory_bytes, seed)
    return Boundaries(normals.spectrum, random, normals.num_left_out, points)


def subspace_directions(basis: np.ndarray, shape: Sequence[int], num_draws: int, seed: int) -> Iterator[Direction]:
    """Uniform on the sphere of the subspace that an orthonormal basis (K×D float32) spans; C×H×W = `shape`, of D values."""
    for draw in range(num_draws):
        coefficients = random_perturbation((len(basis),), norm="l2", radius=1.0, seed=seed + draw)
        yield Direction(SUBSPACE, draw, (coefficients @ torch.from_numpy(basis)).view(*shape))


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


def _find_normals(workers: Workers, dataset: Dataset, memory_bytes: int) -> Iterator[Normals]:
    """Of all examples, block by block, in waves of as many as a share of the memory holds."""
    blocks = dataset.blocks(BLOCK_SIZE)
    block_bytes = (4 * BLOCK_SIZE + 8) * int(np.prod(dataset.shape))
    wave_size = max(1, int(WAVE_SHARE * memory_bytes) // block_bytes)
    for start in range(0, len(blocks), wave_size):
        yield from workers.map(Worker.normals, blocks[start : start + wave_size])


def _sketch_bytes(memory_bytes: int) -> int:
    return int((1 - WAVE_SHARE) * memory_bytes)
