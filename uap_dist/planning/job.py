"""The job that a plan is made for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uap_dist.computing.options import ComputeOptions
from uap_dist.fleet.config import FleetConfig
from uap_dist.method.config import ComputeConfig


@dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """A job to plan.

    Attributes:
        model, weights: as for `load_classifier`.
        train_urls, val_urls: URLs of the shards.
        num_train_images, num_val_images: the first so many images take part; None for all.
        max_bad_fraction: see `list_dataset`.
        num_perturbations: number of computations.
        config: of each computation.
        fleet: that will compute.
        storage: folder or URL where profiling commits its rounds, and removes them again.
        price_per_gpu_hour: in any currency; None if not given.
        options: options that the cost depends on, as JSON values; a run must have the same ones to be compared with the plan.
    """

    model: str
    weights: str | None
    train_urls: Sequence[str]
    val_urls: Sequence[str]
    num_train_images: int | None
    num_val_images: int | None
    max_bad_fraction: float
    num_perturbations: int
    config: ComputeConfig
    fleet: FleetConfig
    storage: str
    price_per_gpu_hour: float | None
    options: Mapping[str, Any]

    @classmethod
    def of(
        cls, options: ComputeOptions, train_urls: Sequence[str], val_urls: Sequence[str], storage: str
    ) -> "PlannedJob":
        """The job that these options ask for."""
        return cls(
            model=options.model,
            weights=options.weights,
            train_urls=train_urls,
            val_urls=val_urls,
            num_train_images=options.data.num_train_images,
            num_val_images=options.data.num_val_images,
            max_bad_fraction=options.data.max_bad_fraction,
            num_perturbations=options.num_perturbations,
            config=options.config,
            fleet=options.fleet,
            storage=storage,
            price_per_gpu_hour=options.price_per_gpu_hour,
            options=options.costs(),
        )
