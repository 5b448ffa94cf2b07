"""The batches of one training worker: its place among the workers, and its images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, distributed, nn

from uap_dist.data.decode import DecodedShard, Geometry, load_shard
from uap_dist.errors import ShardError
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
        return self.add_up(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def add_up(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all workers, in place; every worker gets the same bits."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

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


def _stack(pairs: Sequence[tuple[np.ndarray, int]]) -> LabelledImages:
    return np.stack([image for image, _ in pairs]), np.array([truth for _, truth in pairs])
