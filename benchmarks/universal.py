"""A whole universal perturbation to one held-out fooling rate: ours, SGD-UAP as published, and ART's: benchmarks/deepfool.md.

    pip install -e '.[bench]'
    python benchmarks/universal.py        # about twenty minutes on one core

SqueezeNet 1.0, ℓ∞ 10, 500 training and 500 held-out photographs, one process, one thread. Counted are clean labels and whatever the
method itself does; measuring held-out rates on the way is not.

SGD-UAP is that of comparison/opponents.py. Ours is given budgets from small to large, since its step depends on them. ART's
UniversalPerturbation is given a few images once: a pass over 500 takes hours.
"""

import time
import warnings
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import tyro
from comparison.attacks import Counting
from comparison.opponents import BATCH, sgd_uap
from networks import NETWORKS
from torch import Tensor, nn

from uap_dist.data.patterns import expand_patterns
from uap_dist.method.config import ComputeConfig
from uap_dist.method.rates import Rate
from uap_dist.models.classifier import Classifier
from uap_dist.models.loading import load_classifier
from uap_dist.rounds.loop import compute
from uap_dist.workers.dataset import Dataset, classify, fooling_rate, load_dataset
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.reproducible import set_up_torch
from uap_dist.workers.worker import Worker

RADIUS = 10.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare."""

    rate: float = 0.6
    """Held-out fooling rate to be reached."""
    seeds: tuple[int, ...] = (0, 1)
    """Of the order of images (ours, SGD-UAP)."""
    budgets: tuple[int, ...] = (700, 800, 1000, 1200, 1500, 2000)
    """Of ours, network evaluations, the clean labels of 500 training images among them."""
    max_passes: int = 6
    """Of SGD-UAP."""
    num_art_images: int = 6
    """That ART's perturbation is computed from."""
    data: Path = Path("../shared")
    """Folder of the images and networks."""


@dataclass(frozen=True)
class Outcome:
    """What a method came to."""

    rate: Rate
    seconds: float
    num_evaluations: int


def main() -> None:
    """A line for each method and seed."""
    options = tyro.cli(Options)
    warnings.simplefilter("ignore")
    network = NETWORKS["squeezenet"]
    plain = load_classifier(*network.locate(options.data))
    set_up_torch(1)  # and memory, as a worker's process
    worker = Worker(load_classifier(*network.locate(options.data)), cache_bytes=8 << 30, num_threads=1)
    workers = LocalWorkers(worker)
    train, val = (
        load_dataset(workers, expand_patterns([str(options.data / pattern)]))
        for pattern in (network.train, network.val)
    )
    pixels = torch.cat(
        [torch.tensor(worker.pixels(train.examples(s, range(n)))) for s, n in enumerate(train.sizes)]
    ).float()
    labels = torch.tensor(train.clean.labels)

    print("| | seed | held-out fooling rate | seconds | evaluations |\n| --- | --- | --- | --- | --- |")
    outcomes: dict[str, list[Outcome]] = {"ours": [], "SGD-UAP": []}
    for seed in options.seeds:
        outcomes["ours"].append(by_us(workers, train, val, seed, options))
        outcomes["SGD-UAP"].append(by_sgd(plain, workers, val, pixels, labels, seed, options))
        for name, found in outcomes.items():
            print_line(name, str(seed), found[-1])
    art = by_art(plain, workers, val, pixels[: options.num_art_images], options)
    print_line(f"ART, {options.num_art_images} images once", "–", art)
    seconds = {name: float(np.mean([one.seconds for one in found])) for name, found in outcomes.items()}
    cost = {name: float(np.mean([one.num_evaluations for one in found])) for name, found in outcomes.items()}
    print(
        f"\nMean over seeds: ours {seconds['ours']:.0f} s and {cost['ours']:.0f} evaluations; SGD-UAP takes "
        f"{seconds['SGD-UAP'] / seconds['ours']:.1f} times as long and {cost['SGD-UAP'] / cost['ours']:.1f} times as many; "
        f"ART had taken {art.seconds / seconds['ours']:.1f} times as long when it was at {art.rate.rate:.3f}."
    )


def print_line(name: str, seed: str, found: Outcome) -> None:
    """Of the table."""
    print(f"| {name} | {seed} | {found.rate} | {found.seconds:.0f} | {found.num_evaluations:,} |", flush=True)


def by_us(workers: LocalWorkers, train: Dataset, val: Dataset, seed: int, options: Options) -> Outcome:
    """The smallest budget that reaches the rate; its run alone is counted."""
    for budget in options.budgets:
        started = time.perf_counter()
        classify(workers, train, np.zeros(train.shape, np.float32))  # the clean labels, which were there already
        seconds = time.perf_counter() - started
        for report in compute(workers, train, val, ComputeConfig(seed=seed, max_evaluations=budget)):
            seconds += report.seconds
        assert report.evaluation is not None
        outcome = Outcome(report.evaluation.val, seconds, report.num_evaluations)
        if outcome.rate.rate >= options.rate:
            break
    return outcome


def by_sgd(
    classifier: Classifier,
    workers: LocalWorkers,
    val: Dataset,
    pixels: Tensor,
    labels: Tensor,
    seed: int,
    options: Options,
) -> Outcome:
    """Until the rate is reached, looked at after every pass."""
    started = time.perf_counter()
    with torch.no_grad():
        for x in pixels.split(BATCH):
            classifier(x)  # the clean labels
    seconds, num_evaluations = time.perf_counter() - started, len(pixels)
    attempts = sgd_uap(classifier, pixels, labels, seed=seed, norm="linf", radius=RADIUS)
    num_batches = -(-len(pixels) // BATCH)
    for _ in range(options.max_passes):
        started = time.perf_counter()
        *_, (v, _) = islice(attempts, num_batches)
        seconds += time.perf_counter() - started
        num_evaluations += 2 * len(pixels)
        rate = fooling_rate(val, classify(workers, val, v.numpy()))
        if rate.rate >= options.rate:
            break
    return Outcome(rate, seconds, num_evaluations)


def by_art(classifier: nn.Module, workers: LocalWorkers, val: Dataset, pixels: Tensor, options: Options) -> Outcome:
    """One pass over some images, with DeepFool as its users get it but for ten iterations at most."""
    from art.attacks.evasion import UniversalPerturbation
    from art.estimators.classification import PyTorchClassifier

    counting = Counting(classifier)
    estimator = PyTorchClassifier(
        nn.Sequential(Scale(), counting),
        nn.CrossEntropyLoss(),
        tuple(val.shape),
        1000,
        clip_values=(0, 1),
        device_type="cpu",
    )
    deepfool = {"max_iter": 10, "epsilon": 0.02, "nb_grads": 10, "verbose": False}
    attack = UniversalPerturbation(
        estimator,
        "deepfool",
        deepfool,
        delta=1 - options.rate,
        max_iter=1,
        eps=RADIUS / 255,
        norm=np.inf,
        verbose=False,
    )
    started = time.perf_counter()
    attack.generate((pixels / 255).numpy())
    seconds = time.perf_counter() - started
    assert attack.noise is not None
    rate = fooling_rate(val, classify(workers, val, (255 * attack.noise[0]).astype(np.float32)))
    return Outcome(rate, seconds, counting.num_forward + counting.num_backward)


class Scale(nn.Module):
    """0..1 to pixels."""

    def forward(self, images: Tensor) -> Tensor:
        """Times 255."""
        return 255 * images


if __name__ == "__main__":
    main()
