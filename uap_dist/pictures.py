"""Everything that is drawn: perturbations, images under them, curves, heat maps."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import networkx as nx
import numpy as np
from PIL import Image
from torch import Tensor

from uap_dist.boundaries import Boundaries
from uap_dist.by_number import NumberPoint
from uap_dist.evaluate import Measurement
from uap_dist.fooling import Rate
from uap_dist.foreign_text import printable
from uap_dist.history import RoundRecord
from uap_dist.phase import Point

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PICTURE_SIDE = 224
MAX_NAME = 22
MAX_COLUMNS = 5
ROUNDS_AVERAGED = 10
NUM_COMPONENTS_DRAWN, NUM_NODES_NAMED = 3, 8  # a component


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
        axis.set_title(_readable(name), fontsize=9)
    _save(figure, path)


def save_curve(path: Path, history: Sequence[RoundRecord], random_rates: Mapping[str, Rate]) -> None:
    """Fooling rate against network evaluations: training and held-out with 95 % intervals, each round's, and the baseline."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    rounds = [record.metrics for record in history]
    axes.plot(
        _column(rounds, "total/evaluations"),
        _column(rounds, "fooling_rate/round"),
        ".",
        ms=4,
        color="0.75",
        label="images of each round, before it",
    )
    for name, label, colour in (("train", "training", "tab:gray"), ("val", "held-out", "tab:blue")):
        rate = f"fooling_rate/{name}"
        measured = [metrics for metrics in rounds if rate in metrics]
        evaluations = _column(measured, "total/evaluations")
        counts = sorted({int(metrics[f"num_images/{name}"]) for metrics in measured})
        label = f"{label} ({', '.join(f'{count:,}' for count in counts)} images)"
        low, high = _column(measured, f"{rate}_low"), _column(measured, f"{rate}_high")
        axes.plot(evaluations, _column(measured, rate), marker="o", color=colour, label=label)
        axes.fill_between(evaluations, low, high, color=colour, alpha=0.2, lw=0)
        axes.vlines(evaluations, low, high, color=colour, alpha=0.4)
    _finish_curves(axes, "Fooling rate, 95 % Wilson intervals", random_rates)
    _save(figure, path)


def save_curves(
    path: Path, histories: Mapping[str, Sequence[Mapping[str, float]]], random_rates: Mapping[str, Rate]
) -> None:
    """Several computations against network evaluations, from all their rounds' metrics: held-out fooling rate, and that of the rounds."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for number, (name, rounds) in enumerate(histories.items()):
        colour = f"C{number % 10}"
        window = max(1, len(rounds) // ROUNDS_AVERAGED)
        means = np.convolve(_column(rounds, "fooling_rate/round"), np.full(window, 1 / window), "valid")
        axes.plot(_column(rounds, "total/evaluations")[window - 1 :], means, lw=0.8, alpha=0.5, color=colour)
        measured = [metrics for metrics in rounds if metrics.get("fooling_rate/val") is not None]
        rates = _column(measured, "fooling_rate/val")
        label = f"{_readable(name)}: {rates[-1]:.3f}"
        axes.plot(_column(measured, "total/evaluations"), rates, marker="o", ms=5, lw=1.5, color=colour, label=label)
    _finish_curves(
        axes, "Held-out fooling rate of each member; thin: on the images of its rounds, averaged", random_rates
    )
    _save(figure, path)


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
    _save(figure, path)


def save_matrix(
    path: Path,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    limits: tuple[float, float],
) -> None:
    """A heat map with its numbers; `limits` are the values of the darkest and the lightest colour, NaN stays empty."""
    figure, axes = plt.subplots(figsize=(2.6 + 1.1 * len(columns), 1.4 + 0.36 * len(rows)), layout="constrained")
    axes.imshow(values, vmin=limits[0], vmax=limits[1], cmap="viridis", aspect="auto")
    middle = limits[0] + 0.6 * (limits[1] - limits[0])
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "white" if value < middle else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(columns)), map(_readable, columns), rotation=20, ha="right")
    axes.set_yticks(range(len(rows)), map(_readable, rows))
    axes.set_title(title, fontsize=10)
    _save(figure, path)


def save_rates_by_norm(path: Path, measurements: Sequence[Measurement]) -> None:
    """Fooling rate against the ℓ∞ norm, a panel for each classifier."""
    classifiers = list(dict.fromkeys(m.classifier for m in measurements))
    figure, panels = plt.subplots(
        1, len(classifiers), figsize=(4.5 * len(classifiers), 4), layout="constrained", squeeze=False, sharey=True
    )
    for axes, classifier in zip(panels[0], classifiers, strict=True):
        own = [m for m in measurements if m.classifier == classifier]
        for name in dict.fromkeys(m.perturbation for m in own):
            points = sorted((m.norm_linf, m.fooling.rate) for m in own if m.perturbation == name)
            baseline = next(m.is_baseline for m in own if m.perturbation == name)
            axes.plot(*zip(*points, strict=True), marker="o", ls="--" if baseline else "-", label=_readable(name))
        axes.set(title=_readable(classifier), xlabel="ℓ∞ norm, pixels", ylim=(0, 1))
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("fooling rate")
    panels[0][0].legend(fontsize=8)
    _save(figure, path)


def save_epochs(path: Path, repetitions: Mapping[str, Sequence[RoundRecord]]) -> None:
    """Of each repetition, epoch by epoch on held-out images: fooling rate and top-1 under members trained on and held out, clean top-1."""
    figure, panels = plt.subplots(
        1, len(repetitions), figsize=(5 * len(repetitions), 4), layout="constrained", squeeze=False, sharey=True
    )
    for axes, (name, records) in zip(panels[0], repetitions.items(), strict=True):
        epochs, metrics = [record.step for record in records], [record.metrics for record in records]
        axes.plot(epochs, _column(metrics, "top1/clean"), "o-", color="black", label="top-1, clean")
        for group, label, style in (("trained_on", "trained on", "-"), ("held_out", "held out", "--")):
            rate = f"fooling_rate/{group}_members"
            values = _column(metrics, rate)
            axes.plot(epochs, values, marker="o", ls=style, color="tab:red", label=f"fooling rate, members {label}")
            low, high = _column(metrics, f"{rate}_low"), _column(metrics, f"{rate}_high")
            axes.fill_between(epochs, low, high, color="tab:red", alpha=0.15, lw=0)
            top1 = _column(metrics, f"top1/{group}_members")
            axes.plot(epochs, top1, marker="o", ls=style, color="tab:blue", label=f"top-1, members {label}")
        axes.set(title=name, xlabel="epochs", ylim=(0, 1))
        axes.set_xticks(epochs)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("share of held-out images")
    panels[0][0].legend(fontsize=8)
    _save(figure, path)


def save_label_graph(path: Path, graph: nx.DiGraph) -> None:
    """The largest components side by side, each label a dot; those that most others are sent to by name."""
    components = sorted(nx.weakly_connected_components(graph), key=len, reverse=True)
    shown = [graph.subgraph(component) for component in components[:NUM_COMPONENTS_DRAWN] if len(component) > 1]
    widths = [len(component) ** 0.5 for component in shown] or [1.0]
    figure, axes = plt.subplots(
        1, len(widths), figsize=(13, 7), layout="constrained", squeeze=False, width_ratios=widths
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, component in zip(axes.flat, shown, strict=False):
        _draw_component(axis, component)
    images = [count for _, count in graph.nodes(data="num_images") if count]
    figure.suptitle(
        f"where labels go: {sum(map(len, shown))} of {graph.number_of_nodes()} labels, the {len(shown)} largest components; "
        f"in brackets, labels sent there\nit rests on {np.mean(images):.1f} images a label (median {np.median(images):.0f})",
        fontsize=10,
    )
    _save(figure, path)


def save_phase_transition(path: Path, points: Sequence[Point]) -> None:
    """Fooling rate against norm, ℓ2 and ℓ∞: a line through the mean of each kind's draws, in the hull of their Wilson intervals."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 5), layout="constrained", sharey=True)
    for axes, norm, name in zip(panels, ("l2", "linf"), ("ℓ2", "ℓ∞"), strict=True):
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
        axes.set(xlabel=f"{name} norm, pixels", ylim=(0, 1))
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"fooling rate on {points[0].fooling.num_examples:,} held-out images")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    _save(figure, path)


def save_boundaries(path: Path, boundaries: Boundaries) -> None:
    """Singular values of the normals beside random ones, the energy that so many dimensions hold, and what their subspace fools."""
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
    _save(figure, path)


def save_number_of_images(path: Path, points: Sequence[NumberPoint]) -> None:
    """Fooling rates against the number of training images: a line through the means, a dot with its Wilson interval for each seed."""
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
    _save(figure, path)


def _hull(rates: Sequence[Rate]) -> tuple[float, float]:
    """From the lowest to the highest end of their intervals."""
    lows, highs = zip(*(rate.interval for rate in rates), strict=True)
    return min(lows), max(highs)


def _to_picture(perturbation: Tensor, *, stretch: bool) -> np.ndarray:
    v = perturbation.numpy().transpose(1, 2, 0)
    scale = 127 / max(float(np.abs(v).max()), 1e-12) if stretch else 1.0
    zoom = -(-PICTURE_SIDE // v.shape[0])  # whole pixels, so that a small perturbation stays crisp
    picture = np.clip(np.rint(128 + scale * v), 0, 255).astype(np.uint8)
    return picture.repeat(zoom, axis=0).repeat(zoom, axis=1)


def _column(metrics: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [one[name] for one in metrics]


def _finish_curves(axes: Axes, title: str, random_rates: Mapping[str, Rate]) -> None:
    for (name, rate), style in zip(random_rates.items(), ("--", ":"), strict=False):
        label = f"random, {name} ({rate.num_examples} held-out images)"
        axes.axhline(rate.rate, color="tab:red", ls=style, label=label)
    axes.set(xlabel="network evaluations", ylabel="fooling rate", ylim=(0, 1))
    axes.set_title(title, fontsize=10)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)


def _draw_component(axes: Axes, graph: nx.DiGraph) -> None:
    places = nx.kamada_kawai_layout(graph.to_undirected())
    incoming = dict(graph.in_degree())
    hubs = sorted(graph, key=lambda node: -incoming[node])[:NUM_NODES_NAMED]
    hubs = [node for node in hubs if node == hubs[0] or incoming[node] > 1]
    sizes = [12 + 5 * incoming[node] for node in graph]
    colours = ["tab:red" if node in hubs else "0.6" for node in graph]
    nx.draw_networkx_edges(graph, places, ax=axes, edge_color="0.8", arrowsize=6, node_size=sizes, width=0.6)
    nx.draw_networkx_nodes(graph, places, ax=axes, node_size=sizes, node_color=colours, linewidths=0)
    for node in hubs:
        name = f"{_readable(graph.nodes[node]['name'])} ({incoming[node]})"
        box = {"facecolor": "white", "alpha": 0.7, "lw": 0, "pad": 1}
        above = 2 + (12 + 5 * incoming[node]) ** 0.5 / 2
        axes.annotate(name, places[node], (0, above), textcoords="offset points", ha="center", fontsize=9, bbox=box)
    axes.margins(0.15)


def _shorten(name: str) -> str:
    return _readable(name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…")


def _readable(name: str) -> str:
    """A name as matplotlib shows it, which else takes what stands between two $ for a formula."""
    return printable(name).replace("$", r"\$")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=130)
    plt.close(figure)
