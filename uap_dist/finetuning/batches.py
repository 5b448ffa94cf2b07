"""The batches of one training worker: its place among the workers, and its images, read and augmented ahead of the steps."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, nn

from uap_dist.data.cache import ShardCache
from uap_dist.data.crops import random_resized_crop, read_pictures
from uap_dist.data.decode import Geometry
from uap_dist.errors import ShardError
from uap_dist.finetuning.options import RANDOM_RESIZED_CROP, TrainingAugmentation
from uap_dist.fleet.config import FleetConfig
from uap_dist.method.augment import augment
from uap_dist.workers.dataset import Dataset
from uap_dist.workers.listing import Shard

NUM_BATCHES_AHEAD = 3

LabelledImages = tuple[np.ndarray, np.ndarray]  # N×3×H×W uint8, N class indices (int64)
Pictures = Sequence[Any]  # N times 3×H×W uint8, or the bytes of a picture that is not decoded yet
T = TypeVar("T")


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
        pixels, truths = (torch.tensor(values).to(self.device) for values in batch)
        return pixels.float(), truths


class ImageReader:
    """Reads a worker's shards: decoded by several threads and cached, as those that compute do, or only their undecoded pictures."""

    def __init__(self, geometry: Geometry, fleet: FleetConfig) -> None:
        """Nothing is read yet.

        Args:
            geometry: resizing and cropping of the network.
            fleet: sizes of the caches, and the threads that decode. Undecoded pictures have a cache in memory of their own, as large
                as that of decoded images.
        """
        self._geometry, self._num_threads = geometry, fleet.decode_threads or 1
        self._cache = ShardCache(
            geometry, memory_bytes=fleet.cache_bytes, disk_bytes=fleet.disk_cache_bytes, num_threads=self._num_threads
        )
        self._pictures: dict[str, list[bytes]] = {}
        self._room = fleet.cache_bytes
        self._pool = ThreadPoolExecutor(self._num_threads, "crop")

    def images(self, shard: Shard) -> Pictures:
        """The shard's decoded images, at the network's input size.

        Raises:
            ShardError: the shard has changed since the job began, or cannot be read.
        """
        found = self._cache.some(shard.url, set(shard.keys))
        self._check(shard, found.digest, found.rows)
        return [found.images[found.rows[key]] for key in shard.keys]

    def pictures(self, shard: Shard) -> Pictures:
        """The shard's pictures as they are, undecoded; kept if there is room.

        Raises:
            ShardError: see `images`.
        """
        if shard.url in self._pictures:
            return self._pictures[shard.url]
        by_key, digest = read_pictures(shard.url)
        self._check(shard, digest, by_key)
        found = [by_key[key] for key in shard.keys]
        size = sum(map(len, found))
        if size <= self._room:
            self._room -= size
            self._pictures[shard.url] = found
        return found

    def crop(self, pictures: Pictures, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """Random views of undecoded pictures, N×3×H×W uint8; see `random_resized_crop`."""
        crop = partial(random_resized_crop, size=size, interpolation=self._geometry.interpolation)
        return np.stack(list(self._pool.map(crop, pictures, rng.integers(2**62, size=len(pictures)).tolist())))

    def _check(self, shard: Shard, digest: str, found: Any) -> None:
        if shard.digest != digest or not all(key in found for key in shard.keys):
            raise ShardError(f"shard {shard.url} changed during the run; start again with shards that stay as they are")


class WorkerImages:
    """The part of a dataset that one worker reads, always some of it ahead of its use."""

    def __init__(self, part: Dataset, reader: ImageReader, num_shards: int) -> None:
        """Nothing is read yet.

        Args:
            part: the worker's examples.
            reader: reads them.
            num_shards: shards whose images are shuffled together; as many are read ahead.
        """
        self._part, self._reader, self._num_shards = part, reader, num_shards

    def views(
        self, rng: np.random.Generator, batch_size: int, augmentation: TrainingAugmentation
    ) -> Iterator[LabelledImages]:
        """Full batches of random views in which each image occurs once; images left over at the end are dropped."""
        return ahead(self._views(rng, batch_size, augmentation), NUM_BATCHES_AHEAD)

    def in_order(self, batch_size: int) -> Iterator[LabelledImages]:
        """All images in the order of the dataset, in batches that do not cross the end of a shard."""
        for shard, images in zip(self._part.shards, ahead(map(self._reader.images, self._part.shards), 1), strict=True):
            for start in range(0, len(images), batch_size):
                yield np.stack(images[start : start + batch_size]), shard.truths[start : start + batch_size]

    def _views(
        self, rng: np.random.Generator, batch_size: int, augmentation: TrainingAugmentation
    ) -> Iterator[LabelledImages]:
        if augmentation == RANDOM_RESIZED_CROP:
            _, height, width = self._part.shape
            for pictures, truths in self._shuffled(self._reader.pictures, rng, batch_size):
                yield self._reader.crop(pictures, (height, width), rng), truths
        else:
            for images, truths in self._shuffled(self._reader.images, rng, batch_size):
                yield augment(np.stack(images), augmentation, rng), truths

    def _shuffled(
        self, read: Callable[[Shard], Pictures], rng: np.random.Generator, batch_size: int
    ) -> Iterator[tuple[Pictures, np.ndarray]]:
        waiting: list[tuple[Any, int]] = []
        shards = [self._part.shards[i] for i in rng.permutation(len(self._part.shards))]
        groups = [shards[start : start + self._num_shards] for start in range(0, len(shards), self._num_shards)]
        everything = ahead(([*map(read, group)] for group in groups), 1)
        for group, found in zip(groups, everything, strict=True):
            pairs = [
                pair
                for shard, pictures in zip(group, found, strict=True)
                for pair in zip(pictures, shard.truths, strict=True)
            ]
            for i in rng.permutation(len(pairs)):
                waiting.append(pairs[i])
                if len(waiting) == batch_size:
                    pictures, truths = zip(*waiting, strict=True)
                    yield pictures, np.array(truths)
                    waiting = []


def ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """The same items, up to `count` of which are made by a thread while earlier ones are used."""
    end: Any = object()
    with ThreadPoolExecutor(1, "ahead") as thread:
        coming = deque(thread.submit(next, items, end) for _ in range(count))
        while (item := coming.popleft().result()) is not end:
            coming.append(thread.submit(next, items, end))
            yield item
