"""Ten perturbations on the same images: each in calls of its own, and several in one call. See benchmarks/overhead.md.

    python benchmarks/sweeps.py      # a minute or two on two idle cores

Networks that cost nothing, so that everything else is seen: what a GPU's sweep would wait for.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from free_network import ROOT, patterns

from uap_dist.data.patterns import expand_patterns
from uap_dist.fleet.config import FleetConfig
from uap_dist.fleet.fleet import Fleet
from uap_dist.fleet.ray_cluster import connect
from uap_dist.versions import git_commit, machine
from uap_dist.workers.dataset import classify, classify_each, load_dataset


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure."""

    sides: tuple[int, ...] = (224, 32)
    """Of the images, pixels: 224 or 32."""
    num_workers: tuple[int, ...] = (1, 2)
    """Sizes of the fleet."""
    num_perturbations: int = 10
    """On the same images."""
    num_images: int = 500
    """Of each side."""
    repeats: int = 3
    """Of which the quickest counts."""
    data: Path = Path("../shared/data")
    """Folder of the images."""


def main() -> None:
    """A row for each side and fleet."""
    options = tyro.cli(Options)
    connect()
    print(
        f"{machine()}; commit {git_commit()}; {options.num_perturbations} perturbations, {options.num_images} images\n"
    )
    print("| side | workers | calls of one perturbation, images/s | of several, images/s | calls |")
    print("| --- | --- | --- | --- | --- |")
    for side in options.sides:
        for num_workers in options.num_workers:
            print(measure(side, num_workers, options), flush=True)


def measure(side: int, num_workers: int, options: Options) -> str:
    """One row of the table."""
    fleet = Fleet(f"{ROOT}/benchmarks/free.py:at_{side}", None, FleetConfig(num_workers=num_workers))
    fleet.wait()
    urls = expand_patterns([patterns(side, options)[0]])
    images = load_dataset(fleet, urls, num_images=options.num_images)
    rng = np.random.default_rng(0)
    many = [10 * rng.normal(size=images.shape).astype(np.float32) for _ in range(options.num_perturbations)]
    calls: list[int] = []
    fleet_map: Callable[..., Any] = fleet.map

    def count(method: Any, tasks: Any, *shared: Any) -> Any:
        calls.append(len(tasks))
        return fleet_map(method, tasks, *shared)

    fleet.map = count  # type: ignore[method-assign]

    def best(work: Callable[[], object]) -> tuple[float, int]:
        seconds = []
        for _ in range(options.repeats):
            calls.clear()
            started = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - started)
        return images.num_examples * len(many) / min(seconds), sum(calls)

    alone, num_alone = best(lambda: [classify(fleet, images, v) for v in many])
    together, num_together = best(lambda: list(classify_each(fleet, images, many)))
    fleet.close()
    return f"| {side} | {num_workers} | {alone:,.0f} | {together:,.0f} | {num_alone} and {num_together} |"


if __name__ == "__main__":
    main()
