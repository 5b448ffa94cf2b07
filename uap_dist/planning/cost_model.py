"""What a computation will cost, from its schedule and from what its parts cost when they were tried. Pure arithmetic."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf
from statistics import median

import numpy as np

from uap_dist.computing.concurrent import at_once
from uap_dist.computing.rounds import EVALUATIONS_PER_LOG_ODDS_SOLVE, count_rounds, is_due, plan_measurements
from uap_dist.method.config import ComputeConfig
from uap_dist.method.schedule import plan_rounds
from uap_dist.workers.dataset import CLASSIFY_SIZE

DISPATCH_S = 0.002  # of the driver for each block, whatever the workers do; benchmarks/overhead.md
ONCE_LOW, ONCE_HIGH = 0.8, 1.25  # what was measured once may be so much less or more the next time
QUANTILES = (0.1, 0.9)  # of what was measured several times


@dataclass(frozen=True)
class Span:
    """An amount, and between what it may lie."""

    expected: float
    low: float
    high: float

    @classmethod
    def exactly(cls, amount: float) -> "Span":
        """Nothing else is possible."""
        return cls(amount, amount, amount)

    @classmethod
    def once(cls, amount: float) -> "Span":
        """Of something that was measured once."""
        return cls(amount, ONCE_LOW * amount, ONCE_HIGH * amount)

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Span":
        """Of something that was measured several times; at least once."""
        if len(samples) == 1:
            return cls.once(samples[0])
        low, high = (float(value) for value in np.quantile(samples, QUANTILES))
        return cls(median(samples), low, high)

    def __add__(self, other: "Span") -> "Span":
        return Span(self.expected + other.expected, self.low + other.low, self.high + other.high)

    def __mul__(self, factor: "Span | float") -> "Span":
        other = factor if isinstance(factor, Span) else Span.exactly(factor)
        return Span(self.expected * other.expected, self.low * other.low, self.high * other.high)

    def at_least(self, other: "Span") -> "Span":
        """The larger of both."""
        return Span(max(self.expected, other.expected), max(self.low, other.low), max(self.high, other.high))


OF_LOG_ODDS = Span.exactly(EVALUATIONS_PER_LOG_ODDS_SOLVE)


@dataclass(frozen=True)
class ShardSizes:
    """The shards of a data set that take part.

    Attributes:
        num_images: of each shard, that take part.
        num_held: of each shard, that it holds and a worker decodes.
        num_bytes: of each shard.
        is_estimated: whether images were not counted, but follow from bytes.
    """

    num_images: tuple[int, ...]
    num_held: tuple[int, ...]
    num_bytes: tuple[int, ...]
    is_estimated: bool = False

    @property
    def total_images(self) -> int:
        """That take part."""
        return sum(self.num_images)


@dataclass(frozen=True)
class Sweep:
    """Images of each shard that are classified one after another, and how often."""

    num_images: tuple[int, ...]
    times: int = 1

    @property
    def total_images(self) -> int:
        """Each time."""
        return sum(self.num_images)

    def images_in_a_row(self, num_workers: int) -> float:
        """How many the busiest worker classifies each time."""
        num_blocks = sum(ceil(size / CLASSIFY_SIZE) for size in self.num_images)
        return ceil(num_blocks / num_workers) * self.total_images / num_blocks if num_blocks else 0.0


@dataclass(frozen=True)
class Work:
    """What a job has to do, counted from its schedule.

    Attributes:
        train, val: computed from, and held out.
        num_perturbations: so many computations.
        rounds: of one computation: how many have how many blocks.
        num_solves: of one computation.
        evaluations_per_solve: network evaluations.
        labels: sweeps for the clean labels, once for all computations.
        measurements: sweeps for the fooling rates of one computation.
    """

    train: ShardSizes
    val: ShardSizes
    num_perturbations: int
    rounds: Mapping[int, int]
    num_solves: int
    evaluations_per_solve: Span
    labels: tuple[Sweep, ...]
    measurements: tuple[Sweep, ...]

    @property
    def num_rounds(self) -> int:
        """Of one computation."""
        return sum(self.rounds.values())

    @property
    def num_blocks(self) -> int:
        """Of one computation."""
        return sum(num_blocks * times for num_blocks, times in self.rounds.items())

    @property
    def num_evaluations(self) -> Span:
        """Of all computations, clean labels of the training images counted by each, as every run reports them."""
        of_one = self.evaluations_per_solve * self.num_solves + Span.exactly(self.train.total_images)
        return of_one * self.num_perturbations

    @property
    def num_classified(self) -> int:
        """Images classified for clean labels and measurements."""
        each = sum(sweep.times * sweep.total_images for sweep in self.measurements)
        return sum(sweep.total_images for sweep in self.labels) + self.num_perturbations * each


def count_work(
    train: ShardSizes,
    val: ShardSizes,
    config: ComputeConfig,
    *,
    num_perturbations: int = 1,
    evaluations_per_solve: Span = OF_LOG_ODDS,
) -> Work:
    """The work of `compute`: under the log-odds rule exactly, under the paper's as the evaluations of a solve have it.

    It is all that the config allows; where a target fooling rate is reached, less.

    Args:
        train: computed from.
        val: held out.
        config: of each computation; the seed of the first serves for all.
        num_perturbations: computations.
        evaluations_per_solve: network evaluations.

    Raises:
        ConfigError: the config allows no round.
    """
    num_train, num_val = train.total_images, val.total_images
    planned = count_rounds(train.num_images, config)
    every, num_glanced = plan_measurements(num_train, num_val, config)
    rounds: Counter[int] = Counter()
    num_solves = num_measurements = 0
    for round_ in plan_rounds(
        train.num_images, seed=config.seed, round_size=config.round_size, block_size=config.block_size
    ):
        rounds[len(round_.blocks)] += 1
        num_solves += round_.num_examples
        spent = num_train + evaluations_per_solve.expected * num_solves
        is_spent = spent >= (config.max_evaluations or inf)
        if round_.number + 1 == planned or is_spent:
            break
        num_measurements += is_due(round_, every)
    everything = (Sweep(train.num_images), Sweep(val.num_images))
    if num_glanced is None:
        before = tuple(Sweep(sweep.num_images, num_measurements) for sweep in everything)
    else:
        before = (Sweep(_thin(val.num_images, num_glanced), num_measurements),)
    return Work(
        train=train,
        val=val,
        num_perturbations=num_perturbations,
        rounds=rounds,
        num_solves=num_solves,
        # what a solve costs less than expected, a budget spends on more of them
        evaluations_per_solve=Span.exactly(evaluations_per_solve.expected) if is_spent else evaluations_per_solve,
        labels=everything,
        measurements=(*before, *everything, Sweep(val.num_images)),  # at last under a random perturbation
    )


def _thin(sizes: Sequence[int], num_images: int) -> tuple[int, ...]:
    """How many of each shard's images are among so many of all, evenly spread."""
    chosen = np.arange(num_images) * sum(sizes) // num_images
    return tuple(int(n) for n in np.histogram(chosen, np.cumsum([0, *sizes]))[0])


@dataclass(frozen=True)
class Costs:
    """What parts of a job cost when they were tried on so many workers at once; seconds.

    Attributes:
        num_workers: that shared a machine.
        start: of the process until all workers are ready, once.
        decode: of a worker, an image.
        classify: of a worker, an image.
        evaluation: of a worker, a network evaluation of a solve.
        driver: a round, beside its solves: reduce, update, projection, commit, MLflow.
        report: the files of a perturbation, beside its measurements.
        evaluations_per_solve: counted.
        worker_bytes: memory of a worker without decoded images.
        gpu_bytes: of its GPU; 0 without one.
        image_bytes: of a decoded image.
    """

    num_workers: int
    start: Span
    decode: Span
    classify: Span
    evaluation: Span
    driver: Span
    report: Span
    evaluations_per_solve: Span
    worker_bytes: int
    gpu_bytes: int
    image_bytes: int


@dataclass(frozen=True)
class FleetPlan:
    """A job on so many workers.

    Attributes:
        num_workers: of the fleet.
        parts: seconds by what they are spent on.
        read_bytes: of shards, by all workers together; what low and high say is what images may be read again.
        worker_bytes: memory of a worker.
        gpu_bytes: memory of its GPU.
        cached_bytes: of it decoded images that it would keep if it had room for all.
        idle: share (0..1) of the rounds' time that the workers idle, because a round has no block for them.
    """

    num_workers: int
    parts: Mapping[str, Span]
    read_bytes: Span
    worker_bytes: int
    gpu_bytes: int
    cached_bytes: int
    idle: float

    @property
    def seconds(self) -> Span:
        """From the start of the process until all results are written."""
        return sum(self.parts.values(), Span.exactly(0.0))

    @property
    def worker_hours(self) -> Span:
        """Of all workers together: GPU-hours, where each has a GPU."""
        return self.seconds * (self.num_workers / 3600)


def plan_fleet(
    work: Work, costs: Costs, config: ComputeConfig, *, num_workers: int, memory_bytes: int, disk_bytes: int
) -> FleetPlan:
    """What the work takes on so many workers.

    Args:
        work: as counted.
        costs: as tried, with as many of these workers as share a machine.
        config: of the computations.
        num_workers: of the fleet.
        memory_bytes: of decoded images that each worker keeps in memory.
        disk_bytes: and on disk.
    """
    num_shards, count = len(work.train.num_images), work.num_perturbations
    mean_images, mean_bytes = (sum(sizes) / num_shards for sizes in (work.train.num_held, work.train.num_bytes))
    others = _shards_of_others(work, config, num_workers)
    num_cached = (num_shards / num_workers + others.expected) * mean_images + sum(work.val.num_held) / num_workers
    cached = round(costs.image_bytes * num_cached)
    missing = max(0.0, 1 - (memory_bytes + disk_bytes) / cached)
    block_images = work.num_solves / work.num_blocks
    # a block of a shard that is not kept has all of it read, and at least its own images decoded
    decoded_again = Span((block_images + mean_images) / 2, block_images, mean_images) * missing
    block = costs.evaluation * work.evaluations_per_solve * block_images + costs.decode * decoded_again
    classify = costs.classify + costs.decode * Span.exactly(missing)
    first_reads = sum(_in_waves(sizes.num_held, num_workers) for sizes in (work.train, work.val))
    rounds = _rounds(work, block, costs.driver, config, num_workers)
    reads_again = count * work.num_blocks * missing
    return FleetPlan(
        num_workers=num_workers,
        parts={
            "start": costs.start,
            "decoding": costs.decode * (Span.exactly(first_reads) + others * mean_images),
            "clean labels": classify * _in_a_row(work.labels, num_workers),
            "rounds": rounds,
            "measurements": classify * (count * _in_a_row(work.measurements, num_workers)),
            "report": costs.report * count,
        },
        read_bytes=Span.exactly(sum(work.train.num_bytes) + sum(work.val.num_bytes) + reads_again * mean_bytes)
        + others * (num_workers * mean_bytes),
        worker_bytes=costs.worker_bytes + min(cached, memory_bytes),
        gpu_bytes=costs.gpu_bytes,
        cached_bytes=cached,
        idle=1 - count * work.num_blocks * block.expected / num_workers / rounds.expected,
    )


def _rounds(work: Work, block: Span, driver: Span, config: ComputeConfig, num_workers: int) -> Span:
    """Seconds of all rounds.

    A round's blocks are solved in waves of as many as there are workers, and the next round begins when it is reduced. Computations of
    a pool fill each other's gaps, until the workers, one computation's chain of rounds, or the driver has no time left.
    """
    count = work.num_perturbations
    waves = sum(ceil(num_blocks / num_workers) * times for num_blocks, times in work.rounds.items())
    of_driver = (driver * work.num_rounds).at_least(Span.exactly(DISPATCH_S * work.num_blocks))
    chain = block * waves + of_driver
    batches = ceil(count / at_once(num_workers, config))
    return (chain * batches).at_least(block * (count * work.num_blocks / num_workers)).at_least(of_driver * count)


def _shards_of_others(work: Work, config: ComputeConfig, num_workers: int) -> Span:
    """Training shards that a worker decodes because it gets blocks of them, though another worker read them at first.

    An idle worker that holds the shard is preferred: where there are more workers than blocks, there mostly is one.
    """
    num_shards = len(work.train.num_images)
    num_blocks = work.num_perturbations * work.num_blocks / num_workers
    at_most = min(num_blocks, num_shards * (1 - 1 / num_workers))
    in_flight = max(work.rounds) * min(work.num_perturbations, at_once(num_workers, config))
    if num_workers > in_flight:
        return Span(0.0, 0.0, at_most)
    touched = num_shards * (1 - (1 - 1 / num_shards) ** num_blocks)
    return Span(touched * (1 - 1 / num_workers), 0.0, at_most)


def _in_waves(sizes: Sequence[int], num_workers: int) -> int:
    """Images that are decoded one after another, each worker taking the next shard when it has done one: at most so many."""
    return sum(max(sizes[start : start + num_workers]) for start in range(0, len(sizes), num_workers))


def _in_a_row(sweeps: Sequence[Sweep], num_workers: int) -> float:
    return sum(sweep.times * sweep.images_in_a_row(num_workers) for sweep in sweeps)
