"""Correlated boundaries: singular values of the normals of decision boundaries, and fooling rates of the subspace they span.

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


@dataclass(frozen=True)
class GatheredNormals:
    """DeepFool's perturbations of many images, in summary.

    Attributes:
        spectrum: of the matrix whose rows are their unit normals.
        total: C×H×W float64, pixels: sum of the perturbations.
        num_left_out: images without a perturbation (see `Normals`).
    """

    spectrum: Spectrum
    total: Tensor
    num_left_out: int


@dataclass(frozen=True)
class BoundaryCorrelation:
    """Correlation of the decision boundaries near many images.

    Attributes:
        spectrum: of the matrix of their unit normals.
        random: of as many random unit vectors.
        num_left_out: images without a normal.
        points: fooling rates of vectors with the same ℓ2 norm: random ones in the subspace of the first singular vectors, random
            ones in the whole space, and the universal perturbation.
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
    """Sum DeepFool's perturbations of all examples and compute the singular values of the matrix of their unit normals.

    The normals are sent to the driver block by block, once each, as many at a time as fit into memory. If workers computed parts of
    the Gram matrix instead, each would need the normals of all blocks, and the singular vectors would need them once more.

    Args:
        workers: run DeepFool; the result does not depend on their number.
        dataset: examples with their clean labels.
        num_singular: number of leading singular vectors to keep.
        memory_bytes: memory of this process for normals. If they do not fit, the result depends on it (see `Sketch`).

    Raises:
        ConfigError: there are fewer normals than singular vectors, or the normals span fewer dimensions.
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
    """Raise ConfigError if the singular vectors cannot be computed from that many normals (C×H×W) in the given memory."""
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
) -> BoundaryCorrelation:
    """Compare the normals with random vectors: singular values, and fooling rates of their subspace (figure 9 of the paper).

    Args:
        workers: measure fooling rates.
        val: held-out images with their clean labels.
        v: the universal perturbation, C×H×W, pixels.
        normals: of training images; their singular vectors span the subspace.
        norm_l2: ℓ2 norm of all measured vectors, pixels.
        num_draws: number of random vectors, in the subspace and in the whole space each.
        memory_bytes: memory for the random unit vectors; use that of `gather_normals`.
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
    return BoundaryCorrelation(normals.spectrum, random, normals.num_left_out, points)


def subspace_directions(basis: np.ndarray, shape: Sequence[int], num_draws: int, seed: int) -> Iterator[Direction]:
    """Random unit vectors of the subspace with an orthonormal basis (K×D float32), as arrays of shape C×H×W with D values."""
    for draw in range(num_draws):
        coefficients = random_perturbation((len(basis),), norm="l2", radius=1.0, seed=seed + draw)
        yield Direction(SUBSPACE, draw, (coefficients @ torch.from_numpy(basis)).view(*shape))


def random_spectrum(num_rows: int, num_values: int, memory_bytes: int, seed: int) -> Spectrum:
    """Singular values of random unit vectors, computed in the same way as those of the normals."""
    generator = torch.Generator().manual_seed(seed)
    sketch = Sketch(num_values, _sketch_bytes(memory_bytes))
    for start in range(0, num_rows, BLOCK_SIZE):
        rows = torch.randn(min(BLOCK_SIZE, num_rows - start), num_values, generator=generator)
        sketch.add((rows / rows.norm(dim=1, keepdim=True)).numpy())
    return sketch.spectrum(0)


def _find_normals(workers: Workers, dataset: Dataset, memory_bytes: int) -> Iterator[Normals]:
    """DeepFool's normals of all examples, block by block; as many blocks are requested at a time as fit into memory."""
    blocks = dataset.blocks(BLOCK_SIZE)
    block_bytes = (4 * BLOCK_SIZE + 8) * int(np.prod(dataset.shape))
    wave_size = max(1, int(WAVE_SHARE * memory_bytes) // block_bytes)
    for start in range(0, len(blocks), wave_size):
        yield from workers.map(Worker.normals, blocks[start : start + wave_size])


def _sketch_bytes(memory_bytes: int) -> int:
    return int((1 - WAVE_SHARE) * memory_bytes)
