"""What the parts of a computation cost, found out by doing a little of it on real workers."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from uap_dist.computing.report import FinishedRun, save_run
from uap_dist.computing.rounds import compute, evaluate
from uap_dist.method.config import ComputeConfig
from uap_dist.method.state import RoundReport
from uap_dist.planning.cost_model import OF_LOG_ODDS, Costs, Span
from uap_dist.tracking.history import RoundRecord
from uap_dist.workers.dataset import CLASSIFY_SIZE, Dataset, list_dataset, predict
from uap_dist.workers.local import R, Shared, Workers
from uap_dist.workers.messages import Examples
from uap_dist.workers.worker import Worker

NUM_WARM_UPS, MIN_ROUNDS, MAX_ROUNDS, ROUNDS_S = 2, 3, 30, 8.0  # rounds that do not count; then how many, how long
BLOCKS_TO_CLASSIFY, NUM_SWEEPS = 2, 4  # of each worker at once; and how often, beside a first time that does not count
MEAN_FOOLED = 0.5  # of the images, over a run of the paper's rule, at most: those cost a single evaluation

Keep = Callable[[RoundReport, Sequence[RoundRecord]], None]  # a round, and all so far


@dataclass(frozen=True)
class _Call:
    """One `map`: how many tasks of how many examples, and how long it took."""

    method: Callable[..., Any]
    num_tasks: int
    num_examples: int
    seconds: float

    def per_example(self, num_workers: int) -> float:
        """Seconds of a worker, the tasks being done in waves of as many as there are workers."""
        return self.seconds * self.num_tasks / self.num_examples / ceil(self.num_tasks / num_workers)


class _Stopwatch:
    """Workers, and how long all that they were asked for took."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self.num_workers = workers.num_workers
        self.calls: list[_Call] = []

    def map(
        self, method: Callable[[Worker, Examples, *Shared], R], tasks: Sequence[Examples], *shared: *Shared
    ) -> Iterator[R]:
        """See Workers."""
        started = time.perf_counter()
        results = list(self._workers.map(method, tasks, *shared))
        seconds = time.perf_counter() - started
        self.calls.append(_Call(method, len(tasks), sum(len(task.keys) for task in tasks), seconds))
        return iter(results)

    def metrics(self) -> dict[str, float]:
        """See Workers."""
        return self._workers.metrics()

    @property
    def seconds(self) -> float:
        return sum(call.seconds for call in self.calls)

    def per_example(self, method: Callable[..., Any]) -> list[float]:
        """Seconds of a worker, of each call."""
        return [call.per_example(self.num_workers) for call in self.calls if call.method == method]


@dataclass(frozen=True)
class Trial:
    """What was tried out.

    Attributes:
        costs: of its parts.
        num_images: of each shard that was read, the first ones of those given.
        num_cpus: of the machine of a worker.
    """

    costs: Costs
    num_images: tuple[int, ...]
    num_cpus: int


def try_out(
    workers: Workers,
    urls: Sequence[str],
    config: ComputeConfig,
    *,
    start_s: float,
    keep: Keep,
    class_names: Sequence[str] = (),
    max_bad_fraction: float = 0.01,
) -> Trial:
    """Decode the first shards, classify and solve some of their images for some rounds, write a report that nobody keeps.

    Args:
        workers: as many as shall share a machine.
        urls: of the training shards; two for each worker are read, more only where those hold less than a block.
        config: of the computation.
        start_s: how long it took until the workers were ready.
        keep: what the job does with each round: commit and track it.
        class_names: of the network's labels; empty where not known.
        max_bad_fraction: see `list_dataset`.

    Raises:
        ShardError, ConfigError: see `list_dataset`.
    """
    watch = _Stopwatch(workers)
    listed, decode_s, preparation_s = _read_some(workers, urls, config.block_size, max_bad_fraction)
    room = max(config.round_size, BLOCKS_TO_CLASSIFY * CLASSIFY_SIZE * watch.num_workers)
    some = predict(watch, listed.thin(min(room, listed.num_examples)))
    final, history, driver_s = _some_rounds(watch, some, config, keep)
    report_s = _report(watch, some, final, history, class_names)
    used = next(workers.map(Worker.resources, [Examples(urls[0])]))
    spent = [record.metrics["total/evaluations"] - some.num_examples for record in history]
    solved = [record.metrics["total/solves"] for record in history]
    per_solve = [(b - a) / (d - c) for a, b, c, d in zip([0, *spent], spent, [0, *solved], solved, strict=False)]
    evaluation_s = [seconds / each for seconds, each in zip(watch.per_example(Worker.solve), per_solve, strict=True)]
    counted = Span.of(per_solve[NUM_WARM_UPS:])
    costs = Costs(
        num_workers=watch.num_workers,
        start=Span.once(start_s + preparation_s),
        decode=Span.once(decode_s),
        classify=Span.of(watch.per_example(Worker.classify)[-NUM_SWEEPS:]),
        evaluation=Span.of(evaluation_s[NUM_WARM_UPS:]),
        driver=Span.of(driver_s[NUM_WARM_UPS:]),
        report=Span.once(report_s),
        evaluations_per_solve=OF_LOG_ODDS
        if config.rule == "log-odds"
        else replace(counted, low=MEAN_FOOLED + (1 - MEAN_FOOLED) * counted.low),
        worker_bytes=used.process_bytes - used.decoded_bytes,
        gpu_bytes=used.gpu_bytes,
        image_bytes=some.shape[0] * some.shape[1] * some.shape[2],
    )
    return Trial(costs, tuple(listed.sizes), used.num_cpus)


def _read_some(
    workers: Workers, urls: Sequence[str], enough: int, max_bad_fraction: float
) -> tuple[Dataset, float, float]:
    """The examples of some shards, seconds to decode an image, and what the first takes beside that: a worker prepares its network."""
    waves: list[tuple[float, int]] = []  # seconds, and images of the largest shard
    num_images = 0
    for start in range(0, len(urls), workers.num_workers):
        if len(waves) > 1 and num_images >= enough:
            break
        end, started = start + workers.num_workers, time.perf_counter()
        wave = list_dataset(workers, urls[start:end], max_bad_fraction=max_bad_fraction)
        waves.append((time.perf_counter() - started, max(wave.sizes)))
        num_images += wave.num_examples
    (first_s, first_images), (last_s, last_images) = waves[0], waves[-1]
    decode_s = last_s / last_images
    listed = list_dataset(workers, urls[:end], max_bad_fraction=max_bad_fraction)
    return listed, decode_s, max(0.0, first_s - first_images * decode_s)


def _some_rounds(
    watch: _Stopwatch, some: Dataset, config: ComputeConfig, keep: Keep
) -> tuple[RoundReport, list[RoundRecord], list[float]]:
    """The report of the last one, all records, and the driver's seconds of each."""
    enough = NUM_WARM_UPS + MAX_ROUNDS
    passes = 1 + ceil(enough * config.round_size / some.num_examples)
    endless = replace(config, max_passes=passes, max_evaluations=None, evaluate_every=passes, target_fooling_rate=1.0)
    history: list[RoundRecord] = []
    driver_s: list[float] = []
    begun = started = time.perf_counter()
    in_calls = watch.seconds
    for report in compute(watch, some, some, endless):
        history.append(RoundRecord.of(report, {}))
        keep(report, history)
        now = time.perf_counter()
        driver_s.append(now - started - (watch.seconds - in_calls))
        started, in_calls = now, watch.seconds
        if len(history) == NUM_WARM_UPS:
            begun = now
        num_counted = len(history) - NUM_WARM_UPS
        if num_counted >= MAX_ROUNDS or (num_counted >= MIN_ROUNDS and now > begun + ROUNDS_S):
            break
    return report, history, driver_s


def _report(
    watch: _Stopwatch, some: Dataset, final: RoundReport, history: Sequence[RoundRecord], class_names: Sequence[str]
) -> float:
    """Seconds to write the files of a perturbation, beside what the workers do for it."""
    for _ in range(NUM_SWEEPS // 2):  # each on training and on held-out images
        evaluation = evaluate(watch, some, some, final.perturbation)
    finished = FinishedRun(
        final=replace(final, evaluation=evaluation),
        history=history,
        random_rates={"linf": evaluation.val, "l2": evaluation.val},
        val=some,
        provenance={"norm": "linf"},
        class_names=class_names,
        mlflow_run_id="",
    )
    started, in_calls = time.perf_counter(), watch.seconds
    with TemporaryDirectory() as folder:
        save_run(Path(folder), finished, watch)
    return time.perf_counter() - started - (watch.seconds - in_calls)
