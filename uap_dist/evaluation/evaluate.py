"""How well perturbations work: fooling rate and top-1 of any of them on a classifier and a dataset."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from uap_dist.method.norms import SYMBOLS, Norm, measure, random_of_same_norms
from uap_dist.method.rates import Rate
from uap_dist.perturbations.files import Perturbation
from uap_dist.workers.accuracy import top1
from uap_dist.workers.dataset import Dataset, classify, fooling_rate
from uap_dist.workers.local import Workers

NOTHING = "zero"  # name of the baseline
NEAR = 0.01  # relative: norms that one baseline serves


@dataclass(frozen=True)
class Measurement:
    """A perturbation on a classifier and a dataset.

    Attributes:
        classifier, dataset, perturbation: names.
        is_baseline: whether nobody computed it.
        scale: what v was multiplied with.
        norm_l2, norm_linf: of what was added, at the classifier's input size, pixels.
        fooling: share of all images whose label is another than their clean one.
        top1_clean, top1: share of the images with a known class that are named rightly, before and after; None without such.
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
    """One measurement for each perturbation and scale.

    Args:
        workers: of the classifier.
        classifier: its name in tables.
        dataset_name: likewise.
        dataset: with its clean labels.
        perturbations: resized to the dataset's input size where theirs is another (`Perturbation.resized`).
        scales: what each is multiplied with.
        quantize: round x + v as saving to 8 bits would.
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
            )


def baselines(perturbations: Iterable[Perturbation], shape: tuple[int, ...], seed: int) -> list[Perturbation]:
    """What perturbations have to be better than: nothing, and for each of them noise that is as large in ℓ∞ and in ℓ2 norm.

    Perturbations whose norms are within a percent of each other share their noise, which is named after the first of them. Noise has
    the norms of the perturbation as it is shown to images of that size (see `Perturbation.resized`).

    Args:
        perturbations: computed ones.
        shape: C×H×W of the images.
        seed: of the noise.
    """
    found = [Perturbation(NOTHING, torch.zeros(shape), {"baseline": True})]
    sizes: list[tuple[Norm, float]] = []
    for perturbation in perturbations:
        noise = random_of_same_norms(perturbation.resized(shape), seed=seed)
        for norm in ("linf", "l2") if noise["l2"] is not noise["linf"] else ("linf",):
            size = measure(perturbation.v, norm)
            if not any(other == norm and abs(size - known) <= NEAR * known for other, known in sizes):
                sizes.append((norm, size))
                name = f"random, {SYMBOLS[norm]} norm of {perturbation.name}"
                found.append(Perturbation(name, noise[norm], {"baseline": True}))
    return found


def measure_noise(workers: Workers, dataset: Dataset, noise: Mapping[Norm, Tensor]) -> dict[Norm, Rate]:
    """Fooling rates by norm of what `random_of_same_norms` gives; noise that stands for both norms is measured once."""
    rates = {id(v): fooling_rate(dataset, classify(workers, dataset, v.numpy())) for v in noise.values()}
    return {norm: rates[id(v)] for norm, v in noise.items()}


def is_baseline(perturbation: Perturbation) -> bool:
    """Whether nobody computed it: see `baselines`."""
    return bool(perturbation.provenance.get("baseline"))
