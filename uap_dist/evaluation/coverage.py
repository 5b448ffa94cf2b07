"""What a pool covers: the images for which at least one of its members does what it is for, against the number of members."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uap_dist.evaluation.evaluate import Measurement
from uap_dist.foreign_text import escape_markdown
from uap_dist.method.norms import SYMBOLS, Norm, random_of_same_norms
from uap_dist.method.rates import ATTACKED, FOOLING, TARGETED, UNTARGETED, Goal, Rate, rate_columns
from uap_dist.models.names import plain_key
from uap_dist.perturbations.files import Perturbation
from uap_dist.workers.dataset import Dataset, classify_each
from uap_dist.workers.local import Workers

VERBS = {
    FOOLING: "fools",
    TARGETED: "gives the target to",
    ATTACKED: "fools, of attacked classes,",
}  # what a member does


@dataclass(frozen=True)
class Coverage:
    """For which images each member of a pool does what it is for: fool them or, with a target, have them taken for it.

    The share that at least one member fools is what "Cocktail universal adversarial attack" (ECCV 2024) measures of its sets.

    Attributes:
        names: M names of the members.
        is_hit: M×N, bool, for the N images that count.
        labels: N clean labels of these images; of several networks the first one's.
        kind: of the rate whose hits these are.
    """

    names: Sequence[str]
    is_hit: np.ndarray
    labels: np.ndarray
    kind: str = FOOLING

    @classmethod
    def of(cls, names: Sequence[str], goal: Goal, clean: np.ndarray, perturbed: np.ndarray) -> "Coverage":
        """By the labels of all images, clean (N) and under each of M members (M×N); the goal's first rate for which images count.

        Of S networks they are N×S and M×N×S, and an image is a hit if it is one of each.
        """
        found = goal.hits(clean, perturbed)  # hits M×N
        kind, counts = next((kind, counts) for kind, (_, counts) in found.items() if kind in VERBS and counts.any())
        labels = clean[:, 0] if goal.networks else clean
        return cls(names, found[kind][0][:, counts], labels[counts], kind)

    @property
    def suffix(self) -> str:
        """What follows "coverage" in the names of results, which alone is the share of fooled images."""
        return "" if self.kind == FOOLING else f"_{self.kind}"

    @cached_property
    def order(self) -> list[int]:
        """The members as they are taken greedily: each has most hits among the images left, the first among equals."""
        left = np.ones(self.is_hit.shape[1], bool)
        order: list[int] = []
        while len(order) < len(self.names):
            gains = (self.is_hit & left).sum(1)
            gains[order] = -1
            order.append(int(gains.argmax()))
            left &= ~self.is_hit[order[-1]]
        return order

    @cached_property
    def rates(self) -> list[Rate]:
        """The share of images that are hits of at least one of the first 1, 2, …, M members in that order."""
        covered = np.logical_or.accumulate(self.is_hit[self.order])
        return [Rate(int(hits), covered.shape[1]) for hits in covered.sum(1)]


@dataclass(frozen=True)
class PoolCoverage:
    """What a pool covers of a data set on a classifier.

    Attributes:
        classifier, dataset, pool: names.
        coverage: of its members.
        random: of as many random perturbations, by the norm that they share with them.
    """

    classifier: str
    dataset: str
    pool: str
    coverage: Coverage
    random: Mapping[Norm, Coverage]

    def metrics(self) -> dict[str, float]:
        """The share covered by all members and by all random perturbations, by their names in MLflow."""
        where = f"{self.pool}/{self.classifier}/{self.dataset}{self.coverage.suffix.replace('_', '/', 1)}"
        chance = {f"coverage_random_{norm}/{where}": each.rates[-1].rate for norm, each in self.random.items()}
        return {
            plain_key(name): value
            for name, value in ({f"coverage/{where}": self.coverage.rates[-1].rate} | chance).items()
        }

    def sentence(self) -> str:
        """One line of Markdown."""
        last, names = self.coverage.rates[-1], map(escape_markdown, (self.classifier, self.pool))
        chance = ", ".join(
            f"{each.rates[-1].rate:.3f} (same {norm} norm)" for norm, each in by_symbol(self.random).items()
        )
        return (
            "* {}: at least one member of **{}** {} {}".format(*names, VERBS[self.coverage.kind], last)
            + f"; of as many random perturbations: {chance}"
        )


def cover_pools(
    workers: Workers,
    dataset: Dataset,
    perturbations: Sequence[Perturbation],
    measurements: Sequence[Measurement],
    *,
    quantize: bool,
    seed: int,
) -> list[PoolCoverage]:
    """Coverage by each pool of which all members were measured, at scale 1, on a classifier and a data set.

    Args:
        workers: with the classifier.
        dataset: images with their clean labels.
        perturbations: whose `pool` is not empty are the members.
        measurements: of these and other perturbations.
        quantize: as for the measurements.
        seed: of the random perturbations beside the first member.
    """
    full = {m.perturbation: m for m in measurements if m.scale == 1}
    found = []
    for pool in dict.fromkeys(p.pool for p in perturbations if p.pool and p.name in full):
        members = [p for p in perturbations if p.pool == pool]
        first = full[members[0].name]
        goal, labels = common_goal(members), np.stack([full[p.name].labels for p in members])
        coverage = Coverage.of([p.name for p in members], goal, dataset.clean.labels, labels)
        shown = torch.stack([p.resized(dataset.shape) for p in members])
        random = measure_random_coverage(workers, dataset, shown, goal, quantize=quantize, seed=seed)
        found.append(PoolCoverage(first.classifier, first.dataset, pool, coverage, random))
    return found


def common_goal(members: Sequence[Perturbation]) -> Goal:
    """That of all members; where they have several, to fool all images."""
    goals = {p.goal for p in members}
    return goals.pop() if len(goals) == 1 else UNTARGETED


def measure_random_coverage(
    workers: Workers,
    dataset: Dataset,
    perturbations: Tensor,
    goal: Goal = UNTARGETED,
    *,
    quantize: bool = False,
    seed: int = 0,
) -> dict[Norm, Coverage]:
    """Coverage by as many random perturbations: for each member noise of its ℓ∞ and of its ℓ2 norm, all of different seeds.

    Args:
        workers: with the classifier.
        dataset: images with their clean labels.
        perturbations: M×C×H×W, pixels.
        goal: of the members.
        quantize: round perturbed images to whole pixel values.
        seed: of the noise beside the first member; the next ones follow.
    """
    clean, names = dataset.clean.labels, [str(number) for number in range(len(perturbations))]
    noise = [random_of_same_norms(v, seed=number) for number, v in enumerate(perturbations, seed)]
    found: dict[Norm, Coverage] = {}
    for norm in ("linf", "l2"):
        if norm == "l2" and all(each["l2"] is each["linf"] for each in noise):
            found["l2"] = found["linf"]
            break
        shown = classify_each(workers, dataset, (each[norm].numpy() for each in noise), quantize=quantize)
        found[norm] = Coverage.of(names, goal, clean, np.stack([each.labels for each in shown]))
    return found


def by_symbol(random: Mapping[Norm, Coverage]) -> dict[str, Coverage]:
    """The same by the norms' symbols, for pictures; where all random perturbations have both norms, once under both."""
    if random["linf"] is random["l2"]:
        return {f"{SYMBOLS['linf']} and {SYMBOLS['l2']}": random["linf"]}
    return {SYMBOLS[norm]: each for norm, each in random.items()}


def coverage_rows(coverage: Coverage, random: Mapping[Norm, Coverage]) -> list[dict[str, Any]]:
    """A row for each number of members: the member taken last, the share covered, and that of as many random perturbations."""
    return [
        {"num_members": number + 1, "member": coverage.names[coverage.order[number]], "kind": coverage.kind}
        | rate_columns("covered", rate)
        | {
            column: value
            for name, other in random.items()
            for column, value in rate_columns(f"covered_random_{name}", other.rates[number]).items()
        }
        for number, rate in enumerate(coverage.rates)
    ]


def class_rows(coverage: Coverage, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """A row for each clean label: how many images have it, and the share covered by the first and by all members; least covered first.

    Args:
        coverage: of a pool.
        names: of the labels.
    """
    first, covered = coverage.is_hit[coverage.order[0]], np.logical_or.reduce(coverage.is_hit)
    rows = []
    for label in np.unique(coverage.labels).tolist():
        own = np.flatnonzero(coverage.labels == label)
        row = {"clean_label": label, "clean_name": names[label], "kind": coverage.kind}
        row |= rate_columns("covered", Rate(int(covered[own].sum()), len(own)))
        rows.append(row | {"covered_by_first": float(first[own].mean())})
    return sorted(rows, key=lambda row: (row["covered"], row["clean_label"]))
