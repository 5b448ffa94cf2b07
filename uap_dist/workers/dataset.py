"""Data sets as the driver sees them: keys, known classes and clean predictions of the examples, never their images."""

import hashlib
import logging
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, islice
from math import prod

import numpy as np

from uap_dist.errors import ConfigError, ShardError
from uap_dist.foreign_text import first_few
from uap_dist.job_options import check_limits
from uap_dist.method.rates import Rate
from uap_dist.models.classes import UNKNOWN_CLASS
from uap_dist.models.classifier import Predictions
from uap_dist.workers.listing import Reader, Shard, list_shards, take_images
from uap_dist.workers.local import Workers
from uap_dist.workers.messages import Examples, check_size
from uap_dist.workers.worker import Worker

CLASSIFY_SIZE = 50  # examples per forward pass; fixed because the bits of a logit depend on the batch size
CLASSIFY_TIMES = 8  # perturbations of these examples in one call, at most; no bit depends on it

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """Examples with their clean predictions. They are numbered from 0 in the order of shards and of samples in them.

    Attributes:
        shards: in the order given.
        shape: C×H×W of an image.
        bad: images left out because they cannot be decoded, as "url: key: reason".
        clean: the classifier's predictions for the unperturbed images.
        shared: held-out images left out because they are training images too, as "url: key = url: key".
        odd_labels: labels that mean no class of the network, as "url: key: reason".
    """

    shards: tuple[Shard, ...]
    shape: tuple[int, ...]
    bad: tuple[str, ...]
    clean: Predictions
    shared: tuple[str, ...] = ()
    odd_labels: tuple[str, ...] = ()

    @property
    def num_examples(self) -> int:
        """Number of examples in all shards."""
        return len(self.clean.labels)

    @property
    def num_bytes(self) -> int:
        """Size of the decoded images."""
        return self.num_examples * prod(self.shape)

    @cached_property
    def sizes(self) -> list[int]:
        """Number of examples in each shard."""
        return [len(shard.keys) for shard in self.shards]

    @cached_property
    def starts(self) -> list[int]:
        """Number of each shard's first example, and of the end."""
        return list(accumulate(self.sizes, initial=0))

    @property
    def keys(self) -> list[str]:
        """Keys of all examples."""
        return [key for shard in self.shards for key in shard.keys]

    @property
    def hashes(self) -> list[bytes]:
        """Hashes of all examples' decoded pixels."""
        return [each for shard in self.shards for each in shard.hashes]

    def place(self, example: int) -> str:
        """Where the example with this number is, as "url: key"."""
        shard = bisect_right(self.starts, example) - 1
        return f"{self.shards[shard].url}: {self.shards[shard].keys[example - self.starts[shard]]}"

    @property
    def truths(self) -> np.ndarray:
        """Class indices of all examples, UNKNOWN_CLASS where not known."""
        return np.concatenate([shard.truths for shard in self.shards])

    @property
    def lack_of_labels(self) -> str:
        """Why classes of images are not known, and what to do."""
        if self.odd_labels:
            return f"labels mean no class of the network: {self.odd_labels[0]}"
        return "there are no labels; give shards with .cls, as jobs/shard.py makes them, or with .json and --label-key"

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over the shards' digests and the examples' keys."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.digest} {' '.join(shard.keys)}\n".encode())
        return digest.hexdigest()

    def thin(self, num_examples: int) -> "Dataset":
        """A subset of this many examples, evenly spaced."""
        return self.take(np.arange(num_examples) * self.num_examples // num_examples)

    def thin_by_blocks(self, num_examples: int, block_size: int) -> "Dataset":
        """A subset of this many examples that can be cut into whole blocks: evenly spaced runs of `block_size` within one shard.

        If there are not enough such runs, evenly spaced single examples are added.
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
        return self.take(np.sort(np.concatenate([chosen, more])))

    def part(self, number: int, num_parts: int) -> "Dataset":
        """Part `number` (from 0) of `num_parts` consecutive parts of nearly equal size."""
        first, last = (n * self.num_examples // num_parts for n in (number, number + 1))
        return self.take(np.arange(first, last))

    def take(self, chosen: np.ndarray) -> "Dataset":
        """The subset of the examples with these numbers, which must be ascending."""
        shards = []
        for start, shard in zip(self.starts, self.shards, strict=False):
            rows = chosen[(chosen >= start) & (chosen < start + len(shard.keys))] - start
            if len(rows):
                keys, hashes = (tuple(values[i] for i in rows) for values in (shard.keys, shard.hashes))
                shards.append(replace(shard, keys=keys, truths=shard.truths[rows], hashes=hashes))
        clean = Predictions(self.clean.labels[chosen], self.clean.confidences[chosen], self.clean.networks)
        return replace(self, shards=tuple(shards), clean=clean)

    def examples(self, shard: int, indices: Sequence[int], seed: tuple[int, ...] = ()) -> Examples:
        """A task for examples of a shard (both by index), with their clean labels."""
        start, chosen = self.starts[shard], self.shards[shard]
        return Examples(
            shard=chosen.url,
            digest=chosen.digest,
            keys=tuple(chosen.keys[i] for i in indices),
            labels=tuple(self.clean.labels[start + i].tolist() for i in indices),
            seed=seed,
        )

    def blocks(self, size: int) -> list[Examples]:
        """All examples in order, as tasks of at most `size` examples of one shard each."""
        return [
            self.examples(shard, range(count)[start : start + size])
            for shard, count in enumerate(self.sizes)
            for start in range(0, count, size)
        ]


def load_dataset(
    workers: Workers,
    urls: Sequence[str],
    *,
    num_images: int | None = None,
    max_bad_fraction: float = 0.01,
    label_key: str | None = None,
) -> Dataset:
    """Let the workers decode shards until there are enough images, and classify these.

    Args:
        workers: read the shards and classify the images.
        urls: of the shards, as returned by `expand_patterns`.
        num_images: use only the first this many; None uses all.
        max_bad_fraction: share of images (0..1) that may fail to decode.
        label_key: key of the labels in .json files; None takes them from .cls files. Labels are optional.

    Raises:
        ShardError: a shard cannot be used, too many images are bad, or images differ in size.
        ConfigError: there are fewer images than `num_images`, or an option is outside its range.
        ClassifierError: the classifier cannot be used on these images.
    """
    listed = list_dataset(workers, urls, num_images=num_images, max_bad_fraction=max_bad_fraction, label_key=label_key)
    return predict(workers, listed)


def list_dataset(
    workers: Workers,
    urls: Sequence[str],
    *,
    num_images: int | None = None,
    max_bad_fraction: float = 0.01,
    label_key: str | None = None,
    like: Dataset | None = None,
    read: Reader = Worker.load,
) -> Dataset:
    """Let the workers decode shards until there are enough images. The result has no clean predictions yet, see `predict`.

    Args:
        workers: read the shards.
        urls: of the shards, as returned by `expand_patterns`.
        num_images: use only the first this many; None uses all.
        max_bad_fraction: fraction of samples allowed to be undecodable (0..1).
        label_key: key of the labels in .json files; None takes them from .cls files. Labels are optional.
        like: a set whose images must have the same size.
        read: `Worker.read` reads the shards while the workers compute.

    Raises:
        ShardError: a shard cannot be used, too many images are bad, or images differ in size.
        ConfigError: there are fewer images than `num_images`, none has a label under `label_key`, or an option is outside its range.
    """
    check_limits(max_bad_fraction, num_images=num_images)
    listings = []
    first = (like.shards[0].url, like.shape) if like else None
    for url, listing in list_shards(workers, urls, num_images, label_key, read):
        if listing.keys:
            first = first or (url, listing.shape)
            check_size(url, listing.shape, first)
        listings.append((url, listing))
    bad = tuple(f"{url}: {complaint}" for url, listing in listings for complaint in listing.bad)
    num_samples = len(bad) + sum(len(listing.keys) for _, listing in listings)
    if len(bad) > max_bad_fraction * num_samples:
        raise ShardError(
            f"{len(bad)} of {num_samples} images cannot be decoded, more than the allowed share {max_bad_fraction} "
            f"(--max-bad-fraction); the first: {bad[0]}"
        )
    if bad:
        logger.warning("left out %d images that cannot be decoded: %s", len(bad), first_few(bad))
    unused = [f"{url}: {name}" for url, listing in listings for name in listing.unused]
    if unused:
        logger.warning(
            "left out %d files that may be pictures or labels: their names begin with a dot or have no extension, their sample has "
            "another picture, or no picture has their name: %s",
            len(unused),
            first_few(unused),
        )
    shards = tuple(take_images(listings, num_images))
    found = sum(len(shard.keys) for shard in shards)
    if first is None or found < (num_images or 1):
        raise ConfigError(f"asked for {num_images or 1} images, but the {len(urls)} shards from {urls[0]} hold {found}")
    odd = tuple(f"{url}: {complaint}" for url, listing in listings for complaint in listing.odd_labels)
    dataset = Dataset(shards, first[1], bad, Predictions.unknown(found), odd_labels=odd)
    _check_labels(dataset, label_key)
    _warn_of_twins(dataset)
    return dataset


def reload_dataset(workers: Workers, dataset: Dataset) -> Dataset:
    """The same examples with the clean predictions of workers that have another classifier.

    Raises:
        ShardError: a shard has changed.
    """
    tasks = [Examples(shard.url) for shard in dataset.shards]
    for _ in workers.map(Worker.load, tasks):  # so that each shard is decoded once
        pass
    return predict(workers, dataset)


def predict(workers: Workers, dataset: Dataset) -> Dataset:
    """The dataset with the clean predictions of its examples."""
    return replace(dataset, clean=classify(workers, dataset, np.zeros(dataset.shape, np.float32)))


def classify(
    workers: Workers, dataset: Dataset, perturbation: np.ndarray, *, quantize: bool = False, divisor: float = 1.0
) -> Predictions:
    """Predictions for all examples perturbed by v (C×H×W float32, pixels); options as for `Worker.classify`."""
    (found,) = classify_each(workers, dataset, [perturbation], quantize=quantize, divisor=divisor)
    return found


def classify_each(
    workers: Workers,
    dataset: Dataset,
    perturbations: Iterable[np.ndarray],
    *,
    quantize: bool = False,
    divisor: float = 1.0,
) -> Iterator[Predictions]:
    """`classify` for each of several perturbations, with the same bits, and in fewer calls."""
    tasks, left = dataset.blocks(CLASSIFY_SIZE), iter(perturbations)
    while some := list(islice(left, CLASSIFY_TIMES)):
        answers = workers.map(Worker.classify, tasks, np.stack(some), quantize, divisor)
        for parts in zip(*answers, strict=True):  # those of one perturbation
            labels, confidences = zip(*((part.labels, part.confidences) for part in parts), strict=True)
            yield Predictions(np.concatenate(labels), np.concatenate(confidences), parts[0].networks)


def fooling_rate(dataset: Dataset, perturbed: Predictions) -> Rate:
    """Fooling rate: the proportion of examples whose perturbed label differs from the clean one, by all networks if they are several."""
    return Rate(int(perturbed.differ_from(dataset.clean).sum()), dataset.num_examples)


def _warn_of_twins(dataset: Dataset) -> None:
    """Warn of images that are in a set more than once, by their decoded pixels."""
    seen: dict[bytes, int] = {}
    twins = [(i, first) for i, image in enumerate(dataset.hashes) if (first := seen.setdefault(image, i)) != i]
    if twins:
        logger.warning(
            "%d of %d images duplicate an earlier one pixel for pixel and are counted again; the first: %s = %s",
            len(twins),
            dataset.num_examples,
            *map(dataset.place, twins[0]),
        )


def _check_labels(dataset: Dataset, label_key: str | None) -> None:
    """Warn of labels that mean no class of the network; raise ConfigError if there is no label under the key that was given."""
    odd = dataset.odd_labels
    if label_key is not None and (dataset.truths == UNKNOWN_CLASS).all():
        first = odd[0] if odd else "there is no .json"
        raise ConfigError(f"no image has a usable label under {label_key!r} (--label-key); the first: {first}")
    if odd:
        logger.warning(
            "%d labels mean no class of the network, so these images do not count for top-1; the first: %s",
            len(odd),
            odd[0],
        )
