"""What pools cover: the share of held-out images that at least one member fools. See benchmarks/pools.md, "What pools cover".

    python benchmarks/pool_coverage.py           # all pools, some ten minutes of one core
    python benchmarks/pool_coverage.py --table   # what has been measured, and benchmarks/pool_coverage.png

In one process, without Ray: members have the configuration of those of a pool of jobs/compute.py. Pools that are in the output already
are not computed again.
"""

import json
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from comparison.bench import Bench, stamp
from matplotlib.ticker import MaxNLocator

from uap_dist.evaluation.coverage import Coverage, by_symbol, measure_random_coverage
from uap_dist.figures import save_figure
from uap_dist.method.config import POOL_RANDOM_START, ComputeConfig
from uap_dist.method.rates import UNTARGETED, Rate
from uap_dist.perturbations.files import Perturbation, load_perturbations
from uap_dist.rounds.loop import compute
from uap_dist.workers.dataset import classify
from uap_dist.workers.local import LocalWorkers


@dataclass(frozen=True)
class Pool:
    """Members from so many seeds of a config, or without one the published perturbations."""

    network: str
    num_members: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)


START = {"random_start": POOL_RANDOM_START}
POOLS = {
    "ResNet-20, 8,000 evaluations each": Pool("resnet20", 5, {"max_evaluations": 8_000, "augment": "none"} | START),
    "the same, all from zero": Pool("resnet20", 5, {"max_evaluations": 8_000, "augment": "none"}),
    "SqueezeNet, 3,000 evaluations each": Pool("squeezenet", 3, {"max_evaluations": 3_000} | START),
    "SqueezeNet, published for other networks": Pool("squeezenet"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure what is missing, or show what there is."""

    table: bool = False
    """Print the table, draw the picture and measure nothing."""
    data: Path = Path("../shared")
    """Folder of the images, networks and published perturbations."""
    output: Path = Path(__file__).with_name("pool_coverage.jsonl")
    """One line of JSON for each pool is added here; the picture lies beside it."""


def main() -> None:
    """Measure, then show."""
    options = tyro.cli(Options)
    if not options.table:
        run(options)
    lines = read(options.output)
    print("\n".join(table(lines)))
    draw(lines, options.output.with_suffix(".png"))


def run(options: Options) -> None:
    """A line for each pool that is missing."""
    for name, pool in POOLS.items():
        if any(line["pool"] == name for line in read(options.output)):
            continue
        bench = Bench(pool.network, options.data)
        workers, held_out = LocalWorkers(bench.worker), bench.held_out
        members = dict(compute_members(pool, bench) if pool.num_members else published_members(bench))
        labels = np.stack([classify(workers, held_out, v.numpy()).labels for v in members.values()])
        coverage = Coverage.of(list(members), UNTARGETED, held_out.clean.labels, labels)
        random = by_symbol(measure_random_coverage(workers, held_out, torch.stack(list(members.values()))))
        line = {
            "pool": name,
            "network": pool.network,
            "num_images": held_out.num_examples,
            "alone": coverage.is_hit.sum(1).tolist(),
            "members": [coverage.names[i] for i in coverage.order],
            "covered": [rate.num_hits for rate in coverage.rates],
            "random": {norm: [rate.num_hits for rate in each.rates] for norm, each in random.items()},
        }
        with options.output.open("a") as file:
            file.write(json.dumps(line | stamp()) + "\n")
        print(name, line["covered"], line["random"], flush=True)


def compute_members(pool: Pool, bench: Bench) -> Iterator[tuple[str, torch.Tensor]]:
    """By seed, one after another."""
    for seed in range(pool.num_members):
        config = ComputeConfig(seed=seed, **pool.config)
        glance = bench.train.thin(1)  # held-out images are looked at in the end only
        (final,) = deque(compute(LocalWorkers(bench.worker), bench.train, glance, config), maxlen=1)
        yield f"seed {seed}", final.perturbation


def published_members(bench: Bench) -> Iterator[tuple[str, torch.Tensor]]:
    """The nine that lie in the data's folder, at the network's input size."""
    folder = bench.data / "reference"
    places = [f"{path}:255" for path in sorted((folder / "lts4").iterdir())]
    places += [f"{path}:1" for path in sorted((folder / "sgd-uap").iterdir())]
    found: list[Perturbation] = load_perturbations(places)
    for each in found:
        yield each.name, each.resized(bench.held_out.shape)


def read(path: Path) -> list[dict[str, Any]]:
    """Lines of the output."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(lines: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each pool."""
    columns = (
        "pool",
        "members",
        "fooled by one member, mean",
        "by the first taken",
        "by at least one of all",
        "by at least one of as many random ones",
        "left by the members",
    )
    yield f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}"
    for line in lines:
        count, covered = line["num_images"], line["covered"]
        random = ", ".join(f"{Rate(hits[-1], count).rate:.3f} ({norm})" for norm, hits in line["random"].items())
        cells = (
            line["pool"],
            str(len(covered)),
            f"{np.mean(line['alone']) / count:.3f}",
            f"{covered[0] / count:.3f}",
            f"**{Rate(covered[-1], count)}**",
            random,
            str(count - covered[-1]),
        )
        yield f"| {' | '.join(cells)} |"


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """A panel for each pool: the share covered against the number of members, with 95 % intervals."""
    figure, panels = plt.subplots(
        1, len(lines), figsize=(4 * len(lines), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, line in zip(panels[0], lines, strict=True):
        curves = {"members": line["covered"]} | {f"random, {norm}": hits for norm, hits in line["random"].items()}
        for name, hits in curves.items():
            rates, numbers = [Rate(each, line["num_images"]) for each in hits], range(1, len(hits) + 1)
            low, high = zip(*(rate.interval for rate in rates), strict=True)
            style = "-o" if name == "members" else "--o"
            axes.plot(numbers, [rate.rate for rate in rates], style, label=name, markersize=4)
            axes.fill_between(numbers, low, high, alpha=0.15)
        axes.set(title=f"{line['pool']}\n{line['num_images']:,} images", xlabel="members, taken greedily", ylim=(0, 1))
        axes.title.set_fontsize(9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("images that at least one fools")
    panels[0][0].legend(fontsize=8, loc="lower right")
    save_figure(figure, path)


if __name__ == "__main__":
    main()
