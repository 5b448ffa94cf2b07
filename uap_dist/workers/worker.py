"""One worker: a classifier and the decoded shards that it has seen; a plain class that knows no Ray.

Everything it returns is a function of its arguments, its classifier and the shards; what it keeps are caches.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import psutil
import torch
from torch import Tensor

from uap_dist.data.cache import ShardCache, Traffic
from uap_dist.data.decode import DecodedShard
from uap_dist.errors import ShardError
from uap_dist.method.augment import augment
from uap_dist.method.deepfool import add_perturbation, deepfool, log_odds_sum
from uap_dist.method.rates import Predictions
from uap_dist.method.solver import LOG_ODDS_SIZE, BlockResult, LocalSteps, Solver, add_sums
from uap_dist.method.update import Iterate, log_odds_update, remember, weigh
from uap_dist.models.accelerate import accelerate
from uap_dist.models.check import check_classifier
from uap_dist.models.classifier import Classifier
from uap_dist.models.loading import load_classifier
from uap_dist.workers.messages import Examples, Normals, Resources, ShardListing
from uap_dist.workers.reproducible import reproducible

P = ParamSpec("P")
T = TypeVar("T")


def _reproducibly(method: Callable[Concatenate["Worker", P], T]) -> Callable[Concatenate["Worker", P], T]:
    """The method with torch set as in every other worker, and as it was afterwards."""

    @wraps(method)
    def call(self: "Worker", /, *args: P.args, **options: P.kwargs) -> T:
        with reproducible(self._num_threads):
            return method(self, *args, **options)

    return call


class Worker:
    """Blocks of shards in, sums and labels out.

    Torch's settings are those of the whole process: number of threads, deterministic kernels, precision (no TF32), and cuBLAS's
    workspace in the environment. They are set during each task, the same in a notebook as in an actor, and are as they were
    afterwards. A cuBLAS that the process has used before keeps its workspace: where GPUs have to repeat their bits, set
    CUBLAS_WORKSPACE_CONFIG=:4096:8 before Python starts.
    """

    def __init__(
        self, classifier: Classifier, *, cache_bytes: int, disk_cache_bytes: int = 0, num_threads: int
    ) -> None:
        """Take a classifier to the GPU where there is one.

        Args:
            classifier: as `load_classifier` gives it.
            cache_bytes: decoded images kept in memory at most.
            disk_cache_bytes: kept on disk at most, beyond these; what does not fit is read and decoded again for each block.
            num_threads: of torch on the CPU; results may depend on it.
        """
        self._num_threads = num_threads
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.classifier = classifier.to(self.device)
        self._cache = ShardCache(classifier.geometry, memory_bytes=cache_bytes, disk_bytes=disk_cache_bytes)
        self._is_fast = False

    @property
    def traffic(self) -> Traffic:
        """What was read, by this worker and those that it took over from."""
        return self._cache.traffic

    def adopt(self, predecessor: "Worker") -> None:
        """Take over what another worker has counted, has on its way and, if this one would decode it so, has decoded."""
        self._cache = predecessor._cache.at(self.classifier.geometry)

    def prefetch(self, url: str) -> None:
        """Start to fetch a shard in the background, one at a time; a task that needs it then waits for the rest only."""
        self._cache.prefetch(url)

    @_reproducibly
    def load(self, examples: Examples) -> ShardListing:
        """Read and decode a whole shard, keep it if there is room, and say what it holds.

        Raises:
            ShardError: see `load_shard`.
            ClassifierError: the network cannot be used on these images, see `check_classifier`.
        """
        shard = self._cache.whole(examples.shard)
        if shard.keys:
            self._accelerate(shard)
        return ShardListing(
            keys=shard.keys,
            truths=shard.truths,
            bad=shard.bad,
            digest=shard.digest,
            hashes=shard.hashes,
            unused=shard.unused,
            shape=shard.images.shape[1:],
        )

    @_reproducibly
    def pixels(self, examples: Examples) -> np.ndarray:
        """The examples' images, N×3×H×W uint8.

        Raises:
            ShardError: the shard is not what it was when its digest was taken.
        """
        shard = self._cache.some(examples.shard, set(examples.keys))
        if shard.digest != examples.digest:
            raise ShardError(
                f"shard {examples.shard} changed during the run; start again with shards that stay as they are"
            )
        self._accelerate(shard)
        return shard.images[[shard.rows[key] for key in examples.keys]]

    @_reproducibly
    def classify(
        self, examples: Examples, perturbation: np.ndarray, quantize: bool = False, divisor: float = 1.0
    ) -> Predictions:
        """What the classifier says of clip(x + v, 0, 255) / divisor.

        Args:
            examples: x.
            perturbation: v, C×H×W float32, pixels.
            quantize: round clip(x + v, 0, 255) to whole pixel values.
            divisor: 255 shows the network another unit than pixels.
        """
        shown = add_perturbation(self._tensor(self.pixels(examples)), self._tensor(perturbation))
        with torch.no_grad():
            logits = self.classifier((shown.round() if quantize else shown) / divisor)
        top = logits.softmax(1).max(1)
        return Predictions(top.indices.cpu().numpy(), top.values.cpu().numpy())

    @_reproducibly
    def solve(
        self, examples: Examples, perturbation: np.ndarray, solver: Solver, local: LocalSteps | None = None
    ) -> BlockResult:
        """Increments of the examples against v (C×H×W float32, pixels), in one sum; or what local steps make of v."""
        views = augment(self.pixels(examples), solver.augmentation, np.random.default_rng(examples.seed))
        labels = torch.tensor(examples.labels, device=self.device)
        if local is not None:
            return self._take_local_steps(self._tensor(views), perturbation, labels, solver, local)
        solve = self._solve_log_odds if solver.rule == "log-odds" else self._solve_paper
        return solve(self._tensor(views), self._tensor(perturbation), labels, solver)

    @_reproducibly
    def normals(self, examples: Examples) -> Normals:
        """Unit normals of the boundaries nearest to the examples as they are (v = 0), by DeepFool's defaults."""
        pixels = self._tensor(self.pixels(examples))
        labels = torch.tensor(examples.labels, device=self.device)
        found = deepfool(self.classifier, pixels, torch.zeros_like(pixels[0]), labels)
        is_found = found.is_solved & found.normals.flatten(1).any(1)
        total = found.steps[is_found].double().sum(0)
        return Normals(found.normals[is_found].cpu().numpy(), total.cpu().numpy(), int((~is_found).sum()))

    def sum_pixels(self, examples: Examples) -> np.ndarray:
        """Sum of the examples' images, C×H×W int64."""
        total: np.ndarray = self.pixels(examples).sum(0, dtype=np.int64)
        return total

    def resources(self, examples: Examples) -> Resources:
        """What it has used so far, and what its machine has."""
        return Resources(
            process_bytes=psutil.Process().memory_info().rss,
            decoded_bytes=self._cache.memory_bytes,
            gpu_bytes=torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0,
            num_cpus=os.cpu_count() or 1,
        )

    def _solve_log_odds(self, pixels: Tensor, perturbation: Tensor, labels: Tensor, solver: Solver) -> BlockResult:
        found = log_odds_sum(self.classifier, pixels, perturbation, labels, weigh=partial(weigh, scale=solver.scale))
        return BlockResult(
            total=found.total.cpu().numpy(),
            num_examples=len(pixels),
            num_fooled=int(found.is_fooled.sum()),
            num_evaluations=found.num_evaluations,
            sums={"mean_log_odds": _sum_finite(found.log_odds), LOG_ODDS_SIZE: _sum_finite(found.log_odds.abs())},
        )

    def _take_local_steps(
        self, pixels: Tensor, perturbation: np.ndarray, labels: Tensor, solver: Solver, local: LocalSteps
    ) -> BlockResult:
        v, momentum = (torch.tensor(array).double() for array in (perturbation, local.momentum))
        start = end = Iterate(v, momentum, solver.scale)
        results = []
        num_batches = -(-len(pixels) // local.batch_size)
        batches = zip(pixels.tensor_split(num_batches), labels.tensor_split(num_batches), strict=True)
        for (some, some_labels), size in zip(batches, local.sizes, strict=False):
            now = replace(solver, scale=end.scale)
            found = self._solve_log_odds(some, end.v.float().to(self.device), some_labels, now)
            end = log_odds_update(end, torch.from_numpy(found.total).double(), size, local.rule)
            end = remember(end, *found.sums[LOG_ODDS_SIZE])
            results.append(found)
        return BlockResult(
            total=torch.stack([end.v - start.v, end.momentum]).float().numpy(),
            num_examples=len(pixels),
            num_fooled=sum(result.num_fooled for result in results),
            num_evaluations=sum(result.num_evaluations for result in results),
            sums=add_sums(results),
        )

    def _solve_paper(self, pixels: Tensor, perturbation: Tensor, labels: Tensor, solver: Solver) -> BlockResult:
        found = deepfool(
            self.classifier,
            pixels,
            perturbation,
            labels,
            candidates=solver.candidates,
            slope_ratio=solver.slope_ratio,
        )
        lengths = found.steps.flatten(1).double().norm(dim=1)
        return BlockResult(
            total=found.steps.double().sum(0).cpu().numpy(),
            num_examples=len(pixels),
            num_fooled=int(found.is_fooled.sum()),
            num_evaluations=found.num_evaluations,
            sums={
                "mean_increment_norm": (float(lengths.sum()), int((lengths > 0).sum())),
                "deepfool_success": (float(found.is_solved.sum()), len(pixels)),
            },
        )

    def _accelerate(self, shard: DecodedShard) -> None:
        """When the size of the images is known; every image that the classifier sees comes after this, here and on other workers."""
        if not self._is_fast:
            check_classifier(self.classifier, shard.images.shape[1:])
            self.classifier = accelerate(self.classifier, shard.images.shape[1:])
            self._is_fast = True

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.tensor(array, dtype=torch.float32, device=self.device)


def _sum_finite(values: Tensor) -> tuple[float, int]:
    finite = values[values.isfinite()].double()
    return float(finite.sum()), len(finite)


def make_worker(
    model: str, weights: str | None, *, cache_bytes: int, disk_cache_bytes: int, num_threads: int
) -> Worker:
    """A worker with the classifier of that name (see `load_classifier`)."""
    classifier = load_classifier(model, weights)
    return Worker(classifier, cache_bytes=cache_bytes, disk_cache_bytes=disk_cache_bytes, num_threads=num_threads)
