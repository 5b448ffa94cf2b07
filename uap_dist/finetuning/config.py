"""Settings of a fine-tuning."""

from dataclasses import dataclass
from typing import Literal

from uap_dist.errors import ConfigError
from uap_dist.method.augment import Augmentation, check_augmentation
from uap_dist.perturbations.pool import PerturbationPool


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything beside data, network, pool and the number of workers that decides the fine-tuned weights."""

    epochs: int = 5
    """Passes over the training images."""
    probability: float = 0.5
    """Probability (0..1) that a random member of the pool is added to a training image."""
    adaptive: bool = False
    """Add α v instead of v, with the smallest α of --ladder that fools the current network, else the largest."""
    ladder: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Values of α for --adaptive, in ascending order; 1 is the perturbation as it was computed."""
    held_out_members: int | None = None
    """Members, the last ones of the pool, that are not trained on; if not given, a fifth of it, at least one."""
    batch_size: int = 64
    """Images per step, over all workers."""
    learning_rate: float | None = None
    """Initial learning rate; it falls to zero on a cosine. If not given, 0.01 with batch norm, else 0.0001."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 1e-4
    """Weight decay of SGD."""
    batch_norm: Literal["train", "frozen"] = "train"
    """train: statistics of each worker's batches. frozen: running ones, and only scale and shift are trained."""
    augment: Augmentation = "flip"
    """Random augmentation of each training image."""
    shuffle_shards: int = 16
    """Shards whose images a worker keeps decoded and shuffles together."""
    seed: int = 0
    """Seed of the order of images, augmentation, pool members and dropout."""

    def __post_init__(self) -> None:
        """Validate the settings; ConfigError names the invalid one."""
        for name in ("epochs", "held_out_members", "batch_size", "learning_rate", "shuffle_shards"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name.replace('_', ' ')} is {value}; it must be positive")
        for name in ("probability", "momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie in [0, 1]")
        if not 0 <= self.weight_decay < float("inf") or self.seed < 0:
            raise ConfigError(f"weight decay is {self.weight_decay}, seed {self.seed}; they must not be negative")
        check_augmentation(self.augment)
        steps = (0.0, *self.ladder)
        if len(steps) < 2 or not all(0 <= a < b < float("inf") for a, b in zip(steps, steps[1:], strict=False)):
            raise ConfigError(f"ladder is {self.ladder}; it must hold ascending positive numbers")
        if not self.adaptive and self.ladder != FinetuneConfig.ladder:
            raise ConfigError("ladder belongs to --adaptive; give that as well, or leave it out")
        if self.batch_norm not in ("frozen", "train"):
            raise ConfigError(f"batch norm is {self.batch_norm!r}; it must be frozen or train")

    def check_workers(self, num_workers: int) -> None:
        """Raise ConfigError unless the batch size is a multiple of the number of workers."""
        if self.batch_size % num_workers:
            raise ConfigError(
                f"batch size {self.batch_size} is not a multiple of {num_workers} workers; give another --batch-size or --num-workers"
            )

    def check_images(self, num_images: int) -> None:
        """Raise ConfigError if there are fewer training images than in a batch."""
        if num_images < self.batch_size:
            raise ConfigError(
                f"{num_images} training images are fewer than one batch of {self.batch_size}; give a smaller --batch-size"
            )

    def split(self, pool: PerturbationPool) -> tuple[PerturbationPool, PerturbationPool]:
        """Split a pool into members to train on and held-out members.

        Raises:
            ConfigError: one of the two parts would be empty.
        """
        size = len(pool.members)
        held_out = self.held_out_members or max(1, size // 5)
        if held_out >= size:
            raise ConfigError(
                f"the pool has {size} members, of which {held_out} would be held out; give a larger pool or fewer --held-out-members"
            )
        return pool.take(0, size - held_out), pool.take(size - held_out, size)
