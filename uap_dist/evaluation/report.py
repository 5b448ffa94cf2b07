"""What an evaluation leaves as files: the table of all measurements, the transfer matrix, fooling rate against norm."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from uap_dist.evaluation import plots
from uap_dist.evaluation.evaluate import Measurement
from uap_dist.foreign_text import escape_markdown
from uap_dist.method.rates import Rate
from uap_dist.tracking.outputs import writes_files

MAX_ROWS_IN_SUMMARY = 40  # MLflow cuts a description at 8,000 characters


@writes_files
def save_evaluation(folder: Path, measurements: Sequence[Measurement]) -> None:
    """All files of an evaluation: tables/, pictures/."""
    for name in ("pictures", "tables"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([_columns(measurement) for measurement in measurements])
    pq.write_table(table, folder / "tables/evaluation.parquet")
    pyarrow.csv.write_csv(table, folder / "tables/evaluation.csv")
    (folder / "tables/evaluation.md").write_text(markdown(measurements) + "\n")
    for dataset in dict.fromkeys(m.dataset for m in measurements):
        own = [m for m in measurements if m.dataset == dataset]
        full = [m for m in own if m.scale == 1]
        if full:
            _save_transfer(folder, dataset, full)
        if len({m.scale for m in own}) > 1:
            plots.save_rates_by_norm(folder / f"pictures/2-fooling-rate-by-norm-{dataset}.png", own)


def summary(measurements: Sequence[Measurement]) -> str:
    """What a run's page says of an evaluation: what is best on which classifier, and all fooling rates."""
    lines = []
    for dataset in dict.fromkeys(m.dataset for m in measurements):
        own = [m for m in measurements if m.dataset == dataset]
        half = max((high - low) / 2 for low, high in (m.fooling.interval for m in own))
        count = own[0].fooling.num_examples
        lines += [
            f"Fooling rates on {count:,} images of {escape_markdown(dataset)} (95 % intervals up to ±{half:.3f}).",
            "",
        ]
        lines += [_best(classifier, own) for classifier in dict.fromkeys(m.classifier for m in own)]
        lines += ["", *_matrix(own), ""]
    return "\n".join(
        [*lines, "Look at `pictures/1-transfer-….png`; `tables/evaluation.csv` has norms, and top-1 before and after."]
    )


def _matrix(measurements: Sequence[Measurement]) -> Iterator[str]:
    """Perturbations down, classifiers across; a dash where an input size has no such baseline of its own."""
    classifiers = list(dict.fromkeys(m.classifier for m in measurements))
    rates = {(m.perturbation, m.scale, m.classifier): f"{m.fooling.rate:.3f}" for m in measurements}
    rows = list(dict.fromkeys((m.perturbation, m.scale) for m in measurements))
    yield f"| perturbation | {' | '.join(map(escape_markdown, classifiers))} |"
    yield "| --- " * (1 + len(classifiers)) + "|"
    for name, scale in rows[:MAX_ROWS_IN_SUMMARY]:
        label = escape_markdown(name) + (f" × {scale:g}" if scale != 1 else "")
        yield f"| {label} | {' | '.join(rates.get((name, scale, classifier), '–') for classifier in classifiers)} |"
    if len(rows) > MAX_ROWS_IN_SUMMARY:
        yield f"\n{len(rows) - MAX_ROWS_IN_SUMMARY} more in `tables/evaluation.md`."


def _best(classifier: str, measurements: Sequence[Measurement]) -> str:
    """The most fooling perturbation of a classifier beside the most fooling noise."""
    own = [m for m in measurements if m.classifier == classifier]
    best, noise = (max((m for m in own if m.is_baseline == b), key=lambda m: m.fooling.rate) for b in (False, True))
    name = escape_markdown(best.perturbation)
    return f"* {escape_markdown(classifier)}: **{name}** fools {best.fooling}; {noise.perturbation}: {noise.fooling}"


def markdown(measurements: Sequence[Measurement]) -> str:
    """A line for each measurement."""
    lines = [
        "| classifier | images | perturbation | scale | ℓ2 | ℓ∞ | fooling rate | top-1 before | top-1 after |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for m in measurements:
        names = " | ".join(map(escape_markdown, (m.classifier, m.dataset, m.perturbation)))
        rates = f"{m.fooling} | {m.top1_clean or '–'} | {m.top1 or '–'}"
        lines.append(f"| {names} | {m.scale:g} | {m.norm_l2:.0f} | {m.norm_linf:.1f} | {rates} |")
    return "\n".join(lines)


def _columns(m: Measurement) -> dict[str, Any]:
    columns = {name: value for name, value in vars(m).items() if not isinstance(value, Rate | None)}
    for name, rate in (("fooling_rate", m.fooling), ("top1_clean", m.top1_clean), ("top1", m.top1)):
        low, high = rate.interval if rate else (None, None)
        columns |= {name: rate.rate if rate else None, f"{name}_low": low, f"{name}_high": high}
        columns[f"{name}_num_images"] = rate.num_examples if rate else None
    return columns


def _save_transfer(folder: Path, dataset: str, measurements: Sequence[Measurement]) -> None:
    """Fooling rates, perturbations down and classifiers across (table 2 of the paper), as heat map and CSV."""
    rows = list(dict.fromkeys(m.perturbation for m in measurements))
    columns = list(dict.fromkeys(m.classifier for m in measurements))
    rates = np.full((len(rows), len(columns)), np.nan)
    for m in measurements:
        rates[rows.index(m.perturbation), columns.index(m.classifier)] = m.fooling.rate
    title = f"fooling rate on {measurements[0].fooling.num_examples} images"
    plots.save_matrix(folder / f"pictures/1-transfer-{dataset}.png", rates, rows, columns, title=title, limits=(0, 1))
    table = pa.table({"perturbation": rows, **dict(zip(columns, rates.T, strict=True))})
    pyarrow.csv.write_csv(table, folder / f"tables/transfer-{dataset}.csv")
