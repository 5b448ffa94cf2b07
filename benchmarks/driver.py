"""What a round costs the driver, with 1 to 1,024 logical workers that only sleep: benchmarks/overhead.md.

    python benchmarks/driver.py

A few actors with many threads stand for the workers (so many processes do not fit on one machine): this measures dispatch,
the way of v and of the sums, and the reduce; not the start of processes, nor a network between machines.
"""

import resource
import time
from dataclasses import dataclass
from itertools import cycle
from math import ceil
from statistics import median
from typing import Any
from unittest.mock import patch

from uap_dist.fleet import ray_cluster as ray_cluster  # first: it sets variables that Ray reads when it is imported

# isort: split
import numpy as np
import ray
import torch
import tyro

from uap_dist.data.cache import Traffic
from uap_dist.fleet import membership
from uap_dist.fleet.actor import Answer, Introduction, RemoteWorker
from uap_dist.fleet.config import FleetConfig
from uap_dist.fleet.fleet import Fleet
from uap_dist.fleet.ray_cluster import Need, connect
from uap_dist.method.config import ComputeConfig
from uap_dist.method.schedule import Block, Round
from uap_dist.method.solver import BlockResult
from uap_dist.method.state import State
from uap_dist.method.update import Iterate
from uap_dist.models.classifier import Predictions
from uap_dist.rounds.plan import RoundTasks, plan_run
from uap_dist.rounds.round import run_round
from uap_dist.workers.dataset import Dataset
from uap_dist.workers.listing import Shard
from uap_dist.workers.messages import Examples

NUM_ACTORS = 4


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure the driver."""

    num_workers: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)
    """Logical workers."""
    num_blocks: int | None = None
    """In a round. Default: one a worker."""
    side: int = 224
    """Of the perturbation, pixels."""
    sleep_s: float = 0.05
    """A block."""
    num_rounds: int = 5
    """The median is printed."""


class Sleeper:
    """Stands for many workers."""

    def __init__(self, sleep_s: float, side: int) -> None:
        self._sleep_s = sleep_s
        self._total = np.ones((1, 3, side, side), np.float32)

    def start(self, *_: Any, **__: Any) -> Introduction:
        """As actor.UapWorker."""
        return Introduction("sleeper", "", "")

    def call(self, method: Any, task: Examples, upcoming: str, *shared: Any) -> Answer:
        """As actor.UapWorker, after a while."""
        time.sleep(self._sleep_s)
        result = BlockResult(self._total, np.ones((1, len(ComputeConfig().solver.names), 2)))
        return Answer(result, Traffic(), self._sleep_s, warnings=(), solves=len(task.keys))


def start_fleet(num_workers: int, options: Options) -> Fleet:
    """A fleet whose workers are threads of a few actors, which need no room."""
    actor = ray.remote(num_cpus=0, max_concurrency=max(1, ceil(num_workers / NUM_ACTORS)))(Sleeper)
    sleepers = cycle(actor.remote(options.sleep_s, options.side) for _ in range(NUM_ACTORS))

    def start_actor(name: str, *_: Any, **__: Any) -> RemoteWorker:
        return RemoteWorker(next(sleepers), name)

    with patch.object(membership, "start_actor", start_actor), patch.object(Need, "room", lambda need: num_workers):
        fleet = Fleet("sleeper", None, FleetConfig(num_workers=num_workers))
    fleet.wait()
    return fleet


def main() -> None:
    """One line for each number of workers."""
    options = tyro.cli(Options)
    connect()
    print("| workers | blocks | round, ms | of it sleep, ms | driver, ms | driver, ms a block | driver's memory, MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for num_workers in options.num_workers:
        fleet = start_fleet(num_workers, options)
        num_blocks = options.num_blocks or num_workers
        keys = tuple(map(str, range(num_blocks)))
        labels = Predictions(np.zeros(num_blocks, np.int64), np.zeros(num_blocks, np.float32))
        shard = Shard("shard", "digest", keys, labels.labels, tuple(key.encode() for key in keys))
        data = Dataset((shard,), (3, options.side, options.side), (), labels)
        round_ = Round(
            number=0, pass_number=0, blocks=tuple(Block(0, (i,)) for i in range(num_blocks)), ends_pass=False
        )
        tasks = RoundTasks.of(round_, data, seed=0)
        plan = plan_run(data.sizes, ComputeConfig(round_size=num_blocks, block_size=1))
        seconds = []
        for _ in range(options.num_rounds + 1):  # the first one warms up
            started = time.perf_counter()
            run_round(fleet, tasks, State(Iterate.zero(data.shape)), plan)
            seconds.append(time.perf_counter() - started)
        fleet.close()
        whole, asleep = 1e3 * median(seconds[1:]), 1e3 * options.sleep_s * ceil(num_blocks / num_workers)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"| {num_workers:,} | {num_blocks:,} | {whole:.0f} | {asleep:.0f} | {whole - asleep:.0f} "
            f"| {(whole - asleep) / num_blocks:.2f} | {memory:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
