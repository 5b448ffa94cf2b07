"""The batches of one training worker: its place among the workers, its images, and perturbations of the pool added to them.

Source: Moosavi-Dezfooli et al., "Universal adversarial perturbations", CVPR 2017, section 3.2.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, distributed, nn

from uap_dist.data.decode import DecodedShard, Geometry, load_shard
from uap_dist.errors import ShardError
from uap_dist.finetuning.config import FinetuneConfig
from uap_dist.finetuning.network import set_training_mode
from uap_dist.method.norms import add_perturbation
from uap_dist.models.classifier import Classifier
from uap_dist.perturbations.pool import PerturbationPool
from uap_dist.perturbations.transform import AddUniversalPerturbation
from uap_dist.workers.dataset import Dataset

LabelledImages = tuple[np.ndarray, np.ndarray]  # N×3×H×W uint8, N class indices (int64)


@dataclass(frozen=True)
class WorkerGroup:
    """The workers that train one network together, as one of them sees it.

    Attributes:
        rank: number of this worker, from 0.
        size: number of workers; with more than one, torch.distributed is initialised.
        device: this worker's device.
    """

    rank: int
    size: int
    device: torch.device

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums of each value over all workers, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            distributed.all_reduce(total)
        return total.tolist()

    def share_buffers(self, module: nn.Module) -> None:
        """Copy the first worker's buffers (such as batch-norm statistics) to all workers."""
        if self.size > 1:
            for buffer in module.buffers():
                distributed.broadcast(buffer, 0)

    def to_tensors(self, batch: LabelledImages) -> tuple[Tensor, Tensor]:
        """Pixels (N×3×H×W float32, 0..255) and class indices (N) on the device."""
        images, truths = batch
        pixels = torch.tensor(images, dtype=torch.float32, device=self.device)
        return pixels, torch.tensor(truths, device=self.device)


class WorkerImages:
    """The part of a dataset that one worker reads. Images are decoded when they are needed; a few shards stay in memory."""

    def __init__(self, part: Dataset, geometry: Geometry, num_shards: int) -> None:
        """Nothing is read yet.

        Args:
            part: the worker's examples.
            geometry: resizing and cropping of the network.
            num_shards: decoded shards that stay in memory, and whose images are shuffled together.
        """
        self._part, self._geometry, self._num_shards = part, geometry, num_shards
        self._load = lru_cache(maxsize=num_shards)(self._read)

    def shuffled(self, rng: np.random.Generator, batch_size: int) -> Iterator[LabelledImages]:
        """Full batches in which each image occurs once; images left over at the end are dropped."""
        waiting: list[tuple[np.ndarray, int]] = []
        order = rng.permutation(len(self._part.shards))
        for start in range(0, len(order), self._num_shards):
            shards = [self._load(int(i)) for i in order[start : start + self._num_shards]]
            places = [(*pair, row) for pair in shards for row in range(len(pair[0].keys))]
            for i in rng.permutation(len(places)):
                shard, truths, row = places[i]
                waiting.append((shard.images[row], truths[row]))
                if len(waiting) == batch_size:
                    yield _stack(waiting)
                    waiting = []

    def in_order(self, batch_size: int) -> Iterator[LabelledImages]:
        """All images in the order of the dataset, in batches that do not cross the end of a shard."""
        for i in range(len(self._part.shards)):
            shard, truths = self._load(i)
            for start in range(0, len(shard.keys), batch_size):
                yield shard.images[start : start + batch_size], truths[start : start + batch_size]

    def _read(self, number: int) -> tuple[DecodedShard, np.ndarray]:
        """Decode the worker's examples of one shard; with their class indices.

        Raises:
            ShardError: the shard has changed since the job began.
        """
        known = self._part.shards[number]
        shard = load_shard(known.url, self._geometry, set(known.keys))
        if shard.digest != known.digest or shard.keys != known.keys:
            raise ShardError(f"shard {known.url} changed during the run; start again with shards that stay as they are")
        return shard, known.truths


class AdversarialImages:
    """Adds a random member of a pool to each training image with some probability, at full or at the smallest fooling strength."""

    def __init__(self, classifier: Classifier, pool: PerturbationPool, config: FinetuneConfig) -> None:
        """Draw from torch's global generator.

        Args:
            classifier: the network in training; adaptive strengths depend on its current weights.
            pool: members to train on.
            config: probability, whether strengths are adaptive, and their ladder.
        """
        self._classifier, self._config = classifier, config
        self._transform = AddUniversalPerturbation(pool, config.probability)

    def perturb(self, pixels: Tensor) -> tuple[Tensor, int]:
        """The images to train on, and the network evaluations that choosing the strengths took.

        Args:
            pixels: N×3×H×W float32, 0..255.
        """
        drawn = self._transform.draw(len(pixels), tuple(pixels.shape[1:]))
        added, is_perturbed = (x.to(pixels.device) for x in drawn)
        factors, num_evaluations = is_perturbed.float(), 0
        rows = is_perturbed.nonzero().squeeze(1)
        if self._config.adaptive and len(rows):
            set_training_mode(self._classifier, False, self._config.batch_norm)
            ladder = self._config.ladder
            factors[rows], num_evaluations = smallest_factors(self._classifier, pixels[rows], added[rows], ladder)
            set_training_mode(self._classifier, True, self._config.batch_norm)
        return add_perturbation(pixels, factors.view(-1, 1, 1, 1) * added), num_evaluations


def smallest_factors(
    classifier: Classifier, pixels: Tensor, added: Tensor, ladder: Sequence[float]
) -> tuple[Tensor, int]:
    """For each image the smallest α of the ladder for which clip(x + α v) and x get different labels, else the largest α.

    Args:
        classifier: the network with its current weights, in inference mode.
        pixels: N×C×H×W, 0..255.
        added: N×C×H×W, pixels: the v of each image.
        ladder: values of α in ascending order.

    Returns:
        α of each image (N), and the number of network evaluations.

    Source: the footnote to section 3.2 of the paper, which does not give its ladder.
    """
    factors = torch.full((len(pixels),), float(ladder[-1]), device=pixels.device)
    is_open = torch.ones(len(pixels), dtype=torch.bool, device=pixels.device)
    with torch.no_grad():
        labels, num_evaluations = classifier(pixels).argmax(1), len(pixels)
        for factor in ladder[:-1]:
            rows = is_open.nonzero().squeeze(1)
            if not len(rows):
                break
            perturbed = add_perturbation(pixels[rows], factor * added[rows])
            fooled = rows[classifier(perturbed).argmax(1) != labels[rows]]
            factors[fooled], is_open[fooled] = factor, False
            num_evaluations += len(rows)
    return factors, num_evaluations


def _stack(pairs: Sequence[tuple[np.ndarray, int]]) -> LabelledImages:
    return np.stack([image for image, _ in pairs]), np.array([truth for _, truth in pairs])
