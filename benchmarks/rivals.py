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
from uap_dist.workers.dataset import Dataset

Method = Literal["random", "ours", "sga", "dm-uap", "ceiling"]
RADIUS = 10.0
TITLES: dict[Method, str] = {
    "random": "random signs",
    "ours": "ours",
    "sga": "SGA, as published",
    "dm-uap": "DM-UAP, as published",
    "ceiling": "ceiling: ours, from the held-out images",
}
OURS = (("ours", 3_000), ("ours", 8_000), ("ours", 32_000), ("ceiling", 32_000))
ALL = slice(None)
# what is measured with which of the seeds, the most wanted first; what stands together goes through the network together
ORDER: tuple[tuple[tuple[tuple[Method, int | None], ...], slice], ...] = (
    ((("random", None),), ALL),
    (OURS, ALL),
    ((("sga", None),), ALL),
    ((("dm-uap", None),), slice(0, 1)),
    ((("dm-uap", None),), slice(1, 2)),
    ((("ours", 128_000),), ALL),
    ((("dm-uap", None),), slice(2, 3)),
    ((("ceiling", 128_000),), ALL),
    ((("dm-uap", None),), slice(3, 4)),
    ((("dm-uap", None),), slice(4, None)),
)
COLUMNS = (
    "evaluations",
    "held-out rate, mean ± sd",
    "to SGA, paired",
    "to DM-UAP, paired",
    "to the ceiling (32,000), paired",
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
class Run:
    """One perturbation."""

    network: str
    method: Method
    budget: int | None
    seed: int

    @property
    def name(self) -> str:
        """As --only selects it."""
        return self.method if self.budget is None else f"{self.method}-{self.budget}"

    def cost(self, num_images: int) -> int:
        """Network evaluations, nearly."""
        return self.budget or {"random": 0, "sga": 161 * num_images, "dm-uap": 841 * num_images}[self.method]


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

    def compute(self, runs: list[Run]) -> list[tuple[Tensor, int]]:
        """Perturbations (C×H×W) of runs that stand together in ORDER, and the network evaluations of each."""
        method, seeds = runs[0].method, [run.seed for run in runs]
        if method == "random":
            return [(random_perturbation(self.train.shape, norm="linf", radius=RADIUS, seed=seed), 0) for seed in seeds]
        with fast(self.worker.device, self.precision):
            if runs[0].budget is not None:
                configs = [ComputeConfig(radius=RADIUS, max_evaluations=run.budget, seed=run.seed) for run in runs]
                together = Together(self.classifier, self.pictures, [self.source(run) for run in runs], configs)
                found = together.compute()[:, 0].float().cpu()
                return list(zip(found, together.num_evaluations, strict=True))
            rows = self.pictures.rows(self.train)
            pixels, labels = self.pictures.whole(rows), self.pictures.labels[rows]
            if method == "sga":
                found, cost = sga(self.classifier, pixels, labels, seeds=seeds, radius=RADIUS)
                return [(v, cost) for v in found.cpu()]
            of_each = [dm_uap(self.trainable, pixels, labels, seed=seed, radius=RADIUS) for seed in seeds]
            return [(v.cpu(), cost) for v, cost in of_each]

    def source(self, run: Run) -> Dataset:
        """The images that a run computes from."""
        return self.held_out if run.method == "ceiling" else self.train

    def measure(self, run: Run, v: Tensor) -> dict[str, Any]:
        """Rates of its perturbation."""
        (rate, share), (source_rate, _) = (
            self.pictures.fooled(self.classifier, images, v) for images in (self.held_out, self.source(run))
        )
        counts = {"num_images": self.held_out.num_examples, "num_source": self.source(run).num_examples}
        return {"rate": rate, "source_rate": source_rate, "most_frequent_share": share} | counts


def main() -> None:
    """Measure what is missing, or print what there is."""
    options = tyro.cli(Options)
    if options.table:
        print("\n".join(table(read(options.output))))
    else:
        run(options)


def run(options: Options) -> None:
    """A line for each run that is missing, as long as there is time."""
    started, labs, speeds = time.perf_counter(), dict[str, Lab](), dict[str, float]()
    precision = options.precision if torch.cuda.is_available() else "float32"
    provenance = {"precision": precision} | stamp() | ({"commit": options.commit} if options.commit else {})
    done = {key(line) for line in read(options.output)}
    for runs in plan(options, done, precision):
        network, names = runs[0].network, ", ".join(dict.fromkeys(run.name for run in runs))
        if network not in labs:
            labs[network] = Lab(network, options)
        lab, begun = labs[network], time.perf_counter()
        expected = sum(run.cost(lab.train.num_examples) for run in runs) / speeds.get(network, float("inf"))
        if begun - started + expected > options.time_limit_s:
            print(f"{network} {names}: no time left, {expected:.0f} s needed", flush=True)
            continue
        found = lab.compute(runs)
        seconds, total = time.perf_counter() - begun, sum(cost for _, cost in found)
        if total:
            speeds[network] = total / seconds
        for each, (v, cost) in zip(runs, found, strict=True):
            shares = {"evaluations": cost, "seconds": round(seconds * cost / (total or 1), 1)}
            line = vars(each) | shares | {"runs_at_once": len(runs)} | lab.measure(each, v) | provenance
            with options.output.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(network, each.name, each.seed, f"{line['rate']:.3f}", f"{line['seconds']} s", flush=True)


def plan(options: Options, done: set[tuple[Any, ...]], precision: str) -> Iterator[list[Run]]:
    """What is wanted and not done yet, in order."""
    for (methods, some), network in product(ORDER, options.networks):
        runs = [Run(network, *method, seed) for method in methods for seed in options.seeds[some]]
        runs = [run for run in runs if (*vars(run).values(), precision) not in done]
        wanted = [run for run in runs if any(fnmatch(run.name, pattern) for pattern in options.only)]
        if wanted:
            yield wanted


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
        opponents = [rows.get(row, {}) for row in (("sga", 0), ("dm-uap", 0), ("ceiling", 32_000))]
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
                f"{mean(run['seconds'] for run in own.values()):.1f}",
                str(len(own)),
            )
            yield f"| {TITLES[method]} | {' | '.join(cells)} |"
        yield ""


if __name__ == "__main__":
    main()
