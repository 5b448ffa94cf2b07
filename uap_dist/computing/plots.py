"""Pictures of a computation: the curve, images clean and perturbed, perturbations."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor

from uap_dist.figures import column, readable, save_figure
from uap_dist.method.rates import Rate
from uap_dist.tracking.history import RoundRecord

PICTURE_SIDE = 224
MAX_NAME = 22
MAX_COLUMNS = 5
ROUNDS_AVERAGED = 10


def save_perturbation(path: Path, perturbation: Tensor, *, stretch: bool) -> None:
    """V as a picture on grey: at true scale, or stretched to the full range to be seen."""
    Image.fromarray(_to_picture(perturbation, stretch=stretch)).save(path)


def save_perturbations(path: Path, perturbations: Tensor, names: Sequence[str]) -> None:
    """Several perturbations (M×C×H×W), each stretched to the full range."""
    columns = min(MAX_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.2 * columns, 2.5 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, v, name in zip(axes.flat, perturbations, names, strict=False):
        axis.imshow(_to_picture(v, stretch=True))
        axis.set_title(readable(name), fontsize=9)
    save_figure(figure, path)


def save_curve(path: Path, history: Sequence[RoundRecord], random_rates: Mapping[str, Rate]) -> None:
    """Fooling rate against network evaluations: training and held-out with 95 % intervals, each round's, and the baseline."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    rounds = [record.metrics for record in history]
    axes.plot(
        column(rounds, "total/evaluations"),
        column(rounds, "fooling_rate/round"),
        ".",
        ms=4,
        color="0.75",
        label="images of each round, before it",
    )
    for name, label, colour in (("train", "training", "tab:gray"), ("val", "held-out", "tab:blue")):
        rate = f"fooling_rate/{name}"
        measured = [metrics for metrics in rounds if rate in metrics]
        evaluations = column(measured, "total/evaluations")
        counts = sorted({int(metrics[f"num_images/{name}"]) for metrics in measured})
        label = f"{label} ({', '.join(f'{count:,}' for count in counts)} images)"
        low, high = column(measured, f"{rate}_low"), column(measured, f"{rate}_high")
        axes.plot(evaluations, column(measured, rate), marker="o", color=colour, label=label)
        axes.fill_between(evaluations, low, high, color=colour, alpha=0.2, lw=0)
        axes.vlines(evaluations, low, high, color=colour, alpha=0.4)
    _finish_curves(axes, "Fooling rate, 95 % Wilson intervals", random_rates)
    save_figure(figure, path)


def save_curves(
    path: Path, histories: Mapping[str, Sequence[Mapping[str, float]]], random_rates: Mapping[str, Rate]
) -> None:
    """Several computations against network evaluations, from all their rounds' metrics: held-out fooling rate, and that of the rounds."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for number, (name, rounds) in enumerate(histories.items()):
        colour = f"C{number % 10}"
        window = max(1, len(rounds) // ROUNDS_AVERAGED)
        means = np.convolve(column(rounds, "fooling_rate/round"), np.full(window, 1 / window), "valid")
        axes.plot(column(rounds, "total/evaluations")[window - 1 :], means, lw=0.8, alpha=0.5, color=colour)
        measured = [metrics for metrics in rounds if metrics.get("fooling_rate/val") is not None]
        rates = column(measured, "fooling_rate/val")
        label = f"{readable(name)}: {rates[-1]:.3f}"
        axes.plot(column(measured, "total/evaluations"), rates, marker="o", ms=5, lw=1.5, color=colour, label=label)
    _finish_curves(
        axes, "Held-out fooling rate of each member; thin: on the images of its rounds, averaged", random_rates
    )
    save_figure(figure, path)


def save_grid(
    path: Path, pixels: np.ndarray, perturbation: Tensor, clean: Sequence[str], perturbed: Sequence[str]
) -> None:
    """Images (N×C×H×W uint8) above themselves perturbed, with the labels before and after."""
    shown = np.clip(np.rint(pixels + perturbation.numpy()), 0, 255).astype(np.uint8)
    figure, axes = plt.subplots(2, len(pixels), figsize=(1.9 * len(pixels), 4.6), layout="constrained", squeeze=False)
    for row, (images, names) in enumerate(((pixels, clean), (shown, perturbed))):
        for axis, image, name, before in zip(axes[row], images, names, clean, strict=True):
            axis.imshow(image.transpose(1, 2, 0))
            axis.set_title(_shorten(name), fontsize=9, color="black" if name == before else "tab:red")
            axis.set_axis_off()
    figure.suptitle("held-out images: clean above, perturbed below (red: label changed)", fontsize=10)
    save_figure(figure, path)


def _to_picture(perturbation: Tensor, *, stretch: bool) -> np.ndarray:
    v = perturbation.numpy().transpose(1, 2, 0)
    scale = 127 / max(float(np.abs(v).max()), 1e-12) if stretch else 1.0
    zoom = -(-PICTURE_SIDE // v.shape[0])  # whole pixels, so that a small perturbation stays crisp
    picture = np.clip(np.rint(128 + scale * v), 0, 255).astype(np.uint8)
    return picture.repeat(zoom, axis=0).repeat(zoom, axis=1)


def _finish_curves(axes: Axes, title: str, random_rates: Mapping[str, Rate]) -> None:
    for (name, rate), style in zip(random_rates.items(), ("--", ":"), strict=False):
        label = f"random, {name} ({rate.num_examples} held-out images)"
        axes.axhline(rate.rate, color="tab:red", ls=style, label=label)
    axes.set(xlabel="network evaluations", ylabel="fooling rate", ylim=(0, 1))
    axes.set_title(title, fontsize=10)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)


def _shorten(name: str) -> str:
    return readable(name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…")
