"""How well the summed increments of one half of the images agree with those of the other, by period: benchmarks/rules.md, "Why".

    python benchmarks/agreement.py --network squeezenet

Looks at training images only.
"""

from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from comparison.bench import Bench
from torch import Tensor

from uap_dist.method.config import ComputeConfig
from uap_dist.method.log_odds import log_odds_sum
from uap_dist.method.update import repeat_mean
from uap_dist.rounds.loop import compute
from uap_dist.workers.local import LocalWorkers

BATCH = 24


@dataclass(frozen=True, kw_only=True)
class Options:
    """Print a table."""

    network: str = "squeezenet"
    """One of networks.py."""
    periods: tuple[int, ...] = (8, 16, 24, 32, 64, 112, 224)
    """In pixels; a side of the image: no repetition."""
    num_images: int = 192
    """In two halves."""
    evaluations: int = 1_000
    """Of the runs, without repetition and with the default period, whose ends are looked at beside v = 0."""
    data: Path = Path("../shared")
    """Folder of the images and networks."""


def main() -> None:
    """Cosine of the sums of both halves, and how much of the sums' energy repeats itself."""
    options = tyro.cli(Options)
    bench = Bench(options.network, options.data)
    train, _ = bench.split(0)
    points = [torch.zeros(train.shape)]
    for period in (max(train.shape), None):
        config = ComputeConfig(max_evaluations=train.num_examples + options.evaluations, period=period)
        (final,) = deque(compute(LocalWorkers(bench.worker), train, train.thin(1), config), maxlen=1)
        points.append(final.perturbation)
    some = train.thin(options.num_images)
    pixels = [bench.worker.pixels(some.examples(s, range(n))) for s, n in enumerate(some.sizes)]
    x, labels = torch.cat([torch.tensor(part) for part in pixels]).float(), torch.tensor(some.clean.labels)
    print(f"{options.network}, {options.num_images} images in two halves:\n")
    print(
        "| period | cosine at v = 0 | energy | at the end of a run without repetition | energy | of a run with it | energy |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    sums = [[half_sum(bench, x[start::2], labels[start::2], v) for start in (0, 1)] for v in points]
    for period in options.periods:
        cells = []
        for halves in sums:
            one, other = (repeat_mean(half, period) for half in halves)
            whole = halves[0] + halves[1]
            energy = float((one + other).square().sum() / whole.square().sum())
            cells += [f"{cosine(one, other):.2f}", f"{energy:.3f}"]
        print(f"| {period} | {' | '.join(cells)} |")


def half_sum(bench: Bench, x: Tensor, labels: Tensor, v: Tensor) -> Tensor:
    """Of a step of the log-odds rule, C×H×W float64."""
    parts = [
        log_odds_sum(bench.worker.classifier, x[i : i + BATCH], v, labels[i : i + BATCH], weigh=torch.ones_like).total
        for i in range(0, len(x), BATCH)
    ]
    return torch.stack(parts).double().sum(0)


def cosine(a: Tensor, b: Tensor) -> float:
    """Of the angle between two tensors."""
    return float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))


if __name__ == "__main__":
    main()
