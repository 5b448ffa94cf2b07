"""Options of jobs/finetune.py."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from uap_dist.errors import ConfigError
from uap_dist.finetuning.config import FinetuneConfig
from uap_dist.fleet.config import FleetConfig
from uap_dist.job_options import DataOptions, ResumableRecordOptions


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """Fine-tune a classifier on a pool of universal perturbations, and measure what that changes."""

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
            raise ConfigError(f"repetitions is {self.repetitions}; it must be positive")
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
