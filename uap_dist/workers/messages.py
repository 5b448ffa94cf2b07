"""What a driver and its workers send each other."""

from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import numpy as np

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Examples:
    """A task: some examples of one shard.

    Attributes:
        shard: URL.
        digest: of the shard when it was first read; another one now is an error. Empty before that.
        keys: of the examples, in the order of computation.
        labels: their clean labels, where known.
        seed: of the augmentation.
    """

    shard: str
    digest: str = ""
    keys: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    seed: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        """For logs: the shard; of a block that is solved, seed, round and block."""
        place = "seed {}, round {}, block {}: ".format(*self.seed) if self.seed else ""
        return place + self.shard


@dataclass(frozen=True)
class ShardListing:
    """What a shard holds, without its images (see DecodedShard); `shape` is C×H×W."""

    keys: tuple[str, ...]
    truths: np.ndarray
    bad: tuple[str, ...]
    digest: str
    hashes: tuple[bytes, ...]
    unused: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Normals:
    """Of a block: DeepFool's perturbations r(x) of the images that it takes across a boundary.

    Attributes:
        directions: M×C×H×W float32: the boundaries' unit normals at the point that is nearest to each image, which is r(x)/‖r(x)‖2 where
            no pixel of r(x) is held back by 0 or 255.
        total: C×H×W float64, pixels: their sum, at the length that DeepFool gives them.
        num_left_out: images that are beyond no boundary after DeepFool's last iteration, or have no direction to go.
    """

    directions: np.ndarray
    total: np.ndarray
    num_left_out: int


@dataclass(frozen=True)
class Resources:
    """Of a worker: bytes of its process, of decoded images among them, of its GPU at most; CPUs of its machine."""

    process_bytes: int
    decoded_bytes: int
    gpu_bytes: int
    num_cpus: int
