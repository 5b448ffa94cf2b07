"""Choose the log-odds rule's constants on held-in images: compute from some training shards, measure on the others.

    python benchmarks/tune.py --network squeezenet --grid '[{"step_size": 8}, {"step_size": 5}]' --num-rounds 50

Nothing here looks at the held-out shards. Each line is one entry of the grid; `rate` is the mean over seeds on the held-in part,
which is another part for each seed (lines without `rotated` are older: one part for all).
"""

import json
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure entries of a grid on held-in images."""

    network: str
    """One of benchmarks/networks.py."""
    grid: str
    """JSON list of ComputeConfig fields, one object an entry."""
    num_rounds: int
    """Rounds of 25 images that the budget pays for; other round sizes get as many images."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Mean over these."""
    data: Path = Path("../shared")
    """Folder of the images and networks."""
    output: Path = Path("benchmarks/tune.jsonl")
    """Lines are added to it."""


def main() -> None:
    """One line of JSON for each entry."""
    options = tyro.cli(Options)
    network = NETWORKS[options.network]
    set_up_torch(1)  # and memory, as a worker's process
    workers = LocalWorkers(Worker(load_classifier(*network.locate(options.data)), cache_bytes=8 << 30, num_threads=1))
    urls = expand_patterns([str(options.data / network.train)])
    for entry in json.loads(options.grid):
        line = {"network": options.network, "rounds": options.num_rounds, "entry": entry, "rotated": True}
        line |= measure(workers, urls, entry, options)
        with options.output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def measure(workers: LocalWorkers, urls: list[str], entry: dict[str, Any], options: Options) -> dict[str, Any]:
    """Held-in fooling rate of each seed and their mean."""
    started, rates, trains = time.perf_counter(), [], []
    num_train_shards = NETWORKS[options.network].tune_shards
    for seed in options.seeds:
        rotated = [*urls[seed % len(urls) :], *urls[: seed % len(urls)]]
        train, held_in = (
            load_dataset(workers, part) for part in (rotated[:num_train_shards], rotated[num_train_shards:])
        )
        budget = train.num_examples + 50 * options.num_rounds
        config = ComputeConfig(seed=seed, max_evaluations=budget, **entry)
        (final,) = deque(compute(workers, train, held_in, config), maxlen=1)
        assert final.evaluation is not None
        rates.append(round(final.evaluation.val.rate, 4))
        trains.append(final.evaluation.train.rate)
    mean = sum(rates) / len(rates)
    return {
        "rate": round(mean, 4),
        "rates": rates,
        "num_held_in": held_in.num_examples,
        "train_rate": round(sum(trains) / len(trains), 4),
        "seconds": round(time.perf_counter() - started),
    }


if __name__ == "__main__":
    main()
