"""Choose the log-odds rule's constants on held-in images: compute from some training shards, measure on the others.

    python benchmarks/tune.py --network squeezenet --grid '[{"step_size": 8}, {"step_size": 5}]' --num-rounds 50

Nothing here looks at the held-out shards. Each line is one entry of the grid; `rate` is the mean over seeds on the held-in part.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from networks import NETWORKS, Network

from uap_dist.classifiers import load_classifier
from uap_dist.compute import ComputeConfig, compute
from uap_dist.dataset import Dataset, LocalWorkers, load_dataset
from uap_dist.shards import expand_patterns
from uap_dist.worker import Worker


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
    workers = LocalWorkers(Worker(load_classifier(*network.locate(options.data)), cache_bytes=8 << 30, num_threads=1))
    train, held_in = _split(workers, network, options.data)
    for entry in json.loads(options.grid):
        line = {"network": options.network, "rounds": options.num_rounds, "entry": entry}
        line |= measure(workers, train, held_in, entry, options)
        with options.output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def measure(
    workers: LocalWorkers, train: Dataset, held_in: Dataset, entry: dict[str, Any], options: Options
) -> dict[str, Any]:
    """Held-in fooling rate of each seed and their mean."""
    started, rates, trains = time.perf_counter(), [], []
    for seed in options.seeds:
        budget = train.num_examples + 50 * options.num_rounds
        config = ComputeConfig(seed=seed, max_evaluations=budget, evaluate_every=10**6, **entry)
        *_, final = compute(workers, train, held_in, config)
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


def _split(workers: LocalWorkers, network: Network, data: Path) -> tuple[Dataset, Dataset]:
    urls = expand_patterns([str(data / network.train)])
    return load_dataset(workers, urls[: network.tune_shards]), load_dataset(workers, urls[network.tune_shards :])


if __name__ == "__main__":
    main()
