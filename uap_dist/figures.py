"""Pictures: what all plots share."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from uap_dist.foreign_text import printable

matplotlib.use("Agg")  # jobs draw in threads and without a screen


def column(metrics: Sequence[Mapping[str, float]], name: str) -> list[float]:
    """Values of one metric, in order."""
    return [one[name] for one in metrics]


def readable(name: str) -> str:
    """A name as matplotlib shows it, which else takes what stands between two $ for a formula."""
    return printable(name).replace("$", r"\$")


def save_figure(figure: Figure, path: Path) -> None:
    """Write and close it."""
    figure.savefig(path, dpi=130)
    plt.close(figure)
