"""The images of one training worker: decoded shard by shard, in an order of each epoch's own."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from uap_dist.data.decode import DecodedShard, Geometry, load_shard
from uap_dist.errors import ShardError
from uap_dist.workers.dataset import Dataset

Batch = tuple[np.ndarray, np.ndarray]  # N×3×H×W uint8, N class indices


class Share:
    """A worker's own images, decoded when they are needed; a few shards stay decoded."""

    def __init__(self, examples: Dataset, geometry: Geometry, num_shards: int) -> None:
        """Of so many shards at a time."""
        self._examples, self._geometry, self._num_shards = examples, geometry, num_shards
        self._load = lru_cache(maxsize=num_shards)(self._read)

    def shuffled(self, rng: np.random.Generator, batch_size: int) -> Iterator[Batch]:
        """Each image once, in batches, but for those that do not fill the last one."""
        waiting: list[tuple[np.ndarray, int]] = []
        order = rng.permutation(len(self._examples.shards))
        for start in range(0, len(order), self._num_shards):
            shards = [self._load(int(i)) for i in order[start : start + self._num_shards]]
            places = [(shard, row) for shard in shards for row in range(len(shard.keys))]
            for i in rng.permutation(len(places)):
                shard, row = places[i]
                waiting.append((shard.images[row], shard.truths[row]))
                if len(waiting) == batch_size:
                    yield _stack(waiting)
                    waiting = []

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Each image once, in batches of one shard each."""
        for i in range(len(self._examples.shards)):
            shard = self._load(i)
            for start in range(0, len(shard.keys), batch_size):
                yield shard.images[start : start + batch_size], shard.truths[start : start + batch_size]

    def _read(self, number: int) -> DecodedShard:
        """Those examples of a shard that belong to this share, in its order.

        Raises:
            ShardError: the shard is not what it was when the job began.
        """
        known = self._examples.shards[number]
        shard = load_shard(known.url, self._geometry, set(known.keys))
        if shard.digest != known.digest or shard.keys != known.keys:
            raise ShardError(f"shard {known.url} changed during the run; start again with shards that stay as they are")
        return shard


def _stack(pairs: Sequence[tuple[np.ndarray, int]]) -> Batch:
    return np.stack([image for image, _ in pairs]), np.array([truth for _, truth in pairs])
