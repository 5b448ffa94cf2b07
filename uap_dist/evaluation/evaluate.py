"""How well perturbations work: fooling rate and top-1 accuracy of any perturbation on a classifier and a dataset."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from uap_dist.method.norms import SYMBOLS, Norm, measure, random_of_same_norms
from uap_dist.method.rates import Rate
from uap_dist.perturbations.files import Perturbation
from uap_dist.workers.accuracy import top1
from uap_dist.workers.dataset import Dataset, classify, fooling_rate
from uap_dist.workers.local import Workers

NOTHING = "zero"  # name of the baseline that changes no pixel
SAME_NORM = 0.01  # relative difference up to which two perturbations share a baseline


@dataclass(frozen=True)
class Measurement:
    """How well one perturbation works on one classifier and dataset.

    Attributes:
        classifier, dataset, perturbation: names.
        is_baseline: whether it is zero or noise (see `baselines`).
        scale: factor that v was multiplied with.
        norm_l2, norm_linf: norms of the scaled v at the classifier's input size, in pixels (0..255).
        fooling: fooling rate over all images.
        top1_clean, top1: top-1 accuracy without and with the perturbation, over the images whose class is known; None if there
            are none.
        is_fooled: N images, bool.
    """

    classifier: str
    dataset: str
    perturbation: str
    is_baseline: bool
    scale: float
    norm_l2: float
    norm_linf: float
    fooling: Rate
    top1_clean: Rate | None
    top1: Rate | None
    is_fooled: np.ndarray = field(default_factory=lambda: np.zeros(0, bool), repr=False, compare=False)


def measure_perturbations(
    workers: Workers,
    classifier: str,
    dataset_name: str,
    dataset: Dataset,
    perturbations: Iterable[Perturbation],
    *,
    scales: Sequence[float] = (1.0,),
    quantize: bool = False,
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
    """
    for perturbation in perturbations:
        for scale in scales:
            v = scale * perturbation.resized(dataset.shape)
            labels = classify(workers, dataset, v.numpy(), quantize=quantize)
            yield Measurement(
                classifier,
                dataset_name,
                perturbation.name,
                is_baseline(perturbation),
                scale,
                measure(v, "l2"),
                measure(v, "linf"),
                fooling_rate(dataset, labels),
                top1(dataset, dataset.clean.labels),
                top1(dataset, labels.labels),
                labels.labels != dataset.clean.labels,
            )


def baselines(perturbations: Iterable[Perturbation], shape: tuple[int, ...], seed: int) -> list[Perturbation]:
    """Baselines for perturbations: zero, and for each of them noise of the same ℓ∞ norm and noise of the same ℓ2 norm.

    Perturbations whose norms differ by at most 1 % share their noise, which is named after the first of them. Norms are
    taken after resizing to the images (see `Perturbation.resized`).

    Args:
        perturbations: computed perturbations.
        shape: C×H×W of the images.
        seed: seed of the noise.
    """
    found = [Perturbation(NOTHING, torch.zeros(shape), {"baseline": True})]
    sizes: list[tuple[Norm, float]] = []
    for perturbation in perturbations:
        noise = random_of_same_norms(perturbation.resized(shape), seed=seed)
        for norm in ("linf", "l2") if noise["l2"] is not noise["linf"] else ("linf",):
            size = measure(perturbation.v, norm)
            if not any(other == norm and abs(size - known) <= SAME_NORM * known for other, known in sizes):
                sizes.append((norm, size))
                name = f"random, {SYMBOLS[norm]} norm of {perturbation.name}"
                found.append(Perturbation(name, noise[norm], {"baseline": True}))
    return found


def measure_noise(workers: Workers, dataset: Dataset, noise: Mapping[Norm, Tensor]) -> dict[Norm, Rate]:
    """Fooling rates of noise from `random_of_same_norms`, by norm; one array that serves both norms is measured once."""
    rates = {id(v): fooling_rate(dataset, classify(workers, dataset, v.numpy())) for v in noise.values()}
    return {norm: rates[id(v)] for norm, v in noise.items()}


def is_baseline(perturbation: Perturbation) -> bool:
    """Whether it is one of `baselines`."""
    return bool(perturbation.provenance.get("baseline"))
