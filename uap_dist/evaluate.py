"""How well perturbations work: fooling rate and top-1 of any of them on a classifier and a dataset."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from uap_dist.accuracy import top1
from uap_dist.dataset import Dataset, Workers, classify, fooling_rate
from uap_dist.fooling import Rate
from uap_dist.norms import measure, random_perturbation
from uap_dist.perturbations import Perturbation


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


def baselines(shape: tuple[int, ...], radius: float, seed: int) -> list[Perturbation]:
    """Nothing, and noise that reaches ±radius or is as long: what a perturbation has to be better than.

    Args:
        shape: C×H×W.
        radius: pixels.
        seed: of the noise.
    """
    signs = random_perturbation(shape, norm="linf", radius=radius, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    uniform = radius * (2 * torch.rand(shape, generator=generator) - 1)
    gaussian = random_perturbation(shape, norm="l2", radius=measure(signs, "l2"), seed=seed)
    noise: dict[str, Tensor] = {
        "zero": torch.zeros(shape),
        f"random signs ±{radius:g}": signs,
        f"random uniform ±{radius:g}": uniform,
        "random Gaussian, length of the signs": gaussian,
    }
    return [Perturbation(name, v, {"baseline": True}) for name, v in noise.items()]


def is_baseline(perturbation: Perturbation) -> bool:
    """Whether it is one of `baselines`."""
    return bool(perturbation.provenance.get("baseline"))
