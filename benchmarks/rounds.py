"""The law of the round: fooling rate against network evaluations and against rounds. See benchmarks/rounds.md.

    python benchmarks/rounds.py --only 'resnet20-16000-*'    # a part; without --only all of it
    python benchmarks/rounds.py --table                      # what has been measured; --held-in: on the images that choose constants
    python benchmarks/rounds.py --picture                    # benchmarks/rounds.png

One process, one thread: what a fleet computes does not depend on its size, so blocks are solved one after another. Runs that are in the
output already are not repeated.
"""

import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import rules
import tyro
from comparison.bench import Bench, stamp
from comparison.intervals import interval, spread

from uap_dist.method.config import ComputeConfig
from uap_dist.rounds.loop import compute
from uap_dist.workers.local import LocalWorkers

BASE = 6  # images of a round that others are compared with


@dataclass(frozen=True)
class Row:
    """A network, a budget and the shape of a round.

    Attributes:
        network: one of networks.py.
        budget: network evaluations.
        blocks: of a round.
        steps: that each block takes on its own copy; 0: the round sums its blocks and takes one.
        images: of a block's step.
    """

    network: str
    budget: int
    blocks: int
    steps: int
    images: int

    @property
    def name(self) -> str:
        """As --only selects it."""
        return f"{self.network}-{self.budget}-{self.shape}"

    @property
    def shape(self) -> str:
        """Such as sum-4x6, or local-4x4x6."""
        return f"local-{self.blocks}x{self.steps}x{self.images}" if self.steps else f"sum-{self.blocks}x{self.images}"

    @property
    def num_shards(self) -> int | None:
        """Of images to compute from: of CIFAR-10 all but one for the largest rounds, since a round is never larger than a pass."""
        return 4 if self.budget == 32_000 else None

    @property
    def base(self) -> "Row":
        """Rounds of the default size, which it is compared with; a fleet may take 1.3 times the evaluations."""
        return Row(self.network, 10_000 if self.budget == 13_000 else self.budget, 1, 0, BASE)

    def config(self, seed: int) -> ComputeConfig:
        """Of a run."""
        block = max(1, self.steps) * self.images
        return ComputeConfig(
            max_evaluations=self.budget,
            round_size=self.blocks * block,
            block_size=block,
            local_steps=self.steps or None,
            seed=seed,
        )


# whole blocks of shards of 100 and of 1,000 images; of 400 photographs 67 blocks of two leave no short round at the end of a pass
SUMS = ((1, 3), (1, 6), (1, 12), (1, 25), (2, 25), (4, 25), (8, 25), (16, 25), (32, 25), (40, 25), (64, 25), (128, 25))
LOCAL = ((8, 1, 2), (8, 4, 3), (64, 1, 2), (67, 1, 2), (67, 1, 1), (64, 4, 3))


def _rows() -> list[Row]:
    rows = []
    for network, budget in (
        ("squeezenet", 3_000),
        ("resnet20", 16_000),
        ("resnet20", 32_000),
        ("squeezenet", 10_000),
        ("squeezenet", 13_000),
    ):
        rows += [Row(network, budget, blocks, 0, images) for blocks, images in SUMS]
        rows += [Row(network, budget, *shape) for shape in LOCAL]
    return rows


ROWS = _rows()
Runs = dict[tuple[str, int], dict[str, Any]]  # by name of the row and seed


@dataclass(frozen=True, kw_only=True)
class Options(rules.Options):
    """Measure, or show what has been measured."""

    output: Path = Path(__file__).with_name("rounds.jsonl")


def main() -> None:
    """Measure what is missing, or show what there is."""
    rules.run_or_show(tyro.cli(Options), ROWS, read=read, measure=measure, table=table, draw=draw)


def measure(rows: list[Row], options: Options) -> None:
    """All missing runs of one network, seed by seed."""
    bench, done = Bench(rows[0].network, options.data), read(options.output)
    for seed, row in product(options.seeds, rows):
        if (row.name, seed) in done:
            continue
        train, held_in = bench.split(seed, row.num_shards)
        started = time.perf_counter()
        (final,) = deque(compute(LocalWorkers(bench.worker), train, train.thin(1), row.config(seed)), maxlen=1)
        line = {
            "name": row.name,
            "seed": seed,
            "rounds": final.round_number + 1,
            "evaluations": final.num_evaluations,
            "seconds": round(time.perf_counter() - started, 1),
        } | stamp()
        line |= bench.rates(final.perturbation, held_in)
        with options.output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(
            row.name, seed, f"{line['rounds']} rounds, held-in {line['held_in']:.3f}, {line['seconds']} s", flush=True
        )


def read(path: Path) -> Runs:
    """Runs by name and seed."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {(line["name"], line["seed"]): line for line in lines}


def table(rows: list[Row], runs: Runs, images: str) -> Iterator[str]:
    """Markdown: a line for each row that has runs, beside rounds of the default size without local steps."""
    rate = f"{images.replace('_', '-')} fooling rate, mean ± sd"
    yield f"| network, evaluations | round | rounds | {rate} | to rounds of {BASE}, paired | seeds |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in rows:
        found = runs_of(row, runs)
        if not found:
            continue
        base = runs_of(row.base, runs)
        differences = [run[images] - base[seed][images] for seed, run in found.items() if seed in base]
        yield (
            f"| {row.network}, {row.budget:,} | {row.shape} | {mean(run['rounds'] for run in found.values()):.0f} "
            f"| {spread([run[images] for run in found.values()])} "
            f"| {'' if row == row.base else interval(differences)} | {len(found)} |"
        )


def runs_of(row: Row, runs: Runs) -> dict[int, dict[str, Any]]:
    """By seed."""
    return {seed: run for (name, seed), run in runs.items() if name == row.name}


def draw(rows: list[Row], runs: Runs, path: Path) -> None:
    """Held-out fooling rate against rounds: a panel for each network and budget."""
    rows = [row for row in rows if runs_of(row, runs)]
    panels = list(dict.fromkeys(row.base for row in rows))
    figure, axes = plt.subplots(
        -(-len(panels) // 2), 2, figsize=(11, 8), layout="constrained", squeeze=False, sharex=True, sharey=True
    )
    kinds = {
        "summed, one step a round": lambda row: not row.steps,
        "averaged": lambda row: row.steps and row.budget == row.base.budget,
        "averaged, 1.3 × the evaluations": lambda row: row.budget > row.base.budget,
    }
    for axis, base in zip(axes.flat, panels, strict=False):
        for color, (title, belongs) in enumerate(kinds.items()):
            found = [list(runs_of(row, runs).values()) for row in rows if row.base == base and belongs(row)]
            points = sorted(
                (mean(run["rounds"] for run in some), mean(run["held_out"] for run in some)) for some in found
            )
            if points:
                axis.plot(*zip(*points, strict=True), f"C{color}o{'' if color else '-'}", label=title)
        axis.set(
            title=f"{base.network}, {base.budget:,} evaluations",
            xscale="log",
            xlabel="rounds",
            ylabel="held-out fooling rate",
        )
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
