"""Ours beside SGA and DM-UAP as published, on the same photographs: rates, evaluations, paired differences. See benchmarks/rivals.md.

    python benchmarks/rivals.py --time-limit-s 240        # on a GPU; what is in the output already is not repeated
    python benchmarks/rivals.py --table

Perturbations are computed from the training images of the main job and measured on its held-out ones, in ℓ∞ 10. *ceiling* is our rule
computed from the held-out images themselves: what ours lacks to it is lost between images, not in the search. Seeds of ours and of SGA
go through the network together, those of DM-UAP one after another. Nothing here imports Ray or MLflow.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
import tyro
from comparison.bench import Bench, stamp
from comparison.intervals import interval, spread
from comparison.pictures import Pictures, Precision, fast
from comparison.published import dm_uap, sga
from comparison.runs_at_once import Together
from torch import Tensor

from uap_dist.method.config import ComputeConfig
from uap_dist.method.norms import random_perturbation
from uap_dist.models.classifier import Classifier
from uap_dist.models.loading import load_classifier

Method = Literal["random", "ours", "sga", "dm-uap", "ceiling"]
RADIUS = 10.0
TITLES: dict[Method, str] = {
    "random": "random signs",
    "ours": "ours",
    "sga": "SGA, as published",
    "dm-uap": "DM-UAP, as published",
    "ceiling": "ceiling: ours, from the held-out images",
}
ALL = slice(None)
ORDER: tuple[
    tuple[Method, int | None, slice], ...
] = (  # what is measured with which of the seeds, the most wanted first
    ("random", None, ALL),
    ("ours", 3_000, ALL),
    ("ours", 8_000, ALL),
    ("ours", 32_000, ALL),
    ("sga", None, ALL),
    ("dm-uap", None, slice(0, 1)),
    ("ceiling", 32_000, ALL),
    ("dm-uap", None, slice(1, 2)),
    ("ours", 128_000, ALL),
    ("dm-uap", None, slice(2, 3)),
    ("dm-uap", None, slice(3, 4)),
    ("dm-uap", None, slice(4, None)),
    ("ceiling", 128_000, ALL),
)
COLUMNS = (
    "evaluations",
    "held-out rate, mean ± sd",
    "to SGA, paired",
    "to DM-UAP, paired",
    "on the images that it was computed from",
    "one label",
    "seconds",
    "seeds",
)
CHANNELS_LAST = ("squeezenet",)  # whose steps take less time so on a GPU


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure, or show what has been measured."""

    networks: tuple[str, ...] = ("squeezenet", "lite0")
    """Names in networks.py."""
    only: tuple[str, ...] = ("*",)
    """Patterns of what to measure: random, ours-3000, sga, dm-uap, ceiling-32000 and so on."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of order, views, batches and starts."""
    time_limit_s: float = float("inf")
    """Nothing is begun that would probably not be finished by then."""
    precision: Precision = "tf32"
    """Of the gradients, on a GPU; rates are measured in float32."""
    table: bool = False
    """Print the tables and measure nothing."""
    data: Path = Path("../shared")
    """Folder of the images (in data/)."""
    models: Path | None = None
    """Folder of the networks (in models/), if it is another one."""
    commit: str | None = None
    """Of this code, where it lies without its repository."""
    output: Path = Path(__file__).with_name("rivals.jsonl")
    """One line of JSON for each run is added here."""


@dataclass(frozen=True)
class Group:
    """Runs of several seeds that are computed together."""

    network: str
    method: Method
    budget: int | None
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        """As --only selects it."""
        return self.method if self.budget is None else f"{self.method}-{self.budget}"


class Lab:
    """A network with its images on the device."""

    def __init__(self, network: str, options: Options) -> None:
        self.bench = Bench(network, options.data, options.models)
        self.worker, self.precision = self.bench.worker, options.precision
        self.train, self.held_out = self.bench.train, self.bench.held_out
        self.pictures = Pictures(self.worker, [self.train, self.held_out])
        self.classifier = self.worker.classifier
        self.format = (
            torch.channels_last
            if network in CHANNELS_LAST and self.worker.device.type == "cuda"
            else torch.preserve_format
        )
        self.classifier.to(memory_format=self.format)

    @cached_property
    def trainable(self) -> Classifier:
        """The network with its own batch norms."""
        classifier = load_classifier(*self.bench.location)
        return classifier.to(self.worker.device, memory_format=self.format)

    def compute(self, group: Group) -> tuple[Tensor, int]:
        """S×C×H×W perturbations, and the network evaluations of each."""
        if group.method == "random":
            noise = [
                random_perturbation(self.train.shape, norm="linf", radius=RADIUS, seed=seed) for seed in group.seeds
            ]
            return torch.stack(noise), 0
        with fast(self.worker.device, self.precision):
            if group.budget is not None:
                images = self.held_out if group.method == "ceiling" else self.train
                configs = [
                    ComputeConfig(radius=RADIUS, max_evaluations=group.budget, seed=seed) for seed in group.seeds
                ]
                together = Together(self.classifier, self.pictures, [images] * len(configs), configs)
                return together.compute()[:, 0].float().cpu(), together.num_evaluations[0]
            rows = self.pictures.rows(self.train)
            pixels, labels = self.pictures.whole(rows), self.pictures.labels[rows]
            if group.method == "sga":
                v, cost = sga(self.classifier, pixels, labels, seeds=group.seeds, radius=RADIUS)
                return v.cpu(), cost
            (seed,) = group.seeds
            v, cost = dm_uap(self.trainable, pixels, labels, seed=seed, radius=RADIUS)
            return v[None].cpu(), cost

    def measure(self, group: Group, v: Tensor) -> dict[str, Any]:
        """Rates of one perturbation (C×H×W)."""
        rate, share = self.pictures.fooled(self.classifier, self.held_out, v)
        source = self.held_out if group.method == "ceiling" else self.train
        source_rate, _ = self.pictures.fooled(self.classifier, source, v)
        return {
            "rate": rate,
            "num_images": self.held_out.num_examples,
            "source_rate": source_rate,
            "num_source": source.num_examples,
            "most_frequent_share": share,
        }


def main() -> None:
    """Measure what is missing, or print what there is."""
    options = tyro.cli(Options)
    if options.table:
        print("\n".join(table(read(options.output))))
    else:
        run(options)


def run(options: Options) -> None:
    """A line for each run that is missing, as long as there is time."""
    started, labs, speeds = time.perf_counter(), {}, dict[str, float]()
    precision = options.precision if torch.cuda.is_available() else "float32"
    done = {key(line) for line in read(options.output)}
    for group in groups(options, done, precision):
        if group.network not in labs:
            labs[group.network] = Lab(group.network, options)
        lab = labs[group.network]
        begun = time.perf_counter()
        expected = num_evaluations(group, lab.train.num_examples) / speeds.get(group.network, float("inf"))
        if begun - started + expected > options.time_limit_s:
            print(f"{group.network} {group.name} {group.seeds}: no time left, {expected:.0f} s needed", flush=True)
            continue
        found, cost = lab.compute(group)
        seconds = time.perf_counter() - begun
        if cost:
            speeds[group.network] = cost * len(group.seeds) / seconds
        stamped = stamp() | ({"commit": options.commit} if options.commit else {})
        for seed, v in zip(group.seeds, found, strict=True):
            line = {"network": group.network, "method": group.method, "budget": group.budget, "seed": seed}
            line |= {"precision": precision, "evaluations": cost, "seconds": round(seconds / len(group.seeds), 1)}
            line |= {"seeds_at_once": len(group.seeds)} | lab.measure(group, v) | stamped
            with options.output.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(group.network, group.name, seed, f"{line['rate']:.3f}", f"{line['seconds']} s", flush=True)


def groups(options: Options, done: set[tuple[Any, ...]], precision: str) -> Iterator[Group]:
    """What is wanted and not done yet, in order."""
    for (method, budget, some), network in product(ORDER, options.networks):
        seeds = [s for s in options.seeds[some] if (network, method, budget, s, precision) not in done]
        for together in [seeds] if method != "dm-uap" else [[seed] for seed in seeds]:
            group = Group(network, method, budget, tuple(together))
            if together and any(fnmatch(group.name, pattern) for pattern in options.only):
                yield group


def num_evaluations(group: Group, num_images: int) -> int:
    """About so many network evaluations of all its seeds."""
    by_method = {"random": 0, "sga": 161 * num_images, "dm-uap": 841 * num_images}
    return len(group.seeds) * (group.budget or by_method[group.method])


def read(path: Path) -> list[dict[str, Any]]:
    """Lines of the output."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    """Of a run."""
    return tuple(line[name] for name in ("network", "method", "budget", "seed", "precision"))


def table(lines: list[dict[str, Any]]) -> Iterator[str]:
    """A table for each network and precision: means over seeds, and differences between runs of the same seed."""
    runs: dict[tuple[str, str, int], dict[tuple[Method, int], dict[int, dict[str, Any]]]] = {}
    for line in lines:
        of_network = runs.setdefault((line["network"], line["precision"], line["num_images"]), {})
        of_network.setdefault((line["method"], line["budget"] or 0), {})[line["seed"]] = line
    for (network, precision, num_images), rows in runs.items():
        yield f"**{network}**, {num_images} held-out images, gradients in {precision}\n"
        yield f"| | {' | '.join(COLUMNS)} |\n|{' --- |' * (len(COLUMNS) + 1)}"
        opponents = [rows.get((method, 0), {}) for method in ("sga", "dm-uap")]
        for method, budget in sorted(rows, key=lambda row: (list(TITLES).index(row[0]), row[1])):
            own = rows[method, budget]
            leads = [
                ""
                if own is other
                else interval([run["rate"] - other[s]["rate"] for s, run in own.items() if s in other])
                for other in opponents
            ]
            cells = (
                f"{mean(run['evaluations'] for run in own.values()):,.0f}",
                spread([run["rate"] for run in own.values()]),
                *leads,
                f"{mean(run['source_rate'] for run in own.values()):.3f}",
                f"{mean(run['most_frequent_share'] for run in own.values()):.2f}",
                f"{mean(run['seconds'] for run in own.values()):.0f}",
                str(len(own)),
            )
            yield f"| {TITLES[method]} | {' | '.join(cells)} |"
        yield ""


if __name__ == "__main__":
    main()
