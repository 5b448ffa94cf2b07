"""Options of jobs/evaluate.py."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite

from uap_dist.errors import ConfigError
from uap_dist.fleet.config import FleetConfig
from uap_dist.job_options import RecordOptions, check_limits
from uap_dist.method.rates import Goal
from uap_dist.models.classifier import Classifier


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Measure perturbations on classifiers and images."""

    perturbations: tuple[str, ...] = ()
    """Folders or files of jobs/compute.py; of others with their unit: FILE.mat:255, FILE.pth:1. NAME=FILE names one."""
    pools: tuple[str, ...] = ()
    """Pools, of which all members are measured; FOLDER:1, FILE.zip:255 of others. NAME=… names them NAME, member."""
    models: tuple[str, ...] = ()
    """Classifiers as [NAME=]MODEL[=WEIGHTS], as in tuned=torchvision/resnet50=tuned.safetensors."""
    shards: tuple[str, ...] = ()
    """Sets of images, each as [NAME=]PATTERN; `::` joins patterns within one."""
    num_images: int | None = None
    """How many images of each set, the first of its shards; if not given, all."""
    scales: tuple[float, ...] = (1.0,)
    """Factors for each perturbation and baseline; several give fooling rate against norm."""
    target: int | str | None = None
    """Label (number or name) that images shall get under perturbations whose files name no goal, as those of others."""
    only_classes: tuple[int | str, ...] = ()
    """Classes (labels or names) whose images such perturbations shall fool, leaving the others alone."""
    spare_classes: tuple[int | str, ...] = ()
    """Classes whose images such perturbations shall leave alone."""
    quantize: bool = False
    """Round perturbed images to whole pixel values, as saving them does."""
    seed: int = 0
    """Seed of the random baselines."""
    max_bad_fraction: float = 0.01
    """Share of images (0..1) that may fail to decode before the job fails."""
    record: RecordOptions = field(default_factory=RecordOptions)
    label_key: str | None = None
    """Key of the labels in the images' .json; if not given, they are in .cls. Only top-1 needs them."""
    fleet: FleetConfig = field(default_factory=FleetConfig)

    def __post_init__(self) -> None:
        """Validate the options."""
        for name in ("models", "shards", "scales"):
            if not getattr(self, name):
                raise ConfigError(f"no {name} given (--{name})")
        if not self.perturbations and not self.pools:
            raise ConfigError("no perturbations given (--perturbations, --pools)")
        check_limits(self.max_bad_fraction, num_images=self.num_images)
        if self.fleet.verify_determinism:
            raise ConfigError("--verify-determinism compares increments, and an evaluation computes none; leave it out")
        for scale in self.scales:
            if not isfinite(scale) or self.scales.count(scale) > 1:
                raise ConfigError(f"scale {scale:g} is not finite, or given twice (--scales)")
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}; it must not be negative")

    def goal(self, classifier: Classifier, class_names: Sequence[str], num_labels: int) -> Goal:
        """That of perturbations whose files name none, see `Goal.of_names`."""
        given = (self.target, self.only_classes, self.spare_classes)
        return Goal.of_names(*given, class_names, num_labels, network=classifier.name)

    job, name = "evaluate", "evaluation"
