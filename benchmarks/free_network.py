"""What a round costs beside the network: jobs/compute.py around networks that cost nothing. See benchmarks/free_network.md.

    python benchmarks/free_network.py      # about ten minutes on two idle cores

Rounds of six images by the job, with one worker and with two, one perturbation and a pool of eight, committed to a local disk and to an S3
server on loopback that waits before each answer; beside them the same rounds in one process and in two at once, each on one thread and
without Ray. This is what a GPU would feel, whose network evaluations take a few milliseconds.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory

import mlflow
import tyro
from mlflow.entities import ViewType
from pyarrow import fs

from uap_dist.data.patterns import expand_patterns
from uap_dist.method.config import ComputeConfig
from uap_dist.models.loading import load_classifier
from uap_dist.rounds.loop import compute
from uap_dist.versions import git_commit, machine
from uap_dist.workers.dataset import load_dataset
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.reproducible import set_up_torch
from uap_dist.workers.worker import Worker

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))
from faulty_store import FaultyStore

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_EC2_METADATA_DISABLED": "true"}
IMAGES = {224: "imagenet-sample/{}-*.tar", 32: "cifar10/{}-0000.tar"}
HELD_OUT = {224: "heldout", 32: "test"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure."""

    sides: tuple[int, ...] = (224, 32)
    """Of the images, pixels: 224 or 32."""
    num_rounds: int = 2_000
    """Of each perturbation."""
    pool: int = 8
    """Perturbations of a pool."""
    delay_s: float = 0.2
    """That the S3 server waits before each answer."""
    data: Path = Path("../shared/data")
    """Folder of the images."""


@dataclass(frozen=True)
class Rounds:
    """Of a job: seconds from the end of its first round to that of its last one, rounds in between, megabytes that were committed."""

    seconds: float
    number: int
    megabytes: float | None = None

    @property
    def milliseconds(self) -> float:
        """Of a round."""
        return 1000 * self.seconds / self.number


def main() -> None:
    """A table for each side."""
    options = tyro.cli(Options)
    print(f"{machine()}; commit {git_commit()}\n")
    for side in options.sides:
        alone, two_at_once = (mean(in_processes(number, side, options)) for number in (1, 2))
        print(f"\n{side}×{side}, {options.num_rounds:,} rounds of six images for each perturbation:\n")
        print("| | a round, ms | beside one process | rounds/s | images/s | committed, MB |")
        print("| --- | --- | --- | --- | --- | --- |")
        print(
            f"| in one process, without Ray | {alone:.2f} | 1 | {1000 / alone:.0f} | {6000 / alone:.0f} | |",
            flush=True,
        )
        print_row("in two processes at once, without Ray", Rounds(two_at_once / 2000, 1), alone)
        for num_perturbations in (1, options.pool):
            for num_workers in (1, 2):
                job = run_job(side, options, num_workers, num_perturbations)
                print_row(f"{describe(num_perturbations)}, {num_workers} workers", job, alone)
        with slow_store(options.delay_s) as store:
            job = run_job(side, options, 1, 1, store)
        print_row(f"one perturbation, 1 workers, S3 that waits {options.delay_s * 1000:.0f} ms", job, alone)


def describe(num_perturbations: int) -> str:
    """In words."""
    return "one perturbation" if num_perturbations == 1 else f"a pool of {num_perturbations}"


def print_row(name: str, job: Rounds, alone: float) -> None:
    """One row of the table."""
    each = job.milliseconds
    committed = "" if job.megabytes is None else f"{job.megabytes:.1f}"
    name = name.replace("1 workers", "1 worker")
    print(
        f"| {name} | {each:.2f} | {each / alone:.2f} | {1000 / each:.0f} | {6000 / each:.0f} | {committed} |",
        flush=True,
    )


def in_processes(number: int, side: int, options: Options) -> list[float]:
    """As `in_this_process`, in so many processes at once: what these cores can give, with nothing beside."""
    with ProcessPoolExecutor(number, mp_context=get_context("spawn")) as processes:
        return list(processes.map(in_this_process, [side] * number, [options] * number))


def in_this_process(side: int, options: Options) -> float:
    """Milliseconds of a round: the median."""
    set_up_torch(1)  # as a worker's process
    worker = Worker(load_classifier(f"{ROOT}/benchmarks/free.py:at_{side}"), cache_bytes=8 << 30, num_threads=1)
    workers = LocalWorkers(worker)
    train, val = (load_dataset(workers, expand_patterns([pattern])) for pattern in patterns(side, options))
    config = ComputeConfig(max_evaluations=train.num_examples + 12 * options.num_rounds)
    reports = compute(workers, train, val, config)
    with worker.reproducibly():
        return 1000 * median(next(reports).seconds for _ in range(min(500, options.num_rounds)))


def patterns(side: int, options: Options) -> tuple[str, str]:
    """Of the training and held-out shards."""
    folder = options.data.resolve()
    return str(folder / IMAGES[side].format("train")), str(folder / IMAGES[side].format(HELD_OUT[side]))


def run_job(
    side: int, options: Options, num_workers: int, num_perturbations: int, store: FaultyStore | None = None
) -> Rounds:
    """A job, from what MLflow was told and when."""
    train, val = patterns(side, options)
    num_images = 500 if side == 224 else 1000
    with TemporaryDirectory() as folder:
        words = [sys.executable, str(ROOT / "jobs/compute.py"), "--model", f"{ROOT}/benchmarks/free.py:at_{side}"]
        words += ["--train-shards", train, "--val-shards", val, "--num-train-images", str(num_images)]
        words += ["--max-evaluations", str(num_images + 12 * options.num_rounds), "--num-workers", str(num_workers)]
        words += ["--num-perturbations", str(num_perturbations), "--output", "out"]
        if store is not None:
            words += ["--storage", f"s3://bucket/runs?{store.query}"]
        env = os.environ | CREDENTIALS | {"MLFLOW_TRACKING_URI": ""}
        subprocess.run(words, cwd=folder, check=True, capture_output=True, env=env)
        client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
        experiment = client.get_experiment_by_name("uap_dist")
        assert experiment is not None
        ends, number = [], -1  # MLflow does not get each round of a long run
        for run in client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL):
            found = client.get_metric_history(run.info.run_id, "total/solves")
            ends += [metric.timestamp for metric in found]
            number += max((metric.step for metric in found), default=0)
        megabytes = None if store is None else store.bytes_put / 1e6
        return Rounds((max(ends) - min(ends)) / 1000, number, megabytes)


@contextmanager
def slow_store(delay_s: float) -> Iterator[FaultyStore]:
    """An S3 server that waits before each answer."""
    os.environ.update(CREDENTIALS)
    store = FaultyStore()
    try:
        fs.FileSystem.from_uri(f"s3://bucket/?{store.query}&allow_bucket_creation=true")[0].create_dir("bucket")
        store.reset()
        store.fault = lambda method, path: ("wait", delay_s)
        yield store
    finally:
        store.stop()


if __name__ == "__main__":
    main()
