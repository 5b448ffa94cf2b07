"""The files of an evaluation: a table of all measurements, the transfer matrix, and fooling rate against norm."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from uap_dist.evaluation import plots
from uap_dist.evaluation.coverage import PoolCoverage, by_symbol, coverage_rows
from uap_dist.evaluation.evaluate import Measurement
from uap_dist.foreign_text import escape_markdown
from uap_dist.method.rates import ATTACKED, FOOLING, RATE_TITLES, SPARED, TARGETED, rate_columns
from uap_dist.tracking.outputs import markdown_table, save_table, writes_files

MEANINGS = {
    TARGETED: "images whose label is the target already do not count",
    ATTACKED: "images of the classes that the perturbation was computed to fool",
    SPARED: "images of the classes that it was to leave alone, so less is better",
}
MAX_ROWS_IN_SUMMARY = 40  # MLflow cuts a description at 8,000 characters


@writes_files
def save_evaluation(folder: Path, measurements: Sequence[Measurement], covered: Sequence[PoolCoverage] = ()) -> None:
    """Write tables/ and pictures/ of an evaluation."""
    for name in ("pictures", "tables"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    save_table(folder / "tables/evaluation", _table(measurements))
    (folder / "tables/evaluation.md").write_text(markdown(measurements) + "\n", encoding="utf-8")
    rows = [
        {"classifier": each.classifier, "dataset": each.dataset, "pool": each.pool} | row
        for each in covered
        for row in coverage_rows(each.coverage, each.random)
    ]
    if rows:
        save_table(folder / "tables/coverage", rows)
    for number, each in enumerate(covered, 1):
        title = f"{each.pool}, {each.classifier}, {each.dataset}"
        path = folder / f"pictures/3-coverage-{number}.png"
        plots.save_coverage(path, each.coverage, by_symbol(each.random), title)
    for dataset in dict.fromkeys(m.dataset for m in measurements):
        own = [m for m in measurements if m.dataset == dataset]
        full = [m for m in own if m.scale == 1]
        if full:
            _save_rates(folder, f"transfer-{dataset}", full, FOOLING)
        for kind in _other_kinds(full):
            _save_rates(folder, f"{kind.replace('_', '-')}-{dataset}", [m for m in full if kind in m.rates], kind)
        if len({m.scale for m in own}) > 1:
            plots.save_rates_by_norm(folder / f"pictures/2-fooling-rate-by-norm-{dataset}.png", own)


def summary(measurements: Sequence[Measurement], covered: Sequence[PoolCoverage] = ()) -> str:
    """Markdown for the run's page: the best perturbation of each classifier, and a matrix of all fooling rates."""
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
        lines += [each.sentence() for each in covered if each.dataset == dataset]
        lines += ["", _matrix(own, FOOLING), ""]
        if any(m.is_own for m in own):
            lines += ["Bold: networks that the perturbation was computed for.", ""]
        for kind in _other_kinds(own):
            counted = [m for m in own if kind in m.rates]
            lines += [f"{RATE_TITLES[kind].capitalize()}: {MEANINGS[kind]}.", ""]
            lines += [
                _best_of_goal(*names, counted, kind) for names in dict.fromkeys((m.classifier, m.goal) for m in counted)
            ]
            lines += ["", _matrix(counted, kind), ""]
    picture = "See `pictures/1-transfer-….png`; " if any(m.scale == 1 for m in measurements) else ""
    return "\n".join([*lines, f"{picture}`tables/evaluation.csv` also has norms, and top-1 before and after."])


def _matrix(measurements: Sequence[Measurement], kind: str) -> str:
    """Perturbations down, classifiers across, those it was computed for in bold. A dash: such sizes have other baselines."""
    classifiers = list(dict.fromkeys(m.classifier for m in measurements))
    rates = {
        (m.perturbation, m.scale, m.classifier): f"{'**' * m.is_own}{m.rates[kind].rate:.3f}{'**' * m.is_own}"
        for m in measurements
    }
    named = list(dict.fromkeys((m.perturbation, m.scale) for m in measurements))
    rows = [
        [_scaled(*each), *(rates.get((*each, classifier), "–") for classifier in classifiers)]
        for each in named[:MAX_ROWS_IN_SUMMARY]
    ]
    table = markdown_table(["perturbation", *map(escape_markdown, classifiers)], rows)
    num_left_out = len(named) - len(rows)
    return table + (f"\n\n{num_left_out} more rows in `tables/evaluation.md`." if num_left_out else "")


def _best(classifier: str, measurements: Sequence[Measurement]) -> str:
    """One line: the perturbation that fools a classifier most often, beside the noise that does."""
    own = [m for m in measurements if m.classifier == classifier]
    best, noise = (max((m for m in own if m.is_baseline == b), key=lambda m: m.fooling.rate) for b in (False, True))
    names = [_scaled(m.perturbation, m.scale) for m in (best, noise)]
    return f"* {escape_markdown(classifier)}: **{names[0]}** fools {best.fooling}; {names[1]}: {noise.fooling}"


def _scaled(name: str, scale: float) -> str:
    """A perturbation and its factor, unless that is 1."""
    return escape_markdown(name) + (f" × {scale:g}" if scale != 1 else "")


def _other_kinds(measurements: Sequence[Measurement]) -> list[str]:
    """The kinds of rates beside the fooling rate that some of the measurements have."""
    return [kind for kind in RATE_TITLES if kind != FOOLING and any(kind in m.rates for m in measurements)]


def _best_of_goal(classifier: str, goal: str, measurements: Sequence[Measurement], kind: str) -> str:
    """One line: the perturbation of a goal with the largest rate on a classifier, beside the noise with the largest."""
    own = [m for m in measurements if (m.classifier, m.goal) == (classifier, goal)]
    best = [
        max(some, key=lambda m: m.rates[kind].rate)
        for is_baseline in (False, True)
        if (some := [m for m in own if m.is_baseline == is_baseline])
    ]
    said = [f"**{_scaled(m.perturbation, m.scale)}** {m.rates[kind]}" for m in best]
    return f"* {escape_markdown(classifier)}, {escape_markdown(goal)}: {'; '.join(said)}"


def markdown(measurements: Sequence[Measurement]) -> str:
    """A Markdown table with a row for each measurement."""
    heads = ["classifier", "images", "perturbation", "scale", "ℓ2", "ℓ∞", "fooling rate", "top-1 before", "top-1 after"]
    kinds = _other_kinds(measurements)
    heads += ["goal", *(RATE_TITLES[kind] for kind in kinds)] if kinds else []
    rows = [
        [
            *map(escape_markdown, (m.classifier, m.dataset, m.perturbation)),
            f"{m.scale:g}",
            f"{m.norm_l2:.0f}",
            f"{m.norm_linf:.1f}",
            *(str(rate or "–") for rate in (m.fooling, m.top1_clean, m.top1)),
            *((escape_markdown(m.goal or "–"), *(str(m.rates.get(kind, "–")) for kind in kinds)) if kinds else ()),
        ]
        for m in measurements
    ]
    return markdown_table(heads, rows)


def _table(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """A row for each measurement; columns on goals only where there are some."""
    kinds, rows = _other_kinds(measurements), []
    for m in measurements:
        row = {name: value for name, value in vars(m).items() if isinstance(value, str | bool | float)}
        if not kinds:
            del row["goal"]
        rates = {f"{kind}_rate": m.rates.get(kind) for kind in (FOOLING, *kinds)}
        for name, rate in (rates | {"top1_clean": m.top1_clean, "top1": m.top1}).items():
            row |= rate_columns(name, rate)
        rows.append(row)
    return rows


def _save_rates(folder: Path, name: str, measurements: Sequence[Measurement], kind: str) -> None:
    """Rates of one kind as heat map and CSV: perturbations down, classifiers across, as in table 2 of the paper."""
    rows = list(dict.fromkeys(m.perturbation for m in measurements))
    columns = list(dict.fromkeys(m.classifier for m in measurements))
    rates = np.full((len(rows), len(columns)), np.nan)
    for m in measurements:
        rates[rows.index(m.perturbation), columns.index(m.classifier)] = m.rates[kind].rate
    counts = sorted({m.rates[kind].num_examples for m in measurements})  # those of a target leave out others
    title = f"{RATE_TITLES[kind]} on {'–'.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} images"
    plots.save_matrix(folder / f"pictures/1-{name}.png", rates, rows, columns, title=title, limits=(0, 1))
    table = pa.table({"perturbation": rows, **dict(zip(columns, rates.T, strict=True))})
    pyarrow.csv.write_csv(table, folder / f"tables/{name}.csv")
