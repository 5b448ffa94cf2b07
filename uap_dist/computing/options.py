"""Options of jobs/compute.py."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

from uap_dist.errors import ConfigError
from uap_dist.fleet.config import FleetConfig
from uap_dist.job_options import DataOptions, ResumableRecordOptions, to_json
from uap_dist.method.config import POOL_RANDOM_START, ComputeConfig
from uap_dist.models.loading import Given
from uap_dist.models.names import ModelChoice, name_models
from uap_dist.rounds.plan import check_budget

FLEET_COSTS = (
    "num_workers",
    "gpus_per_worker",
    "threads_per_worker",
    "precision",
    "decode_threads",
    "cache_gib",
    "disk_cache_gib",
)


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Compute a universal adversarial perturbation, or a pool of them.

    Pixels are RGB values 0..255 at the classifier's input size; every norm, radius and step is in these units.
    """

    model: str = "efficientnet_lite0"
    """torchvision/NAME[@WEIGHTS], timm/NAME[.TAG], efficientnet_lite0|1|2, or path/to/file.py:factory[?KEY=VALUE&…]."""
    weights: str | None = None
    """File with its weights (.safetensors, or a .pth of tensors), or FILE#KEY; if not given, the published ones."""
    models: tuple[str, ...] = ()
    """Several networks that each perturbation shall fool, as [NAME=]MODEL[=WEIGHTS], instead of --model and --weights."""
    num_perturbations: int = 1
    """How many perturbations to compute, with seeds from --seed on; several make a pool."""
    register_as: str | None = None
    """Model in MLflow's registry that the finished pool becomes a version of."""
    plan: bool = False
    """Compute nothing: time a few blocks, and print what the run takes in time, worker-hours, data and memory."""
    price_per_gpu_hour: float | None = None
    """With --plan: what an hour of one GPU costs, in any currency."""
    planned: str | None = None
    """plan.json of this run, to compare at the end what was planned with what it took."""
    data: DataOptions = field(default_factory=DataOptions)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    record: ResumableRecordOptions = field(default_factory=ResumableRecordOptions)
    fleet: FleetConfig = field(default_factory=FleetConfig)

    def __post_init__(self) -> None:
        """Validate the options."""
        self._check_networks()
        if self.data.num_train_images is not None:
            check_budget(self.data.num_train_images, self.compute, max(1, len(self.models)))
        if bool(self.data.train_shards) != bool(self.data.val_shards):
            raise ConfigError("give both --train-shards and --val-shards, or neither for the demonstration")
        if self.num_perturbations < 1:
            raise ConfigError(f"--num-perturbations is {self.num_perturbations}; it must be positive")
        if self.register_as is not None and self.num_perturbations == 1:
            raise ConfigError("only a pool is registered (--register-as); give --num-perturbations 2 or more")
        if self.register_as is not None and not re.fullmatch("[^/:'\"]+", self.register_as):
            raise ConfigError(
                f"--register-as {self.register_as!r} is no name for a model: it must not hold / : ' or \""
            )
        if self.plan and self.record.resume is not None:
            raise ConfigError("--plan plans a run from its beginning; leave out --resume")
        if self.plan and self.fleet.verify_determinism:
            raise ConfigError("--plan does not count what --verify-determinism solves twice; leave it out")
        if self.compute.members_at_once > 1 and self.fleet.verify_determinism:
            raise ConfigError("--verify-determinism compares blocks that workers share; leave out --members-at-once")
        if self.plan and self.planned is not None:
            raise ConfigError("--plan makes what --planned takes; give one of them")
        if self.price_per_gpu_hour is not None and not self.plan:
            raise ConfigError("--price-per-gpu-hour belongs to --plan")
        if self.price_per_gpu_hour is not None and not 0 < self.price_per_gpu_hour < inf:
            raise ConfigError(f"--price-per-gpu-hour is {self.price_per_gpu_hour}; it must be positive and finite")

    def _check_networks(self) -> None:
        if not self.models:
            return
        if len(self.networks) == 1:
            raise ConfigError(f"--models has one network, {self.models[0]}; give it as --model, or give several")
        if self.model != type(self).model:
            raise ConfigError(f"give --model {self.model} as one of --models, or leave out --models")
        if self.weights is not None:
            raise ConfigError("--weights belongs to --model; with --models give each network its own, as MODEL=WEIGHTS")

    @property
    def networks(self) -> list[str]:
        """Names of several networks; empty for one."""
        return name_models([ModelChoice.parse(text) for text in self.models])

    @property
    def given(self) -> Given:
        """The network or networks, as `load_classifier` takes them."""
        return self.models or self.model

    @property
    def config(self) -> ComputeConfig:
        """Of all perturbations, with the random start that members of a pool have by default."""
        is_default = self.num_perturbations > 1 and self.compute.random_start is None
        return replace(self.compute, random_start=POOL_RANDOM_START) if is_default else self.compute

    def with_labels(self, class_names: Sequence[str], num_classes: int) -> "ComputeOptions":
        """The options with labels as numbers, see `ComputeConfig.with_labels`."""
        return replace(self, compute=self.compute.with_labels(class_names, num_classes))

    @property
    def job(self) -> str:
        """Kind of job, which the MLflow run is tagged with."""
        return "plan" if self.plan else "compute"

    @property
    def is_demo(self) -> bool:
        """Whether the images are those of the demo extra."""
        return not self.data.train_shards

    @property
    def name(self) -> str:
        """Name of the MLflow run and, with the time, of the output folder."""
        path, _, arguments = self.model.partition("?")
        model = "-".join(Path(path).parts[-2:]) if ".py:" not in path else Path(path).name
        model += re.sub(r"[^\w.=]+", "-", f"-{arguments}" if arguments else "")
        if self.models:
            model = re.sub(r"[^\w.=+]+", "-", "+".join(self.networks))
        seed = self.compute.seed
        which = f"seed{seed}" if self.num_perturbations == 1 else f"pool{self.num_perturbations}-seed{seed}"
        target = self.compute.target
        which += "" if target is None else re.sub(r"[^\w.=]+", "-", f"-target-{target}")
        return f"{model.replace(':', '-')}-{self.compute.norm}-{which}{'-plan' * self.plan}"

    def costs(self) -> dict[str, Any]:
        """The options that time and money depend on, as plain values; a plan that differs in one is of another run."""
        values = to_json(replace(self, compute=self.compute.without_goal()))  # a goal costs nothing, and may be a name
        data, fleet = values["data"], values["fleet"]
        return {
            **{name: values[name] for name in ("model", "weights", "num_perturbations")},
            **({"models": values["models"]} if self.models else {}),
            **{name: data[name] for name in ("train_shards", "val_shards", "num_train_images", "num_val_images")},
            **values["compute"],
            **{name: fleet[name] for name in FLEET_COSTS},
        }

    def alone(self, seed: int, output: Path) -> "ComputeOptions":
        """The options with which one member of the pool would be computed alone."""
        return replace(
            self,
            num_perturbations=1,
            register_as=None,
            compute=replace(self.config, seed=seed),
            record=replace(self.record, output=output),
        )
