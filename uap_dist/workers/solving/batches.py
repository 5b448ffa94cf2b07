"""From blocks of examples to the batch that a solver gets: which images, which views of them, and what fills the batch up."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uap_dist.method.augment import Views, draw_views, take_views
from uap_dist.method.solver import Batch, Solver, solve_block
from uap_dist.models.classifier import Classifier
from uap_dist.workers.messages import Examples, Together
from uap_dist.workers.solving.gpu_images import GpuImages


@dataclass(frozen=True)
class Part:
    """What one block adds to a batch.

    Attributes:
        examples: the block; of a perturbation that has none now, any other one.
        views: of its images.
        index: which of its images, in the order of the batch, of which the last one fills the part up; all if there is nothing to fill.
        num_real: how many of them are no filling.
    """

    examples: Examples
    views: Views
    index: np.ndarray | slice
    num_real: int

    @property
    def labels(self) -> np.ndarray:
        """Clean labels of its images."""
        return np.array(self.examples.labels, np.int64)[self.index]

    @property
    def zooms(self) -> np.ndarray | None:
        """Of its perturbed images, see `Views`."""
        return None if self.views.zooms is None else self.views.zooms[self.index]

    @property
    def is_real(self) -> np.ndarray:
        """Mask of its images."""
        return np.arange(len(self.labels)) < self.num_real


def parts_of(task: Examples | Together, side: int, solver: Solver) -> list[Part]:
    """The parts of the batch for a task, whose images are so many pixels across."""

    def draw(examples: Examples) -> Views:
        rng = np.random.default_rng(examples.seed)
        return draw_views(examples.num_examples, side, solver.augmentation, rng, solver.max_zoom)

    if isinstance(task, Examples):
        return [Part(task, draw(task), slice(None), task.num_examples)]
    any_block = next(block for block in task.blocks if block is not None)
    places, parts = np.arange(task.size), []
    for block in task.blocks:
        examples = block or any_block
        index = np.minimum(places, examples.num_examples - 1)
        parts.append(Part(examples, draw(examples), index, examples.num_examples if block else 0))
    return parts


def choose(parts: Sequence[Part], images: GpuImages) -> np.ndarray:
    """N×6 int64: row in `images`, flip, shifts down and to the right, label, whether it is real; all images must be there.

    Three columns more, before the label, if perturbed images are zoomed; and of S networks S labels.
    """
    columns = []
    for part in parts:
        rows, views = images.rows(part.examples), part.views
        assert rows is not None
        zooms = () if views.zooms is None else (views.zooms,)
        each = np.column_stack([rows, views.flips, views.shifts, *zooms, part.examples.labels])[part.index]
        columns.append(np.column_stack([each, np.arange(len(each)) < part.num_real]))
    return np.concatenate(columns)


def solve_chosen(
    choice: Tensor, perturbation: Tensor, scales: Tensor, images: Tensor, classifier: Classifier, solver: Solver
) -> tuple[Tensor, Tensor]:
    """As `solve_block`, for views of images that are taken where they are.

    Args:
        choice: N×6 or more, see `choose`.
        perturbation: v, M×C×H×W float32, pixels.
        scales: see `solve_block`.
        images: as `GpuImages.pixels`.
        classifier: see `solve_block`.
        solver: see `solve_block`.
    """
    rows, flips, *_ = choice.unbind(1)
    pixels = take_views(images, rows, flips.bool(), choice[:, 2:4]).to(torch.float32)
    zooms, rest = (choice[:, 4:7], choice[:, 7:]) if solver.max_zoom else (None, choice[:, 4:])
    labels = rest[:, :-1].squeeze(1)  # of one network N
    return solve_block(classifier, Batch(pixels, labels, rest[:, -1].bool(), zooms), perturbation, scales, solver)
