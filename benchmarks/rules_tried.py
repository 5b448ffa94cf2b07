"""Changes of the log-odds rule, tried on held-in images. See benchmarks/rules_tried.md.

    python benchmarks/rules_tried.py --network resnet20 --budget 8000 --grid '[{}, {"weight": "sigmoid"}]'
    python benchmarks/rules_tried.py --table

A loop of its own, short enough to change: one process, a round in one batch, on the GPU where there is one. The first entry `{}` is
the rule as it was before it repeated itself, in rounds of 24 images; every other entry says what differs. The rule as it is now, but for
longer periods under l2, is {"period": 32, "round_size": 6, "weight": "bell", "offset": 0, "width": 0.5, "relative": true, "memory": 0.9,
"raw": true, "decay": 0.5}.
Runs that are in the output already are not repeated. Nothing here looks at the held-out shards.
"""

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import tyro
from comparison.intervals import interval, spread
from comparison.variants import Trial, Variant
from networks import NETWORKS
from torch import Tensor

from uap_dist.data.patterns import expand_patterns
from uap_dist.method.norms import Norm
from uap_dist.models.loading import load_classifier
from uap_dist.workers.dataset import Dataset, classify, load_dataset
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.reproducible import set_up_torch
from uap_dist.workers.worker import Worker

MAX_HELD_IN_SHARDS = 2


@dataclass(frozen=True, kw_only=True)
class Options:
    """Try entries of a grid, or print what has been tried."""

    network: str = "resnet20"
    norm: Norm = "linf"
    budget: int = 8000
    """Network evaluations, clean labels included."""
    grid: str = "[{}]"
    """JSON list of Variant fields, one object an entry."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    train_shards: int | None = None
    """To compute from; the next ones are held in, two at most. Default: networks.py's."""
    table: bool = False
    base: str = "{}"
    """Of the table: what entries are compared with, seed by seed."""
    data: Path = Path("../shared")
    output: Path = Path(__file__).with_name("rules_tried.jsonl")


def main() -> None:
    """Run what is missing, then print the table."""
    options = tyro.cli(Options)
    if not options.table:
        run(options)
    print_table(options)


def run(options: Options) -> None:
    """A line for each entry and seed."""
    network = NETWORKS[options.network]
    set_up_torch(1)  # and memory, as a worker's process
    worker = Worker(load_classifier(*network.locate(options.data)), cache_bytes=8 << 30, num_threads=1)
    workers = LocalWorkers(worker)
    urls = expand_patterns([str(options.data / network.train)])
    shards = [load_dataset(workers, [url]) for url in urls]
    done = {key(line) for line in lines(options.output)}
    count = options.train_shards or network.tune_shards
    for seed in options.seeds:
        parts = shards[seed % len(shards) :] + shards[: seed % len(shards)]
        for entry in json.loads(options.grid):
            line = {
                "network": options.network,
                "norm": options.norm,
                "budget": options.budget,
                "entry": entry,
                "seed": seed,
                "train_shards": count,
            }
            if key(line) in done:
                continue
            started = time.perf_counter()
            held_in = parts[count : count + MAX_HELD_IN_SHARDS]
            more = parts[count + MAX_HELD_IN_SHARDS :] if Variant(**entry).num_images else []
            train = [*parts[:count], *more]
            images = np.concatenate([worker.pixels(part.examples(0, range(part.num_examples))) for part in train])
            labels = np.concatenate([part.clean.labels for part in train])
            v = Trial(worker, images, labels, Variant(**entry), options.norm).compute(seed, options.budget)
            line |= measure(workers, held_in, v)
            train_parts = [part.thin(min(500, part.num_examples)) for part in parts[:count]]
            line["train_rate"] = measure(workers, train_parts, v)["rate"]
            line["seconds"] = round(time.perf_counter() - started, 1)
            with options.output.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


def measure(workers: LocalWorkers, parts: list[Dataset], v: Tensor) -> dict[str, Any]:
    """Shares that are fooled, get the most frequent label, and are left of those whose clean label it is."""
    clean = [part.clean.labels for part in parts]
    answers = [classify(workers, part, v.float().numpy()).labels for part in parts]
    before, after = np.concatenate(clean), np.concatenate(answers)
    label, count = max(Counter(after.tolist()).items(), key=lambda item: item[1])
    return {
        "rate": round(float((after != before).mean()), 4),
        "most_frequent": int(label),
        "most_frequent_share": round(count / len(after), 4),
        "left_of_it": round(float(((after == before) & (before == label)).mean()), 4),
    }


def lines(path: Path) -> list[dict[str, Any]]:
    """What has been tried."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key(line: dict[str, Any]) -> str:
    """Of a run."""
    shards = line.get("train_shards", NETWORKS[line["network"]].tune_shards)
    variant = asdict(Variant(**line["entry"]))
    return json.dumps([line["network"], line["norm"], line["budget"], variant, line["seed"], shards])


def print_table(options: Options) -> None:
    """A line for each entry: mean, spread, and the paired difference to the base on the same views."""
    groups: dict[tuple[str, str, int, int], dict[str, dict[int, dict[str, Any]]]] = {}
    for line in lines(options.output):
        shards = line.get("train_shards", NETWORKS[line["network"]].tune_shards)
        group = groups.setdefault((line["network"], line["norm"], line["budget"], shards), {})
        group.setdefault(json.dumps(line["entry"], sort_keys=True), {})[line["seed"]] = line
    for (network, norm, budget, shards), entries in groups.items():
        print(f"\n{network}, {norm}, {budget:,} evaluations, computed from {shards} shards:\n")
        print(
            "| what differs | held-in rate, mean ± sd | to the base, paired | training | one label, left of it | seeds |"
        )
        print("| --- | --- | --- | --- | --- | --- |")
        for entry, runs in sorted(entries.items(), key=lambda item: -mean(run["rate"] for run in item[1].values())):
            views = {name: value for name, value in json.loads(entry).items() if name == "augment"}
            base = json.loads(options.base) | views
            others = entries.get(json.dumps(base, sort_keys=True), {}) if base != json.loads(entry) else {}
            print(
                f"| {describe(json.loads(entry), json.loads(options.base))} | {spread([run['rate'] for run in runs.values()])} "
                f"| {interval([run['rate'] - others[seed]['rate'] for seed, run in runs.items() if seed in others])} "
                f"| {mean(run['train_rate'] for run in runs.values()):.3f} | {average_answers(list(runs.values()))} | {len(runs)} |"
            )


def average_answers(runs: list[dict[str, Any]]) -> str:
    """The most frequent label's share of the answers, and the share of images that are not fooled because it is theirs."""
    if any("left_of_it" not in run for run in runs):
        return ""
    return ", ".join(f"{mean(run[name] for run in runs):.2f}" for name in ("most_frequent_share", "left_of_it"))


def describe(entry: dict[str, Any], base: dict[str, Any]) -> str:
    """What differs from the base, in words."""
    values, usual = asdict(Variant(**entry)), asdict(Variant(**base))
    return ", ".join(f"{name} {value}" for name, value in values.items() if value != usual[name]) or "nothing"


if __name__ == "__main__":
    main()
