"""Figures of an evaluation: heat maps, fooling rate against norm, and the label graph."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import networkx as nx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from uap_dist.evaluation.coverage import Coverage
from uap_dist.evaluation.evaluate import Measurement
from uap_dist.figures import readable, save_figure
from uap_dist.method.rates import ATTACKED, FOOLING, TARGETED

NUM_COMPONENTS_DRAWN = 3
NUM_NODES_NAMED = 8  # in each component
COVERED = {
    FOOLING: "images that at least one fools",
    TARGETED: "images to which at least one gives the target",
    ATTACKED: "images of attacked classes that at least one fools",
}


def save_matrix(
    path: Path,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    limits: tuple[float, float],
) -> None:
    """Draw a heat map with its numbers. `limits` are the values of the darkest and the lightest colour; NaN cells stay empty."""
    figure, axes = plt.subplots(figsize=(2.6 + 1.1 * len(columns), 1.4 + 0.36 * len(rows)), layout="constrained")
    axes.imshow(values, vmin=limits[0], vmax=limits[1], cmap="viridis", aspect="auto")
    middle = limits[0] + 0.6 * (limits[1] - limits[0])
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "white" if value < middle else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(columns)), map(readable, columns), rotation=20, ha="right")
    axes.set_yticks(range(len(rows)), map(readable, rows))
    axes.set_title(title, fontsize=10)
    save_figure(figure, path)


def save_rates_by_norm(path: Path, measurements: Sequence[Measurement]) -> None:
    """Draw fooling rate against ℓ∞ norm, with a panel for each classifier."""
    classifiers = list(dict.fromkeys(m.classifier for m in measurements))
    figure, panels = plt.subplots(
        1, len(classifiers), figsize=(4.5 * len(classifiers), 4), layout="constrained", squeeze=False, sharey=True
    )
    for axes, classifier in zip(panels[0], classifiers, strict=True):
        own = [m for m in measurements if m.classifier == classifier]
        for name in dict.fromkeys(m.perturbation for m in own):
            points = sorted((m.norm_linf, m.fooling.rate) for m in own if m.perturbation == name)
            baseline = next(m.is_baseline for m in own if m.perturbation == name)
            axes.plot(*zip(*points, strict=True), marker="o", ls="--" if baseline else "-", label=readable(name))
        axes.set(title=readable(classifier), xlabel="ℓ∞ norm, pixels", ylim=(0, 1))
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("fooling rate")
    panels[0][0].legend(fontsize=8)
    save_figure(figure, path)


def save_coverage(path: Path, coverage: Coverage, random: Mapping[str, Coverage], name: str) -> None:
    """Draw the share of images that at least one member covers against the number of members, beside that of random perturbations."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    numbers = range(1, len(coverage.names) + 1)
    for label, each, line in (
        ("members", coverage, "-"),
        *((f"random, same {n} norm", c, "--") for n, c in random.items()),
    ):
        low, high = zip(*(rate.interval for rate in each.rates), strict=True)
        axes.plot(numbers, [rate.rate for rate in each.rates], line, marker="o", label=label)
        axes.fill_between(numbers, low, high, alpha=0.15)
    axes.set(xlabel="members, taken greedily", ylabel=COVERED[coverage.kind], ylim=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"{readable(name)}: {coverage.is_hit.shape[1]} images, 95 % intervals", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def save_label_graph(path: Path, graph: nx.DiGraph) -> None:
    """Draw the largest components side by side, a dot for each label; those with most incoming edges and the target are named."""
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
        _target_line(graph)
        + f"Label most often given to the fooled images of each label: the {len(shown)} largest components, with "
        f"{sum(map(len, shown))} of {graph.number_of_nodes()} labels\n"
        f"in brackets: number of incoming edges; images per label: mean {np.mean(images):.1f}, median {np.median(images):.0f}",
        fontsize=10,
    )
    save_figure(figure, path)


def _target_line(graph: nx.DiGraph) -> str:
    """A line that names the target and says of how many labels most fooled images get it; empty without a target."""
    for node, is_target in graph.nodes(data="is_target"):
        if is_target:
            name, others = (
                readable(graph.nodes[node]["name"]),
                [n for n in graph if n != node and graph.nodes[n]["num_images"]],
            )
            return f"The target {name} (star) is the one most often given for {graph.in_degree(node)} of {len(others)} other labels\n"
    return ""


def _draw_component(axes: Axes, graph: nx.DiGraph) -> None:
    places = nx.kamada_kawai_layout(graph.to_undirected())
    incoming = dict(graph.in_degree())
    hubs = sorted(graph, key=lambda node: -incoming[node])[:NUM_NODES_NAMED]
    targets = [node for node, is_target in graph.nodes(data="is_target") if is_target]
    hubs = [node for node in hubs if node == hubs[0] or incoming[node] > 1 or node in targets]
    hubs += [node for node in targets if node not in hubs]
    sizes = [12 + 5 * incoming[node] for node in graph]
    colours = ["tab:red" if node in hubs else "0.6" for node in graph]
    nx.draw_networkx_edges(graph, places, ax=axes, edge_color="0.8", arrowsize=6, node_size=sizes, width=0.6)
    nx.draw_networkx_nodes(graph, places, ax=axes, node_size=sizes, node_color=colours, linewidths=0)
    nx.draw_networkx_nodes(graph, places, targets, ax=axes, node_size=250, node_color="tab:green", node_shape="*")
    for node in hubs:
        name = f"{readable(graph.nodes[node]['name'])} ({incoming[node]})"
        box = {"facecolor": "white", "alpha": 0.7, "lw": 0, "pad": 1}
        above = 2 + (12 + 5 * incoming[node]) ** 0.5 / 2
        axes.annotate(name, places[node], (0, above), textcoords="offset points", ha="center", fontsize=9, bbox=box)
    axes.margins(0.15)
