"""Options of jobs/finetune.py."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from uap_dist.errors import ConfigError
from uap_dist.fleet.config import FleetConfig
from uap_dist.job_options import DataOptions, ResumableRecordOptions, option
from uap_dist.method.augment import Augmentation
from uap_dist.perturbations.pool import PerturbationPool

RANDOM_RESIZED_CROP: Literal["random-resized-crop"] = "random-resized-crop"
TrainingAugmentation = Augmentation | Literal["random-resized-crop"]
Precision = Literal["float32", "bfloat16"]
Optimiser = Literal["sgd", "adamw"]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything beside data, network, pool and the number of workers that decides the fine-tuned weights."""

    epochs: int = 5
    """Passes over the training images."""
    probability: float | None = None
    """Probability (0..1) that a member of the pool, or one of --online, is added to an image; if not given, 0.5, online 0.75."""
    adaptive: bool = False
    """Add α v instead of v, with the smallest α of --ladder that fools the current network, else the largest."""
    ladder: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Values of α for --adaptive, in ascending order; 1 is the perturbation as it was computed."""
    online: bool = False
    """Train on perturbations that each step also updates, against the network, instead of the pool's, which then only test it."""
    online_perturbations: int = 4
    """With --online: number of perturbations that are trained on."""
    online_step: float = 0.05
    """With --online: their step at each batch, as a fraction of the radius."""
    held_out_members: int | None = None
    """Members, the last ones of the pool, that are not trained on; if not given, a fifth of it, at least one."""
    batch_size: int = 64
    """Images per step, over all workers."""
    optimiser: Optimiser | None = None
    """Of the weights; if not given, adamw for networks with layer and no batch norms (transformers, ConvNeXt), else sgd."""
    learning_rate: float | None = None
    """At first; it falls to zero on a cosine. If not given, sgd: 0.01 with batch norm, else 0.0001; adamw: 0.00001."""
    momentum: float = 0.9
    """Momentum of sgd, and the first beta of adamw."""
    weight_decay: float = 1e-4
    """Weight decay of the optimiser."""
    label_smoothing: float = 0.0
    """Share (0..1) of each label that is spread over all classes, as networks for photographs are often trained."""
    ema_decay: float = 0.0
    """Measure and save a moving average of the weights, which keeps this share (0..1) of itself at each step; 0: the last."""
    batch_norm: Literal["train", "frozen"] = "train"
    """train: statistics of each worker's batches. frozen: running ones, and only scale and shift are trained."""
    augment: TrainingAugmentation = "flip"
    """Random view of each training image; random-resized-crop takes it from the whole picture, and mirrors it too."""
    training_precision: Precision | None = None
    """Of the steps; bfloat16 has weights in float32 (autocast). If not given, bfloat16 on GPUs, else float32."""
    shuffle_shards: int = 16
    """Shards whose images a worker shuffles together; it reads as many ahead."""
    seed: int = 0
    """Seed of the order of images, augmentation, pool members and dropout."""

    def __post_init__(self) -> None:
        """Validate the settings; ConfigError names the invalid one."""
        positive = ("epochs", "held_out_members", "batch_size", "learning_rate", "shuffle_shards")
        for name in (*positive, "online_perturbations"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{option(name)} is {value}; it must be positive")
        for name in ("momentum", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{option(name)} is {getattr(self, name)}; it must lie in [0, 1)")
        for name in ("probability", "label_smoothing"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{option(name)} is {value}; it must lie in [0, 1]")
        for name in ("weight_decay", "seed"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(
                    f"{option(name)} is {getattr(self, name)}; it must not be negative, and must be finite"
                )
        for name, allowed in (
            ("augment", (*get_args(Augmentation), RANDOM_RESIZED_CROP)),
            ("training_precision", get_args(Precision)),
            ("optimiser", get_args(Optimiser)),
        ):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ConfigError(f"{option(name)} is {value!r}; it must be one of {', '.join(allowed)}")
        steps = (0.0, *self.ladder)
        if len(steps) < 2 or not all(0 <= a < b < float("inf") for a, b in zip(steps, steps[1:], strict=False)):
            raise ConfigError(f"--ladder is {self.ladder}; it must hold ascending positive numbers")
        if not self.adaptive and self.ladder != FinetuneConfig.ladder:
            raise ConfigError("--ladder belongs to --adaptive; give that as well, or leave it out")
        if not 0 < self.online_step <= 1:
            raise ConfigError(f"--online-step is {self.online_step}; it must lie in (0, 1], a fraction of the radius")
        for name in ("online_perturbations", "online_step"):
            if not self.online and getattr(self, name) != getattr(FinetuneConfig, name):
                raise ConfigError(f"{option(name)} belongs to --online; give that as well, or leave it out")
        if self.online and self.held_out_members is not None:
            raise ConfigError("with --online no member of the pool is trained on; leave out --held-out-members")
        if self.batch_norm not in ("frozen", "train"):
            raise ConfigError(f"--batch-norm is {self.batch_norm!r}; it must be frozen or train")

    @property
    def share_perturbed(self) -> float:
        """Probability of an image being perturbed; benchmarks/finetune.md, "How its options were chosen"."""
        return self.probability if self.probability is not None else 0.75 if self.online else 0.5

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
        """Split a pool into members to train on, of which there are none with --online, and held-out members.

        Raises:
            ConfigError: one of the two parts would be empty, without --online.
        """
        if self.online:
            return pool.take(0, 0), pool
        size = len(pool.members)
        held_out = self.held_out_members or max(1, size // 5)
        if held_out >= size:
            raise ConfigError(
                f"the pool has {size} members, of which {held_out} would be held out; give a larger pool or fewer --held-out-members"
            )
        return pool.take(0, size - held_out), pool.take(size - held_out, size)


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """Fine-tune a classifier on universal perturbations, and measure what that changes."""

    model: str = ""
    """The network, as jobs/compute.py takes it."""
    weights: str | None = None
    """File with its weights, or FILE#KEY; if not given, the published ones."""
    pool: str = ""
    """Pool that jobs/compute.py computed for it: a folder, s3://, gs://, runs:/RUN/pool or models:/NAME/VERSION."""
    repetitions: int = 1
    """How often to fine-tune and compute a fresh pool against the fine-tuned network, on which the next one trains."""
    allow_transfer: bool = False
    """Take a pool of another network, or of another input size (then resized)."""
    data: DataOptions = field(default_factory=DataOptions)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    record: ResumableRecordOptions = field(default_factory=ResumableRecordOptions)
    fleet: FleetConfig = field(default_factory=FleetConfig)

    def __post_init__(self) -> None:
        """Validate the options."""
        for name, value in (("model", self.model), ("pool", self.pool)):
            if not value:
                raise ConfigError(f"no {name} given (--{name})")
        self.data.require()
        if self.data.num_train_images is not None:
            self.finetune.check_images(self.data.num_train_images)
        if self.repetitions < 1:
            raise ConfigError(f"--repetitions is {self.repetitions}; it must be positive")
        low, high = self.fleet.bounds
        if high not in (None, low):
            raise ConfigError(
                f"fine-tuned weights depend on the number of workers: give one number (--num-workers {high})"
            )
        if high is not None:
            self.finetune.check_workers(high)
        if self.fleet.gpus_per_worker not in (None, 0, 1):
            raise ConfigError("training workers take a GPU each or none: give --gpus-per-worker 1 or 0")

    job = "finetune"

    @property
    def name(self) -> str:
        """Name of the MLflow run and, with the time, of the output folder."""
        path, _, arguments = self.model.partition("?")
        name = f"{Path(path).name}-{arguments}" if arguments else Path(path).name
        return "finetune-" + re.sub(r"[^\w.=@]+", "-", name)
