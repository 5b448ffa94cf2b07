"""The rows of benchmarks/rules.py, and the runs of each that are in a file."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any

from uap_dist.method.norms import Norm

RULES = ("ours", "entropy", "tuned", "published", "paper")
TITLES = {
    "ours": "ours",
    "entropy": "ours, cross-entropy",
    "tuned": "SGD-UAP, tuned",
    "published": "SGD-UAP, as published",
    "paper": "the paper's rule",
}
RADII: dict[str, dict[Norm, float]] = {  # of 224×224 and of 32×32 images: alike for each pixel
    "imagenet": {"linf": 10.0, "l2": 2000.0},
    "cifar": {"linf": 10.0, "l2": 285.7},
}
BUDGETS = (1_000, 2_000, 4_000, 8_000, 16_000, 32_000)
SEEDS = (0, 1, 2, 3, 4)
MAX_LABEL_SHARE = 4  # at most a quarter of the budget pays for clean labels, so small budgets get fewer images
NO_CLAMP = 1_000.0  # a cross-entropy that no logits of ours reach


@dataclass(frozen=True)
class Row:
    """A rule on a network, at a norm and a budget."""

    network: str
    norm: Norm
    budget: int
    rule: str

    @property
    def name(self) -> str:
        """As --only selects it."""
        return f"{self.network}-{self.norm}-{self.budget}-{self.rule}"

    @property
    def collection(self) -> str:
        """Of images."""
        return "cifar" if self.network.startswith("resnet") else "imagenet"

    @property
    def config(self) -> dict[str, Any]:
        """Fields of ComputeConfig but the seed, and the clamp if it is not CLAMP; of SGD-UAP as published norm, radius and budget."""
        config = {"norm": self.norm, "radius": RADII[self.collection][self.norm], "max_evaluations": self.budget}
        if self.rule == "paper":
            config |= {"rule": "paper", "round_size": 1, "block_size": 1}  # algorithm 1
        if self.rule == "tuned":
            config |= tuned_config(self.network, self.norm, self.budget)
        return config


def tuned_config(network: str, norm: Norm, budget: int) -> dict[str, Any]:
    """What was searched for SGD-UAP on held-in images, benchmarks/rules_tried.md ("The opponent"); no repetition, which is ours."""
    size = 24
    config: dict[str, Any] = {"period": 224, "augment": "none" if network.startswith("resnet") else "flip-shift"}
    match network, norm:
        case "resnet20" | "resnet56", "linf" if budget > 4_000:
            size, config["step_size"] = 6, 1.7
        case "resnet20", "l2" if budget <= 16_000:
            size, config["clamp"] = 6, NO_CLAMP
        case "resnet56", "l2":
            size = 6
        case "squeezenet", "linf":
            config["clamp"] = NO_CLAMP
        case "squeezenet", "l2" if budget <= 8_000:
            config |= {"clamp": NO_CLAMP, "step_size": 12.37 if budget <= 4_000 else 11.0}  # twice our default
    return config | {"round_size": size, "block_size": size}


ROWS = [
    Row(network, norm, budget, rule)
    for network, norm, budget, rule in product(
        ("resnet20", "resnet56", "squeezenet", "lite0"), ("linf", "l2"), BUDGETS, RULES
    )
]
Runs = dict[tuple[Row, int], dict[str, Any]]  # by row and seed


def read(path: Path) -> Runs:
    """Runs by row and seed; those with another config than the row has now are left out."""
    return {(row, line["seed"]): line for row, line in read_all(path) if row.config == line["config"]}


def read_all(path: Path) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Every run with its row, of whatever config."""
    for line in path.read_text().splitlines() if path.exists() else ():
        found = json.loads(line)
        yield Row(*(found[name] for name in ("network", "norm", "budget", "rule"))), found


def group(rows: list[Row]) -> Iterator[list[Row]]:
    """Rows of one network, norm and budget together."""
    for _, some in groupby(rows, key=lambda row: (row.network, row.norm, row.budget)):
        yield list(some)


def rates_of(row: Row, runs: Runs, images: str) -> dict[int, float]:
    """Fooling rate by seed."""
    return {seed: runs[row, seed][images] for seed in SEEDS if (row, seed) in runs}
