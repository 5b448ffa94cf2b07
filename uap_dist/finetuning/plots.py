"""Pictures of a fine-tuning."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from uap_dist.figures import column, save_figure
from uap_dist.tracking.history import RoundRecord


def save_epochs(path: Path, repetitions: Mapping[str, Sequence[RoundRecord]]) -> None:
    """Of each repetition, epoch by epoch on held-out images: fooling rate and top-1 under members trained on and held out, clean top-1."""
    figure, panels = plt.subplots(
        1, len(repetitions), figsize=(5 * len(repetitions), 4), layout="constrained", squeeze=False, sharey=True
    )
    for axes, (name, records) in zip(panels[0], repetitions.items(), strict=True):
        epochs, metrics = [record.step for record in records], [record.metrics for record in records]
        axes.plot(epochs, column(metrics, "top1/clean"), "o-", color="black", label="top-1, clean")
        for group, label, style in (("trained_on", "trained on", "-"), ("held_out", "held out", "--")):
            values = column(metrics, f"fooling_rate/{group}_members")
            axes.plot(epochs, values, marker="o", ls=style, color="tab:red", label=f"fooling rate, members {label}")
            low, high = (column(metrics, f"interval/{group}_members_{end}") for end in ("low", "high"))
            axes.fill_between(epochs, low, high, color="tab:red", alpha=0.15, lw=0)
            top1 = column(metrics, f"top1/{group}_members")
            axes.plot(epochs, top1, marker="o", ls=style, color="tab:blue", label=f"top-1, members {label}")
        axes.set(title=name, xlabel="epochs", ylim=(0, 1))
        axes.set_xticks(epochs)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("share of held-out images")
    panels[0][0].legend(fontsize=8)
    save_figure(figure, path)
