"""What `--plan` does: measures the costs of a job's parts on workers like its own, and works out what all of it costs."""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

from rich.console import Console

from uap_dist.computing.options import ComputeOptions
from uap_dist.errors import ConfigError, WorkerLostError
from uap_dist.fleet.config import need_of
from uap_dist.fleet.fleet import Fleet
from uap_dist.foreign_text import redact
from uap_dist.method.state import RoundReport
from uap_dist.models.classifier import Classifier
from uap_dist.planning.comparison import count_workers
from uap_dist.planning.cost_model import Costs, plan_fleet
from uap_dist.planning.profiling import measure_costs
from uap_dist.planning.report import Plan, fleet_sizes
from uap_dist.planning.shard_sizes import count_bytes, size_shards
from uap_dist.planning.work import count_work
from uap_dist.rounds.record import RoundRecord
from uap_dist.tracking.checkpoint import Checkpoint, JobRecord
from uap_dist.tracking.checkpoint_store import CheckpointStore
from uap_dist.tracking.mlflow_run import Tracker
from uap_dist.versions import seconds_since_start


@dataclass(frozen=True)
class Profiler:
    """Measures the costs of a job's parts, on fleets that it starts for that.

    Attributes:
        options: of the job.
        classifier: its network.
        train_urls: its training shards.
        storage: folder or URL where rounds are committed, to be removed again.
        tracker: of the plan's run.
        console: for progress.
        before_s: seconds that the process had run before it measures.
    """

    options: ComputeOptions
    classifier: Classifier
    train_urls: Sequence[str]
    storage: str
    tracker: Tracker
    console: Console
    before_s: float = field(default_factory=seconds_since_start)

    def measure(self, num_workers: int) -> Costs:
        """Costs on that many workers at once.

        Raises:
            ShardError, ConfigError: a shard cannot be used.
            WorkerLostError: there is no room for the workers, or they died.
        """
        self.console.print(f"measuring costs on {count_workers(num_workers)}")
        started = time.perf_counter()
        options, classifier, run_id = self.options, self.classifier, self.tracker.run_id
        config = replace(options.fleet, num_workers=num_workers)
        fleet = Fleet(options.given, options.weights, config, run_id, weights_digest=classifier.weights_digest)
        with closing(fleet), CheckpointStore(self.storage) as store:
            fleet.wait()
            ready_s = time.perf_counter() - started
            store.prepare()
            try:
                return measure_costs(
                    fleet,
                    self.train_urls,
                    options.config.without_goal(),  # which costs nothing more
                    start_s=self.before_s + ready_s,
                    commit=partial(self._commit, store, num_workers),
                    class_names=classifier.class_names,
                    max_bad_fraction=options.data.max_bad_fraction,
                )
            finally:
                store.remove()

    def _commit(
        self, store: CheckpointStore, num_workers: int, report: RoundReport, history: Sequence[RoundRecord]
    ) -> None:
        """Commit and track a round as a job does; its MLflow metrics have a prefix."""
        record = JobRecord(self.tracker.run_id, {}, {}, {}, program="plan")
        store.commit(Checkpoint(record, report.state, history))
        metrics = {f"profiling-{num_workers}/{name}": value for name, value in history[-1].metrics.items()}
        self.tracker.log_round(replace(history[-1], metrics=metrics))


def make_plan(profiler: Profiler, val_urls: Sequence[str]) -> Plan:
    """Measure costs on one worker and, where workers are CPUs, on as many as share a machine, and plan from these.

    Ray is connected already.

    Raises:
        ConfigError: a price was given although workers have no GPUs, or the job's options do not fit its data.
        ShardError: a shard cannot be used.
    """
    options, train_urls = profiler.options, profiler.train_urls
    need = need_of(options.fleet)
    if options.price_per_gpu_hour is not None and not need.gpus:
        raise ConfigError(
            "--price-per-gpu-hour needs workers with GPUs, and Ray has none here; plan on the cluster that will compute, or give "
            "--gpus-per-worker if its nodes start on demand"
        )
    fewest, most = options.fleet.bounds
    most = most or max(1, need.room())
    costs = [profiler.measure(1)]
    workers_per_machine = 1 if need.gpus else min(most, max(1, costs[0].num_cpus // need.cpus))
    if workers_per_machine > 1:
        try:
            costs.append(profiler.measure(workers_per_machine))
        except WorkerLostError as error:
            profiler.console.print(redact(f"planned from one worker alone: {error}"))
    counted = max((each.shard_images for each in costs), key=len)
    images_per_byte = sum(counted) / sum(count_bytes(train_urls[: len(counted)]))
    work = count_work(
        size_shards(train_urls, options.data.num_train_images, counted, images_per_byte),
        size_shards(val_urls, options.data.num_val_images, (), images_per_byte),
        options.config,
        num_perturbations=options.num_perturbations,
        evaluations_per_solve=costs[-1].evaluations_per_solve,
        num_networks=len(profiler.classifier.members),
    )
    room = {
        "memory_bytes": options.fleet.cache_bytes,
        "disk_bytes": options.fleet.disk_cache_bytes,
    }
    fleets = []
    for size in fleet_sizes(fewest, most):
        nearest = next((each for each in costs if each.num_workers >= size), costs[-1])
        fleets.append(plan_fleet(work, nearest, options.config, num_workers=size, **room))
    return Plan(options, work, fleets, [each.num_workers for each in costs], workers_per_machine, need.gpus)
