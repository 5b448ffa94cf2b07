"""Solves the blocks of a task: images of the CPU, or such as lie on the GPU already."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from uap_dist.data.decode import DecodedShard
from uap_dist.method.augment import show
from uap_dist.method.solver import Batch, LocalSteps, Solver, solve_block, take_local_steps
from uap_dist.models.classifier import Classifier
from uap_dist.workers.messages import Examples, Together
from uap_dist.workers.solving.batches import Part, choose, parts_of, solve_chosen
from uap_dist.workers.solving.gpu_images import GpuImages
from uap_dist.workers.solving.graphs import Graphs, send


class BlockSolver:
    """Solves blocks on one device."""

    def __init__(self, device: torch.device, read: Callable[[Examples], DecodedShard], graphs: Graphs) -> None:
        """Begin without images.

        Args:
            device: of the classifier.
            read: the decoded shard of some examples, with their images at least.
            graphs: where CUDA graphs are kept.
        """
        self._device, self._read, self._graphs, self._images = device, read, graphs, GpuImages(device)

    def solve(
        self,
        classifier: Classifier,
        task: Examples | Together,
        v: Tensor,
        scales: Tensor,
        solver: Solver,
        local: LocalSteps | None,
    ) -> tuple[Tensor, Tensor]:
        """`BlockResult.total` and `sums` of the blocks of a task.

        Args:
            classifier: on the device.
            task: the blocks.
            v: M×C×H×W float32 on the device, pixels.
            scales: see `solve_block`.
            solver: gives the rule and the views of the images.
            local: local steps.
        """
        parts = parts_of(task, v.shape[-1], solver)
        if local is not None:
            return take_local_steps(classifier, self._show(parts), v, scales, solver, local)
        if solver.rule == "log-odds" and self._are_on_gpu(parts):
            choice = send(choose(parts, self._images), self._device)
            total, sums = self._graphs.call(solve_chosen, [choice, v, scales], self._images.pixels, classifier, solver)
            return total, sums
        return solve_block(classifier, self._show(parts), v, scales, solver)

    def _are_on_gpu(self, parts: Sequence[Part]) -> bool:
        """Whether all images are on the GPU; those that are not are brought there, if there is room."""
        if self._device.type == "cpu":
            return False
        before = self._images.pixels
        missing = [part.examples for part in parts if self._images.rows(part.examples) is None]
        are_there = all(self._images.add(self._read(examples)) for examples in missing)
        if self._images.pixels is not before:
            self._graphs.forget()  # they read the images where they were
        return are_there

    def _show(self, parts: Sequence[Part]) -> Batch:
        """The views of all images as one batch."""
        shown = [show(self._read(part.examples).take(part.examples.keys), part.views) for part in parts]
        zooms = [part.zooms for part in parts if part.zooms is not None]
        zoomed = self._tensor(np.concatenate(zooms)) if zooms else None
        if len(parts) == 1:  # nothing to fill up
            return Batch(self._tensor(shown[0]).float(), self._tensor(parts[0].labels), zooms=zoomed)
        pixels = np.concatenate([images[part.index] for images, part in zip(shown, parts, strict=True)])
        labels, is_real = (np.concatenate([getattr(part, name) for part in parts]) for name in ("labels", "is_real"))
        return Batch(self._tensor(pixels).float(), self._tensor(labels), self._tensor(is_real), zoomed)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)
