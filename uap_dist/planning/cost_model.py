"""The cost of a job on a fleet, worked out from its work and the measured costs of its parts. Pure arithmetic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from uap_dist.method.config import ComputeConfig
from uap_dist.planning.range import Range
from uap_dist.planning.work import Work
from uap_dist.rounds.concurrent import num_concurrent
from uap_dist.workers.dataset import CLASSIFY_SIZE

DISPATCH_S = 0.002  # of the driver for each block, from benchmarks/overhead.md


@dataclass(frozen=True)
class Costs:
    """Costs of the parts of a job, measured on some workers at once, which share a machine. Times are in seconds.

    Attributes:
        num_workers: number of these workers.
        start: from the start of the process until all workers are ready.
        decode: one image, on one worker.
        classify: one image, on one worker.
        evaluation: one network evaluation of a solve, on one worker; in a batch of members, one of each, with their updates.
        update: one round without its solves: reduction, update and projection, on the driver or, in a span, on a worker. Zero in a
            batch of members.
        driver: what else the driver does for a round that the workers share: its calls, commit and MLflow.
        report: the files of one perturbation, without its measurements.
        evaluations_per_solve: network evaluations.
        worker_bytes: memory of a worker without decoded images.
        gpu_bytes: GPU memory of a worker; 0 without a GPU.
        image_bytes: size of a decoded image.
        num_cpus: of the workers' machine.
        shard_images: number of images in each of the first training shards, which were read.
    """

    num_workers: int
    start: Range
    decode: Range
    classify: Range
    evaluation: Range
    update: Range
    driver: Range
    report: Range
    evaluations_per_solve: Range
    worker_bytes: int
    gpu_bytes: int
    image_bytes: int
    num_cpus: int
    shard_images: tuple[int, ...]


@dataclass(frozen=True)
class FleetPlan:
    """The cost of a job on a fleet of some size.

    Attributes:
        num_workers: size of the fleet.
        parts: seconds by part of the job.
        read_bytes: bytes of shards read by all workers together. Its range covers images that may be read again.
        worker_bytes: memory of a worker.
        gpu_bytes: GPU memory of a worker.
        cached_bytes: decoded images that a worker would keep if it had room for all of them.
        idle: fraction (0..1) of the rounds' time in which a worker has no block to solve.
        has_spans: whether workers compute spans, each of one perturbation or of a batch, instead of sharing the blocks of a round.
    """

    num_workers: int
    parts: Mapping[str, Range]
    read_bytes: Range
    worker_bytes: int
    gpu_bytes: int
    cached_bytes: int
    idle: float
    has_spans: bool

    @property
    def seconds(self) -> Range:
        """From the start of the process until all results are written."""
        return sum(self.parts.values(), Range.exactly(0.0))

    @property
    def worker_hours(self) -> Range:
        """Hours of all workers together."""
        return self.seconds * (self.num_workers / 3600)


def plan_fleet(
    work: Work, costs: Costs, config: ComputeConfig, *, num_workers: int, memory_bytes: int, disk_bytes: int
) -> FleetPlan:
    """Work out the cost of a job on `num_workers` workers.

    Args:
        work: of the job.
        costs: measured with as many workers on a machine as the fleet will have there.
        config: of the computations.
        num_workers: size of the fleet.
        memory_bytes: decoded images that each worker keeps in memory.
        disk_bytes: decoded images that each worker keeps on disk beyond these.
    """
    num_shards, count = len(work.train.num_images), work.num_perturbations
    num_batches = ceil(count / config.members_at_once)  # which take their time as one perturbation does
    mean_images, mean_bytes = (sum(sizes) / num_shards for sizes in (work.train.num_held, work.train.num_bytes))
    block_images = work.num_solves / work.num_blocks
    block_s = costs.evaluation * work.evaluations_per_solve * block_images
    fits = costs.image_bytes * sum(work.train.num_held) <= memory_bytes + disk_bytes
    has_spans = config.members_at_once > 1 or (fits and _are_spans_quicker(work, block_s, costs, num_workers))
    extra_shards = (_shards_for_spans if has_spans else _extra_shards)(work, config, num_workers)
    num_cached = (num_shards / num_workers + extra_shards.expected) * mean_images + sum(work.val.num_held) / num_workers
    cached_bytes = round(costs.image_bytes * num_cached)
    missing = max(0.0, 1 - (memory_bytes + disk_bytes) / cached_bytes)  # fraction of the images that caches do not hold
    # for a block of a shard that is not cached, its images are read and decoded again; of a compressed tar, all of it is read
    decoded_again = Range(block_images, block_images, mean_images) * missing
    block = block_s + costs.decode * decoded_again * config.members_at_once
    classify = costs.classify + costs.decode * missing
    labels = sum(_classified_in_a_row(sizes.num_images, num_workers) for sizes in (work.train, work.val))
    measurements = sum(times * _classified_in_a_row(sizes, num_workers) for sizes, times in work.measurements.items())
    first_reads = sum(_decoded_in_a_row(sizes.num_held, num_workers) for sizes in (work.train, work.val))
    if has_spans:  # perturbations or batches take turns
        rounds = _alone_s(work, block, costs) * max(1.0, num_batches / num_workers)
    else:
        rounds = _shared_s(work, block, costs, config, num_workers)
    share = min(1.0, block_images / mean_images)
    read_again = Range(share, share, 1.0) * (count * work.num_blocks * missing)  # shards
    return FleetPlan(
        num_workers=num_workers,
        parts={
            "start": costs.start,
            "decoding": costs.decode * (extra_shards * mean_images + first_reads),
            "clean labels": classify * labels,
            "rounds": rounds,
            "measurements": classify * (count * measurements),
            "report": costs.report * count,
        },
        read_bytes=(extra_shards * num_workers + read_again) * mean_bytes
        + (sum(work.train.num_bytes) + sum(work.val.num_bytes)),
        worker_bytes=costs.worker_bytes + min(cached_bytes, memory_bytes),
        gpu_bytes=costs.gpu_bytes,
        cached_bytes=cached_bytes,
        idle=1 - num_batches * work.num_blocks * block.expected / num_workers / max(rounds.expected, 1e-9),
        has_spans=has_spans,
    )


def _alone_s(work: Work, block: Range, costs: Costs) -> Range:
    """Seconds of the rounds of one perturbation, or of one batch, in spans, given those of a block."""
    return block * work.num_blocks + costs.update * work.num_rounds


def _are_spans_quicker(work: Work, block: Range, costs: Costs, num_workers: int) -> bool:
    """What `Sharing` will find, given the seconds of a block whose images are decoded."""
    if work.num_perturbations >= num_workers:
        return True
    of_driver = (costs.update + costs.driver) * work.num_rounds
    shared = block * _waves(work, num_workers) + of_driver
    return _alone_s(work, block, costs).expected <= shared.expected


def _waves(work: Work, num_workers: int) -> int:
    """The blocks of a round are solved in waves of one for each worker: their number in all rounds of one perturbation."""
    return sum(ceil(num_blocks / num_workers) * times for num_blocks, times in work.rounds.items())


def _shared_s(work: Work, block: Range, costs: Costs, config: ComputeConfig, num_workers: int) -> Range:
    """Seconds of all rounds that workers share, given those of a block.

    The next round of a computation begins when the last one is reduced. The computations of a pool fill each other's gaps,
    until the workers, the rounds of one computation or the driver have no time left.
    """
    count = work.num_perturbations
    driver = costs.update + costs.driver
    of_driver = (driver * work.num_rounds).at_least(Range.exactly(DISPATCH_S * work.num_blocks))
    of_computation = block * _waves(work, num_workers) + of_driver
    of_workers = block * (count * work.num_blocks / num_workers)
    num_batches = ceil(count / num_concurrent(num_workers, count, config))
    return (of_computation * num_batches).at_least(of_workers).at_least(of_driver * count)


def _shards_for_spans(work: Work, config: ComputeConfig, num_workers: int) -> Range:
    """Training shards that a worker decodes in addition to those it read first, because its spans need all of them."""
    others = len(work.train.num_images) * (1 - 1 / num_workers)
    are_certain = config.members_at_once > 1 or work.num_perturbations >= num_workers
    return Range(others if are_certain else 0.0, 0.0, others)


def _extra_shards(work: Work, config: ComputeConfig, num_workers: int) -> Range:
    """Training shards that a worker decodes in addition to those it read first, because it is given blocks of them.

    An idle worker that holds the shard is preferred, and with more workers than blocks there mostly is one.
    """
    num_shards = len(work.train.num_images)
    num_blocks = work.num_perturbations * work.num_blocks / num_workers  # of a worker
    at_most = min(num_blocks, num_shards * (1 - 1 / num_workers))
    in_flight = max(work.rounds) * min(
        work.num_perturbations, num_concurrent(num_workers, work.num_perturbations, config)
    )
    if num_workers > in_flight:
        return Range(0.0, 0.0, at_most)
    touched = num_shards * (1 - (1 - 1 / num_shards) ** num_blocks)  # if each block is of a shard drawn at random
    return Range(touched * (1 - 1 / num_workers), 0.0, at_most)


def _decoded_in_a_row(sizes: Sequence[int], num_workers: int) -> int:
    """Images that are decoded one after another, at most, if each worker takes the next shard when it is done with one."""
    return sum(max(sizes[start : start + num_workers]) for start in range(0, len(sizes), num_workers))


def _classified_in_a_row(sizes: Sequence[int], num_workers: int) -> float:
    """Images that the busiest worker classifies, in blocks of one shard."""
    num_blocks = sum(ceil(size / CLASSIFY_SIZE) for size in sizes)
    return ceil(num_blocks / num_workers) * sum(sizes) / max(1, num_blocks)
