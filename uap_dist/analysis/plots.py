"""Plots of an analysis."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from uap_dist.analysis.boundaries import BoundaryCorrelation
from uap_dist.analysis.phase_transition import Point
from uap_dist.analysis.sample_size import SampleSizePoint
from uap_dist.analysis.text import NORMS
from uap_dist.figures import save_figure
from uap_dist.method.norms import SYMBOLS
from uap_dist.method.rates import Rate


def save_phase_transition(path: Path, points: Sequence[Point]) -> None:
    """Plot fooling rate against ℓ2 and ℓ∞ norm: the mean over the draws of each kind, in the hull of their Wilson intervals."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 5), layout="constrained", sharey=True)
    for axes, norm in zip(panels, NORMS, strict=True):
        own = [point for point in points if point.norm == norm]
        for number, kind in enumerate(dict.fromkeys(point.kind for point in own)):
            colour = f"C{number}"
            some = [point for point in own if point.kind == kind]
            scales = sorted({point.scale for point in some})
            draws = [[point for point in some if point.scale == scale] for scale in scales]
            norms = [getattr(each[0], f"norm_{norm}") for each in draws]
            means = [np.mean([point.fooling.rate for point in each]) for each in draws]
            lows, highs = zip(*(_hull([point.fooling for point in each]) for each in draws), strict=True)
            count = len(draws[0])
            label = kind if count == 1 else f"{kind} (mean of {count})"
            # nothing, which is known without a measurement, fools nobody
            width = 2.4 if number == 0 else 1.4
            axes.plot([0, *norms], [0, *means], marker="o", ms=4, lw=width, color=colour, label=label)
            axes.fill_between([0, *norms], [0, *lows], [0, *highs], color=colour, alpha=0.15, lw=0)
            if number == 0:
                axes.axvline(norms[scales.index(1.0)], color="0.5", ls=":", label=f"norm of the {kind}")
        axes.set(xlabel=f"{SYMBOLS[norm]} norm, pixels", ylim=(0, 1))
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"fooling rate on {points[0].fooling.num_examples:,} held-out images")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    save_figure(figure, path)


def save_boundaries(path: Path, boundaries: BoundaryCorrelation) -> None:
    """Plot singular values of normals and of random vectors, the energy of leading dimensions, and fooling rates of the subspace."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    found = {"normals of boundaries": boundaries.spectrum, "random unit vectors": boundaries.random}
    for (name, spectrum), colour in zip(found.items(), ("tab:blue", "tab:red"), strict=True):
        numbers = np.arange(1, len(spectrum.values) + 1)
        left.plot(numbers, spectrum.values, color=colour, label=f"{spectrum.num_rows:,} {name}")
        middle.plot(numbers, spectrum.shares, color=colour)
    left.axvline(
        len(boundaries.spectrum.vectors),
        color="0.5",
        ls=":",
        label=f"the first {len(boundaries.spectrum.vectors)} span the subspace",
    )
    middle.axhline(0.9, color="0.5", ls=":", label="90 % of the energy")
    left.set(xscale="log", xlabel="index", title="singular values, in descending order")
    left.set_ylim(bottom=0)
    middle.set(xlabel="dimensions", ylim=(0, 1.02), title="share of the energy in so many dimensions")
    middle.set_xlim(left=0)
    kinds = list(dict.fromkeys(point.kind for point in boundaries.points))
    for row, kind in enumerate(kinds):
        rates = [point.fooling for point in boundaries.points if point.kind == kind]
        for place, rate in zip(row + np.linspace(-0.15, 0.15, len(rates) + 2)[1:-1], rates, strict=True):
            right.plot(rate.interval, [place, place], "|-", ms=7, color=f"C{row}")
            right.plot(rate.rate, place, "o", ms=4, color=f"C{row}")
    right.set_yticks(range(len(kinds)), [kind.replace(" of ", "\nof ").replace(" per", "\nper") for kind in kinds])
    length = boundaries.points[0].norm_l2
    right.set(
        xlim=(0, 1), ylim=(len(kinds) - 0.5, -0.5), xlabel="fooling rate", title=f"at ℓ2 norm {length:.0f} pixels"
    )
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.title.set_fontsize(10)
    left.legend(fontsize=8, loc="lower left")
    middle.legend(fontsize=8, loc="lower right")
    save_figure(figure, path)


def save_number_of_images(path: Path, points: Sequence[SampleSizePoint]) -> None:
    """Plot fooling rate against the number of training images: the mean over seeds, and each seed with its Wilson interval."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    numbers = sorted({point.num_images for point in points})
    seeds = sorted({point.seed for point in points})
    for name, colour in (("train", "tab:gray"), ("val", "tab:blue")):
        rates = [[getattr(point, name) for point in points if point.num_images == number] for number in numbers]
        count = f"{rates[0][0].num_examples:,} held-out images" if name == "val" else "the training images themselves"
        means = [np.mean([rate.rate for rate in each]) for each in rates]
        axes.plot(numbers, means, marker="_", ms=12, color=colour, label=f"{count}, mean of {len(seeds)} seeds")
    for point in points:
        place = point.num_images * 1.03 ** (seeds.index(point.seed) - (len(seeds) - 1) / 2)  # beside each other
        axes.plot([place, place], point.val.interval, "_-", ms=5, lw=1, color="tab:blue", alpha=0.6)
        axes.plot(place, point.val.rate, "o", ms=4, color="tab:blue")
    axes.set(xscale="log", ylim=(0, 1.02), xlabel="training images", ylabel="fooling rate")
    axes.set_xticks(numbers, [f"{number:,}" for number in numbers], minor=False)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    save_figure(figure, path)


def _hull(rates: Sequence[Rate]) -> tuple[float, float]:
    """Smallest interval that contains the Wilson intervals of all rates."""
    lows, highs = zip(*(rate.interval for rate in rates), strict=True)
    return min(lows), max(highs)
