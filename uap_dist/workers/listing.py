"""From the listings of shards to the images of a data set."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from uap_dist.errors import ConfigError
from uap_dist.workers.local import Workers
from uap_dist.workers.messages import Examples, ShardListing
from uap_dist.workers.worker import Worker

Reader = Callable[[Worker, Examples, str | None], ShardListing]  # `Worker.load` or `Worker.read`


@dataclass(frozen=True)
class Shard:
    """The examples of one shard that belong to a data set.

    Attributes:
        url: of the shard.
        digest: SHA-256 (hex) of its file.
        keys: N sample keys.
        truths: N class indices, see `ShardListing`.
        hashes: N hashes of the decoded pixels, see `DecodedShard`.
    """

    url: str
    digest: str
    keys: tuple[str, ...]
    truths: np.ndarray
    hashes: tuple[bytes, ...]


def list_shards(
    workers: Workers, urls: Sequence[str], num_images: int | None, label_key: str | None, read: Reader
) -> Iterator[tuple[str, ShardListing]]:
    """Load all shards at once or, for a limited number of images, one, and then as many at a time as should hold the rest.

    How many that are does not depend on the workers, because a shard that cannot be used ends the job.

    Raises:
        ConfigError: there is none.
    """
    if not urls:
        raise ConfigError("no shards given")
    found, start, size = 0, 0, len(urls) if num_images is None else 1
    while start < len(urls) and (num_images is None or found < num_images):
        wave = urls[start : start + size]
        start += size
        tasks = [Examples(url) for url in wave]
        for url, listing in zip(wave, workers.map(read, tasks, label_key), strict=True):
            if num_images is None or found < num_images:
                yield url, listing
            found += len(listing.keys)
        if num_images is not None:
            size = ceil((num_images - found) * start / found) if found else start


def take_images(listings: Sequence[tuple[str, ShardListing]], num_images: int | None) -> Iterator[Shard]:
    """The first so many images of these shards; None takes all."""
    room = num_images if num_images is not None else sum(len(listing.keys) for _, listing in listings)
    for url, listing in listings:
        keys = listing.keys[:room]
        room -= len(keys)
        if keys:
            yield Shard(url, listing.digest, keys, listing.truths[: len(keys)], listing.hashes[: len(keys)])
