"""What `--plan` does: tries a job's parts on workers like those that will compute it, and works out what all of it costs."""

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

from rich.console import Console

from uap_dist.data.locations import join
from uap_dist.errors import ConfigError, WorkerLostError
from uap_dist.fleet.config import FleetConfig, need_of
from uap_dist.fleet.fleet import Fleet
from uap_dist.fleet.ray_cluster import Need
from uap_dist.foreign_text import redact
from uap_dist.method.config import ComputeConfig
from uap_dist.method.state import RoundReport
from uap_dist.models.classifier import Classifier
from uap_dist.planning.cost_model import ShardSizes, count_work, plan_fleet
from uap_dist.planning.profiling import Trial, try_out
from uap_dist.planning.report import GIB, Plan, fleet_sizes
from uap_dist.planning.shard_sizes import count_bytes, read_indexes
from uap_dist.tracking.checkpoint import Checkpoint, CheckpointStore, JobRecord
from uap_dist.tracking.history import RoundRecord
from uap_dist.tracking.mlflow_run import Tracker
from uap_dist.versions import seconds_since_start


@dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """What is to be planned.

    Attributes:
        model, weights: as `load_classifier` takes them.
        train_urls, val_urls: of the shards.
        num_train_images, num_val_images: the first so many; None for all.
        max_bad_fraction: of images.
        num_perturbations: computations.
        config: of each.
        fleet: that will compute.
        storage: folder or URL where the rounds of the trial are committed, and removed again.
        price_per_gpu_hour: None where not given.
        options: that the costs depend on, for whoever compares.
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


def make_plan(job: PlannedJob, classifier: Classifier, tracker: Tracker, console: Console) -> Plan:
    """Try the job out on one worker and, where its workers share machines, on as many as share one; Ray is connected.

    Raises:
        ConfigError: a price without GPUs, or a job that cannot be.
        ShardError: shards that cannot be used.
    """
    need = need_of(job.fleet)
    if job.price_per_gpu_hour is not None and not need.gpus:
        raise ConfigError(
            "--price-per-gpu-hour wants workers with GPUs, and Ray has none here; plan on the cluster that will compute, or give "
            "--gpus-per-worker where its nodes start on demand"
        )
    fewest, most = job.fleet.bounds
    most = most or max(1, need.room())
    trials, share_machine = _try_fleets(job, most, need, classifier, tracker, console)
    costs = [trial.costs for trial in trials]
    seen = max((trial.num_images for trial in trials), key=len)
    images_per_byte = sum(seen) / sum(count_bytes(job.train_urls[: len(seen)]))
    work = count_work(
        _size_shards(job.train_urls, job.num_train_images, seen, images_per_byte),
        _size_shards(job.val_urls, job.num_val_images, (), images_per_byte),
        job.config,
        num_perturbations=job.num_perturbations,
        evaluations_per_solve=costs[-1].evaluations_per_solve,
    )
    fleets = []
    memory_bytes, disk_bytes = int(job.fleet.cache_gib * GIB), int(job.fleet.disk_cache_gib * GIB)
    for size in fleet_sizes(fewest, most):
        as_many = next((each for each in costs if each.num_workers >= size), costs[-1])
        planned = plan_fleet(
            work, as_many, job.config, num_workers=size, memory_bytes=memory_bytes, disk_bytes=disk_bytes
        )
        fleets.append(planned)
    return Plan(
        job=job.options,
        config=job.config,
        work=work,
        fleets=fleets,
        tried=[each.num_workers for each in costs],
        share_machine=share_machine,
        gpus_per_worker=need.gpus,
        cache_gib=job.fleet.cache_gib,
        disk_cache_gib=job.fleet.disk_cache_gib,
        price_per_gpu_hour=job.price_per_gpu_hour,
    )


def _try_fleets(
    job: PlannedJob, num_workers: int, need: Need, classifier: Classifier, tracker: Tracker, console: Console
) -> tuple[list[Trial], int]:
    """Trials by size, and how many of the job's fleet may share a machine."""
    before_s = seconds_since_start()
    trial = partial(_try_fleet, job, classifier, tracker, console, before_s)
    alone = trial(1)
    trials = [alone]
    share_machine = 1 if need.gpus else min(num_workers, max(1, alone.num_cpus // need.cpus))
    if share_machine > 1:
        try:
            trials.append(trial(share_machine))
        except WorkerLostError as error:
            console.print(redact(f"planned from one worker alone: {error}"))
    return trials, share_machine


def _try_fleet(
    job: PlannedJob,
    classifier: Classifier,
    tracker: Tracker,
    console: Console,
    before_s: float,
    num_workers: int,
) -> Trial:
    """The trial on a fleet of its own; `before_s` is what the process did before it."""
    console.print(f"trying out {num_workers} worker{'s' * (num_workers > 1)}")
    started = time.perf_counter()
    config = replace(job.fleet, num_workers=num_workers)
    fleet = Fleet(job.model, job.weights, config, tracker.run_id, weights_digest=classifier.weights_digest)
    with closing(fleet), CheckpointStore(join(job.storage, tracker.run_id)) as store:
        fleet.wait()
        ready_s = time.perf_counter() - started
        store.prepare()
        try:
            found = try_out(
                fleet,
                job.train_urls,
                job.config,
                start_s=before_s + ready_s,
                keep=partial(_keep, store, tracker, num_workers),
                class_names=classifier.class_names,
                max_bad_fraction=job.max_bad_fraction,
            )
        finally:
            store.remove()
    return found


def _keep(
    store: CheckpointStore, tracker: Tracker, num_workers: int, report: RoundReport, history: Sequence[RoundRecord]
) -> None:
    """What a job does with a round; in MLflow the trial's figures have names of their own."""
    nothing: Mapping[str, Any] = {}
    record = JobRecord(tracker.run_id, nothing, nothing, nothing, program="plan")
    store.commit(Checkpoint(record, report.state, tuple(history)))
    metrics = {f"trial-{num_workers}/{name}": value for name, value in history[-1].metrics.items()}
    tracker.log_round(replace(history[-1], metrics=metrics))


def _size_shards(
    urls: Sequence[str], num_images: int | None, seen: Sequence[int], images_per_byte: float
) -> ShardSizes:
    """Of the shards that take part: images as seen (the first ones), else as an index beside them says, else by their bytes."""
    num_bytes, indexed = count_bytes(urls), read_indexes(urls)
    known = [*seen, *(indexed.get(url) for url in urls[len(seen) :])]
    sizes = [
        max(1, round(images_per_byte * size)) if count is None else count
        for count, size in zip(known, num_bytes, strict=True)
    ]
    if num_images is None:
        return ShardSizes(tuple(sizes), tuple(sizes), tuple(num_bytes), is_estimated=None in known)
    starts = list(accumulate(sizes, initial=0))
    if starts[-1] < num_images and None not in known:
        raise ConfigError(f"asked for {num_images} images, but the {len(urls)} shards from {urls[0]} hold {starts[-1]}")
    taken = [min(size, num_images - start) for start, size in zip(starts, sizes, strict=False) if start < num_images]
    count = len(taken)
    return ShardSizes(tuple(taken), tuple(sizes[:count]), tuple(num_bytes[:count]), is_estimated=None in known[:count])
