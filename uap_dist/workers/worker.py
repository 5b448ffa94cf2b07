"""A worker: a classifier and a cache of decoded shards. A plain class that knows nothing of Ray.

Everything it returns is a function of its arguments, its classifier and the shards; it keeps nothing but caches.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from math import inf
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from uap_dist.data.cache import ShardCache, Traffic
from uap_dist.data.decode import DecodedShard
from uap_dist.errors import ShardError
from uap_dist.method.deepfool import deepfool
from uap_dist.method.norms import add_perturbation
from uap_dist.method.solver import BlockResult, LocalSteps, Solver
from uap_dist.models.accelerate import accelerate
from uap_dist.models.check import check_classifier
from uap_dist.models.classes import find_classes
from uap_dist.models.classifier import Classifier, Predictions
from uap_dist.models.loading import Given, load_classifier
from uap_dist.workers.messages import Examples, Normals, ShardListing, Together
from uap_dist.workers.reproducible import Precision, reproducible
from uap_dist.workers.solving.block_solver import BlockSolver
from uap_dist.workers.solving.graphs import Graphs

P = ParamSpec("P")
T = TypeVar("T")


def _reproducibly(method: Callable[Concatenate["Worker", P], T]) -> Callable[Concatenate["Worker", P], T]:
    """Run a method of Worker with the torch settings that all workers share, and restore the old ones afterwards."""

    @wraps(method)
    def call(self: "Worker", /, *args: P.args, **options: P.kwargs) -> T:
        with self.reproducibly():
            return method(self, *args, **options)

    return call


class Worker:
    """Computes results for examples of shards: clean labels, increments, boundary normals.

    Each task runs with torch settings that make its bits repeatable: number of threads, deterministic kernels, full float32
    precision (no TF32), and cuBLAS's workspace. They are settings of the whole process, the same in a notebook as in a Ray actor,
    and are restored after the task. Only cuBLAS keeps the workspace it was first used with: where GPU results have to repeat bit
    for bit, set CUBLAS_WORKSPACE_CONFIG=:4096:8 before Python starts.

    Attributes:
        device: that the classifier runs on.
        classifier: accelerated once it has seen the first image.
        num_solves: increments computed so far.
        graphs: CUDA graphs of what it computes.
    """

    def __init__(
        self,
        classifier: Classifier,
        *,
        cache_bytes: int,
        disk_cache_bytes: int = 0,
        num_threads: int,
        decode_threads: int | None = None,
        precision: Precision = "float32",
    ) -> None:
        """Move a classifier to the GPU if there is one.

        Args:
            classifier: as returned by `load_classifier`.
            cache_bytes: limit of the decoded images that are kept in memory.
            disk_cache_bytes: limit of those that are kept on disk once memory is full. Of shards that fit in neither, the
                images of a block are read and decoded again for each block.
            num_threads: torch's threads on the CPU; results may depend on it.
            decode_threads: threads that decode images; None for as many as the machine has CPUs. Results do not depend on it.
            precision: of the network, see `reproducible`.
        """
        self._num_threads, self._precision = num_threads, precision
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.classifier = classifier.to(self.device)
        self._cache = ShardCache(
            classifier.geometry,
            memory_bytes=cache_bytes,
            disk_bytes=disk_cache_bytes,
            num_threads=decode_threads or os.cpu_count() or 1,
        )
        self.graphs = Graphs()
        self._blocks = BlockSolver(self.device, self._shard, self.graphs)
        self._is_prepared = self._is_set_up = False
        self.num_solves = 0

    @contextmanager
    def reproducibly(self) -> Iterator[None]:
        """The torch settings that all workers share. Tasks have them anyway; entered before many tasks, they are set only once."""
        if self._is_set_up:
            yield
            return
        with reproducible(self._num_threads, self._precision):
            self._is_set_up = True
            try:
                yield
            finally:
                self._is_set_up = False

    @property
    def decoded_bytes(self) -> int:
        """Of the decoded images in memory."""
        return self._cache.memory_bytes

    @property
    def traffic(self) -> Traffic:
        """What was read so far, by this worker and by those whose cache it has adopted."""
        return self._cache.traffic

    def adopt(self, predecessor: "Worker") -> None:
        """Take over another worker's cache: its counts, the shard it is fetching and, for the same geometry, its decoded images."""
        self._cache = predecessor._cache.at(self.classifier.geometry)

    def prefetch(self, url: str) -> None:
        """Start fetching a shard in the background, one at a time; a task that needs it waits only for the rest."""
        self._cache.prefetch(url)

    @_reproducibly
    def load(self, examples: Examples, label_key: str | None = None) -> ShardListing:
        """Read and decode a whole shard, keep it if there is room, and list its examples.

        Args:
            examples: name the shard.
            label_key: see `find_class`.

        Raises:
            ShardError: see `fetch` and `decode_shard`.
            ClassifierError: the classifier cannot be used on these images, see `check_classifier`.
        """
        listing = self.read(examples, label_key)
        if listing.keys:
            self._prepare_classifier(listing.shape)
        return listing

    def read(self, examples: Examples, label_key: str | None = None) -> ShardListing:
        """As `load`, but the classifier is not made ready: this may run in a thread beside one other method.

        Raises:
            ShardError: see `fetch` and `decode_shard`.
        """
        return _list_examples(self._cache.whole(examples.shard), self.classifier, label_key)

    @_reproducibly
    def pixels(self, examples: Examples) -> np.ndarray:
        """The examples' images, N×3×H×W uint8.

        Raises:
            ShardError: the shard has changed since its digest was taken.
        """
        return self._shard(examples).take(examples.keys)

    def _shard(self, examples: Examples) -> DecodedShard:
        """The examples' shard, with their images at least."""
        shard = self._cache.some(examples.shard, set(examples.keys))
        if shard.digest != examples.digest:
            raise ShardError(
                f"shard {examples.shard} changed during the run; start again with shards that stay as they are"
            )
        return shard

    @_reproducibly
    def classify(
        self, examples: Examples, perturbations: np.ndarray, quantize: bool = False, divisor: float = 1.0
    ) -> list[Predictions]:
        """Labels and confidences of clip(x + v, 0, 255) / divisor, for one v after another.

        Args:
            examples: x, which go through the network as one batch.
            perturbations: M×C×H×W float32, pixels: each v.
            quantize: whether to round clip(x + v, 0, 255) to whole pixel values.
            divisor: 255 shows the network values of 0..1 instead of pixels.
        """
        images = self.pixels(examples)
        self._prepare_classifier(images.shape[1:])
        x, found = self._tensor(images), []
        with torch.no_grad():
            for v in self._tensor(perturbations):
                shown = add_perturbation(x, v)
                logits = self.classifier((shown.round() if quantize else shown) / divisor)
                found.append(logits.softmax(-1).max(-1))
        # only now, because a GPU has to be waited for
        arrays = ((top.indices.cpu().numpy(), top.values.cpu().numpy()) for top in found)
        return [Predictions(labels, confidences, self.classifier.networks) for labels, confidences in arrays]

    @_reproducibly
    def solve(
        self,
        task: Examples | Together,
        perturbation: np.ndarray | Tensor,
        solver: Solver,
        scales: np.ndarray | Tensor | None = None,
        local: LocalSteps | None = None,
    ) -> BlockResult:
        """Increments of a block against v, summed; or with `local`, what local steps make of v. It returns arrays as it was given them.

        Args:
            task: the block, or those of M perturbations.
            perturbation: v, M×C×H×W float32, pixels; an array, or a tensor on this worker's device.
            solver: gives the rule and the views of the images.
            scales: M or M×S float64, `Iterate.scale`; None for those of no image yet.
            local: local steps.
        """
        started = time.perf_counter()
        v = perturbation if isinstance(perturbation, Tensor) else self._tensor(perturbation)
        self._prepare_classifier(v.shape[1:])
        self.num_solves += task.num_examples
        if not isinstance(scales, Tensor):
            unknown = np.full((v[..., 0, 0, 0].numel(), len(self.classifier.members)), inf)
            scales = torch.tensor(unknown if scales is None else scales, device=self.device)
        total, sums = self._blocks.solve(self.classifier, task, v, scales, solver, local)
        if isinstance(perturbation, Tensor):
            return BlockResult(total, sums, time.perf_counter() - started)
        return BlockResult(total.cpu().numpy(), sums.cpu().numpy(), time.perf_counter() - started)

    @_reproducibly
    def normals(self, examples: Examples) -> Normals:
        """Unit normals of the boundaries nearest to the unperturbed examples, found by DeepFool with its default options."""
        images = self.pixels(examples)
        self._prepare_classifier(images.shape[1:])
        x, labels = self._tensor(images), torch.tensor(examples.labels, device=self.device)
        found = deepfool(self.classifier, x, torch.zeros_like(x[0]), labels)
        is_found = found.is_solved & found.normals.flatten(1).any(1)
        total = found.steps[is_found].double().sum(0)
        return Normals(found.normals[is_found].cpu().numpy(), total.cpu().numpy(), int((~is_found).sum()))

    def _prepare_classifier(self, shape: tuple[int, ...]) -> None:
        """Check the classifier in float32 and accelerate it, once: before it sees the first image, on every worker."""
        if not self._is_prepared:
            with reproducible(self._num_threads):
                check_classifier(self.classifier, shape)
                self.classifier = accelerate(self.classifier, shape, self._precision)
            self._is_prepared = True

    def _tensor(self, array: np.ndarray) -> Tensor:
        # images become float32 where they are used, which spares a GPU three quarters of their bytes
        return torch.tensor(array, device=self.device).to(torch.float32)


def _list_examples(shard: DecodedShard, classifier: Classifier, label_key: str | None) -> ShardListing:
    truths, reasons = find_classes(shard.labels, classifier.class_names, label_key)
    return ShardListing(
        keys=shard.keys,
        truths=truths,
        odd_labels=tuple(f"{key}: {reason}" for key, reason in zip(shard.keys, reasons, strict=True) if reason),
        bad=shard.bad,
        digest=shard.digest,
        hashes=shard.hashes,
        unused=shard.unused,
        shape=shard.images.shape[1:],
    )


def make_worker(model: Given, weights: str | None, **options: Any) -> Worker:
    """A worker with the classifier that `load_classifier` returns for this model and weights; options as for `Worker`."""
    return Worker(load_classifier(model, weights), **options)
