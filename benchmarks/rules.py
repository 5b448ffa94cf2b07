"""Fooling rate against network evaluations: ours, the paper's rule, SGD-UAP as published and tuned. See benchmarks/rules.md.

    python benchmarks/rules.py --only 'resnet20-linf-1000-*'     # a part, minutes; without --only all of it, about a day on one core
    python benchmarks/rules.py --table                           # what has been measured; --held-in: on the images that choose constants
    python benchmarks/rules.py --constants                       # of SGD-UAP: those that it was run with, on held-in images
    python benchmarks/rules.py --picture                         # benchmarks/rules.png

One process, one thread. Runs that are in the output already are not repeated, so it goes on where it was stopped.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from comparison.bench import Bench, stamp
from comparison.opponents import BATCH, CLAMP, EntropyWorkers, sgd_uap
from comparison.report import constants, draw, table
from comparison.rows import MAX_LABEL_SHARE, ROWS, SEEDS, Row, group, read
from torch import Tensor

from uap_dist.method.config import ComputeConfig
from uap_dist.rounds.loop import compute
from uap_dist.workers.dataset import Dataset
from uap_dist.workers.local import LocalWorkers


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure, or show what has been measured."""

    only: tuple[str, ...] = ("*",)
    """Patterns of the names of rows to measure or show."""
    seeds: tuple[int, ...] = SEEDS
    """Of the training images, their order and views."""
    table: bool = False
    """Print the table and measure nothing."""
    held_in: bool = False
    """The table is of held-in images."""
    picture: bool = False
    """Draw the picture beside the output and measure nothing."""
    data: Path = Path("../shared")
    """Folder of the images and networks."""
    output: Path = Path(__file__).with_name("rules.jsonl")
    """One line of JSON for each run is added here."""


@dataclass(frozen=True, kw_only=True)
class OptionsWithConstants(Options):
    """Measure, or show what has been measured."""

    constants: bool = False
    """Print how SGD-UAP did on held-in images with each set of constants that it was run with, and measure nothing."""


def main() -> None:
    """Measure what is missing, or show what there is."""
    options = tyro.cli(OptionsWithConstants)
    if options.constants:
        print("\n".join(constants(options.output)))
    else:
        run_or_show(options, ROWS, read=read, measure=measure, table=table, draw=draw)


def run_or_show(
    options: Options,
    rows: Sequence[Any],
    *,
    read: Callable[[Path], Any],
    measure: Callable[[list[Any], Any], None],
    table: Callable[[list[Any], Any, str], Iterator[str]],
    draw: Callable[[list[Any], Any, Path], None],
) -> None:
    """What the options ask for, with the functions of a comparison whose rows have a name and a network."""
    chosen = [row for row in rows if any(fnmatch(row.name, pattern) for pattern in options.only)]
    if not chosen:
        raise SystemExit(f"--only {' '.join(options.only)}: no such row. Rows have names such as {rows[0].name}.")
    if options.table:
        print("\n".join(table(chosen, read(options.output), "held_in" if options.held_in else "held_out")))
    if options.picture:
        draw(chosen, read(options.output), options.output.with_suffix(".png"))
    if options.table or options.picture:
        return
    for network in dict.fromkeys(row.network for row in chosen):
        measure([row for row in chosen if row.network == network], options)


def measure(rows: list[Row], options: Options) -> None:
    """All missing runs of one network: seed by seed within a norm and budget, so that what there is can be compared."""
    bench, done = Bench(rows[0].network, options.data), read(options.output)
    for some in group(rows):
        for seed, row in product(options.seeds, some):
            if (row, seed) in done:
                continue
            train, held_in = bench.split(seed)
            train = train.thin(min(train.num_examples, row.budget // MAX_LABEL_SHARE))
            started = time.perf_counter()
            v, num_evaluations = run(row, seed, train, bench)
            line = row_line(row, seed, num_evaluations, time.perf_counter() - started) | bench.rates(v, held_in)
            with options.output.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(row.name, seed, f"held-in {line['held_in']:.3f}", f"{line['seconds']} s", flush=True)


def run(row: Row, seed: int, train: Dataset, bench: Bench) -> tuple[Tensor, int]:
    """V as the rule delivers it, and the network evaluations that it took."""
    if row.rule == "published":
        pixels = [bench.worker.pixels(train.examples(s, range(n))) for s, n in enumerate(train.sizes)]
        x = torch.tensor(np.concatenate(pixels), device=bench.worker.device).float()
        labels = torch.tensor(train.clean.labels, device=bench.worker.device)
        spent = len(x)
        for v, cost in sgd_uap(
            bench.worker.classifier, x, labels, seed=seed, norm=row.norm, radius=row.config["radius"]
        ):
            spent += cost
            if spent + 2 * BATCH > row.budget:
                return v.cpu(), spent
    config = dict(row.config)
    clamp = config.pop("clamp", CLAMP)
    workers = EntropyWorkers(bench.worker, clamp) if row.rule in ("entropy", "tuned") else LocalWorkers(bench.worker)
    glance = train.thin(1)  # held-in and held-out rates are measured by the caller
    (final,) = deque(compute(workers, train, glance, ComputeConfig(seed=seed, **config)), maxlen=1)
    return final.perturbation, final.num_evaluations


def row_line(row: Row, seed: int, num_evaluations: int, seconds: float) -> dict[str, Any]:
    """What is kept of a run beside its rates."""
    return (
        vars(row)
        | {
            "seed": seed,
            "config": row.config,
            "evaluations": num_evaluations,
            "seconds": round(seconds, 1),
        }
        | stamp()
    )


if __name__ == "__main__":
    main()
