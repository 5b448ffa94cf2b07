"""Changes of the rule as it is, all at once, on held-in images. See benchmarks/rules_tried.md, "Plateaus", "The period", "Starts".

    python benchmarks/rules_at_once.py --network squeezenet --budgets 1000 --grid '[{"period": 32}, {"period": 64}]'
    python benchmarks/rules_at_once.py --table

On the GPU where there is one; on one core 20 s a run. Images, order, views and steps are those of `ours` in rules.py, but all seeds and
entries go through the network together: rounds of 6 images do not fill a GPU, whose convolutions are in TF32 here. What is in the output
already is not repeated. Nothing here looks at the held-out shards.
"""

import json
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
import tyro
from comparison.bench import Bench
from comparison.intervals import interval, spread
from comparison.pictures import Pictures, fast
from comparison.rows import MAX_LABEL_SHARE, RADII, Row
from comparison.runs_at_once import Change, Together

from uap_dist.method.config import ComputeConfig
from uap_dist.method.norms import Norm


@dataclass(frozen=True, kw_only=True)
class Options:
    """Try entries of a grid, or print what has been tried."""

    network: Literal["squeezenet", "lite0", "resnet20", "resnet56"] = "squeezenet"
    norms: tuple[Norm, ...] = ("linf", "l2")
    budgets: tuple[int, ...] = (4_000, 16_000)
    """Network evaluations, clean labels included."""
    grid: str = "[{}]"
    """JSON list of Change fields, one object an entry."""
    seeds: tuple[int, ...] = tuple(range(10))
    """Of the training images, their order and views."""
    channels_last: bool = False
    """Memory format of the network: less time for SqueezeNet on a GPU."""
    table: bool = False
    """Print what has been tried."""
    base: str = "{}"
    """Of the table: what entries are compared with, seed by seed."""
    data: Path = Path("../shared")
    output: Path = Path(__file__).with_name("rules_at_once.jsonl")


def main() -> None:
    """Run what is missing, or print the table."""
    options = tyro.cli(Options)
    if options.table:
        ((base, _),) = parse("--base", f"[{options.base}]")
        print_table(list(read(options.output).values()), base)
    else:
        run(options)


def run(options: Options) -> None:
    """A line for each norm, budget, seed and entry."""
    entries, changes = zip(*parse("--grid", options.grid), strict=True)
    bench = Bench(options.network, options.data)
    pictures = Pictures(bench.worker, bench.shards)
    if options.channels_last:
        bench.worker.classifier.to(memory_format=torch.channels_last)
    for budget, norm in product(options.budgets, options.norms):
        done = read(options.output)
        wanted = {
            seed: [i for i, entry in enumerate(entries) if key(options.network, norm, budget, entry, seed) not in done]
            for seed in options.seeds
        }
        seeds = [seed for seed, some in wanted.items() if some]
        if not seeds:
            continue
        started = time.perf_counter()
        radius = RADII[Row(options.network, norm, budget, "ours").collection][norm]
        configs = [ComputeConfig(norm=norm, radius=radius, max_evaluations=budget, seed=seed) for seed in seeds]
        train, held_in = zip(*map(bench.split, seeds), strict=True)
        train = [each.thin(min(each.num_examples, budget // MAX_LABEL_SHARE)) for each in train]
        together = Together(bench.worker.classifier, pictures, train, configs, changes)
        with fast(pictures.device):
            found = together.compute()
        for (i, j), measured in together.measure(found, held_in):
            seed = seeds[i]
            if j in wanted[seed]:
                line = {"network": options.network, "norm": norm, "budget": budget, "entry": entries[j], "seed": seed}
                with options.output.open("a") as file:
                    file.write(json.dumps(line | measured) + "\n")
        print(options.network, norm, f"{budget:,}", f"{time.perf_counter() - started:.0f} s", flush=True)


def parse(option: str, grid: str) -> list[tuple[dict[str, Any], Change]]:
    """Entries of a JSON list, each as it is written and what it means."""
    try:
        return [(entry, Change(**entry)) for entry in json.loads(grid)]
    except (ValueError, TypeError) as error:
        raise SystemExit(f"{option} {grid}: {error}; give JSON objects with fields of Change") from error


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Lines by their keys."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {key(*(line[name] for name in ("network", "norm", "budget", "entry", "seed"))): line for line in lines}


def key(network: str, norm: str, budget: int, entry: dict[str, Any], seed: int) -> str:
    """Of a run."""
    return json.dumps([network, norm, budget, asdict(Change(**entry)), seed])


def print_table(lines: list[dict[str, Any]], base: dict[str, Any]) -> None:
    """A line for each entry: means, and the paired difference to the base in held-in and training rate."""
    columns = (
        "held-in rate, mean ± sd",
        "to the base, paired",
        "training",
        "to the base, paired",
        "one label",
        "seeds",
    )
    print(f"| network, norm, evaluations | what differs | {' | '.join(columns)} |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    groups: dict[tuple[str, str, int], dict[str, dict[int, dict[str, Any]]]] = {}
    for line in lines:
        group = groups.setdefault((line["network"], line["norm"], line["budget"]), {})
        group.setdefault(describe(line["entry"]), {})[line["seed"]] = line
    for (network, norm, budget), entries in sorted(groups.items()):
        others = entries.get(describe(base), {})
        for name, runs in sorted(entries.items()):
            held_in, train = (
                interval([run[rate] - others[seed][rate] for seed, run in runs.items() if seed in others])
                for rate in ("rate", "train_rate")
            )
            print(
                f"| {network}, {norm}, {budget:,} | {name} | {spread([run['rate'] for run in runs.values()])} "
                f"| {'' if runs is others else held_in} | {mean(run['train_rate'] for run in runs.values()):.3f} "
                f"| {'' if runs is others else train} | {mean(run['most_frequent_share'] for run in runs.values()):.2f} | {len(runs)} |"
            )


def describe(entry: dict[str, Any]) -> str:
    """What differs from the rule, in words."""
    usual = asdict(Change())
    return (
        ", ".join(f"{name} {value}" for name, value in asdict(Change(**entry)).items() if value != usual[name])
        or "nothing"
    )


if __name__ == "__main__":
    main()
