"""The costs of the parts of a computation, measured by doing a little of it on real workers."""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch

from uap_dist.computing.report import FinishedRun, save_run
from uap_dist.method.config import ComputeConfig
from uap_dist.method.rates import UNTARGETED
from uap_dist.method.state import RoundReport, State
from uap_dist.planning.cost_model import Costs
from uap_dist.planning.range import Range
from uap_dist.planning.work import OF_LOG_ODDS
from uap_dist.rounds.loop import compute
from uap_dist.rounds.plan import RoundTasks, plan_run, schedule_rounds
from uap_dist.rounds.record import RoundRecord
from uap_dist.rounds.round import evaluate
from uap_dist.rounds.span import Span, compute_span
from uap_dist.workers.dataset import CLASSIFY_SIZE, Dataset, list_dataset, predict
from uap_dist.workers.local import R, Shared, T, Workers
from uap_dist.workers.messages import Examples
from uap_dist.workers.worker import Worker

NUM_WARM_UPS = 2  # rounds, or spans of batches, that are not counted
MIN_ROUNDS, MAX_ROUNDS, ROUNDS_S = (
    3,
    30,
    8.0,
)  # counted: at least, at most, and for how long; as many spans as rounds at least
CLASSIFY_BLOCKS = 2  # blocks that each worker classifies in one measurement
NUM_MEASUREMENTS = 4  # of the time to classify, after one that is not counted
MAX_FOOLED = (
    0.5  # fraction of the images that are fooled already, over a run of the paper's rule; those take one evaluation
)

Commit = Callable[[RoundReport, Sequence[RoundRecord]], None]  # of a round, given the records of all rounds so far


class _TimedWorkers:
    """Workers whose calls are timed.

    Attributes:
        num_workers: of them.
        room_for_spans: none.
        seconds: spent in all calls.
        per_example: for each method the seconds per example on one worker, of each call in turn.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self.num_workers = workers.num_workers
        self.room_for_spans = 0  # each round is to be measured
        self.seconds = 0.0
        self.per_example: defaultdict[Callable[..., Any], list[float]] = defaultdict(list)

    def map(self, method: Callable[[Worker, T, *Shared], R], tasks: Sequence[T], *shared: *Shared) -> Iterator[R]:
        """See Workers."""
        started = time.perf_counter()
        results = list(self._workers.map(method, tasks, *shared))
        seconds = time.perf_counter() - started
        self.seconds += seconds
        num_examples, num_waves = sum(task.num_examples for task in tasks), ceil(len(tasks) / self.num_workers)
        self.per_example[method].append(seconds / num_waves * len(tasks) / num_examples)
        return iter(results)

    def metrics(self) -> dict[str, float]:
        """See Workers."""
        return self._workers.metrics()


def measure_costs(
    workers: Workers,
    urls: Sequence[str],
    config: ComputeConfig,
    *,
    start_s: float,
    commit: Commit,
    class_names: Sequence[str] = (),
    max_bad_fraction: float = 0.01,
) -> Costs:
    """Decode the first shards, classify some images, solve some rounds, and write a report that is discarded.

    Args:
        workers: all workers that will share a machine.
        urls: training shards. Two for each worker are read, and more only if those hold less than a block.
        config: of the computation.
        start_s: seconds until the workers were ready.
        commit: commits and tracks a round, as the job does.
        class_names: names of the network's labels; empty if unknown.
        max_bad_fraction: see `list_dataset`.

    Raises:
        ShardError, ConfigError: see `list_dataset`.
    """
    timed = _TimedWorkers(workers)
    listed, decode_s, preparation_s = _measure_decoding(workers, urls, config.block_size, max_bad_fraction)
    num_images = max(config.round_size, CLASSIFY_BLOCKS * CLASSIFY_SIZE * timed.num_workers)
    images = predict(timed, listed.thin(min(num_images, listed.num_examples)))
    rounds = _measure_rounds(timed, images, config, commit)
    report_s = _measure_report(timed, images, rounds, class_names)
    solve_s = zip(timed.per_example[Worker.solve], rounds.evaluations_per_solve, strict=True)
    evaluation_s = [seconds / num_evaluations for seconds, num_evaluations in solve_s][NUM_WARM_UPS:]
    update_s = rounds.update_s[NUM_WARM_UPS:]
    if config.members_at_once > 1:
        evaluation_s, update_s = _measure_batches(workers, images, config), [0.0]
    used = next(workers.map(find_resources, [Examples(urls[0])]))
    evaluations_per_solve = Range.of(rounds.evaluations_per_solve[NUM_WARM_UPS:])
    return Costs(
        num_workers=timed.num_workers,
        start=Range.once(start_s + preparation_s),
        decode=Range.once(decode_s),
        classify=Range.of(timed.per_example[Worker.classify][-NUM_MEASUREMENTS:]),
        evaluation=Range.of(evaluation_s),
        update=Range.of(update_s),
        driver=Range.of(rounds.driver_s[NUM_WARM_UPS:]),
        report=Range.once(report_s),
        evaluations_per_solve=OF_LOG_ODDS * max(1, len(images.clean.networks))
        if config.rule == "log-odds"
        else replace(evaluations_per_solve, low=MAX_FOOLED + (1 - MAX_FOOLED) * evaluations_per_solve.low),
        worker_bytes=used.process_bytes - used.decoded_bytes,
        gpu_bytes=used.gpu_bytes,
        image_bytes=images.shape[0] * images.shape[1] * images.shape[2],
        num_cpus=used.num_cpus,
        shard_images=tuple(listed.sizes),
    )


def _measure_decoding(
    workers: Workers, urls: Sequence[str], min_images: int, max_bad_fraction: float
) -> tuple[Dataset, float, float]:
    """The images that were decoded, seconds to decode one, and seconds in which workers prepared their networks before."""
    waves: list[tuple[float, int]] = []  # seconds, and images of the largest shard
    num_images = 0
    for start in range(0, len(urls), workers.num_workers):
        if len(waves) > 1 and num_images >= min_images:
            break
        end, started = start + workers.num_workers, time.perf_counter()
        wave = list_dataset(workers, urls[start:end], max_bad_fraction=max_bad_fraction)
        waves.append((time.perf_counter() - started, max(wave.sizes)))
        num_images += wave.num_examples
    (first_s, first_images), (last_s, last_images) = waves[0], waves[-1]
    decode_s = last_s / last_images
    listed = list_dataset(workers, urls[:end], max_bad_fraction=max_bad_fraction)
    return listed, decode_s, max(0.0, first_s - first_images * decode_s)


@dataclass(frozen=True)
class _Rounds:
    """The last report of some rounds, and of every round its record, evaluations per solve, update and commit seconds."""

    final: RoundReport
    history: list[RoundRecord]
    update_s: list[float]
    driver_s: list[float]
    evaluations_per_solve: list[float]


def _measure_rounds(timed: _TimedWorkers, images: Dataset, config: ComputeConfig, commit: Commit) -> _Rounds:
    endless = replace(_endless(config, images), members_at_once=1)
    history: list[RoundRecord] = []
    update_s: list[float] = []
    driver_s: list[float] = []
    per_solve: list[float] = []
    num_evaluations, num_solves = images.clean.labels.size, 0
    begun = started = time.perf_counter()
    in_calls = timed.seconds
    for report in compute(timed, images, images, endless):
        solved = time.perf_counter()
        update_s.append(solved - started - (timed.seconds - in_calls))
        history.append(RoundRecord.of(report, {}))
        commit(report, history)
        now = time.perf_counter()
        driver_s.append(now - solved)
        per_solve.append((report.num_evaluations - num_evaluations) / (report.num_solves - num_solves))
        num_evaluations, num_solves = report.num_evaluations, report.num_solves
        started, in_calls = now, timed.seconds
        if len(history) == NUM_WARM_UPS:
            begun = now
        num_counted = len(history) - NUM_WARM_UPS
        if num_counted >= MAX_ROUNDS or (num_counted >= MIN_ROUNDS and now > begun + ROUNDS_S):
            break
    return _Rounds(report, history, update_s, driver_s, per_solve)


def _endless(config: ComputeConfig, images: Dataset) -> ComputeConfig:
    """The config with more rounds than are measured, without a measurement of rates before their end."""
    passes = 1 + ceil((NUM_WARM_UPS + MAX_ROUNDS) * config.round_size / images.num_examples)
    return replace(config, max_passes=passes, max_evaluations=None, evaluate_every=passes, target_fooling_rate=1.0)


def _measure_batches(workers: Workers, images: Dataset, config: ComputeConfig) -> list[float]:
    """Seconds of one evaluation of each member of a full batch, updates included, from spans that each worker computes at once."""
    endless, places = _endless(config, images), range(config.members_at_once)
    scheduled = islice(schedule_rounds(images.sizes, endless), MAX_ROUNDS)
    rounds = tuple(RoundTasks.of(round_, images, config.seed) for round_ in scheduled)
    start = State.start(images.shape, images.clean.labels, config)
    spans = [Span(dict.fromkeys(places, rounds), len(places))] * workers.num_workers
    plan, found = plan_run(images.sizes, endless, images.clean.networks), list[float]()
    for _ in range(NUM_WARM_UPS + MIN_ROUNDS):
        answers = list(workers.map(compute_span, spans, dict.fromkeys(places, start), plan))
        of_first_member = [answer[0] for answer in answers]
        spent = [reports[-1].num_evaluations - start.num_evaluations for reports in of_first_member]
        seconds = [sum(report.seconds for report in reports) for reports in of_first_member]
        found.append(max(each / count for each, count in zip(seconds, spent, strict=True)))
    return found[NUM_WARM_UPS:]


def _measure_report(timed: _TimedWorkers, images: Dataset, rounds: _Rounds, class_names: Sequence[str]) -> float:
    """Seconds to write the files of a perturbation, without the time of the workers."""
    for _ in range(NUM_MEASUREMENTS // 2):  # each classifies training and held-out images
        goal = UNTARGETED.of_networks(images.clean.networks)
        evaluation = evaluate(timed, images, images, rounds.final.perturbation, goal)
    finished = FinishedRun(
        final=replace(rounds.final, evaluation=evaluation),
        history=rounds.history,
        random_rates={"linf": evaluation.val_rates, "l2": evaluation.val_rates},
        val=images,
        provenance={"norm": "linf"},
        class_names=class_names,
        mlflow_run_id="",
    )
    started, in_calls = time.perf_counter(), timed.seconds
    with TemporaryDirectory() as folder:
        save_run(Path(folder), finished, timed)
    return time.perf_counter() - started - (timed.seconds - in_calls)


@dataclass(frozen=True)
class Resources:
    """What a worker uses.

    Attributes:
        process_bytes: resident memory of its process.
        decoded_bytes: of decoded images, part of that.
        gpu_bytes: largest amount of GPU memory reserved so far.
        num_cpus: of its machine.
    """

    process_bytes: int
    decoded_bytes: int
    gpu_bytes: int
    num_cpus: int


def find_resources(worker: Worker, examples: Examples) -> Resources:
    """Memory that a worker has used so far, and the CPUs of its machine."""
    return Resources(
        process_bytes=psutil.Process().memory_info().rss,
        decoded_bytes=worker.decoded_bytes,
        gpu_bytes=torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0,
        num_cpus=os.cpu_count() or 1,
    )
