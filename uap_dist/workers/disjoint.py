"""Held-out images that are training images too."""

import logging
from collections.abc import Collection
from dataclasses import replace

import numpy as np

from uap_dist.errors import ShardError
from uap_dist.foreign_text import first_few
from uap_dist.workers.dataset import Dataset
from uap_dist.workers.messages import check_size

logger = logging.getLogger(__name__)


def check_shapes(train: Dataset, val: Dataset) -> None:
    """Raise ShardError where training and held-out images differ in shape."""
    check_size(val.shards[0].url, val.shape, (train.shards[0].url, train.shape))


def check_disjoint(train: Dataset, val: Dataset, *, max_shared_fraction: float = 0.01) -> Dataset:
    """The held-out set without the images whose decoded pixels equal those of a training image.

    Args:
        train: the training set.
        val: the held-out set.
        max_shared_fraction: fraction of the held-out images that may be left out in this way (0..1).

    Raises:
        ShardError: a shard with the same content is in both sets, or more images are shared.
    """
    held_out = {shard.digest: shard.url for shard in val.shards}
    for shard in train.shards:
        if shard.digest in held_out:
            raise ShardError(
                f"training shard {shard.url} is also a held-out shard ({held_out[shard.digest]}); hold out other shards"
            )
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
    logger.warning("left out %s that are training images too: %s", count, first_few(shared))
    return replace(val.take(np.delete(np.arange(val.num_examples), list(twins))), shared=shared)


def _warn_of_keys(train: Dataset, val: Dataset, twins: Collection[int]) -> None:
    """Warn of held-out images that have the key of a training image but other pixels (are not among `twins`)."""
    trained_on = set(train.keys)
    same = [key for i, key in enumerate(val.keys) if key in trained_on and i not in twins]
    if same:
        logger.warning(
            "%d of %d held-out images have the key of a training image but other pixels, the first %s; this is fine if keys are "
            "running numbers, but if these are the same photographs in another encoding, the held-out rate is meaningless",
            len(same),
            val.num_examples,
            same[0],
        )
