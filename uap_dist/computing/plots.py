"""Plots of a computation: its curve, clean and perturbed images, and perturbations."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from uap_dist.figures import column, readable, save_figure
from uap_dist.method.norms import Norm
from uap_dist.method.rates import Rate, rate_titles, running_rates
from uap_dist.rounds.record import RUNNING_IMAGES, RoundRecord

PICTURE_SIDE = 224
MAX_NAME = 22
MAX_COLUMNS = 5
RUNNING_SHARE = (
    0.02  # of all images of the rounds, where that is more than RUNNING_IMAGES: for runs of thousands of rounds
)


def save_perturbation(path: Path, perturbation: Tensor, *, stretch: bool) -> None:
    """Save v (C×H×W, pixels) as an image on grey, at true scale or stretched to the full range of values."""
    Image.fromarray(_to_picture(perturbation, stretch=stretch)).save(path)


def save_perturbations(path: Path, perturbations: Tensor, names: Sequence[str]) -> None:
    """Save several perturbations (M×C×H×W) as one figure, each stretched to the full range of values."""
    columns = min(MAX_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.2 * columns, 2.5 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, v, name in zip(axes.flat, perturbations, names, strict=False):
        axis.imshow(_to_picture(v, stretch=True))
        axis.set_title(readable(name), fontsize=9)
    save_figure(figure, path)


def save_curve(path: Path, history: Sequence[RoundRecord], random_rates: Mapping[str, Mapping[str, Rate]]) -> None:
    """Plot one computation against its network evaluations: each kind of rate, and below them the norms of v.

    Args:
        path: PNG file.
        history: records of all rounds.
        random_rates: held-out rates of random perturbations, by kind and by the norms that they share with v.
    """
    rounds = [record.metrics for record in history]
    figure, panels, norms = _curve_panels(random_rates)
    titles = rate_titles(panels, capital=True)
    for kind, axes in panels.items():
        _draw_running(axes, rounds, kind, color="tab:orange")
        _draw_measured(axes, rounds, "train", kind, color="0.3", label="training images")
        _draw_measured(axes, rounds, "val", kind, color="tab:blue", label="held-out images")
        axes.set_title(f"{readable(titles[kind])} with 95 % Wilson intervals", fontsize=10)
    _draw_norms(norms, rounds, ("tab:green", "tab:purple"))
    _finish_curves(figure, panels, norms, random_rates)
    save_figure(figure, path)


def save_curves(
    path: Path,
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    random_rates: Mapping[str, Mapping[str, Rate]],
) -> None:
    """Plot several computations as `save_curve` plots one.

    Args:
        path: PNG file.
        histories: metrics of every round, by the name of the computation.
        random_rates: as for `save_curve`.
    """
    figure, panels, norms = _curve_panels(random_rates)
    for number, (name, rounds) in enumerate(histories.items()):
        colour = f"C{number % 10}"
        for kind, axes in panels.items():
            _draw_running(axes, rounds, kind, color=colour, is_background=True)
            _draw_measured(axes, rounds, "val", kind, color=colour)
            axes.lines[-1].set_label(f"{readable(name)}: {rounds[-1][f'{kind}_rate/val']:.3f}")
        _draw_norms(norms, rounds, (colour, colour))
    for kind, axes in panels.items():
        title = f"Held-out {readable(rate_titles(panels)[kind])} by each member; thin: training images of its rounds, running mean"
        axes.set_title(title, fontsize=10)
    _finish_curves(figure, panels, norms, random_rates)
    save_figure(figure, path)


def save_grid(
    path: Path,
    pixels: np.ndarray,
    perturbation: Tensor,
    clean: Sequence[Sequence[str]],
    perturbed: Sequence[Sequence[str]],
) -> None:
    """Plot images (N×C×H×W uint8) above their perturbed versions, with the labels that each network predicts for both."""
    shown = np.clip(np.rint(pixels + perturbation.numpy()), 0, 255).astype(np.uint8)
    figure, axes = plt.subplots(2, len(pixels), figsize=(1.9 * len(pixels), 4.6), layout="constrained", squeeze=False)
    for row, (images, names) in enumerate(((pixels, clean), (shown, perturbed))):
        for axis, image, name, before in zip(axes[row], images, names, clean, strict=True):
            axis.imshow(image.transpose(1, 2, 0))
            axis.set_title("\n".join(map(_shorten, name)), fontsize=9, color="black" if name == before else "tab:red")
            axis.set_axis_off()
    figure.suptitle("held-out images: clean above, perturbed below (red: label changed)", fontsize=10)
    save_figure(figure, path)


def _to_picture(perturbation: Tensor, *, stretch: bool) -> np.ndarray:
    v = perturbation.numpy().transpose(1, 2, 0)
    scale = 127 / max(float(np.abs(v).max()), 1e-12) if stretch else 1.0
    zoom = -(-PICTURE_SIDE // v.shape[0])  # whole pixels, so that a small perturbation stays crisp
    picture = np.clip(np.rint(128 + scale * v), 0, 255).astype(np.uint8)
    return picture.repeat(zoom, axis=0).repeat(zoom, axis=1)


def _curve_panels(kinds: Collection[str]) -> tuple[Figure, dict[str, Axes], tuple[Axes, Axes]]:
    """A figure with axes for each kind of rate, that of the goal first, and below for ℓ2 norms (scale on the left) and ℓ∞ norms."""
    heights, size = (*(3 for _ in kinds), 1), (7.5, 2.2 + 3.8 * len(kinds))
    figure, (*panels, below) = plt.subplots(
        len(heights), 1, figsize=size, height_ratios=heights, sharex=True, layout="constrained"
    )
    return figure, dict(zip(kinds, panels, strict=True)), (below, below.twinx())


def _draw_running(
    axes: Axes, rounds: Sequence[Mapping[str, float]], kind: str, *, color: str, is_background: bool = False
) -> None:
    """Plot the running mean of the rounds' rates, in the foreground with its interval and its number of images."""
    rates = [Rate.from_metrics(metrics, "round", kind) for metrics in rounds]
    num_averaged = max(RUNNING_IMAGES, int(RUNNING_SHARE * sum(rate.num_examples for rate in rates)))
    means = zip(column(rounds, "total/evaluations"), running_rates(rates, num_averaged), strict=True)
    points = [(x, rate) for x, rate in means if rate.num_examples]
    if not points:  # as of spared classes without training images
        return
    evaluations, running = zip(*points, strict=True)
    if not is_background:
        lows, highs = zip(*(rate.interval for rate in running), strict=True)
        axes.fill_between(evaluations, lows, highs, color=color, alpha=0.2, lw=0)
    axes.plot(evaluations, [rate.rate for rate in running], color=color, lw=0.8, alpha=0.5 if is_background else 1.0)
    if not is_background:
        axes.lines[-1].set_label(f"images of the rounds, before their update (mean of {num_averaged:,})")


def _draw_measured(
    axes: Axes, rounds: Sequence[Mapping[str, float]], name: str, kind: str, *, color: str, label: str = ""
) -> None:
    """Plot measured rates with their intervals.

    Only points of equally many images are connected: a step from a subset to all images would be one between images, not in time.
    """
    by_count: dict[int, list[tuple[float, Rate]]] = {}
    for metrics in rounds:
        rate = Rate.from_metrics(metrics, name, kind)
        if rate.num_examples:
            by_count.setdefault(rate.num_examples, []).append((metrics["total/evaluations"], rate))
    for number, (count, points) in enumerate(by_count.items()):
        evaluations, rates = zip(*points, strict=True)
        lows, highs = zip(*(rate.interval for rate in rates), strict=True)
        axes.vlines(evaluations, lows, highs, color=color, lw=1, alpha=0.5)
        values = [rate.rate for rate in rates]
        axes.plot(evaluations, values, marker="oD"[number > 0], ms=4 + 2 * number, lw=1.5, color=color)
        if label:
            axes.lines[-1].set_label(f"{count:,} {label}")


def _draw_norms(axes: tuple[Axes, Axes], rounds: Sequence[Mapping[str, float]], colours: tuple[str, str]) -> None:
    """Plot the norms of the iterate after each round: ℓ2 as a line, ℓ∞ dashed."""
    norms: tuple[Norm, Norm] = ("l2", "linf")
    for own, norm, colour, style in zip(axes, norms, colours, ("-", "--"), strict=True):
        own.plot(column(rounds, "total/evaluations"), column(rounds, f"iterate/norm_{norm}"), color=colour, ls=style)


def _finish_curves(
    figure: Figure,
    panels: Mapping[str, Axes],
    norms: tuple[Axes, Axes],
    random_rates: Mapping[str, Mapping[str, Rate]],
) -> None:
    for kind, axes in panels.items():
        for (name, rate), style in zip(random_rates[kind].items(), ("--", ":"), strict=False):
            axes.axhline(rate.rate, color="tab:red", ls=style, lw=1, label=f"random v of the {name}, held-out images")
        axes.set(ylabel=readable(rate_titles(panels)[kind]), ylim=(0, 1))
        axes.grid(alpha=0.3)
        if len(panels) > 1:  # the labels have other counts and values in each
            axes.legend(fontsize=8)
    if len(panels) == 1:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    left, right = norms
    left.set_xlabel("network evaluations, clean labels of the training images included")
    left.set_ylabel("ℓ2 norm of v\n(line), pixels", fontsize=9)
    right.set_ylabel("ℓ∞ norm of v\n(dashed), pixels", fontsize=9)
    for each in norms:
        each.set_ylim(0, 1.15 * each.dataLim.y1)
    left.grid(alpha=0.3)


def _shorten(name: str) -> str:
    return readable(name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…")
