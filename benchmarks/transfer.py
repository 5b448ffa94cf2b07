"""Do perturbations carry over to networks that they were not computed on, and what helps? See docs/transfer.md.

    python benchmarks/transfer.py              # some hours on one core; with --seeds 0 a part
    python benchmarks/transfer.py --table      # what has been measured

A variant is chosen by the first table, of training images, and reported by the second one, of held-out images.

ℓ∞ 10, our rule. One process, one thread; neither Ray nor MLflow. What is in the output already is not repeated.
"""

import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import tyro
from comparison.bench import Bench, stamp
from comparison.intervals import interval, spread
from comparison.rows import MAX_LABEL_SHARE
from several_networks import fooled_by
from torch import Tensor

from uap_dist.method.config import ComputeConfig
from uap_dist.method.norms import random_perturbation
from uap_dist.perturbations.files import load_perturbations
from uap_dist.rounds.loop import compute
from uap_dist.workers.local import LocalWorkers

RADIUS = 10.0
BUDGETS = {"squeezenet": 3_000, "lite0": 4_000}
NETWORKS = ("squeezenet", "lite0", "lite1", "lite2")
VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"achromatic": True, "zoom": 0.25},
    {"achromatic": True},
    {"zoom": 0.25},
    {"achromatic": True, "zoom": 0.15},
    {"achromatic": True, "zoom": 0.4},
    {"achromatic": True, "zoom": 0.25, "period": 64},
    {"period": 64},
    {"period": 224},
)
NO_SOURCE = "none of these"
OTHERS = "mean of the others"
IMAGES = ("training", "held-out")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure, or show what has been measured."""

    sources: tuple[str, ...] = (*BUDGETS, NO_SOURCE)
    """Networks to compute on."""
    variants: int = len(VARIANTS)
    """The first so many variants only."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of the training images, their order and views."""
    table: bool = False
    """Print the tables and measure nothing."""
    data: Path = Path("../shared")
    """Folder of the images and networks."""
    output: Path = Path(__file__).with_name("transfer.jsonl")
    """One line of JSON for each run is added here."""


@dataclass(frozen=True)
class Run:
    """One perturbation; `variant` are options of the computation as JSON, or a name."""

    source: str
    variant: str
    seed: int


Lines = dict[Run, dict[str, Any]]
Rates = dict[int, dict[str, float]]  # by seed, then by network


def main() -> None:
    """Measure what is missing, or show what there is."""
    options = tyro.cli(Options)
    if options.table:
        print("\n".join(tables(read(options.output))))
        return
    benches = {name: Bench(name, options.data) for name in NETWORKS}
    for source in options.sources:
        for run, v, seconds in runs(source, options, benches):
            fooled = {images: hits(v, images, benches) for images in IMAGES}
            line = vars(run) | fooled | {"seconds": seconds} | stamp()
            with options.output.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(*vars(run).values(), f"{seconds} s", fooled, flush=True)


def runs(source: str, options: Options, benches: dict[str, Bench]) -> Iterator[tuple[Run, Tensor, float]]:
    """All that are missing, each with its perturbation and the time that it took."""
    done = read(options.output)
    if source == NO_SOURCE:
        for name, seed, v in others(options):
            if (run := Run(source, name, seed)) not in done:
                yield run, v, 0.0
        return
    for seed, variant in product(options.seeds, VARIANTS[: options.variants]):
        if (run := Run(source, json.dumps(variant), seed)) not in done:
            started = time.perf_counter()
            v = compute_one(benches[source], BUDGETS[source], variant, seed)
            yield run, v, round(time.perf_counter() - started, 1)


def compute_one(bench: Bench, budget: int, variant: dict[str, Any], seed: int) -> Tensor:
    """V as it is delivered."""
    train, _ = bench.split(seed)
    train = train.thin(min(train.num_examples, budget // MAX_LABEL_SHARE))
    config = ComputeConfig(radius=RADIUS, max_evaluations=budget, seed=seed, **variant)
    (final,) = deque(compute(LocalWorkers(bench.worker), train, train.thin(1), config), maxlen=1)
    return final.perturbation


def others(options: Options) -> Iterator[tuple[str, int, Tensor]]:
    """Name, seed and v of random signs, in three channels and in one, and of what others have published."""
    for seed in options.seeds:
        signs = random_perturbation((3, 224, 224), norm="linf", radius=RADIUS, seed=seed)
        yield "random signs", seed, signs
        yield "random signs, achromatic", seed, signs[:1].expand(3, -1, -1)
    folder = options.data / "reference"
    places = [f"{path}:255" for path in sorted((folder / "lts4").iterdir())]
    for v in load_perturbations([*places, *(f"{path}:1" for path in sorted((folder / "sgd-uap").iterdir()))]):
        yield v.name, 0, v.v


def hits(v: Tensor, images: str, benches: dict[str, Bench]) -> dict[str, tuple[int, int]]:
    """Fooled images by network, and all."""
    found = {}
    for network, bench in benches.items():
        mask = fooled_by(v, bench.train if images == "training" else bench.held_out, bench)
        found[network] = int(mask.sum()), len(mask)
    return found


def read(path: Path) -> Lines:
    """What is in a file."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {Run(*(line[field.name] for field in fields(Run))): line for line in lines}


def rates_of(found: Lines, source: str, variant: str, images: str) -> Rates:
    """Fooling rates by seed and network; OTHERS has the mean over all but the source."""
    rates: Rates = {}
    for run, line in found.items():
        if (run.source, run.variant) == (source, variant):
            own = {name: hits / count for name, (hits, count) in line[images].items()}
            rates[run.seed] = own | {OTHERS: mean(rate for name, rate in own.items() if name != source)}
    return rates


def tables(found: Lines) -> Iterator[str]:
    """Markdown: fooling rates by network, and what a variant gains over the default, paired by seed."""
    for images in IMAGES:
        heads = ("computed on", "variant", *NETWORKS, OTHERS, "gain there", "gain on its own", "seeds")
        yield f"500 {images} images:\n\n| {' | '.join(heads)} |"
        yield "| --- " * len(heads) + "|"
        for source, variant in product(BUDGETS, VARIANTS):
            default = rates_of(found, source, json.dumps({}), images)
            yield from row(source, variant, rates_of(found, source, json.dumps(variant), images), default)
        for name in sorted({run.variant for run in found if run.source == NO_SOURCE}):
            yield from row(NO_SOURCE, name, rates_of(found, NO_SOURCE, name, images), {})
        yield ""


def row(source: str, variant: dict[str, Any] | str, rates: Rates, default: Rates) -> Iterator[str]:
    """One of the table, if there is any run of it."""
    if not rates:
        return
    cells = [spread([one[column] for one in rates.values()]) for column in (*NETWORKS, OTHERS)]
    seeds = sorted({*rates} & {*default}) if variant else []
    gains = [gain([rates[s][c] - default[s][c] for s in seeds]) for c in (OTHERS, source)] if seeds else ["", ""]
    title = variant if isinstance(variant, str) else describe(variant)
    yield f"| {' | '.join([source, title, *cells, *gains])} | {len(rates)} |"


def gain(differences: list[float]) -> str:
    """Mean, with its interval from three seeds on: that of two says nothing."""
    return interval(differences) if len(differences) > 2 else f"{mean(differences):+.3f}"


def describe(variant: dict[str, Any]) -> str:
    """As options."""
    words = (f"--{name}" if value is True else f"--{name} {value}" for name, value in variant.items())
    return " ".join(words) or "the default"


if __name__ == "__main__":
    main()
