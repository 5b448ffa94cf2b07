"""What a fleet has done so far, in numbers: for MLflow, and for Ray's dashboard while the fleet runs."""

import time
from dataclasses import asdict, dataclass, field

from uap_dist.fleet import ray_cluster as ray_cluster  # first: it sets variables that Ray reads when it is imported

# isort: split
from ray.util.metrics import Counter, Gauge

from uap_dist.data.cache import Traffic

SECONDS_BETWEEN_UPDATES = 5.0
DESCRIPTIONS = {
    "solves": "examples solved",
    "stragglers": "tasks given to a second worker because the first took long",
    "workers_lost": "workers lost and replaced",
    "bytes_read": "bytes of shards read",
    "seconds_reading": "seconds that workers waited for shards",
    "shards_read": "shards read",
    "cache_hits": "tasks whose images were decoded already",
    "cache_misses": "shards read again, because their images were not kept",
    "retries": "attempts at reading a shard beyond the first",
}


@dataclass
class FleetStats:
    """Totals since the fleet began.

    Attributes:
        solves: examples solved.
        stragglers: tasks that were given to a second worker because the first took long.
        workers_lost: workers that were lost and replaced.
        seconds_busy: time that workers spent on their tasks, waiting for shards included.
        traffic: of all workers together.
    """

    solves: int = 0
    stragglers: int = 0
    workers_lost: int = 0
    seconds_busy: float = 0.0
    traffic: Traffic = field(default_factory=Traffic)

    def metrics(self) -> dict[str, float]:
        """MLflow metrics for a round's report."""
        traffic = self.traffic
        return {
            "workers/stragglers": float(self.stragglers),
            "workers/lost": float(self.workers_lost),
            "workers/bytes_read": float(traffic.bytes_read),
            "workers/waiting_share": traffic.seconds_reading / max(self.seconds_busy, 1e-9),
            "workers/cache_hit_rate": traffic.cache_hits / max(traffic.cache_hits + traffic.cache_misses, 1),
        }


class Dashboard:
    """Exports the totals as Ray metrics named `uap_…`, which Prometheus reads and Ray's dashboard draws."""

    def __init__(self, run: str) -> None:
        """Tag all metrics with the id of the MLflow run."""
        self._counters = {name: Counter(f"uap_{name}", text, ("run",)) for name, text in DESCRIPTIONS.items()}
        self._workers = Gauge("uap_workers", "workers that are ready", ("run",))
        self._in_flight = Gauge("uap_tasks_in_flight", "tasks that workers compute now", ("run",))
        self._rate = Gauge("uap_solves_per_second", "examples solved a second", ("run",))
        for metric in (*self._counters.values(), self._workers, self._in_flight, self._rate):
            metric.set_default_tags({"run": run})
        self._exported: dict[str, float] = dict.fromkeys(DESCRIPTIONS, 0.0)
        self._last_update = time.monotonic()

    def update(self, stats: FleetStats, *, num_workers: int, num_in_flight: int) -> None:
        """Export the totals, unless they were a few seconds ago."""
        seconds = time.monotonic() - self._last_update
        if seconds <= SECONDS_BETWEEN_UPDATES:
            return
        self._last_update += seconds
        values = asdict(stats) | asdict(stats.traffic)
        self._rate.set((stats.solves - self._exported["solves"]) / seconds)
        for name, counter in self._counters.items():
            if values[name] > self._exported[name]:
                counter.inc(values[name] - self._exported[name])
                self._exported[name] = values[name]
        self._workers.set(num_workers)
        self._in_flight.set(num_in_flight)
