"""Settings of a fine-tuning."""

from dataclasses import dataclass
from typing import Literal

from uap_dist.errors import ConfigError
from uap_dist.method.augment import Augmentation
from uap_dist.perturbations.pool import PerturbationPool


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything beside data, network, pool and the number of workers that decides the fine-tuned weights."""

    epochs: int = 5
    """Passes over the training images."""
    probability: float = 0.5
    """That an image is shown perturbed (0..1), by a member of the pool drawn at random."""
    adaptive: bool = False
    """Add α v instead of v: for each image the smallest α of --ladder that fools the network as it is then, else the largest."""
    ladder: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """The α of --adaptive, ascending; 1 is the perturbation as it was computed."""
    held_out_members: int | None = None
    """Members of the pool, its last ones, that the network is never trained on. Default: a fifth of them, at least one."""
    batch_size: int = 64
    """Images in a step, on all workers together."""
    learning_rate: float | None = None
    """Of the first step; a cosine takes it to zero. Default: 0.01 for networks with batch norm, 0.0001 for others,
    whose gradients may be of any size."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 1e-4
    """Of SGD."""
    batch_norm: Literal["train", "frozen"] = "train"
    """train: batch norms use and gather the statistics of each worker's batches, perturbed images among them. frozen: they go on
    with those that they came with, only their scale and shift learn: for batches of a few images on each worker."""
    augment: Augmentation = "flip"
    """Random views of the training images, drawn per image."""
    shuffle_shards: int = 16
    """Shards that a worker keeps decoded, and whose images it shuffles together; the order of shards is random as well."""
    seed: int = 0
    """Of order, views, members and dropout."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for name in ("epochs", "held_out_members", "batch_size", "learning_rate", "shuffle_shards"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name.replace('_', ' ')} is {value}; it must be positive")
        for name in ("probability", "momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie in [0, 1]")
        if not 0 <= self.weight_decay < float("inf") or self.seed < 0:
            raise ConfigError(f"weight decay is {self.weight_decay}, seed {self.seed}; they must not be negative")
        steps = (0.0, *self.ladder)
        if len(steps) < 2 or not all(0 <= a < b < float("inf") for a, b in zip(steps, steps[1:], strict=False)):
            raise ConfigError(f"ladder is {self.ladder}; it must hold ascending positive numbers")
        if not self.adaptive and self.ladder != FinetuneConfig.ladder:
            raise ConfigError("ladder belongs to --adaptive; give that as well, or leave it out")
        if self.batch_norm not in ("frozen", "train"):
            raise ConfigError(f"batch norm is {self.batch_norm!r}; it must be frozen or train")

    def check_workers(self, num_workers: int) -> None:
        """Raise ConfigError unless so many workers can share each batch."""
        if self.batch_size % num_workers:
            raise ConfigError(
                f"batch size {self.batch_size} is not a multiple of {num_workers} workers; give another --batch-size or --num-workers"
            )

    def check_images(self, num_images: int) -> None:
        """Raise ConfigError unless so many training images fill a batch."""
        if num_images < self.batch_size:
            raise ConfigError(
                f"{num_images} training images are fewer than one batch of {self.batch_size}; give a smaller --batch-size"
            )

    def split(self, pool: PerturbationPool) -> tuple[PerturbationPool, PerturbationPool]:
        """The members to train on, and the held-out ones.

        Raises:
            ConfigError: no member is left for one of them.
        """
        size = len(pool.members)
        held_out = self.held_out_members or max(1, size // 5)
        if held_out >= size:
            raise ConfigError(
                f"the pool has {size} members, of which {held_out} would be held out; give a larger pool or fewer --held-out-members"
            )
        return pool.take(0, size - held_out), pool.take(size - held_out, size)
