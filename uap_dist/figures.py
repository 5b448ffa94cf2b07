"""What all plots share."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from uap_dist.foreign_text import printable

matplotlib.use("Agg")  # jobs draw in threads and without a display


def column(metrics: Sequence[Mapping[str, float]], name: str) -> list[float]:
    """The values of one metric, in order."""
    return [one[name] for one in metrics]


def readable(name: str) -> str:
    """Escape a name for matplotlib, which would draw text between two $ as a formula."""
    return printable(name).replace("$", r"\$")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure to a file and close it."""
    figure.savefig(path, dpi=130)
    plt.close(figure)
