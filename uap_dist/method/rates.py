"""Fooling rates and other proportions of examples, with 95 % intervals, and the goal that says what they are of."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, reduce
from operator import and_, or_
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from uap_dist.errors import ConfigError
from uap_dist.models.classes import find_label, find_labels, name_with_label
from uap_dist.models.several import WORST, of_network, split_kind

# kinds of rates, by which metrics and columns are named
FOOLING, TARGETED, ATTACKED, SPARED = "fooling", "targeted_success", "attacked_fooling", "spared_fooling"
RATE_TITLES = {
    TARGETED: "targeted success rate",
    ATTACKED: "fooling rate of attacked classes",
    SPARED: "fooling rate of spared classes",
    FOOLING: "fooling rate",
}

Labels = TypeVar("Labels", np.ndarray, Tensor)


@cache  # a curve of thousands of rounds asks for few different ones, each of which takes half a millisecond
def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion.

    Raises:
        ConfigError: `total` is not positive, or `successes` is outside 0..total.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    from scipy.stats import binomtest  # imported here because it takes half a second

    if not 0 <= successes <= total or total == 0:
        raise ConfigError(f"{successes} of {total} is not a share")
    interval = binomtest(successes, total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Rate:
    """A share of examples, such as that of the fooled ones (label of clip(x + v, 0, 255) ≠ clean label).

    Attributes:
        num_hits: number of examples that are fooled, get the target, or are classified correctly.
        num_examples: number of all examples that count.
    """

    num_hits: int
    num_examples: int

    @property
    def rate(self) -> float:
        """The proportion, between 0 and 1."""
        return self.num_hits / self.num_examples

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson score interval."""
        return wilson_interval(self.num_hits, self.num_examples)

    def point(self, name: str, kind: str = FOOLING) -> dict[str, float]:
        """The rate and its count, by the names that MLflow and the plots use; the count alone where it is zero.

        Args:
            name: of the examples, such as val.
            kind: of rate, see `Goal.kinds`.
        """
        count = {f"num_images/{_examples(name, kind)}": float(self.num_examples)}
        return {f"{kind}_rate/{name}": self.rate} | count if self.num_examples else count

    def metrics(self, name: str, kind: str = FOOLING) -> dict[str, float]:
        """The same with the rate's interval."""
        (low, high), examples = self.interval, _examples(name, kind)
        return self.point(name, kind) | {f"interval/{examples}_low": low, f"interval/{examples}_high": high}

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, float], name: str, kind: str = FOOLING) -> "Rate":
        """The rate that stands in metrics under these names; one of no examples if there is none."""
        num_examples = int(metrics.get(f"num_images/{_examples(name, kind)}") or 0)
        return cls(round(metrics[f"{kind}_rate/{name}"] * num_examples), num_examples) if num_examples else cls(0, 0)

    def __str__(self) -> str:
        """Rate, interval and count, as printed everywhere."""
        low, high = self.interval
        return f"{self.rate:.3f} [{low:.3f}, {high:.3f}] of {self.num_examples}"


Rates = Mapping[str, Rate]  # by kind, that of the goal first


def _examples(name: str, kind: str) -> str:
    return name if kind == FOOLING else f"{name}_{kind}"


@dataclass(frozen=True)
class Goal:
    """What images shall be taken for under a perturbation.

    Attributes:
        target: label that the attacked images shall get; None where any other than their clean label will do.
        only: labels whose images are attacked; empty for all that are not spared.
        spare: labels whose images shall keep them; empty for all others than `only`, or none if that is empty, too.
        spare_weight: of each spared image in the sum of the steps; an attacked one has 1.
        networks: S names of the networks that v is computed for, where they are several; empty for one. Labels are then N×S.
    """

    target: int | None = None
    only: tuple[int, ...] = ()
    spare: tuple[int, ...] = ()
    spare_weight: float = 1.0
    networks: tuple[str, ...] = ()

    @classmethod
    def from_provenance(cls, provenance: Mapping[str, Any]) -> "Goal":
        """That of a saved perturbation; without provenance it is to fool all images."""
        only, spare = (tuple(provenance.get(name) or ()) for name in ("only_classes", "spare_classes"))
        return cls(provenance.get("target"), only, spare)

    @classmethod
    def of_names(
        cls,
        target: int | str | None,
        only: Sequence[int | str],
        spare: Sequence[int | str],
        class_names: Sequence[str],
        num_classes: int,
        *,
        network: str = "",
    ) -> "Goal":
        """That of labels and names of a network's classes.

        Args:
            target: see `Goal`.
            only: see `Goal`.
            spare: see `Goal`.
            class_names: of the network's labels; empty if unknown.
            num_classes: how many labels it has.
            network: its name, for messages; empty where there is only one.

        Raises:
            ConfigError: one is no class of the network, or no class is left to attack or to spare.
        """
        known, whose = (class_names, num_classes), f" for {network}" if network else ""
        label = None if target is None else find_label(target, *known, option=f"target{whose}")
        attacked, spared = (
            find_labels(some, *known, option=f"{option}{whose}")
            for option, some in (("--only-classes", only), ("--spare-classes", spare))
        )
        goal = cls(label, attacked, spared)
        goal.check(num_classes)
        return goal

    def check(self, num_classes: int) -> None:
        """Raise ConfigError where, of so many classes, one is both attacked and spared, none is left to attack, or none to spare."""
        both, labels = sorted({*self.only} & {*self.spare}), np.arange(num_classes)
        if both:
            raise ConfigError(f"label {both[0]} is to be attacked (--only-classes) and spared (--spare-classes)")
        if self.has_classes and not self.spares(labels).any():
            raise ConfigError(f"--only-classes has all {num_classes} classes; leave it out")
        if not self.attacks(labels).any():
            raise ConfigError(f"--spare-classes has all {num_classes} classes; leave some to attack")
        if not self.pushes(labels).any():
            raise ConfigError(
                f"only images of class {self.target} are to be attacked, and that is the target (--target); attack other classes"
            )

    def provenance(self) -> dict[str, Any]:
        """Inverse of `from_provenance`."""
        return {"target": self.target, "only_classes": self.only, "spare_classes": self.spare}

    @property
    def labels(self) -> tuple[int, ...]:
        """All that it names."""
        return (*(() if self.target is None else (self.target,)), *self.only, *self.spare)

    @property
    def has_classes(self) -> bool:
        """Whether some classes are attacked and others are not."""
        return bool(self.only or self.spare)

    def of_networks(self, networks: tuple[str, ...]) -> "Goal":
        """The same goal for these networks."""
        return replace(self, networks=networks)

    @cached_property
    def _own_kinds(self) -> tuple[str, ...]:
        targeted = () if self.target is None else (TARGETED,)
        return (*targeted, *((ATTACKED, SPARED) if self.has_classes else ()), FOOLING)

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of rates that say how far the goal is reached, its own first; of several networks each one's before that of all.

        An image counts as a hit of all networks if it is one of each; of spared classes, if it is one of any.
        """
        return tuple(
            each for kind in self._own_kinds for each in (*(of_network(kind, name) for name in self.networks), kind)
        )

    @property
    def num_networks(self) -> int:
        """S, or 1."""
        return max(1, len(self.networks))

    def of_each(self, name: str) -> tuple[str, ...]:
        """The name of a quantity that each network has one of: itself, or with the names of the networks if they are several."""
        return tuple(of_network(name, network) for network in self.networks) or (name,)

    def attacks(self, clean: Labels) -> Labels:
        """Mask of the images (N, bool) of attacked classes, by their clean labels."""
        if self.only:
            return _among(clean, self.only)
        return ~_among(clean, self.spare) if self.spare else clean == clean

    def spares(self, clean: Labels) -> Labels:
        """Mask of the images (N, bool) of spared classes, by their clean labels."""
        if self.spare:
            return _among(clean, self.spare)
        return ~_among(clean, self.only) if self.only else clean != clean

    def pushes(self, clean: Labels) -> Labels:
        """Mask of the images (N, bool) that shall get another label: the attacked ones but those with the target's label."""
        return self.attacks(clean) if self.target is None else self.attacks(clean) & (clean != self.target)

    def aims(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        """What the step of each image does, by their clean labels (N).

        Returns:
            N labels whose log-odds it changes, and N factors: positive ones raise them, negative ones lower them, 0 leaves out the image.
        """
        if self.target is None and not self.has_classes:
            return clean, torch.full_like(clean, -1)
        pushed, spared = self.pushes(clean), self.spares(clean)
        factors = self.spare_weight * spared.float()
        if self.target is None:
            return clean, factors - pushed.float()
        return clean.where(spared, self.target), factors + pushed.float()

    def balanced(self, clean: np.ndarray) -> float:
        """The weight of spared images with which they count as much as the pushed ones; by the clean labels of all images."""
        num_spared = int(self.spares(clean).sum())
        return int(self.pushes(clean).sum()) / num_spared if num_spared else 1.0

    def hits(self, clean: Labels, perturbed: Labels) -> dict[str, tuple[Labels, Labels]]:
        """For each kind of rate, by clean and perturbed labels (N): masks of the images that are hits, and of those that count."""
        own = self._hits(clean, perturbed)
        if not self.networks:
            return own
        found: dict[str, tuple[Labels, Labels]] = {}
        for kind, (hits, counts) in own.items():
            each = [(hits[..., number], counts[..., number]) for number in range(len(self.networks))]
            found |= {of_network(kind, name): masks for name, masks in zip(self.networks, each, strict=True)}
            all_hits, all_counts = zip(*each, strict=True)
            of_all = reduce(and_, all_counts)
            found[kind] = (reduce(or_, all_hits) & of_all if kind == SPARED else reduce(and_, all_hits), of_all)
        return found

    def _hits(self, clean: Labels, perturbed: Labels) -> dict[str, tuple[Labels, Labels]]:
        """The same for labels of any shape, without regard to networks."""
        fooled: Labels = perturbed != clean
        found: dict[str, tuple[Labels, Labels]] = {}
        if self.target is not None:
            found[TARGETED] = (perturbed == self.target, self.pushes(clean))
        if self.has_classes:
            found |= {ATTACKED: (fooled, self.attacks(clean)), SPARED: (fooled, self.spares(clean))}
        found[FOOLING] = (fooled, clean == clean)
        return {kind: (hits & counts, counts) for kind, (hits, counts) in found.items()}

    def rates(self, clean: np.ndarray, perturbed: np.ndarray) -> dict[str, Rate]:
        """Rates by kind, from clean and perturbed labels (N); without those for which no image counts.

        Of several networks also the worst one's, before the others.
        """
        all_ = {
            k: Rate(int(hits.sum()), int(counts.sum())) for k, (hits, counts) in self.hits(clean, perturbed).items()
        }
        found = {kind: rate for kind, rate in all_.items() if rate.num_examples}
        if not self.networks:
            return found
        rates: dict[str, Rate] = {}
        for kind in self._own_kinds:
            of_each = {name: found[name] for name in self.of_each(kind) if name in found}
            if of_each:
                extreme = max if kind == SPARED else min
                rates[of_network(kind, WORST)] = extreme(of_each.values(), key=lambda each: each.rate)
            rates |= of_each | {name: found[name] for name in (kind,) if name in found}
        return rates


def rate_titles(kinds: Iterable[str], *, capital: bool = False) -> dict[str, str]:
    """Kinds of rates in words, perhaps beginning with a capital letter."""
    split = {kind: split_kind(kind) for kind in kinds}
    are_several = any(network for network, _ in split.values())
    of_all = " of all networks at once" if are_several else ""
    named = {"": of_all, WORST: " of the worst network"}
    titles = {kind: RATE_TITLES[own] + named.get(network, f" of {network}") for kind, (network, own) in split.items()}
    return {kind: title[0].upper() + title[1:] for kind, title in titles.items()} if capital else titles


def goal_in_words(goal: Goal, class_names: Sequence[str]) -> list[str]:
    """Such as ["target goldfish (1)", "attacked: tench (0)", "spared: all others"]; empty where all images are to be fooled."""
    words = [] if goal.target is None else [f"target {name_with_label(goal.target, class_names)}"]
    if goal.has_classes:
        named = [", ".join(name_with_label(label, class_names) for label in some) for some in (goal.only, goal.spare)]
        words += [f"{part}: {names or 'all others'}" for part, names in zip(("attacked", "spared"), named, strict=True)]
    return words


def _among(labels: Labels, classes: tuple[int, ...]) -> Labels:
    """Mask of the labels that are among those classes."""
    if isinstance(labels, Tensor):
        return torch.isin(labels, _on_device(classes, labels.device))
    return np.isin(labels, classes)


@cache
def _on_device(classes: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(classes, device=device)


UNTARGETED = Goal()


def rate_columns(name: str, rate: Rate | None) -> dict[str, Any]:
    """Table columns NAME (the rate), NAME_low, NAME_high (its interval) and NAME_num_images; all None without a rate."""
    values = (None,) * 4 if rate is None else (rate.rate, *rate.interval, rate.num_examples)
    return dict(zip((name, f"{name}_low", f"{name}_high", f"{name}_num_images"), values, strict=True))


def flatten_rates(row: Mapping[str, Any]) -> dict[str, Any]:
    """A table row with `rate_columns` in place of each rate."""
    columns: dict[str, Any] = {}
    for name, value in row.items():
        columns |= rate_columns(name, value) if isinstance(value, Rate) else {name: value}
    return columns


def running_rates(rates: Sequence[Rate], num_examples: int) -> list[Rate]:
    """Running mean of consecutive rates, each pooled with as few before it as cover `num_examples` examples, or with all."""
    hits, examples = (np.cumsum([0, *(getattr(rate, name) for rate in rates)]) for name in ("num_hits", "num_examples"))
    starts = np.maximum(np.searchsorted(examples, examples[1:] - num_examples, side="right") - 1, 0)
    pooled = zip(hits[1:] - hits[starts], examples[1:] - examples[starts], strict=True)
    return [Rate(int(some_hits), int(some_examples)) for some_hits, some_examples in pooled]
