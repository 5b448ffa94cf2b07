"""What a fine-tuning leaves as files: the table before / after, all measurements, the epochs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from uap_dist.evaluation.evaluate import Measurement
from uap_dist.evaluation.report import save_evaluation
from uap_dist.finetuning import plots
from uap_dist.finetuning.trainer import HELD_OUT, TRAINED_ON
from uap_dist.foreign_text import escape_markdown
from uap_dist.method.rates import Rate, flatten_rates
from uap_dist.tracking.history import RoundRecord
from uap_dist.tracking.outputs import RESULT_FILE, markdown_table, save_table, writes_files

BEFORE = "before"
FRESH, RANDOM = "fresh", "random"
TITLES = {
    TRAINED_ON: "members trained on",
    HELD_OUT: "members held out",
    FRESH: "**perturbations computed against this network**",
    RANDOM: "random, as large as the first member",
}


@dataclass(frozen=True)
class Comparison:
    """One network of a fine-tuning under one group of perturbations.

    Attributes:
        network: BEFORE, or which repetition led to it.
        group: TRAINED_ON, HELD_OUT (members of the pool of that repetition; before: of the first), FRESH (computed against this
            very network by the pool's config and seeds; before: the given pool, none if that is another network's), RANDOM.
        num_perturbations: in the group.
        fooling, top1: means over the group; counts and intervals are those of the images.
        lowest, highest: fooling rate within the group.
        top1_clean: of the network without any perturbation.
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
    """What a fine-tuning has measured.

    Attributes:
        measurements: of every network (BEFORE, and after each repetition) under every perturbation.
        groups: for each network its perturbations by group (see Comparison).
        epochs: of each repetition.
        provenance: network, pool, data, config, versions.
        mlflow_run_id: where it is logged.
    """

    measurements: Sequence[Measurement]
    groups: Mapping[str, Mapping[str, Sequence[str]]]
    epochs: Mapping[str, Sequence[RoundRecord]]
    provenance: Mapping[str, Any]
    mlflow_run_id: str

    @property
    def comparisons(self) -> list[Comparison]:
        """For each network and group."""
        return [
            _compare(
                network, group, [m for m in self.measurements if m.classifier == network and m.perturbation in names]
            )
            for network, groups in self.groups.items()
            for group, names in groups.items()
            if names
        ]

    def result(self) -> dict[str, Any]:
        """The numbers that scripts read."""
        return {
            "comparisons": [flatten_rates(vars(comparison)) for comparison in self.comparisons],
            "mlflow_run_id": self.mlflow_run_id,
            "provenance": dict(self.provenance),
        }

    def metrics(self) -> dict[str, float]:
        """The end in numbers, under the names that MLflow uses; before, and after the last repetition."""
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
        """A few lines of Markdown: what was trained on what, and what it changed."""
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
        return (
            f"**{model}** fine-tuned on a pool of {p['pool_size']} universal perturbations ({p['norm']} ≤ {p['radius']:g} pixels), "
            f"{p['finetune.epochs']} epochs on {p['num_train_images']:,} images, {variant}; repetitions: {len(networks) - 1}.\n\n"
            f"Perturbations that are computed against the network itself, by one config and the same {last.num_perturbations} seeds, "
            f"fool {before}**{last.fooling}** after; clean top-1 {by_group[networks[0], RANDOM].top1_clean} before, "
            f"{last.top1_clean} after.\n\n{self.markdown()}\n\n"
            "Fooling rates are means over the perturbations of a group (in brackets lowest and highest) on held-out images; the 95 % "
            "interval of such a mean is at most that of one rate. `network.safetensors` is the fine-tuned network, for `--weights`."
        )

    def markdown(self) -> str:
        """A line for each network, a column for each group."""
        rows = []
        for network in self.groups:
            by_group = {c.group: c for c in self.comparisons if c.network == network}
            cells = [_cell(by_group.get(group)) for group in TITLES]
            rows.append([network, str(by_group[RANDOM].top1_clean), *cells])
        return markdown_table(["network", "clean top-1", *TITLES.values()], rows)


@writes_files
def save_finetuning(folder: Path, finished: FinishedFinetuning) -> None:
    """Every file but the networks, result.json last."""
    save_evaluation(folder, finished.measurements)
    (folder / "tables/before-after.md").write_text(finished.markdown() + "\n")
    save_table(folder / "tables/before-after", [flatten_rates(vars(comparison)) for comparison in finished.comparisons])
    epochs = [{"repetition": name, "epoch": r.step, **r.metrics} for name, rs in finished.epochs.items() for r in rs]
    names = list(dict.fromkeys(name for row in epochs for name in row))
    rows = [{name: row.get(name) for name in names} for row in epochs]
    save_table(folder / "tables/epochs", rows)
    plots.save_epochs(folder / "pictures/2-epochs.png", finished.epochs)
    (folder / RESULT_FILE).write_text(json.dumps(finished.result(), indent=2) + "\n")


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
