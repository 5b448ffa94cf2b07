"""What `--plan` does: measures the costs of a job's parts on workers like its own, and works out what all of it costs."""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial

from rich.console import Console

from uap_dist.data.locations import join
from uap_dist.errors import ConfigError, WorkerLostError
from uap_dist.fleet.config import need_of
from uap_dist.fleet.fleet import Fleet
from uap_dist.foreign_text import redact
from uap_dist.method.state import RoundReport
from uap_dist.models.classifier import Classifier
from uap_dist.planning.comparison import count_workers
from uap_dist.planning.cost_model import Costs, plan_fleet
from uap_dist.planning.job import PlannedJob
from uap_dist.planning.profiling import measure_costs
from uap_dist.planning.report import GIB, Plan, fleet_sizes
from uap_dist.planning.shard_sizes import count_bytes, size_shards
from uap_dist.planning.work import count_work
from uap_dist.tracking.checkpoint import Checkpoint, CheckpointStore, JobRecord
from uap_dist.tracking.history import RoundRecord
from uap_dist.tracking.mlflow_run import Tracker
from uap_dist.versions import seconds_since_start


def make_plan(job: PlannedJob, classifier: Classifier, tracker: Tracker, console: Console) -> Plan:
    """Measure costs on one worker and, where workers are CPUs, on as many as share a machine, and plan from these.

    Ray is connected already.

    Raises:
        ConfigError: a price was given although workers have no GPUs, or the job's options do not fit its data.
        ShardError: a shard cannot be used.
    """
    need = need_of(job.fleet)
    if job.price_per_gpu_hour is not None and not need.gpus:
        raise ConfigError(
            "--price-per-gpu-hour needs workers with GPUs, and Ray has none here; plan on the cluster that will compute, or give "
            "--gpus-per-worker if its nodes start on demand"
        )
    fewest, most = job.fleet.bounds
    most = most or max(1, need.room())
    measure = partial(_measure, job, classifier, tracker, console, seconds_since_start())
    costs = [measure(1)]
    workers_per_machine = 1 if need.gpus else min(most, max(1, costs[0].num_cpus // need.cpus))
    if workers_per_machine > 1:
        try:
            costs.append(measure(workers_per_machine))
        except WorkerLostError as error:
            console.print(redact(f"planned from one worker alone: {error}"))
    counted = max((each.shard_images for each in costs), key=len)
    images_per_byte = sum(counted) / sum(count_bytes(job.train_urls[: len(counted)]))
    work = count_work(
        size_shards(job.train_urls, job.num_train_images, counted, images_per_byte),
        size_shards(job.val_urls, job.num_val_images, (), images_per_byte),
        job.config,
        num_perturbations=job.num_perturbations,
        evaluations_per_solve=costs[-1].evaluations_per_solve,
    )
    memory_bytes, disk_bytes = int(job.fleet.cache_gib * GIB), int(job.fleet.disk_cache_gib * GIB)
    fleets = []
    for size in fleet_sizes(fewest, most):
        nearest = next((each for each in costs if each.num_workers >= size), costs[-1])
        fleets.append(
            plan_fleet(work, nearest, job.config, num_workers=size, memory_bytes=memory_bytes, disk_bytes=disk_bytes)
        )
    return Plan(job, work, fleets, [each.num_workers for each in costs], workers_per_machine, need.gpus)


def _measure(
    job: PlannedJob, classifier: Classifier, tracker: Tracker, console: Console, before_s: float, num_workers: int
) -> Costs:
    """Measure costs on a fleet that is started for it; `before_s` are seconds that the process had run before."""
    console.print(f"measuring costs on {count_workers(num_workers)}")
    started = time.perf_counter()
    config = replace(job.fleet, num_workers=num_workers)
    fleet = Fleet(job.model, job.weights, config, tracker.run_id, weights_digest=classifier.weights_digest)
    with closing(fleet), CheckpointStore(join(job.storage, tracker.run_id)) as store:
        fleet.wait()
        ready_s = time.perf_counter() - started
        store.prepare()
        try:
            return measure_costs(
                fleet,
                job.train_urls,
                job.config,
                start_s=before_s + ready_s,
                commit=partial(_commit, store, tracker, num_workers),
                class_names=classifier.class_names,
                max_bad_fraction=job.max_bad_fraction,
            )
        finally:
            store.remove()


def _commit(
    store: CheckpointStore, tracker: Tracker, num_workers: int, report: RoundReport, history: Sequence[RoundRecord]
) -> None:
    """Commit and track a round as a job does; its MLflow metrics have a prefix."""
    store.commit(Checkpoint(JobRecord(tracker.run_id, {}, {}, {}, program="plan"), report.state, tuple(history)))
    metrics = {f"profiling-{num_workers}/{name}": value for name, value in history[-1].metrics.items()}
    tracker.log_round(replace(history[-1], metrics=metrics))
