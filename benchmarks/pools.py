"""Pools and transfer by real jobs: time against separate runs, diversity, matrices across networks. See benchmarks/pools.md.

    python benchmarks/pools.py                       # all parts, about an hour on two cores
    python benchmarks/pools.py --only diversity      # one part
    python benchmarks/pools.py --table               # the tables of what has been measured

Jobs that have left a result in the folder already are not repeated, so it goes on where it was stopped.
The matrices need the `bench` extra.
"""

import csv
import json
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import tyro
from networks import NETWORKS

from uap_dist.data.patterns import expand_patterns
from uap_dist.fleet.config import FleetConfig
from uap_dist.fleet.fleet import Fleet
from uap_dist.fleet.ray_cluster import connect
from uap_dist.method.config import POOL_RANDOM_START, ComputeConfig
from uap_dist.perturbations.pool import PerturbationPool
from uap_dist.rounds.loop import compute
from uap_dist.versions import git_commit
from uap_dist.workers.dataset import load_dataset

JOBS = Path(__file__).parents[1] / "jobs"
POOLS = {  # members, and the options of the main job's rows
    "resnet20": (5, ("--max-evaluations", "8000", "--augment", "none")),
    "squeezenet": (3, ("--max-evaluations", "3000")),
}
CIFAR = ("resnet20", "resnet32", "resnet44", "resnet56")
IMAGENET = ("squeezenet", "lite0", "lite1", "lite2")
LITE0 = ("--max-evaluations", "4000")
WAYS = {  # in which members differ
    "resnet20": ("order", "order, images", "order, start", "order, images, start"),
    "squeezenet": ("order", "order, start"),
}
DIVERSITY_CONFIGS: dict[str, dict[str, Any]] = {
    "resnet20": {"max_evaluations": 8_000, "augment": "none"},
    "squeezenet": {"max_evaluations": 2_900},  # 100 fewer images
}
NUM_MEMBERS = 4


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure parts, or print their tables."""

    only: tuple[str, ...] = ("pools", "cifar", "imagenet", "diversity")
    """Parts to measure."""
    table: bool = False
    """Print the tables of what has been measured, and measure nothing."""
    data: Path = Path("../shared")
    """Folder of the images, networks and published perturbations."""
    folder: Path = Path("outputs/pools")
    """Where the jobs leave their files."""
    output: Path = Path(__file__).with_name("pools.jsonl")
    """Results; those of a part that is measured again are replaced."""


def main() -> None:
    """Measure what was asked for, then print the tables."""
    options = tyro.cli(Options)
    if not options.table:
        options.folder.mkdir(parents=True, exist_ok=True)
        for part in options.only:
            lines = [{"part": part} | line | _provenance() for line in PARTS[part](options)]
            kept = [line for line in _read(options.output) if line["part"] != part]
            options.output.write_text("".join(json.dumps(line) + "\n" for line in [*kept, *lines]))
    print("\n".join(_tables(options.output)))


def pools(options: Options) -> Iterator[dict[str, Any]]:
    """Wall time of a pool, and of as many separate runs after it; both start their own Ray."""
    for name, (count, words) in POOLS.items():
        pool = _compute(options, name, f"{name}-pool", *words, "--num-perturbations", str(count))
        words += ("--random-start", str(POOL_RANDOM_START))
        alone = [_compute(options, name, f"{name}-alone-{seed}", *words, "--seed", str(seed)) for seed in range(count)]
        members = list(pool["members"].values())
        yield {
            "network": name,
            "rates": [member["val_fooling_rate"] for member in members],
            "random_rate": pool["val_fooling_rate_random"],
            "num_val_images": pool["num_val_images"],
            "largest_inner_product": pool["largest_inner_product"],
            "dominant": [member["dominant_labels"][0][0] for member in members],
            "same_bits": [m["perturbation_sha256"] for m in members] == [a["perturbation_sha256"] for a in alone],
            "pool_s": pool["wall_s"],
            "alone_s": round(sum(result["wall_s"] for result in alone), 1),
        }


def cifar(options: Options) -> Iterator[dict[str, Any]]:
    """Each ResNet's perturbation on each ResNet."""
    words = POOLS["resnet20"][1]
    for name in CIFAR:
        _compute(options, name, f"{name}-single", *words)
    perturbations = [f"{name}={options.folder / f'{name}-single'}" for name in CIFAR]
    yield from _transfer(options, "cifar", perturbations, CIFAR)


def imagenet(options: Options) -> Iterator[dict[str, Any]]:
    """Our perturbations of SqueezeNet and EfficientNet-Lite0, and the nine published ones, on four networks."""
    _compute(options, "squeezenet", "squeezenet-single", *POOLS["squeezenet"][1])
    _compute(options, "lite0", "lite0-single", *LITE0)
    published = options.data / "reference"
    perturbations = [f"ours-{name}={options.folder / f'{name}-single'}" for name in ("squeezenet", "lite0")]
    perturbations += [f"{path}:255" for path in sorted((published / "lts4").iterdir())]
    perturbations += [f"{path}:1" for path in sorted((published / "sgd-uap").iterdir())]
    yield from _transfer(options, "imagenet", perturbations, IMAGENET)


def diversity(options: Options) -> Iterator[dict[str, Any]]:
    """What makes members differ, at what cost in fooling rate, on held-in images: the order of images, other images, another start."""
    connect()
    for name, ways in WAYS.items():
        network, words = NETWORKS[name], DIVERSITY_CONFIGS[name]
        fleet = Fleet(*network.locate(options.data), FleetConfig(num_workers=2))
        fleet.wait()
        *shards, last = expand_patterns([str(options.data / network.train)])
        held_in = load_dataset(fleet, [last])
        same = load_dataset(fleet, shards[: network.tune_shards])
        for way in ways:
            rates, found = [], []
            for seed in range(NUM_MEMBERS):
                train = load_dataset(fleet, shards[seed : seed + 1]) if "images" in way else same
                start = POOL_RANDOM_START if "start" in way else None
                config = ComputeConfig(seed=seed, random_start=start, **words)
                (final,) = deque(compute(fleet, train, held_in, config), maxlen=1)
                assert final.evaluation is not None
                rates.append(final.evaluation.val.rate)
                found.append(final.perturbation)
            pool = PerturbationPool(torch.stack(found), {}, [{"name": str(seed)} for seed in range(NUM_MEMBERS)])
            products = [product for product, _ in pool.nearest_pairs()]
            yield {
                "network": name,
                "way": way,
                "rates": rates,
                "num_held_in": held_in.num_examples,
                "mean_inner_product": mean(products),
                "largest_inner_product": max(products),
            }
        fleet.close()


def _compute(options: Options, network_name: str, name: str, *words: str) -> dict[str, Any]:
    """What jobs/compute.py says of the result, and its wall time."""
    network, output = NETWORKS[network_name], options.folder / name
    result, wall = output / "result.json", output.with_suffix(".seconds")
    if not result.exists():
        model, weights = network.locate(options.data)
        words = ("--model", model, *(("--weights", weights) if weights else ()), *words)
        words += ("--train-shards", str(options.data / network.train), "--val-shards", str(options.data / network.val))
        words += ("--num-train-images", str(network.num_train_images), "--num-val-images", str(network.num_val_images))
        words += ("--num-workers", "2", "--evaluate-every", "1000000", "--output", str(output))
        shutil.rmtree(output, ignore_errors=True)
        wall.write_text(str(_run("compute.py", *words)))
    return json.loads(result.read_text()) | {"wall_s": float(wall.read_text())}


def _transfer(
    options: Options, part: str, perturbations: list[str], networks: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """The rows of jobs/evaluate.py, whose picture is kept."""
    output = options.folder / f"transfer-{part}"
    if not (output / "tables").exists():
        models = [NETWORKS[name].locate(options.data) for name in networks]
        words = ["--models", *(f"{model}={weights}" if weights else model for model, weights in models)]
        first = NETWORKS[networks[0]]
        words += ["--shards", f"heldout={options.data / first.val}", "--num-images", str(first.num_val_images)]
        words += ["--num-workers", "2"]
        shutil.rmtree(output, ignore_errors=True)
        _run("evaluate.py", "--perturbations", *perturbations, *words, "--output", str(output))
    shutil.copy(output / "pictures/1-transfer-heldout.png", options.output.with_name(f"transfer-{part}.png"))
    with (output / "tables/evaluation.csv").open() as file:
        for row in csv.DictReader(file):
            numbers = {key: float(row[key]) for key in ("fooling_rate", "fooling_rate_low", "fooling_rate_high")}
            numbers["num_images"] = int(row["fooling_rate_num_images"])
            yield {"classifier": row["classifier"], "perturbation": row["perturbation"], **numbers}


def _run(job: str, *words: str) -> float:
    """Wall time of a job, in seconds."""
    print("python", f"jobs/{job}", *words, flush=True)
    started = time.monotonic()
    subprocess.run([sys.executable, str(JOBS / job), *words], check=True)
    return round(time.monotonic() - started, 1)


def _tables(path: Path) -> Iterator[str]:
    """Markdown of all parts that were measured."""
    lines = _read(path)
    columns = (
        "pool",
        "held-out fooling rates",
        "mean",
        "random",
        "images",
        "largest inner product",
        "most frequent labels",
    )
    yield _header(*columns, "same bits alone", "pool, s", "separate runs, s", "ratio")
    for line in (line for line in lines if line["part"] == "pools"):
        rates = " ".join(f"{rate:.3f}" for rate in line["rates"])
        yield (
            f"| {line['network']} × {len(line['rates'])} | {rates} | {mean(line['rates']):.3f} | {line['random_rate']:.3f} "
            f"| {line['num_val_images']} | {line['largest_inner_product']:.2f} | {', '.join(line['dominant'])} "
            f"| {'yes' if line['same_bits'] else '**no**'} | {line['pool_s']:.0f} | {line['alone_s']:.0f} "
            f"| **{line['pool_s'] / line['alone_s']:.2f}** |"
        )
    yield (
        "\n| members differ in | held-out fooling rates | mean | inner product, mean | largest |\n" + "| --- " * 5 + "|"
    )
    for line in (line for line in lines if line["part"] == "diversity"):
        rates = " ".join(f"{rate:.3f}" for rate in line["rates"])
        products = f"{line['mean_inner_product']:.2f} | {line['largest_inner_product']:.2f}"
        yield f"| {line['network']} | {line['way']} | {rates} | {mean(line['rates']):.3f} | {products} |"
    for part in ("cifar", "imagenet"):
        own = [line for line in lines if line["part"] == part]
        columns = tuple(dict.fromkeys(line["classifier"] for line in own))
        if own:
            yield f"\n{part}, {own[0]['num_images']:,} held-out images:\n"
            yield _header("perturbation", *columns)
        for row in dict.fromkeys(line["perturbation"] for line in own):
            rates = {line["classifier"]: line["fooling_rate"] for line in own if line["perturbation"] == row}
            yield f"| {row} | {' | '.join(f'{rates[column]:.3f}' for column in columns)} |"


def _header(*columns: str) -> str:
    return f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|"


def _provenance() -> dict[str, str]:
    return {"commit": git_commit(), "date": datetime.now(UTC).date().isoformat()}


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


PARTS: dict[str, Callable[[Options], Iterator[dict[str, Any]]]] = {
    "pools": pools,
    "cifar": cifar,
    "imagenet": imagenet,
    "diversity": diversity,
}


if __name__ == "__main__":
    main()
