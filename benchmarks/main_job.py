"""Held-out fooling rates of the defaults and of the paper's rule, mean over seeds: benchmarks/main_job.md.

    python benchmarks/main_job.py --only squeezenet-linf-3000     # one row; without --only all of them, about an hour on two cores
    python benchmarks/main_job.py --table                         # the table of what has been measured

Runs that are in the output already are not repeated, so it goes on where it was stopped.
"""

import json
import os
import platform
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import tyro
from networks import NETWORKS

from uap_dist.data.patterns import expand_patterns
from uap_dist.evaluation.evaluate import measure_noise
from uap_dist.fleet.config import FleetConfig
from uap_dist.fleet.fleet import Fleet
from uap_dist.fleet.ray_cluster import connect
from uap_dist.method.config import ComputeConfig
from uap_dist.method.norms import SYMBOLS, random_of_same_norms
from uap_dist.method.norms import measure as measure_norm
from uap_dist.method.rates import FOOLING
from uap_dist.rounds.loop import compute
from uap_dist.versions import git_commit
from uap_dist.workers.dataset import load_dataset


@dataclass(frozen=True)
class Row:
    """A line of the table: a network, a config and the seeds that it is averaged over."""

    network: str
    config: dict[str, Any]
    seeds: tuple[int, ...]
    goal: float | None = None


PAPER = {"rule": "paper", "round_size": 24, "block_size": 6}  # increments of 24 images against one v, one projection
ALGORITHM_1 = {"rule": "paper", "round_size": 1, "block_size": 1}  # the paper's own: a projection after each image


def _rows() -> dict[str, Row]:
    five = (0, 1, 2, 3, 4)
    rows = {}
    for network, norm, budget, goal in (
        ("squeezenet", "linf", 3_000, 0.90),
        ("lite0", "linf", 4_000, 0.86),
        ("resnet20", "linf", 8_000, 0.87),
        ("squeezenet", "l2", 3_000, 0.80),
        ("lite0", "l2", 4_000, 0.78),
        ("squeezenet", "linf", 10_000, 0.94),
        ("lite0", "linf", 12_000, 0.90),
        ("resnet20", "linf", 32_000, 0.885),
    ):
        rows[f"{network}-{norm}-{budget}"] = Row(network, {"norm": norm, "max_evaluations": budget}, five, goal)
    for network, budget in (("squeezenet", 3_000), ("lite0", 4_000), ("resnet20", 8_000)):
        for name, config in (("paper", PAPER), ("algorithm1", ALGORITHM_1)):
            rows[f"{network}-{name}-{budget}"] = Row(network, config | {"max_evaluations": budget}, five)
    return rows


ROWS = _rows()


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure rows, or print the table."""

    only: tuple[str, ...] = tuple(ROWS)
    """Rows to measure."""
    seeds: tuple[int, ...] = ()
    """Seeds to measure now. Default: all of the row."""
    table: bool = False
    """Print the table of what has been measured, and measure nothing."""
    num_workers: int = 2
    """Workers; the rates do not depend on it."""
    data: Path = Path("../shared")
    """Folder of the images and networks."""
    output: Path = Path(__file__).with_name("main_job.jsonl")
    """One line of JSON for each run is added here."""


def main() -> None:
    """Measure what is missing, then print the table."""
    options = tyro.cli(Options)
    if unknown := [name for name in options.only if name not in ROWS]:
        raise SystemExit(f"--only {' '.join(unknown)}: no such row. There are {', '.join(ROWS)}.")
    if not options.table:
        connect()
        for network in dict.fromkeys(ROWS[name].network for name in options.only):
            measure(network, [name for name in options.only if ROWS[name].network == network], options)
    print("\n".join(table(options.output)))


def measure(network_name: str, names: list[str], options: Options) -> None:
    """All missing runs of one network on one fleet."""
    network, done = NETWORKS[network_name], {(line["row"], line["seed"]) for line in _lines(options.output)}
    missing = [
        (name, seed)
        for name in names
        for seed in ROWS[name].seeds
        if (name, seed) not in done and seed in (options.seeds or ROWS[name].seeds)
    ]
    if not missing:
        return
    fleet = Fleet(*network.locate(options.data), FleetConfig(num_workers=options.num_workers))
    fleet.wait()
    train = load_dataset(
        fleet, expand_patterns([str(options.data / network.train)]), num_images=network.num_train_images
    )
    val = load_dataset(fleet, expand_patterns([str(options.data / network.val)]), num_images=network.num_val_images)
    for name, seed in missing:
        config, started = ComputeConfig(seed=seed, **ROWS[name].config), time.perf_counter()
        (final,) = deque(compute(fleet, train, val, config), maxlen=1)
        assert final.evaluation is not None
        noise = measure_noise(fleet, val, random_of_same_norms(final.perturbation, seed=seed))
        line = {
            "row": name,
            "seed": seed,
            "config": ROWS[name].config,
            "rate": final.evaluation.val.rate,
            "random_rate": noise[config.norm][FOOLING].rate,
            "random_rate_by_norm": {norm: rates[FOOLING].rate for norm, rates in noise.items()},
            "norm_l2": measure_norm(final.perturbation, "l2"),
            "norm_linf": measure_norm(final.perturbation, "linf"),
            "num_val_images": val.num_examples,
            "train_rate": final.evaluation.train.rate,
            "num_evaluations": final.num_evaluations,
            "num_rounds": final.round_number + 1,
            "seconds": round(time.perf_counter() - started, 1),
            "sha256": sha256(final.perturbation.numpy().tobytes()).hexdigest(),
            "commit": git_commit(),
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        }
        with options.output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
    fleet.close()


def table(path: Path) -> Iterator[str]:
    """Markdown: a line for each row that has runs."""
    yield "| row | held-out fooling rate of each seed | mean ± sd | goal | random | training | evaluations | images |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, row in ROWS.items():
        lines = sorted((line for line in _lines(path) if line["row"] == name), key=lambda line: line["seed"])
        if not lines:
            continue
        rates = [line["rate"] for line in lines]
        spread = f" ± {stdev(rates):.3f}" if len(rates) > 1 else ""
        yield (
            f"| {name} | {' '.join(f'{rate:.3f}' for rate in rates)} "
            f"| **{mean(rates):.3f}**{spread} | {row.goal or '–'} | {random_rates(lines)} "
            f"| {mean(line['train_rate'] for line in lines):.3f} | {max(line['num_evaluations'] for line in lines):,} "
            f"| {lines[0]['num_val_images']} |"
        )


def random_rates(lines: list[dict[str, Any]]) -> str:
    """Mean fooling rate of noise as large as the perturbations; of either norm where these are in no corner of the ball."""
    by_norm = [line["random_rate_by_norm"] for line in lines if "random_rate_by_norm" in line]
    if any(rates["linf"] != rates["l2"] for rates in by_norm):
        return ", ".join(f"{SYMBOLS[norm]} {mean(rates[norm] for rates in by_norm):.3f}" for norm in ("linf", "l2"))
    return f"{mean(line['random_rate'] for line in lines):.3f}"


def _lines(path: Path) -> list[dict[str, Any]]:
    """Runs of the rows as they are now; those of a row whose config has changed since are left out."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["row"] in ROWS and line["config"] == ROWS[line["row"]].config]


if __name__ == "__main__":
    main()
