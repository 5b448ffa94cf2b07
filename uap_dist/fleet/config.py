"""Settings of a fleet."""

from dataclasses import dataclass

from uap_dist.errors import ConfigError
from uap_dist.fleet import ray_cluster
from uap_dist.fleet.ray_cluster import Need


@dataclass(frozen=True, kw_only=True)
class FleetConfig:
    """Who computes; nothing of it changes the result but the number of threads."""

    num_workers: int | str | None = None
    """Workers: a number, or a range as 1:64: begin with one, ask the cluster for 64, and go on with those that there are.
    Default: what fits on the nodes of the cluster, and on those that join it later."""
    gpus_per_worker: float | None = None
    """GPUs that each takes: 0, a share such as 0.5, or a whole number. Default: 1 where the cluster has any, else 0. To be given
    where GPU nodes start on demand."""
    threads_per_worker: int = 1
    """CPU threads of each worker (and CPUs that it takes from the cluster). The bits of the result may depend on it."""
    cache_gib: float = 4.0
    """Decoded images that each worker keeps in memory at most, in GiB."""
    disk_cache_gib: float = 8.0
    """Decoded images beyond these that each worker keeps in the folder for temporary files (TMPDIR) at most, in GiB; half of what is
    free there stays free. 0 keeps none; what does not fit is read again for each block."""
    placement_timeout_s: float = 600.0
    """Seconds without a single worker after which the job gives up; at its start, without as many as it begins with."""
    task_timeout_s: float = 900.0
    """Seconds after which a worker that does not answer is taken for lost, and its block given to another."""
    verify_determinism: bool = False
    """Have one block of each round solved by two workers, and fail on the first bit that differs. Needs two workers."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for name in ("threads_per_worker", "cache_gib", "placement_timeout_s", "task_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name.replace('_', ' ')} is {getattr(self, name)}; it must be positive")
        if not self.disk_cache_gib >= 0:
            raise ConfigError(f"disk cache gib is {self.disk_cache_gib}; it must not be negative")
        gpus = self.gpus_per_worker or 0
        if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
            raise ConfigError(f"gpus per worker is {gpus:g}; it must be 0, a share of one GPU or a whole number")
        _, most = self.bounds
        if self.verify_determinism and most == 1:
            raise ConfigError("verify determinism compares workers; give --num-workers 2 or more")

    @property
    def bounds(self) -> tuple[int, int | None]:
        """Workers to begin with, and workers to ask for; None: as many as fit."""
        if self.num_workers is None:
            return 1, None
        first, colon, last = str(self.num_workers).partition(":")
        try:
            low, high = int(first), int(last if colon else first)
        except ValueError:
            raise ConfigError(
                f"num workers is {self.num_workers!r}; it must be a number as 8, or a range as 1:64"
            ) from None
        if low < 1:
            raise ConfigError(f"num workers is {self.num_workers}; it must be positive")
        if high < low:
            raise ConfigError(
                f"num workers is {self.num_workers}, upside down; give the smaller number first: {high}:{low}"
            )
        return low, high


def need_of(config: FleetConfig) -> Need:
    """What each worker takes of a node of the cluster."""
    gpus = config.gpus_per_worker if config.gpus_per_worker is not None else float(ray_cluster.has_gpus())
    return Need(config.threads_per_worker, gpus)
