"""Messages between the driver and its workers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from uap_dist.errors import ShardError
from uap_dist.foreign_text import redact

NUM_KEYS_SHOWN = 5


class Task(Protocol):
    """What a worker is given: some examples of one shard (`Examples`), or some rounds (`rounds.span.Span`)."""

    @property
    def shard(self) -> str:
        """URL of the shard that it needs. Workers that have read it before get the task first."""
        ...

    @property
    def num_examples(self) -> int:
        """Examples that it names."""
        ...

    @property
    def title(self) -> str:
        """A title for logs."""
        ...

    def describe(self) -> str:
        """What it is, for messages about its worker."""
        ...


@dataclass(frozen=True)
class Examples:
    """A task: some examples of one shard.

    Attributes:
        shard: its URL.
        digest: of the shard when it was first read, to detect a change; empty before that.
        keys: of the examples, in the order of computation.
        labels: their clean labels, if known; of several networks a list for each example.
        seed: of the augmentation: the run's seed, the round and the block.
    """

    shard: str
    digest: str = ""
    keys: tuple[str, ...] = ()
    labels: tuple[int | list[int], ...] = ()
    seed: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        """A title for logs: the shard and, for a block that is solved, its seed, round and block number."""
        place = "seed {}, round {}, block {}: ".format(*self.seed) if self.seed else ""
        return place + redact(self.shard)

    @property
    def num_examples(self) -> int:
        """Number of keys."""
        return len(self.keys)

    def describe(self) -> str:
        """Such as "examples of shard.tar: key, key, …"."""
        return f"examples of {redact(self.shard)}: {', '.join(self.keys[:NUM_KEYS_SHOWN])}" + ", …" * (
            len(self.keys) > NUM_KEYS_SHOWN
        )


@dataclass(frozen=True)
class Together:
    """A task: blocks of several perturbations, each to be solved against its own, in one batch of fixed shape.

    Attributes:
        blocks: of each perturbation; None for one that has no block now. One at least has images.
        size: images that each takes in the batch; what a block lacks is filled up and counts for nothing.
    """

    blocks: tuple[Examples | None, ...]
    size: int

    @property
    def shard(self) -> str:
        """That of the first block."""
        return next(block.shard for block in self.blocks if block is not None)

    @property
    def num_examples(self) -> int:
        """In all blocks."""
        return sum(block.num_examples for block in self.blocks if block is not None)

    @property
    def title(self) -> str:
        """A title for logs."""
        return "; ".join(block.title for block in self.blocks if block is not None)

    def describe(self) -> str:
        """What each block is."""
        return "; ".join(block.describe() for block in self.blocks if block is not None)


@dataclass(frozen=True)
class ShardListing:
    """The contents of a shard without its images, see `DecodedShard`.

    Attributes:
        truths: N class indices, UNKNOWN_CLASS for images without a label that the network knows.
        odd_labels: labels that mean no class of the network, as "key: reason".
        shape: C×H×W of an image.
    """

    keys: tuple[str, ...]
    truths: np.ndarray
    odd_labels: tuple[str, ...]
    bad: tuple[str, ...]
    digest: str
    hashes: tuple[bytes, ...]
    unused: tuple[str, ...]
    shape: tuple[int, ...]


def check_size(url: str, shape: Sequence[int], first: tuple[str, Sequence[int]]) -> None:
    """Raise ShardError where the images of a shard (C×H×W) differ in size from those of the first one, given as URL and shape."""
    if tuple(shape) != tuple(first[1]):
        here, there = (f"{width}×{height}" for _, height, width in (shape, first[1]))
        raise ShardError(
            f"{url} holds images of {here} pixels, {first[0]} of {there}; give shards with images of one size, or the network an "
            "attribute `input_size`"
        )


@dataclass(frozen=True)
class Normals:
    """DeepFool's perturbations r(x) of the images of a block, for those M that it takes across a boundary.

    Attributes:
        directions: M×C×H×W float32, unit normals of the boundaries at the points nearest to the images. A normal is r(x)/‖r(x)‖2 if
            no pixel of r(x) is held back by 0 or 255.
        total: C×H×W float64, pixels, the sum of the r(x).
        num_left_out: images that DeepFool did not take across a boundary within its iterations, or whose gradient is zero.
    """

    directions: np.ndarray
    total: np.ndarray
    num_left_out: int
