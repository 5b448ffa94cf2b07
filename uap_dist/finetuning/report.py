"""The files of a fine-tuning: a comparison before and after, all measurements, and the epochs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt

from uap_dist.computing.plots import save_perturbations
from uap_dist.evaluation.evaluate import Measurement
from uap_dist.evaluation.report import save_evaluation
from uap_dist.figures import column, save_figure
from uap_dist.finetuning.trainer import HELD_OUT, TRAINED_ON
from uap_dist.foreign_text import escape_markdown
from uap_dist.method.rates import Rate, flatten_rates
from uap_dist.perturbations.pool import PerturbationPool
from uap_dist.rounds.record import RoundRecord
from uap_dist.tracking.outputs import RESULT_FILE, markdown_table, save_table, writes_files

BEFORE = "before"
ONLINE_FOLDER = "online-pool"
FRESH, RANDOM = "fresh", "random"
TITLES = {
    TRAINED_ON: "members trained on",
    HELD_OUT: "members held out",
    FRESH: "**perturbations computed against this network**",
    RANDOM: "random, as large as the first member",
}
ONLINE_TITLES = {TRAINED_ON: "perturbations trained on", HELD_OUT: "members of the pool, held out"}


@dataclass(frozen=True)
class Comparison:
    """Measurements of one network under one group of perturbations.

    Attributes:
        network: BEFORE, or the repetition that trained it.
        group: TRAINED_ON and HELD_OUT are the members of the repetition's pool (BEFORE: of the first one). FRESH perturbations were
            computed against this network with the config and seeds of the pool (BEFORE: the given pool, unless it is of another
            network), and with --online TRAINED_ON those that moved with the network (BEFORE: as they ended in the first repetition).
            RANDOM is noise.
        num_perturbations: number of perturbations in the group.
        fooling, top1: means over the group, with the number of images and its interval.
        lowest, highest: extreme fooling rates within the group.
        top1_clean: accuracy without a perturbation.
    """

    network: str
    group: str
    num_perturbations: int
    fooling: Rate
    top1: Rate
    lowest: float
    highest: float
    top1_clean: Rate


@dataclass(frozen=True)
class FinishedFinetuning:
    """Results of a fine-tuning.

    Attributes:
        measurements: every network (BEFORE, and after each repetition) under every perturbation.
        groups: names of the perturbations of each network, by group (see `Comparison`).
        epochs: records of all epochs of each repetition.
        online: perturbations that moved with the last network; None without --online.
        evaluations: network evaluations that led to each network.
        provenance: network, pool, data, config and versions.
        mlflow_run_id: MLflow run of the job.
    """

    measurements: Sequence[Measurement]
    groups: Mapping[str, Mapping[str, Sequence[str]]]
    epochs: Mapping[str, Sequence[RoundRecord]]
    online: PerturbationPool | None
    evaluations: Mapping[str, int]
    provenance: Mapping[str, Any]
    mlflow_run_id: str

    @property
    def comparisons(self) -> list[Comparison]:
        """A comparison for each network and group of perturbations."""
        return [
            _compare(
                network, group, [m for m in self.measurements if m.classifier == network and m.perturbation in names]
            )
            for network, groups in self.groups.items()
            for group, names in groups.items()
            if names
        ]

    def result(self) -> dict[str, Any]:
        """The contents of result.json."""
        return {
            "comparisons": [flatten_rates(vars(comparison)) for comparison in self.comparisons],
            "evaluations": dict(self.evaluations),
            "mlflow_run_id": self.mlflow_run_id,
            "provenance": dict(self.provenance),
        }

    def metrics(self) -> dict[str, float]:
        """Metrics before fine-tuning and after the last repetition, by their names in MLflow."""
        found: dict[str, float] = {}
        networks = list(self.groups)
        for comparison in self.comparisons:
            when = {networks[0]: "before", networks[-1]: "after"}.get(comparison.network)
            if when is not None:
                found[f"{when}/fooling_rate_{comparison.group}"] = comparison.fooling.rate
                found[f"{when}/top1_{comparison.group}"] = comparison.top1.rate
                found[f"{when}/top1_clean"] = comparison.top1_clean.rate
        return found

    def summary(self) -> str:
        """A summary in Markdown: what was trained, and how it changed the fooling rates."""
        p = self.provenance
        model = escape_markdown(p["model"])
        by_group = {(c.network, c.group): c for c in self.comparisons}
        networks = list(self.groups)
        first, last = by_group.get((networks[0], FRESH)), by_group[networks[-1], FRESH]
        before = (
            f"**{first.fooling}** of the held-out images before and "
            if first
            else "(those before were another network's) "
        )
        variant = "adaptive magnitudes" if p["finetune.adaptive"] else "the perturbations as they are"
        what = (
            f"{len(self.online.members)} that moved with it"
            if self.online is not None
            else f"a pool of {p['pool_size']}"
        )
        return (
            f"**{model}** fine-tuned on universal perturbations, {what} ({p['norm']} ≤ {p['radius']:g} pixels), "
            f"{p['finetune.epochs']} epochs on {p['num_train_images']:,} images, {variant}; repetitions: {len(networks) - 1}.\n\n"
            f"Perturbations that are computed against the network itself, with one config and the same {last.num_perturbations} seeds, "
            f"fool {before}**{last.fooling}** after; clean top-1 {by_group[networks[0], RANDOM].top1_clean} before, "
            f"{last.top1_clean} after.\n\n{self.markdown()}\n\n"
            "Fooling rates are means over the perturbations of a group (in brackets lowest and highest) on held-out images; the 95 % "
            "interval of such a mean is at most that of one rate. Network evaluations (one image once forward or once backward) are those "
            "of all training so far, and of computing the members that were trained on. `network.safetensors` is the fine-tuned network, "
            "for `--weights`."
        )

    def markdown(self) -> str:
        """A table with a row for each network and a column for each group."""
        rows, titles = [], TITLES | ({} if self.online is None else ONLINE_TITLES)
        for network in self.groups:
            by_group = {c.group: c for c in self.comparisons if c.network == network}
            cells = [_cell(by_group.get(group)) for group in titles]
            rows.append([network, f"{self.evaluations[network]:,}", str(by_group[RANDOM].top1_clean), *cells])
        return markdown_table(["network", "network evaluations", "clean top-1", *titles.values()], rows)


@writes_files
def save_finetuning(folder: Path, finished: FinishedFinetuning) -> None:
    """Write all files except the networks, result.json last."""
    save_evaluation(folder, finished.measurements)
    (folder / "tables/before-after.md").write_text(finished.markdown() + "\n", encoding="utf-8")
    save_table(folder / "tables/before-after", [flatten_rates(vars(comparison)) for comparison in finished.comparisons])
    epochs = [{"repetition": name, "epoch": r.step, **r.metrics} for name, rs in finished.epochs.items() for r in rs]
    names = list(dict.fromkeys(name for row in epochs for name in row))
    rows = [{name: row.get(name) for name in names} for row in epochs]
    save_table(folder / "tables/epochs", rows)
    _plot_epochs(folder / "pictures/2-epochs.png", finished.epochs)
    if finished.online is not None:
        finished.online.save(folder / ONLINE_FOLDER)
        own = [member["name"] for member in finished.online.members]
        save_perturbations(folder / "pictures/3-online.png", finished.online.perturbations, own)
    (folder / RESULT_FILE).write_text(json.dumps(finished.result(), indent=2) + "\n", encoding="utf-8")


def _cell(c: Comparison | None) -> str:
    return f"{c.fooling.rate:.3f} ({c.lowest:.3f}–{c.highest:.3f}), top-1 {c.top1.rate:.3f}" if c else "–"


def _compare(network: str, group: str, measurements: Sequence[Measurement]) -> Comparison:
    rates = [m.fooling.rate for m in measurements]
    clean = measurements[0].top1_clean
    assert clean is not None
    return Comparison(
        network=network,
        group=group,
        num_perturbations=len(measurements),
        fooling=_mean([m.fooling for m in measurements]),
        top1=_mean([m.top1 for m in measurements if m.top1 is not None]),
        lowest=min(rates),
        highest=max(rates),
        top1_clean=clean,
    )


def _mean(rates: Sequence[Rate]) -> Rate:
    return Rate(round(mean(rate.num_hits for rate in rates)), rates[0].num_examples)


def _plot_epochs(path: Path, repetitions: Mapping[str, Sequence[RoundRecord]]) -> None:
    """Plot each repetition by epoch, on held-out images: clean top-1, and fooling rate and top-1 under both parts of the pool."""
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
