"""How well perturbations work: fooling rate, targeted success and top-1 accuracy of any perturbation on a classifier and a dataset."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import tee

import numpy as np
import torch
from torch import Tensor

from uap_dist.foreign_text import first_few
from uap_dist.method.norms import SYMBOLS, Norm, measure, random_of_same_norms
from uap_dist.method.rates import FOOLING, RATE_TITLES, UNTARGETED, Goal, Rate, Rates, goal_in_words
from uap_dist.perturbations.files import Perturbation
from uap_dist.workers.accuracy import top1
from uap_dist.workers.dataset import Dataset, classify_each
from uap_dist.workers.local import Workers

ZERO = "zero"  # name of the baseline that changes no pixel
SAME_NORM = 0.01  # relative difference up to which two perturbations share a baseline

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """How well one perturbation works on one classifier and dataset.

    Attributes:
        classifier, dataset, perturbation: names.
        is_baseline: whether it is zero or noise (see `baselines`).
        scale: factor that v was multiplied with.
        norm_l2, norm_linf: norms of the scaled v at the classifier's input size, in pixels (0..255).
        rates: by kind: the fooling rate over all images, and those that its goal calls for.
        top1_clean, top1: top-1 accuracy without and with the perturbation, over the images whose class is known; None if there
            are none.
        goal: the perturbation's target and classes in words; empty if it is to fool all images.
        is_own: whether the perturbation was computed for this classifier, alone or with others.
        labels: N, what the images are taken for under it.
    """

    classifier: str
    dataset: str
    perturbation: str
    is_baseline: bool
    scale: float
    norm_l2: float
    norm_linf: float
    rates: Rates
    top1_clean: Rate | None
    top1: Rate | None
    goal: str = ""
    is_own: bool = False
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, int), repr=False, compare=False)

    @property
    def fooling(self) -> Rate:
        """The fooling rate among `rates`."""
        return self.rates[FOOLING]

    def rates_in_words(self) -> Iterator[str]:
        """Such as "targeted success rate 0.700 […] of 90"; a fooling rate alone goes without saying what it is."""
        for kind, rate in self.rates.items():
            yield f"{RATE_TITLES[kind]} {rate}" if len(self.rates) > 1 else str(rate)


def measure_perturbations(
    workers: Workers,
    classifier: str,
    dataset_name: str,
    dataset: Dataset,
    perturbations: Iterable[Perturbation],
    *,
    scales: Sequence[float] = (1.0,),
    quantize: bool = False,
    class_names: Sequence[str] = (),
    weights_digest: str = "",
) -> Iterator[Measurement]:
    """Yield one measurement for each perturbation and scale.

    Args:
        workers: workers that hold the classifier.
        classifier: its name in tables.
        dataset_name: name of the dataset in tables.
        dataset: images with the classifier's clean labels.
        perturbations: any size; resized to that of the images (`Perturbation.resized`).
        scales: factors that each is multiplied with.
        quantize: whether to round x + v to whole pixel values, as saving to 8 bits does.
        class_names: of the classifier's labels; empty if unknown.
        weights_digest: of the classifier, to tell whether a perturbation was computed for it.
    """
    scaled = ((each, scale, scale * each.resized(dataset.shape)) for each in perturbations for scale in scales)
    measured, shown = tee(scaled)
    found = classify_each(workers, dataset, (v.numpy() for *_, v in shown), quantize=quantize)
    for (perturbation, scale, v), predictions in zip(measured, found, strict=True):
        goal, labels = perturbation.goal, predictions.labels
        yield Measurement(
            classifier,
            dataset_name,
            perturbation.name,
            is_baseline(perturbation),
            scale,
            measure(v, "l2"),
            measure(v, "linf"),
            goal.rates(dataset.clean.labels, labels),
            top1(dataset, dataset.clean.labels),
            top1(dataset, labels),
            "; ".join(goal_in_words(goal, class_names)),
            bool(weights_digest) and perturbation.is_for(weights_digest),
            labels,
        )


def baselines(perturbations: Iterable[Perturbation], shape: tuple[int, ...], seed: int) -> list[Perturbation]:
    """Baselines for perturbations: zero, and for each of them noise of the same ℓ∞ norm and noise of the same ℓ2 norm.

    Perturbations of one goal whose norms differ by at most 1 % share their noise, which has their goal and is named after the
    first of them. Norms are taken after resizing to the images (see `Perturbation.resized`).

    Args:
        perturbations: computed perturbations.
        shape: C×H×W of the images.
        seed: seed of the noise.
    """
    found = [Perturbation(ZERO, torch.zeros(shape), {"baseline": True})]
    sizes: list[tuple[Norm, Goal, float]] = []
    for perturbation in perturbations:
        v, goal = perturbation.resized(shape), perturbation.goal
        noise = random_of_same_norms(v, seed=seed)
        for norm in ("linf", "l2") if noise["l2"] is not noise["linf"] else ("linf",):
            size = measure(v, norm)
            alike = (known for *kind, known in sizes if kind == [norm, goal])
            if not any(abs(size - known) <= SAME_NORM * known for known in alike):
                sizes.append((norm, goal, size))
                name = f"random, {SYMBOLS[norm]} norm of {perturbation.name}"
                found.append(Perturbation(name, noise[norm], {"baseline": True} | goal.provenance()))
    return found


def aim(perturbations: Iterable[Perturbation], goal: Goal, classifier: str, num_labels: int) -> list[Perturbation]:
    """Perturbations as they are measured on a classifier: with the goal of their files; those whose files name none, with the one given.

    Args:
        perturbations: of any networks.
        goal: of those that are only to fool all images by what their files say.
        classifier: its name, for messages.
        num_labels: how many it has. A perturbation whose own goal names others is measured without one.
    """
    found, others = [], []
    for each in perturbations:
        own = each.goal
        outside = [label for label in own.labels if label >= num_labels]
        if outside:
            logger.warning(
                "%s is not measured by its goal, which names label %d: %s has %d labels",
                *(each.name, outside[0], classifier, num_labels),
            )
            found.append(each.aimed(UNTARGETED))
        elif own == UNTARGETED:
            found.append(each.aimed(goal))
        else:
            found.append(each)
            if goal not in (UNTARGETED, own):
                others.append(each.name)
    if others:
        logger.warning(
            "measured by the goal of their files, not by the one given: %s",
            first_few(others),
        )
    return found


def measure_noise(
    workers: Workers, dataset: Dataset, noise: Mapping[Norm, Tensor], goal: Goal = UNTARGETED
) -> dict[Norm, Rates]:
    """Rates of noise from `random_of_same_norms`, by norm; one array that serves both norms is measured once."""
    different = {id(v): v.numpy() for v in noise.values()}
    found = classify_each(workers, dataset, different.values())
    rates = {key: goal.rates(dataset.clean.labels, each.labels) for key, each in zip(different, found, strict=True)}
    return {norm: rates[id(v)] for norm, v in noise.items()}


def is_baseline(perturbation: Perturbation) -> bool:
    """Whether it is one of `baselines`."""
    return bool(perturbation.provenance.get("baseline"))
