"""Shards as the driver knows them: keys, truths and clean predictions, never images."""

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import numpy as np

from uap_dist.errors import ConfigError, ShardError
from uap_dist.job_options import check_limits
from uap_dist.method.rates import Predictions, Rate
from uap_dist.workers.local import Workers
from uap_dist.workers.messages import Examples, ShardListing
from uap_dist.workers.worker import Worker

NUM_BAD_SHOWN = 5
CLASSIFY_SIZE = 50  # examples in one forward; fixed, because the bits of a logit depend on the batch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """The examples of one shard that take part; `hashes` are of their decoded pixels (see DecodedShard)."""

    url: str
    digest: str
    keys: tuple[str, ...]
    truths: np.ndarray
    hashes: tuple[bytes, ...]


@dataclass(frozen=True)
class Dataset:
    """Examples with their clean predictions, in shard order.

    Attributes:
        shards: in the order given.
        shape: C×H×W of an image.
        bad: images that were left out, as "url: key: reason".
        clean: what the classifier says of the images unperturbed.
        shared: held-out images that were left out because they are training images too, as "url: key = url: key".
    """

    shards: tuple[Shard, ...]
    shape: tuple[int, ...]
    bad: tuple[str, ...]
    clean: Predictions
    shared: tuple[str, ...] = ()

    @property
    def num_examples(self) -> int:
        """Examples in all shards."""
        return len(self.clean.labels)

    @cached_property
    def sizes(self) -> list[int]:
        """Examples of each shard."""
        return [len(shard.keys) for shard in self.shards]

    @cached_property
    def starts(self) -> list[int]:
        """Place of each shard's first example among all."""
        return list(accumulate(self.sizes, initial=0))

    @property
    def keys(self) -> list[str]:
        """Of all examples."""
        return [key for shard in self.shards for key in shard.keys]

    @property
    def hashes(self) -> list[bytes]:
        """Of the decoded pixels of all examples."""
        return [each for shard in self.shards for each in shard.hashes]

    def place(self, example: int) -> str:
        """Of the example with that number among all: "url: key"."""
        shard = bisect_right(self.starts, example) - 1
        return f"{self.shards[shard].url}: {self.shards[shard].keys[example - self.starts[shard]]}"

    @property
    def truths(self) -> np.ndarray:
        """Class indices of the data, of all examples."""
        return np.concatenate([shard.truths for shard in self.shards])

    @property
    def digest(self) -> str:
        """SHA-256 over the shards' digests and the keys that take part."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.digest} {' '.join(shard.keys)}\n".encode())
        return digest.hexdigest()

    def thin(self, num_examples: int) -> "Dataset":
        """So many of its examples, evenly spread."""
        return self._take(np.arange(num_examples) * self.num_examples // num_examples)

    def thin_by_blocks(self, num_examples: int, block_size: int) -> "Dataset":
        """So many of its examples, in evenly spread runs of a block within one shard: however few there are, they make whole blocks.

        Shards of fewer examples than a block give single ones, where whole blocks do not suffice.
        """
        runs = [
            start + i
            for start, n in zip(self.starts, self.sizes, strict=False)
            for i in range(0, n - block_size + 1, block_size)
        ]
        count = min(len(runs), -(-num_examples // block_size))
        chosen = np.array(runs, np.int64)[np.arange(count) * len(runs) // max(1, count), None] + np.arange(block_size)
        chosen = chosen.ravel()[:num_examples]
        others = np.setdiff1d(np.arange(self.num_examples), chosen)
        missing = num_examples - len(chosen)
        more = others[np.arange(missing) * len(others) // max(1, missing)]
        return self._take(np.sort(np.concatenate([chosen, more])))

    def part(self, number: int, num_parts: int) -> "Dataset":
        """One of `num_parts` (numbered from 0) into which its examples are cut in their order, as equal as can be."""
        first, last = (n * self.num_examples // num_parts for n in (number, number + 1))
        return self._take(np.arange(first, last))

    def _take(self, chosen: np.ndarray) -> "Dataset":
        """Those examples, by their places in ascending order."""
        shards = []
        for start, shard in zip(self.starts, self.shards, strict=False):
            rows = chosen[(chosen >= start) & (chosen < start + len(shard.keys))] - start
            if len(rows):
                keys, hashes = (tuple(values[i] for i in rows) for values in (shard.keys, shard.hashes))
                shards.append(replace(shard, keys=keys, truths=shard.truths[rows], hashes=hashes))
        clean = Predictions(self.clean.labels[chosen], self.clean.confidences[chosen])
        return replace(self, shards=tuple(shards), clean=clean)

    def examples(self, shard: int, indices: Sequence[int], seed: tuple[int, ...] = ()) -> Examples:
        """A task for those examples of a shard, with their clean labels."""
        start, chosen = self.starts[shard], self.shards[shard]
        return Examples(
            shard=chosen.url,
            digest=chosen.digest,
            keys=tuple(chosen.keys[i] for i in indices),
            labels=tuple(int(self.clean.labels[start + i]) for i in indices),
            seed=seed,
        )

    def blocks(self, size: int) -> list[Examples]:
        """All examples in shard order, as tasks of at most so many of one shard."""
        return [
            self.examples(shard, range(count)[start : start + size])
            for shard, count in enumerate(self.sizes)
            for start in range(0, count, size)
        ]


def load_dataset(
    workers: Workers, urls: Sequence[str], *, num_images: int | None = None, max_bad_fraction: float = 0.01
) -> Dataset:
    """Have the workers decode shards until there are enough images, and classify them; arguments as for `list_dataset`.

    Raises:
        ShardError: a shard that cannot be used, or too many bad images.
        ConfigError: fewer images than asked for, or an option outside its range.
    """
    return predict(workers, list_dataset(workers, urls, num_images=num_images, max_bad_fraction=max_bad_fraction))


def list_dataset(
    workers: Workers, urls: Sequence[str], *, num_images: int | None = None, max_bad_fraction: float = 0.01
) -> Dataset:
    """Have the workers decode shards until there are enough images; clean labels are to be had from `predict`.

    Args:
        workers: who reads them.
        urls: of the shards, as `expand_patterns` gives them.
        num_images: the first so many are taken; None takes all.
        max_bad_fraction: share of samples that may be no images.

    Raises:
        ShardError: a shard that cannot be used, or too many bad images.
        ConfigError: fewer images than asked for, or an option outside its range.
    """
    check_limits(max_bad_fraction, num_images)
    listings = list(_list_shards(workers, urls, num_images))
    bad = tuple(f"{url}: {complaint}" for url, listing in listings for complaint in listing.bad)
    num_samples = len(bad) + sum(len(listing.keys) for _, listing in listings)
    if len(bad) > max_bad_fraction * num_samples:
        raise ShardError(
            f"{len(bad)} of {num_samples} images cannot be decoded, more than the allowed share {max_bad_fraction} "
            f"(--max-bad-fraction); the first: {bad[0]}"
        )
    if bad:
        logger.warning("left out %d images that cannot be decoded: %s", len(bad), _first(bad))
    unused = [f"{url}: {name}" for url, listing in listings for name in listing.unused]
    if unused:
        logger.warning(
            "left out %d files that may be pictures: their names begin with a dot or have no extension, or their sample has "
            "another picture: %s",
            len(unused),
            _first(unused),
        )
    shards = tuple(_take(listings, num_images))
    found = sum(len(shard.keys) for shard in shards)
    if found < (num_images or 1):
        raise ConfigError(f"asked for {num_images or 1} images, but the {len(urls)} shards from {urls[0]} hold {found}")
    shapes = {listing.shape for _, listing in listings if listing.keys}
    if len(shapes) > 1:
        raise ShardError(f"shards hold images of different sizes {sorted(shapes)}; give shards with images of one size")
    dataset = Dataset(shards, shapes.pop(), bad, Predictions(np.full(found, -1), np.zeros(found, np.float32)))
    _warn_of_twins(dataset)
    return dataset


def reload_dataset(workers: Workers, dataset: Dataset) -> Dataset:
    """The same examples as workers with another classifier see them.

    Raises:
        ShardError: a shard that has changed since.
    """
    for _ in workers.map(Worker.load, [Examples(shard.url) for shard in dataset.shards]):  # each is decoded once
        pass
    return predict(workers, dataset)


def predict(workers: Workers, dataset: Dataset) -> Dataset:
    """The dataset with the clean predictions of its examples."""
    return replace(dataset, clean=classify(workers, dataset, np.zeros(dataset.shape, np.float32)))


def classify(
    workers: Workers, dataset: Dataset, perturbation: np.ndarray, *, quantize: bool = False, divisor: float = 1.0
) -> Predictions:
    """Predictions of every example of the dataset under v (C×H×W float32, pixels), see `Worker.classify`."""
    tasks = dataset.blocks(CLASSIFY_SIZE)
    parts = list(workers.map(Worker.classify, tasks, perturbation, quantize, divisor))
    return Predictions(np.concatenate([p.labels for p in parts]), np.concatenate([p.confidences for p in parts]))


def fooling_rate(dataset: Dataset, perturbed: Predictions) -> Rate:
    """Of predictions under a perturbation against the clean ones."""
    return Rate(int((perturbed.labels != dataset.clean.labels).sum()), dataset.num_examples)


def check_disjoint(train: Dataset, val: Dataset, *, max_shared_fraction: float = 0.01) -> Dataset:
    """The held-out set without those of its images that are, pixel by pixel as decoded, training images too.

    Args:
        train: the training set.
        val: the held-out set.
        max_shared_fraction: share of the held-out images that may be left out so.

    Raises:
        ShardError: a shard, by its content, is among both, or more images are.
    """
    held_out = {shard.digest: shard.url for shard in val.shards}
    for shard in train.shards:
        if shard.digest in held_out:
            raise ShardError(f"shard {shard.url} is also among the held-out ones ({held_out[shard.digest]})")
    trained_on = {image: example for example, image in enumerate(train.hashes)}
    twins = {i: trained_on[image] for i, image in enumerate(val.hashes) if image in trained_on}
    _warn_of_keys(train, val, twins)
    if not twins:
        return val
    shared = tuple(f"{val.place(ours)} = {train.place(theirs)}" for ours, theirs in twins.items())
    count = f"{len(shared)} of {val.num_examples} held-out images"
    if len(shared) > max_shared_fraction * val.num_examples or len(shared) == val.num_examples:
        raise ShardError(
            f"{count} are training images too, more than the allowed share {max_shared_fraction} (--max-bad-fraction); the "
            f"first: {shared[0]}; hold out shards of images that are in no training shard"
        )
    logger.warning("left out %s that are training images too: %s", count, _first(shared))
    return replace(val._take(np.delete(np.arange(val.num_examples), list(twins))), shared=shared)


def _warn_of_keys(train: Dataset, val: Dataset, twins: Collection[int]) -> None:
    """Of held-out images that have the key of a training image, but are none of the twins."""
    trained_on = set(train.keys)
    same = [key for i, key in enumerate(val.keys) if key in trained_on and i not in twins]
    if same:
        logger.warning(
            "%d of %d held-out images have the key of a training image and other pixels, the first %s: as it should be where keys "
            "are running numbers; but if they are the same photographs in another encoding, the held-out rate says nothing",
            len(same),
            val.num_examples,
            same[0],
        )


def _warn_of_twins(dataset: Dataset) -> None:
    """Of images that a set has more than once, by their decoded pixels."""
    seen: dict[bytes, int] = {}
    twins = [(i, first) for i, image in enumerate(dataset.hashes) if (first := seen.setdefault(image, i)) != i]
    if twins:
        logger.warning(
            "%d of %d images are there before, pixel by pixel, and count again; the first: %s = %s",
            len(twins),
            dataset.num_examples,
            *map(dataset.place, twins[0]),
        )


def _first(complaints: Sequence[str]) -> str:
    return "; ".join(complaints[:NUM_BAD_SHOWN]) + "; …" * (len(complaints) > NUM_BAD_SHOWN)


def _list_shards(workers: Workers, urls: Sequence[str], num_images: int | None) -> Iterator[tuple[str, ShardListing]]:
    """Load shards, all at once or, where not all may be needed, in waves of two a worker, until the images suffice."""
    found, start = 0, 0
    while start < len(urls) and (num_images is None or found < num_images):
        size = len(urls) if num_images is None else 2 * workers.num_workers
        wave = urls[start : start + size]
        start += size
        for url, listing in zip(wave, workers.map(Worker.load, [Examples(url) for url in wave]), strict=True):
            if num_images is None or found < num_images:
                yield url, listing
            found += len(listing.keys)


def _take(listings: Sequence[tuple[str, ShardListing]], num_images: int | None) -> Iterator[Shard]:
    room = num_images if num_images is not None else sum(len(listing.keys) for _, listing in listings)
    for url, listing in listings:
        keys = listing.keys[:room]
        room -= len(keys)
        if keys:
            yield Shard(url, listing.digest, keys, listing.truths[: len(keys)], listing.hashes[: len(keys)])
