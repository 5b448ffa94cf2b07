"""Targeted perturbations: ours, a gradient attack on the target's cross-entropy, and ART's. See docs/targets.md.

    python benchmarks/targeted.py --networks resnet20 --tune     # constants of the others, on held-in images, first
    python benchmarks/targeted.py --networks resnet20            # ten targets, five seeds; what is in the output already is not repeated
    python benchmarks/targeted.py --table

*Entropy* is our schedule, momentum, repetition, steps and corner with the gradient of the target's cross-entropy in place of our
increments. *ART* is TargetedUniversalPerturbation (Hirano and Takemoto, 2019) with FGSM, ended when its evaluations are spent. ℓ∞ 10.
One process, one thread; neither Ray nor MLflow.
"""

import json
import random
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
import tyro
from comparison.attacks import Counting
from comparison.bench import Bench, stamp
from comparison.intervals import interval
from comparison.opponents import EntropyWorkers
from comparison.rows import MAX_LABEL_SHARE, NO_CLAMP
from torch import Tensor, nn

from uap_dist.method.config import ComputeConfig
from uap_dist.method.norms import random_of_same_norms
from uap_dist.method.rates import FOOLING, TARGETED, Goal, Rate
from uap_dist.rounds.loop import compute
from uap_dist.rounds.plan import count_rounds
from uap_dist.workers.dataset import Dataset, classify
from uap_dist.workers.local import LocalWorkers

Method = Literal["ours", "entropy", "art"]
RADIUS, BUDGET = 10.0, 8_000
TITLES: dict[Method, str] = {"ours": "ours", "entropy": "entropy", "art": "ART"}
# chosen before anything was measured: all ten classes of CIFAR-10, every hundredth of ImageNet
TARGETS = {"cifar": tuple(range(10)), "imagenet": tuple(range(50, 1_000, 100))}
HEADS = ("network, evaluations", "method", "targeted success, held out", "lead of ours, paired", "of the worst target")
HEADS += ("fooling rate", "success of random signs", "targets", "seeds", "runs")
Constants = dict[str, Any]
# tried with --tune; the first is what is used until CHOSEN names another
GRID: dict[Method, tuple[Constants, ...]] = {
    "entropy": tuple({"step": step, "clamp": clamp} for clamp in (NO_CLAMP, 12.0) for step in (1.0, 0.5, 2.0, 4.0)),
    "art": tuple({"eps": eps} for eps in (1.0, 0.5, 2.0, 5.0, 10.0, 20.0)),
}
CHOSEN: dict[tuple[str, Method], Constants] = {  # by network, from the table of --tune
    ("resnet20", "entropy"): {"step": 2.0, "clamp": NO_CLAMP},
    ("resnet20", "art"): {"eps": 1.0},
    ("squeezenet", "entropy"): {"step": 2.0, "clamp": NO_CLAMP},
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure, or show what has been measured."""

    networks: tuple[str, ...] = ("resnet20", "squeezenet", "lite0")
    """Names in networks.py."""
    methods: tuple[Method, ...] = ("ours", "entropy", "art")
    """Which of them."""
    targets: tuple[int, ...] = ()
    """Labels; if not given, ten of each network, chosen beforehand."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of the training images, their order and views."""
    budget: int = BUDGET
    """Network evaluations of each run."""
    tune: bool = False
    """Measure the constants of the others, by two targets and two seeds, instead of all targets."""
    table: bool = False
    """Print the tables and measure nothing."""
    data: Path = Path("../shared")
    """Folder of the images and networks."""
    output: Path = Path(__file__).with_name("targeted.jsonl")
    """One line of JSON for each run is added here."""


@dataclass(frozen=True)
class Run:
    """One perturbation; `constants` are those of its method as JSON."""

    network: str
    target: int
    method: Method
    budget: int
    constants: str
    seed: int


def main() -> None:
    """Measure what is missing, or show what there is."""
    options = tyro.cli(Options)
    if options.table:
        print("\n".join(tables(options.output)))
        return
    for network in options.networks:
        bench, done = Bench(network, options.data), set(read(options.output))
        for run in runs(network, options):
            if run not in done:
                line = vars(run) | measure(run, bench) | stamp()
                with options.output.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(*vars(run).values(), f"{line['seconds']} s: {Rate(*line['held_out_success'])}", flush=True)


def runs(network: str, options: Options) -> Iterator[Run]:
    """All that the options ask for, target by target and seed by seed, so that what there is can be compared."""
    targets = options.targets or TARGETS["cifar" if network.startswith("resnet") else "imagenet"]
    targets, seeds = (targets[1::5], options.seeds[:2]) if options.tune else (targets, options.seeds)
    for target, seed, method in product(targets, seeds, options.methods):
        for constants in GRID.get(method, ({},)) if options.tune else (chosen(network, method),):
            yield Run(network, target, method, options.budget, json.dumps(constants), seed)


def chosen(network: str, method: Method) -> Constants:
    """The constants of a method; ours has none."""
    return CHOSEN.get((network, method), GRID.get(method, ({},))[0])


def measure(run: Run, bench: Bench) -> dict[str, Any]:
    """Compute one perturbation, and its rates on held-in and held-out images as hits and images that count."""
    train, held_in = bench.split(run.seed)
    train = train.thin(min(train.num_examples, run.budget // MAX_LABEL_SHARE))
    started, goal = time.perf_counter(), Goal(run.target)
    v, num_evaluations = attack(run, bench, train)
    line = {"evaluations": num_evaluations, "seconds": round(time.perf_counter() - started, 1)}
    noise = random_of_same_norms(v, seed=run.seed)["linf"]
    for name, images, shown in (
        ("held_in", held_in, v),
        ("held_out", bench.held_out, v),
        ("random", bench.held_out, noise),
    ):
        labels = classify(LocalWorkers(bench.worker), images, shown.numpy()).labels
        rates = goal.rates(images.clean.labels, labels)
        line |= {f"{name}_success": tuple(vars(rates[TARGETED]).values())}
        line |= {f"{name}_fooling": tuple(vars(rates[FOOLING]).values())}
    return line


def attack(run: Run, bench: Bench, train: Dataset) -> tuple[Tensor, int]:
    """V as the method delivers it (C×H×W, pixels), and the network evaluations that it took, clean labels included."""
    constants = json.loads(run.constants)
    if run.method == "art":
        return by_art(run, bench, train, constants["eps"])
    config = ComputeConfig(radius=RADIUS, max_evaluations=run.budget, seed=run.seed, target=run.target)
    workers = LocalWorkers(bench.worker)
    if run.method == "entropy":
        workers = EntropyWorkers(bench.worker, constants["clamp"])
        config = with_first_step(config, constants["step"], train)
    elsewhere = train.take(np.flatnonzero(train.clean.labels != run.target)[:1])  # rates are measured by the caller
    (final,) = deque(compute(workers, train, elsewhere, config), maxlen=1)
    return final.perturbation, final.num_evaluations


def with_first_step(config: ComputeConfig, factor: float, train: Dataset) -> ComputeConfig:
    """The config with the first step that its run would have, times a factor."""
    steps = config.steps(count_rounds(train.sizes, config), train.shape)
    assert steps is not None
    return replace(config, step_size=factor * steps.first_size)


class Spent(Exception):
    """The network evaluations are."""


class Scaled(Counting):
    """Takes images of 0..1 and counts; raises Spent when the evaluations are spent."""

    def __init__(self, network: nn.Module, budget: int) -> None:
        super().__init__(network)
        self.budget = budget

    def forward(self, images: Tensor) -> Tensor:
        """As the network of 255 times the images."""
        if self.num_forward + self.num_backward >= self.budget:
            raise Spent
        return super().forward(255 * images)


def by_art(run: Run, bench: Bench, train: Dataset, eps: float) -> tuple[Tensor, int]:
    """ART's TargetedUniversalPerturbation with FGSM steps of `eps` pixels, passes without end until all is spent.

    Its clean labels are counted as its code asks for them: once; its rates after each pass are counted, too.
    """
    from art.attacks.evasion import TargetedUniversalPerturbation, targeted_universal_perturbation
    from art.estimators.classification import PyTorchClassifier

    pixels = [bench.worker.pixels(train.examples(s, range(n))) for s, n in enumerate(train.sizes)]
    x = np.concatenate(pixels)[train.clean.labels != run.target].astype(np.float32) / 255
    num_labels = bench.worker.classifier.count_labels(train.shape)
    counting = Scaled(bench.worker.classifier, run.budget)
    estimator = PyTorchClassifier(
        counting, nn.CrossEntropyLoss(), tuple(train.shape), num_labels, clip_values=(0, 1), device_type="cpu"
    )
    fgsm = {"eps": eps / 255, "targeted": True, "batch_size": 1}
    made = TargetedUniversalPerturbation(
        estimator, "fgsm", fgsm, delta=0.0, max_iter=run.budget, eps=RADIUS / 255, norm=np.inf
    )
    newest, project = [np.zeros_like(x[:1])], targeted_universal_perturbation.projection

    def keep(*given: Any) -> np.ndarray:
        newest[0] = project(*given)
        return newest[0]

    random.seed(run.seed)  # it draws the order of the images from there
    with patch.object(targeted_universal_perturbation, "projection", keep), suppress(Spent):
        made.generate(x, np.eye(num_labels, dtype=np.float32)[np.full(len(x), run.target)])
    return torch.from_numpy(255 * newest[0][0]).float(), counting.num_forward + counting.num_backward


def read(path: Path) -> dict[Run, dict[str, Any]]:
    """Runs that are in a file, and their lines."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {Run(**{name: line[name] for name in Run.__annotations__}): line for line in lines}


def tables(path: Path) -> Iterator[str]:
    """Markdown: for each network and budget the methods as they are chosen; for each target; and what --tune has tried."""
    found = read(path)
    groups = dict.fromkeys((run.network, run.budget) for run in found)
    yield f"| {' | '.join(HEADS)} |"
    yield "| --- " * len(HEADS) + "|"
    for network, budget in groups:
        own = {run: line for run, line in found.items() if (run.network, run.budget) == (network, budget)}
        yield from method_rows(network, budget, own)
    yield from [
        "",
        "| network, evaluations | target | " + " | ".join(TITLES.values()) + " | random |",
        "| --- " * 6 + "|",
    ]
    for network, budget in groups:
        own = {run: line for run, line in found.items() if (run.network, run.budget) == (network, budget)}
        for target in sorted({run.target for run in own}):
            rates = [rates_of(own, method, "held_out_success") for method in TITLES]
            rates.append(rates_of(own, "ours", "random_success"))
            cells = [[value for (label, _), value in each.items() if label == target] for each in rates]
            shown = [f"{mean(each):.3f} ({len(each)})" if each else "" for each in cells]
            yield f"| {network}, {budget:,} | {target} | {' | '.join(shown)} |"
    yield from [
        "",
        "| network, evaluations | method, constants | targeted success, held in | runs |",
        "| --- " * 4 + "|",
    ]
    for network, budget, method in dict.fromkeys((run.network, run.budget, run.method) for run in found):
        yield from tried_rows(network, budget, method, found)


def method_rows(network: str, budget: int, own: dict[Run, dict[str, Any]]) -> Iterator[str]:
    """A row for each method: means over its runs, and over those of which ours has the same target and seed that of the difference."""
    ours = rates_of(own, "ours", "held_out_success")
    for method in TITLES:
        found = rates_of(own, method, "held_out_success")
        if not found:
            continue
        targets, seeds = ({each[i] for each in found} for i in (0, 1))
        worst = min(mean(rate for (own_target, _), rate in found.items() if own_target == t) for t in targets)
        leads = [ours[pair] - value for pair, value in found.items() if pair in ours]
        others = [mean(rates_of(own, method, key).values()) for key in ("held_out_fooling", "random_success")]
        yield (
            f"| {network}, {budget:,} | {TITLES[method]} | **{mean(found.values()):.3f}** "
            f"| {interval(leads) if method != 'ours' else ''} | {worst:.3f} | {others[0]:.3f} | {others[1]:.3f} "
            f"| {len(targets)} | {len(seeds)} | {len(found)} |"
        )


def tried_rows(network: str, budget: int, method: Method, found: dict[Run, dict[str, Any]]) -> Iterator[str]:
    """A row for each of the constants that were tried: the mean over the targets and seeds that all of them were tried with."""
    tried: dict[str, dict[tuple[int, int], float]] = {}
    for run, line in found.items():
        if (run.network, run.budget, run.method) == (network, budget, method):
            tried.setdefault(run.constants, {})[run.target, run.seed] = rate(line["held_in_success"])
    common = set.intersection(*map(set, tried.values()))
    if len(tried) > 1 and common:
        for constants, rates in tried.items():
            shown = mean(rates[pair] for pair in common)
            yield f"| {network}, {budget:,} | {TITLES[method]} {constants} | {shown:.3f} | {len(common)} |"


def rates_of(own: dict[Run, dict[str, Any]], method: Method, key: str) -> dict[tuple[int, int], float]:
    """Of a method's runs with the chosen constants, by target and seed."""
    return {
        (run.target, run.seed): rate(line[key])
        for run, line in own.items()
        if run.method == method and run.constants == json.dumps(chosen(run.network, method))
    }


def rate(hits_and_images: list[int]) -> float:
    """Hits by images."""
    hits, images = hits_and_images
    return hits / images


if __name__ == "__main__":
    main()
