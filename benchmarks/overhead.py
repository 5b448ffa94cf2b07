"""What a job costs beside its solves: start, rounds, measurements; and two workers against one. See benchmarks/overhead.md.

    python benchmarks/overhead.py                                      # about a quarter of an hour on two cores
    python benchmarks/overhead.py --round-size 24 --block-size 12      # rounds that two workers gain from sharing

The same SqueezeNet run by jobs/compute.py with one worker, with two, and its solves alone in this process on one thread.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import mlflow
import tyro
from networks import NETWORKS

from uap_dist.data.patterns import expand_patterns
from uap_dist.method.config import ComputeConfig
from uap_dist.models.loading import load_classifier
from uap_dist.rounds.loop import compute
from uap_dist.workers.dataset import load_dataset
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.reproducible import set_up_torch
from uap_dist.workers.worker import Worker

JOB = Path(__file__).parents[1] / "jobs/compute.py"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure."""

    network: str = "squeezenet"
    """Of benchmarks/networks.py."""
    max_evaluations: int = 10_000
    """Of the run."""
    round_size: int = 6
    """Images in a round."""
    block_size: int = 3
    """Of them in a block, which one worker solves."""
    data: Path = Path("../shared")
    """Folder of the images and networks."""


@dataclass(frozen=True)
class JobTimes:
    """Of a job, seconds: to its first round; from there to the end of the last one, before the final measurement; in its rounds; in all."""

    start: float
    loop: float
    rounds: float
    whole: float
    num_rounds: int
    rate: float


def main() -> None:
    """Run all three and print how they compare."""
    options = tyro.cli(Options)
    loading, alone = work_alone(options)
    one, two = (run_job(options, num_workers) for num_workers in (1, 2))
    print("| | to the first round | rounds and glances | of it rounds | the end: measuring all, files, MLflow |")
    print("| --- | --- | --- | --- | --- |")
    for name, job in (("1 worker", one), ("2 workers", two)):
        rest = job.whole - job.start - job.loop
        print(f"| {name} | {job.start:.1f} | {job.loop:.1f} | {job.rounds:.1f} | {rest:.1f} |")
    print(
        f"| alone, 1 thread | decoding, clean labels: {loading:.1f} | {alone:.1f} | {alone:.1f} | |\n\n"
        f"{options.network}, {one.num_rounds} rounds of {options.round_size} images, seconds: one worker's rounds take "
        f"{one.rounds / alone - 1:+.1%} beside their solves alone, with glances at held-out images {one.loop / alone - 1:+.1%}; "
        f"two workers' rounds are {one.rounds / two.rounds:.2f} times as fast as one's. Rates {one.rate:.3f}, {two.rate:.3f}."
    )


def job_arguments(options: Options) -> list[str]:
    """Of the run."""
    network = NETWORKS[options.network]
    model, weights = network.locate(options.data.resolve())
    return [
        *("--model", model, *(("--weights", weights) if weights else ())),
        *(
            "--train-shards",
            str(options.data.resolve() / network.train),
            "--num-train-images",
            str(network.num_train_images),
        ),
        *("--val-shards", str(options.data.resolve() / network.val), "--num-val-images", str(network.num_val_images)),
        *("--max-evaluations", str(options.max_evaluations), "--round-size", str(options.round_size)),
        *("--block-size", str(options.block_size)),
    ]


def run_job(options: Options, num_workers: int) -> JobTimes:
    """Its times, from what MLflow was told and when."""
    with TemporaryDirectory() as folder:
        words = [
            sys.executable,
            str(JOB),
            *job_arguments(options),
            "--num-workers",
            str(num_workers),
            "--output",
            "out",
        ]
        started = time.time()
        subprocess.run(words, cwd=folder, check=True, capture_output=True, env=os.environ | {"MLFLOW_TRACKING_URI": ""})
        whole = time.time() - started
        client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
        (run,) = client.search_runs([client.get_experiment_by_name("uap_dist").experiment_id])  # type: ignore[union-attr]
        rounds = client.get_metric_history(run.info.run_id, "round/seconds")
        begin = rounds[0].timestamp / 1000 - rounds[0].value
        return JobTimes(
            start=begin - started,
            loop=rounds[-2].timestamp / 1000 + rounds[-1].value - begin,
            rounds=mean(metric.value for metric in rounds)
            * rounds[-1].step,  # MLflow does not get each round of a long run
            whole=whole,
            num_rounds=rounds[-1].step,
            rate=run.data.metrics["fooling_rate/val"],
        )


def work_alone(options: Options) -> tuple[float, float]:
    """Seconds of decoding and clean labels, and of Worker.solve for the same rounds."""
    network = NETWORKS[options.network]
    set_up_torch(1)  # and memory, as a worker's process
    worker = Worker(load_classifier(*network.locate(options.data)), cache_bytes=8 << 30, num_threads=1)
    workers = TimedWorkers(worker)
    started = time.perf_counter()
    train, val = (
        load_dataset(workers, expand_patterns([str(options.data / pattern)]), num_images=number)
        for pattern, number in ((network.train, network.num_train_images), (network.val, network.num_val_images))
    )
    loading = time.perf_counter() - started
    sizes = {"round_size": options.round_size, "block_size": options.block_size}
    config = ComputeConfig(max_evaluations=options.max_evaluations, **sizes)
    for report in compute(workers, train, val, config):
        if report.round_number == report.num_rounds - 2:  # type: ignore[operator]
            break  # the last one is followed by a measurement that nobody needs here
    return loading, workers.solve_seconds * (report.round_number + 2) / (report.round_number + 1)


class TimedWorkers(LocalWorkers):
    """A worker of this process that adds up how long it solves."""

    solve_seconds = 0.0

    def map(self, method, tasks, *shared):  # type: ignore[no-untyped-def]
        """As a worker."""
        started = time.perf_counter()
        results = list(super().map(method, tasks, *shared))
        if method is Worker.solve:
            self.solve_seconds += time.perf_counter() - started
        return iter(results)


if __name__ == "__main__":
    main()
