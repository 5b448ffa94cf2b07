"""One perturbation for two networks against one for each, on these and on others of their kind. See benchmarks/several_networks.md.

    python benchmarks/several_networks.py --only cifar --seeds 0 1
    python benchmarks/several_networks.py --only imagenet --seeds 0
    python benchmarks/several_networks.py --table           # what has been measured

ℓ∞ 10, our rule with its defaults. One process, one thread; neither Ray nor MLflow. What is in the output already is not repeated.
"""

import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from itertools import product
from operator import and_
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import tyro
from comparison.bench import Bench, stamp
from comparison.intervals import interval, spread
from comparison.rows import MAX_LABEL_SHARE, SEEDS
from networks import NETWORKS
from torch import Tensor

from uap_dist.method import solver
from uap_dist.method.config import ComputeConfig
from uap_dist.method.norms import random_of_same_norms
from uap_dist.perturbations.files import Perturbation
from uap_dist.rounds.loop import compute
from uap_dist.workers.dataset import Dataset, classify
from uap_dist.workers.local import LocalWorkers

RADIUS, BUDGET = 10.0, 8_000
PAIRS = {"cifar": ("resnet20", "resnet32"), "imagenet": ("squeezenet", "lite0")}
OTHERS = {"cifar": ("resnet44", "resnet56"), "imagenet": ("lite1", "lite2")}  # on which nothing is computed
Lines = dict[tuple["Row", int], dict[str, Any]]  # by row and seed


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure, or show what has been measured."""

    only: tuple[str, ...] = tuple(PAIRS)
    """Collections of images."""
    seeds: tuple[int, ...] = SEEDS
    """Of the training images, their order and views."""
    table: bool = False
    """Print the tables and measure nothing."""
    data: Path = Path("../shared")
    """Folder of the images and networks."""
    output: Path = Path(__file__).with_name("several_networks.jsonl")
    """One line of JSON for each run is added here."""


@dataclass(frozen=True)
class Row:
    """The networks that a perturbation is computed on, and the network evaluations that it may take.

    `is_balanced`: sums of several networks are taken in units of their log-odds, as ours are, not as they come.
    """

    collection: str
    networks: tuple[str, ...]
    budget: int
    is_balanced: bool = True

    @property
    def title(self) -> str:
        """In tables."""
        return " + ".join(self.networks) + ", not balanced" * (not self.is_balanced)


ROWS = [
    row
    for collection, pair in PAIRS.items()
    for row in (
        Row(collection, pair, BUDGET),
        *(Row(collection, (name,), budget) for budget, name in product((BUDGET // 2, BUDGET), pair)),
        Row(collection, pair, BUDGET, is_balanced=False),
    )
]


class SeveralBench(Bench):
    """One network, or several as one classifier, with the images of the first."""

    def __init__(self, networks: Sequence[str], data: Path) -> None:
        super().__init__(networks[0], data)
        if len(networks) > 1:
            places = [NETWORKS[name].locate(data) for name in networks]
            given = (
                f"{name}={model}" + (f"={file}" if file else "")
                for name, (model, file) in zip(networks, places, strict=True)
            )
            self.location = tuple(given), None


def main() -> None:
    """Measure what is missing, or show what there is."""
    options = tyro.cli(Options)
    if options.table:
        print("\n".join(tables(read(options.output))))
        return
    for collection in options.only:
        rows = [row for row in ROWS if row.collection == collection]
        seen_by = {name: Bench(name, options.data) for name in (*PAIRS[collection], *OTHERS[collection])}
        benches = {row.networks: SeveralBench(row.networks, options.data) for row in rows}
        for seed, row in product(options.seeds, rows):
            if (row, seed) in read(options.output):
                continue
            started = time.perf_counter()
            v, num_evaluations = run(row, seed, benches[row.networks])
            line = vars(row) | {"seed": seed, "evaluations": num_evaluations}
            line |= {"seconds": round(time.perf_counter() - started, 1)} | rates(v, seed, collection, seen_by) | stamp()
            with options.output.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(*row.networks, row.budget, seed, f"{line['seconds']} s", line["held_out"], flush=True)


def run(row: Row, seed: int, bench: Bench) -> tuple[Tensor, int]:
    """V as it is delivered, and the network evaluations that it took."""
    train, _ = bench.split(seed)
    train = train.thin(min(train.num_examples, row.budget // (MAX_LABEL_SHARE * len(row.networks))))
    config = ComputeConfig(radius=RADIUS, max_evaluations=row.budget, seed=seed)
    glance = train.thin(1)  # held-out rates are measured by the caller
    with nullcontext() if row.is_balanced else patch.object(solver, "balance", torch.ones_like):
        (final,) = deque(compute(LocalWorkers(bench.worker), train, glance, config), maxlen=1)
    return final.perturbation, final.num_evaluations


def rates(v: Tensor, seed: int, collection: str, benches: dict[str, Bench]) -> dict[str, Any]:
    """Hits and images by network, and of both of a pair at once, of v and of a random one of its norms.

    On held-out images and, of the pair, on held-in ones: training images that this seed does not compute from.
    """
    noise, found = random_of_same_norms(v, seed=seed)["linf"], dict[str, Any]()
    out = {network: bench.held_out for network, bench in benches.items()}
    held_in = {network: benches[network].split(seed)[1] for network in PAIRS[collection]}
    for name, shown, images in (("held_out", v, out), ("random", noise, out), ("held_in", v, held_in)):
        fooled = {network: fooled_by(shown, own, benches[network]) for network, own in images.items()}
        at_once = reduce(and_, (fooled[network] for network in PAIRS[collection]))
        found[name] = {network: (int(mask.sum()), len(mask)) for network, mask in fooled.items()}
        found[name]["at once"] = (int(at_once.sum()), len(at_once))
    return found


def fooled_by(v: Tensor, images: Dataset, bench: Bench) -> np.ndarray:
    """Mask of the images whose label v changes, which is resized to the network's input as jobs/evaluate.py does."""
    resized = Perturbation("", v).resized(images.shape)
    return classify(LocalWorkers(bench.worker), images, resized.numpy()).differ_from(images.clean)


def read(path: Path) -> Lines:
    """What is in a file."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    fields = ("collection", "networks", "budget", "is_balanced")
    return {(Row(*(to_tuple(line[name]) for name in fields)), line["seed"]): line for line in lines}


def to_tuple(value: Any) -> Any:
    """A list as a tuple."""
    return tuple(value) if isinstance(value, list) else value


def tables(found: Lines) -> Iterator[str]:
    """Markdown: for each pair fooling rates by network, and below them what one perturbation for both gains and costs."""
    for collection, pair in PAIRS.items():
        rows = [row for row in ROWS if row.collection == collection and any(row == known for known, _ in found)]
        if not rows:
            continue
        networks = (*pair, *OTHERS[collection])
        heads = ["computed on", "evaluations", *networks, "the worse of the pair", "both at once", "seeds", "images"]
        yield f"| {' | '.join(heads)} |"
        yield "| --- " * len(heads) + "|"
        for row in rows:
            yield table_row(row, networks, of_seeds(row, found, "held_out"))
        noise = [line["random"] for (row, _), line in found.items() if row == rows[0]]
        yield table_row(Row(collection, ("random, same ℓ∞ norm",), 0), networks, dict(enumerate(noise)))
        yield ""
        yield from leads(pair, rows, networks, found)
        yield ""
        yield from held_in(pair, rows, found)
        yield ""


def of_seeds(row: Row, found: Lines, name: str) -> dict[int, Any]:
    """Rates of a row by seed."""
    return {seed: line[name] for (own, seed), line in found.items() if own == row}


def table_row(row: Row, networks: Sequence[str], by_seed: dict[int, Any]) -> str:
    """Means over seeds with their standard deviation."""
    pair, columns = PAIRS[row.collection], [*networks, "worse", "at once"]
    cells = [spread([rate(one, column, pair) for one in by_seed.values()]) for column in columns]
    count = next(iter(by_seed.values()))["at once"][1]
    budget = f"{row.budget:,}" if row.budget else ""
    return f"| {row.title} | {budget} | {' | '.join(cells)} | {len(by_seed)} | {count:,} |"


def leads(pair: tuple[str, ...], rows: Sequence[Row], networks: Sequence[str], found: Lines) -> Iterator[str]:
    """Paired differences of the perturbation for both to each of the others, where more than one seed is there."""
    joint, *others = rows
    ours = of_seeds(joint, found, "held_out")
    columns = [*networks, "worse", "at once"]
    heads = ["both minus", "evaluations", *networks, "the worse of the pair", "both at once"]
    yield f"| {' | '.join(heads)} |"
    yield "| --- " * len(heads) + "|"
    for row in others:
        theirs = of_seeds(row, found, "held_out")
        seeds = sorted({*ours} & {*theirs})
        cells = [difference([rate(ours[s], c, pair) - rate(theirs[s], c, pair) for s in seeds]) for c in columns]
        yield f"| {row.title} | {row.budget:,} | {' | '.join(cells)} |"


def held_in(pair: tuple[str, ...], rows: Sequence[Row], found: Lines) -> Iterator[str]:
    """What the choice of the rule was made by: held-in rates with sums in units of log-odds, and as they come."""
    heads = ["held-in images", "evaluations", *pair, "the worse", "both at once", "seeds", "images"]
    yield f"| {' | '.join(heads)} |"
    yield "| --- " * len(heads) + "|"
    for row in rows:
        if row.networks == pair:
            yield table_row(row, pair, of_seeds(row, found, "held_in"))


def difference(values: list[float]) -> str:
    """Mean and 95 % interval over seeds; of a single seed the difference alone."""
    return interval(values) if len(values) > 1 else f"{mean(values):+.3f}" if values else ""


def rate(line: dict[str, list[int]], column: str, pair: Sequence[str]) -> float:
    """A fooling rate; "worse" is that of the network of the pair with the lower one."""
    if column == "worse":
        return min(rate(line, name, pair) for name in pair)
    hits, count = line[column]
    return hits / count


if __name__ == "__main__":
    main()
