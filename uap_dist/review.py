"""What an evaluation leaves as files: the table of all measurements, the transfer matrix, fooling rate against norm."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from uap_dist.evaluate import Measurement
from uap_dist.fooling import Rate

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def save_evaluation(folder: Path, measurements: Sequence[Measurement]) -> None:
    """All files of an evaluation."""
    table = pa.Table.from_pylist([_columns(measurement) for measurement in measurements])
    pq.write_table(table, folder / "evaluation.parquet")
    pyarrow.csv.write_csv(table, folder / "evaluation.csv")
    (folder / "evaluation.md").write_text(markdown(measurements) + "\n")
    for dataset in dict.fromkeys(m.dataset for m in measurements):
        own = [m for m in measurements if m.dataset == dataset]
        full = [m for m in own if m.scale == 1]
        if full:
            _save_matrix(folder / f"transfer-{dataset}.png", full)
        if len({m.scale for m in own}) > 1:
            _save_scales(folder / f"fooling-rate-by-norm-{dataset}.png", own)


def markdown(measurements: Sequence[Measurement]) -> str:
    """A line for each measurement."""
    lines = [
        "| classifier | images | perturbation | scale | ℓ2 | ℓ∞ | fooling rate | top-1 before | top-1 after |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {m.classifier} | {m.dataset} | {m.perturbation} | {m.scale:g} | {m.norm_l2:.0f} | {m.norm_linf:.1f} "
        f"| {m.fooling} | {m.top1_clean or '–'} | {m.top1 or '–'} |"
        for m in measurements
    ]
    return "\n".join(lines)


def _columns(m: Measurement) -> dict[str, Any]:
    plain = {key: value for key, value in vars(m).items() if not isinstance(value, Rate) and value is not None}
    rates = {"fooling_rate": m.fooling, "top1_clean": m.top1_clean, "top1": m.top1}
    for name, rate in rates.items():
        low, high = rate.interval if rate else (None, None)
        plain |= {name: rate.rate if rate else None, f"{name}_low": low, f"{name}_high": high}
        plain |= {f"{name}_num_images": rate.num_examples if rate else None}
    return {key: value for key, value in plain.items() if key not in ("top1_clean", "top1") or value is not None}


def _save_matrix(path: Path, measurements: Sequence[Measurement]) -> None:
    """Fooling rates, perturbations down and classifiers across (table 2 of the paper)."""
    rows = list(dict.fromkeys(m.perturbation for m in measurements))
    columns = list(dict.fromkeys(m.classifier for m in measurements))
    rates = np.full((len(rows), len(columns)), np.nan)
    for m in measurements:
        rates[rows.index(m.perturbation), columns.index(m.classifier)] = m.fooling.rate
    figure, axes = plt.subplots(figsize=(2.6 + 1.1 * len(columns), 1.4 + 0.36 * len(rows)), layout="constrained")
    axes.imshow(rates, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (row, column), rate in np.ndenumerate(rates):
        axes.text(
            column, row, f"{rate:.2f}", ha="center", va="center", color="white" if rate < 0.6 else "black", fontsize=9
        )
    axes.set_xticks(range(len(columns)), columns, rotation=20, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    count = measurements[0].fooling.num_examples
    axes.set_title(f"fooling rate on {count} images", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _save_scales(path: Path, measurements: Sequence[Measurement]) -> None:
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
            axes.plot(*zip(*points, strict=True), marker="o", ls="--" if baseline else "-", label=name)
        axes.set(title=classifier, xlabel="ℓ∞ norm, pixels", ylim=(0, 1))
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("fooling rate")
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
