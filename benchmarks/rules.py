"""Fooling rate against network evaluations: ours, the paper's rule, SGD-UAP as published and tuned. See benchmarks/rules.md.

    python benchmarks/rules.py --only 'resnet20-linf-1000-*'     # a part, minutes; without --only all of it, about a day on one core
    python benchmarks/rules.py --table                           # what has been measured; --held-in: on the images that choose constants
    python benchmarks/rules.py --constants                       # of SGD-UAP: those that it was run with, on held-in images
    python benchmarks/rules.py --picture                         # benchmarks/rules.png

One process, one thread. Runs that are in the output already are not repeated, so it goes on where it was stopped.
"""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import cached_property
from itertools import groupby, product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from networks import NETWORKS
from opponents import BATCH, CLAMP, EntropyWorkers, sgd_uap
from scipy.stats import t as student
from torch import Tensor

from uap_dist.computing.rounds import compute
from uap_dist.data.patterns import expand_patterns
from uap_dist.method.config import ComputeConfig
from uap_dist.method.norms import Norm
from uap_dist.models.loading import load_classifier
from uap_dist.versions import git_commit, machine
from uap_dist.workers.dataset import Dataset, classify, fooling_rate, load_dataset
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.reproducible import set_up_torch
from uap_dist.workers.worker import Worker

RULES = ("ours", "entropy", "tuned", "published", "paper")
TITLES = {
    "ours": "ours",
    "entropy": "ours, cross-entropy",
    "tuned": "SGD-UAP, tuned",
    "published": "SGD-UAP, as published",
    "paper": "the paper's rule",
}
RADII: dict[str, dict[Norm, float]] = {  # of 224×224 and of 32×32 images: alike for each pixel
    "imagenet": {"linf": 10.0, "l2": 2000.0},
    "cifar": {"linf": 10.0, "l2": 285.7},
}
BUDGETS = (1_000, 2_000, 4_000, 8_000, 16_000, 32_000)
SEEDS = (0, 1, 2, 3, 4)
MAX_LABEL_SHARE = 4  # at most a quarter of the budget pays for clean labels, so small budgets get fewer images
MAX_HELD_IN = 1_000
NO_CLAMP = 1_000.0  # a cross-entropy that no logits of ours reach


@dataclass(frozen=True)
class Row:
    """A rule on a network, at a norm and a budget."""

    network: str
    norm: Norm
    budget: int
    rule: str

    @property
    def name(self) -> str:
        """As --only selects it."""
        return f"{self.network}-{self.norm}-{self.budget}-{self.rule}"

    @property
    def collection(self) -> str:
        """Of images."""
        return "cifar" if self.network.startswith("resnet") else "imagenet"

    @property
    def config(self) -> dict[str, Any]:
        """Fields of ComputeConfig but the seed, and the clamp if it is not CLAMP; of SGD-UAP as published norm, radius and budget."""
        config = {"norm": self.norm, "radius": RADII[self.collection][self.norm], "max_evaluations": self.budget}
        if self.rule == "paper":
            config |= {"rule": "paper", "round_size": 1, "block_size": 1}  # algorithm 1
        if self.rule == "tuned":
            config |= tuned_config(self.network, self.norm, self.budget)
        return config


def tuned_config(network: str, norm: Norm, budget: int) -> dict[str, Any]:
    """What was searched for SGD-UAP on held-in images, benchmarks/rules_tried.md ("The opponent"); no repetition, which is ours."""
    size = 24
    config: dict[str, Any] = {"period": 224, "augment": "none" if network.startswith("resnet") else "flip-shift"}
    match network, norm:
        case "resnet20" | "resnet56", "linf" if budget > 4_000:
            size, config["step_size"] = 6, 1.7
        case "resnet20", "l2" if budget <= 16_000:
            size, config["clamp"] = 6, NO_CLAMP
        case "resnet56", "l2":
            size = 6
        case "squeezenet", "linf":
            config["clamp"] = NO_CLAMP
        case "squeezenet", "l2" if budget <= 8_000:
            config |= {"clamp": NO_CLAMP, "step_size": 12.37 if budget <= 4_000 else 11.0}  # twice our default
    return config | {"round_size": size, "block_size": size}


ROWS = [
    Row(network, norm, budget, rule)
    for network, norm, budget, rule in product(
        ("resnet20", "resnet56", "squeezenet", "lite0"), ("linf", "l2"), BUDGETS, RULES
    )
]


Runs = dict[tuple[Row, int], dict[str, Any]]  # by row and seed


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


class Bench:
    """A network with its images, loaded when they are needed."""

    def __init__(self, network: str, data: Path) -> None:
        self.network, self.data = NETWORKS[network], data

    @cached_property
    def worker(self) -> Worker:
        """Ours."""
        set_up_torch(1)  # and memory, as a worker's process
        return Worker(load_classifier(*self.network.locate(self.data)), cache_bytes=8 << 30, num_threads=1)

    @cached_property
    def shards(self) -> list[Dataset]:
        """Of training images."""
        urls = expand_patterns([str(self.data / self.network.train)])
        return [load_dataset(LocalWorkers(self.worker), [url]) for url in urls]

    @cached_property
    def held_out(self) -> Dataset:
        """As the main job's."""
        urls = expand_patterns([str(self.data / self.network.val)])
        return load_dataset(LocalWorkers(self.worker), urls, num_images=self.network.num_val_images)

    def split(self, seed: int, num_shards: int | None = None) -> tuple[Dataset, Dataset]:
        """Images to compute from, of so many shards (default: `tune_shards`), and held-in ones: others for each seed."""
        shift = seed % len(self.shards)
        shards = self.shards[shift:] + self.shards[:shift]
        num_shards = num_shards or self.network.tune_shards
        train, held_in = join(shards[:num_shards]), join(shards[num_shards:])
        return train, held_in.thin(min(MAX_HELD_IN, held_in.num_examples))

    def rates(self, v: Tensor, held_in: Dataset) -> dict[str, float]:
        """Fooling rates on held-in and held-out images, and on how many."""
        workers, rates = LocalWorkers(self.worker), {}
        for name, images in (("held_in", held_in), ("held_out", self.held_out)):
            found = fooling_rate(images, classify(workers, images, v.numpy()))
            rates |= {name: found.rate, f"num_{name}": found.num_examples}
        return rates


def join(parts: list[Dataset]) -> Dataset:
    """One data set of several."""
    clean = replace(
        parts[0].clean,
        labels=np.concatenate([part.clean.labels for part in parts]),
        confidences=np.concatenate([part.clean.confidences for part in parts]),
    )
    return replace(parts[0], shards=tuple(shard for part in parts for shard in part.shards), clean=clean)


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


def stamp() -> dict[str, str]:
    """Where and when a line was measured."""
    return {
        "commit": git_commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{machine()}, {os.cpu_count()} cores",
    }


def read(path: Path) -> Runs:
    """Runs by row and seed; those with another config than the row has now are left out."""
    return {(row, line["seed"]): line for row, line in read_all(path) if row.config == line["config"]}


def read_all(path: Path) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Every run with its row, of whatever config."""
    for line in path.read_text().splitlines() if path.exists() else ():
        found = json.loads(line)
        yield Row(*(found[name] for name in ("network", "norm", "budget", "rule"))), found


def group(rows: list[Row]) -> Iterator[list[Row]]:
    """Rows of one network, norm and budget together."""
    for _, some in groupby(rows, key=lambda row: (row.network, row.norm, row.budget)):
        yield list(some)


def table(rows: list[Row], runs: Runs, images: str) -> Iterator[str]:
    """Markdown: where ours is ahead, then a line for each row that has runs."""
    yield from leads(rows, runs, images)
    yield ""
    rate = f"{images.replace('_', '-')} fooling rate, mean ± sd"
    yield f"| network, norm, evaluations | rule | {rate} | to SGD-UAP tuned, paired | seconds | seeds |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for some in group(rows):
        for row in some:
            rates = rates_of(row, runs, images)
            if not rates:
                continue
            tuned = rates_of(replace(row, rule="tuned"), runs, images)
            differences = [rate - tuned[seed] for seed, rate in rates.items() if seed in tuned]
            seconds = mean(runs[row, seed]["seconds"] for seed in rates)
            yield (
                f"| {row.network}, {row.norm}, {row.budget:,} | {TITLES[row.rule]} | {spread(list(rates.values()))} "
                f"| {'' if row.rule == 'tuned' else interval(differences)} | {seconds:.0f} | {len(rates)} |"
            )


def leads(rows: list[Row], runs: Runs, images: str) -> Iterator[str]:
    """Markdown: rates of ours with their paired difference to SGD-UAP tuned, bold where that is more than its interval."""
    budgets = sorted({row.budget for row in rows})
    yield f"| ours (to SGD-UAP tuned) | {' | '.join(f'{budget:,}' for budget in budgets)} |"
    yield "| --- " * (1 + len(budgets)) + "|"
    for network, norm in dict.fromkeys((row.network, row.norm) for row in rows):
        cells = []
        for budget in budgets:
            ours, tuned = (rates_of(Row(network, norm, budget, rule), runs, images) for rule in ("ours", "tuned"))
            differences = [rate - tuned[seed] for seed, rate in ours.items() if seed in tuned]
            lead = interval(differences)
            if len(differences) > 1 and abs(mean(differences)) > half_interval(differences):
                lead = f"**{lead}**"
            cells.append(f"{mean(ours.values()):.3f} ({lead})" if ours else "")
        if any(cells):
            yield f"| {network}, {norm} | {' | '.join(cells)} |"


def constants(path: Path) -> Iterator[str]:
    """Markdown: held-in rates of SGD-UAP where it was run with several sets of constants; its row has those in bold."""
    found: dict[Row, dict[tuple[Any, ...], list[float]]] = {}
    for row, line in read_all(path):
        if row.rule == "tuned":
            found.setdefault(row, {}).setdefault(constants_of(line["config"]), []).append(line["held_in"])
    yield "| network, norm, evaluations | images of a round | clamp | first step, pixels | held-in fooling rate, mean | seeds |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in (row for row in ROWS if len(found.get(row, ())) > 1):
        for (size, clamp, step_size), rates in found[row].items():
            rate = f"{mean(rates):.3f}"
            rate = f"**{rate}**" if constants_of(row.config) == (size, clamp, step_size) else rate
            limit = "none" if clamp == NO_CLAMP else f"{clamp:g}"
            name = f"{row.network}, {row.norm}, {row.budget:,}"
            yield f"| {name} | {size} | {limit} | {step_size or 'ours'} | {rate} | {len(rates)} |"


def constants_of(config: dict[str, Any]) -> tuple[Any, ...]:
    """Images of a round, clamp, first step in pixels (None: our default)."""
    return config["round_size"], config.get("clamp", CLAMP), config.get("step_size")


def rates_of(row: Row, runs: Runs, images: str) -> dict[int, float]:
    """Fooling rate by seed."""
    return {seed: runs[row, seed][images] for seed in SEEDS if (row, seed) in runs}


def spread(rates: list[float]) -> str:
    """Mean and standard deviation."""
    return f"**{mean(rates):.3f}**" + (f" ± {stdev(rates):.3f}" if len(rates) > 1 else "")


def interval(differences: list[float]) -> str:
    """Mean and 95 % interval of Student's t."""
    if len(differences) < 2:
        return "–"
    return f"{mean(differences):+.3f} ± {half_interval(differences):.3f}"


def half_interval(differences: list[float]) -> float:
    """Of the 95 % interval of Student's t, half its width."""
    return float(student.ppf(0.975, len(differences) - 1)) * stdev(differences) / len(differences) ** 0.5


def draw(rows: list[Row], runs: Runs, path: Path) -> None:
    """Held-out fooling rate against evaluations: a panel for each network and norm that has runs, the spread of seeds as a band."""
    rows = [row for row in rows if len(rates_of(row, runs, "held_out")) > 1]
    panels = list(dict.fromkeys((row.network, row.norm) for row in rows))
    columns = min(len(panels), 4)
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4 * columns, 3.6 * lines), layout="constrained", squeeze=False, sharey=True
    )
    for axis, (network, norm) in zip(axes.flat, panels, strict=False):
        for rule, title in TITLES.items():
            some = [row for row in rows if (row.network, row.norm, row.rule) == (network, norm, rule)]
            found = {row.budget: list(rates_of(row, runs, "held_out").values()) for row in some}
            if not found:
                continue
            means, sds = ([f(rates) for rates in found.values()] for f in (mean, stdev))
            color = f"C{RULES.index(rule)}"
            axis.plot(list(found), means, color=color, marker="o", ms=4, label=title)
            low, high = ([m + sign * sd for m, sd in zip(means, sds, strict=True)] for sign in (-1, 1))
            axis.fill_between(list(found), low, high, color=color, alpha=0.2, lw=0)
        limits = (0.8 * BUDGETS[0], 1.2 * BUDGETS[-1])
        axis.set(title=f"{network}, {norm}", xscale="log", xlabel="network evaluations", xlim=limits, ylim=(0, 1))
        axis.set_xticks(BUDGETS, [f"{budget // 1000}k" for budget in BUDGETS], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    axes[0, 0].set_ylabel("held-out fooling rate")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
