"""Options of a fleet."""

from dataclasses import dataclass
from math import inf
from typing import get_args

from uap_dist.errors import ConfigError
from uap_dist.fleet import ray_cluster
from uap_dist.fleet.ray_cluster import Need
from uap_dist.job_options import GIB, option
from uap_dist.workers.reproducible import Precision


@dataclass(frozen=True, kw_only=True)
class FleetConfig:
    """Number and size of the workers. Only `threads_per_worker` and `precision` can change the result."""

    num_workers: int | str | None = None
    """Number of workers, or a range such as 1:64 on a cluster that grows; if not given, as many as fit."""
    gpus_per_worker: float | None = None
    """GPUs of each worker: 0, a fraction such as 0.5, or a whole number; if not given, 1 where there are any."""
    threads_per_worker: int = 1
    """CPU threads of each worker, and CPUs that it takes from the cluster. It may change the bits of the result."""
    precision: Precision = "float32"
    """Of the network: tf32 and bfloat16 are faster on GPUs; labels and rates are computed in it too. It changes the result."""
    decode_threads: int | None = None
    """Threads of each worker that decode images; if not given, its share of the CPUs of its node."""
    cache_gib: float = 4.0
    """Decoded images that each worker keeps in memory, at most, in GiB."""
    disk_cache_gib: float = 8.0
    """Further decoded images that each worker keeps in temporary files (TMPDIR), at most, in GiB."""
    placement_timeout_s: float = 600.0
    """Seconds to wait for the first workers, and later while no worker is left, before the job fails."""
    task_timeout_s: float = 900.0
    """Seconds after which a worker that does not answer counts as lost, and another one gets its block."""
    verify_determinism: bool = False
    """Have two workers solve one block of each round, and fail if a bit differs."""

    def __post_init__(self) -> None:
        """Validate the options."""
        for name in ("threads_per_worker", "decode_threads", "cache_gib", "placement_timeout_s", "task_timeout_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < inf:
                raise ConfigError(f"{option(name)} is {value}; it must be positive and finite")
        if self.precision not in get_args(Precision):
            raise ConfigError(f"--precision is {self.precision!r}; it must be one of {', '.join(get_args(Precision))}")
        if not 0 <= self.disk_cache_gib < inf:
            raise ConfigError(f"--disk-cache-gib is {self.disk_cache_gib}; it must not be negative, and must be finite")
        gpus = self.gpus_per_worker or 0
        if not 0 <= gpus < inf or (gpus > 1 and gpus != int(gpus)):
            raise ConfigError(f"--gpus-per-worker is {gpus:g}; it must be 0, a fraction of one GPU or a whole number")
        _, most = self.bounds
        if self.verify_determinism and most == 1:
            raise ConfigError("--verify-determinism compares workers; give --num-workers 2 or more")

    @property
    def cache_bytes(self) -> int:
        """Decoded images that each worker keeps in memory."""
        return int(self.cache_gib * GIB)

    @property
    def disk_cache_bytes(self) -> int:
        """Further ones that it keeps in temporary files."""
        return int(self.disk_cache_gib * GIB)

    @property
    def bounds(self) -> tuple[int, int | None]:
        """Number of workers to begin with, and number to ask for; None: as many as fit."""
        if self.num_workers is None:
            return 1, None
        first, colon, last = str(self.num_workers).partition(":")
        try:
            low, high = int(first), int(last if colon else first)
        except ValueError:
            raise ConfigError(
                f"--num-workers is {self.num_workers!r}; it must be a number such as 8, or a range such as 1:64"
            ) from None
        if low < 1:
            raise ConfigError(f"--num-workers is {self.num_workers}; it must be positive")
        if high < low:
            raise ConfigError(
                f"--num-workers is {self.num_workers}; a range begins with the smaller number: give {high}:{low}"
            )
        return low, high


def need_of(config: FleetConfig) -> Need:
    """What each worker takes of a node of the cluster; without `gpus_per_worker` that depends on the cluster as it is now."""
    gpus = config.gpus_per_worker if config.gpus_per_worker is not None else float(ray_cluster.has_gpus())
    return Need(config.threads_per_worker, gpus)
