"""Tables and the picture of benchmarks/rules.py."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from comparison.intervals import half_interval, interval, spread
from comparison.opponents import CLAMP
from comparison.rows import BUDGETS, NO_CLAMP, ROWS, RULES, TITLES, Row, Runs, group, rates_of, read_all


def table(rows: list[Row], runs: Runs, images: str) -> Iterator[str]:
    """Markdown: where ours is ahead, then a line for each row that has runs."""
    yield from leads(rows, runs, images)
    yield ""
    rate = f"{images.replace('_', '-')} fooling rate, mean ± sd"
    yield f"| network, norm, evaluations | rule | {rate} | to SGD-UAP tuned, paired | seconds | seeds |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for some in group(rows):
        for row in some:
            rates = rates_of(row, runs, images)
            if not rates:
                continue
            tuned = rates_of(replace(row, rule="tuned"), runs, images)
            differences = [rate - tuned[seed] for seed, rate in rates.items() if seed in tuned]
            seconds = mean(runs[row, seed]["seconds"] for seed in rates)
            yield (
                f"| {row.network}, {row.norm}, {row.budget:,} | {TITLES[row.rule]} | {spread(list(rates.values()))} "
                f"| {'' if row.rule == 'tuned' else interval(differences)} | {seconds:.0f} | {len(rates)} |"
            )


def leads(rows: list[Row], runs: Runs, images: str) -> Iterator[str]:
    """Markdown: rates of ours with their paired difference to SGD-UAP tuned, bold where that is more than its interval."""
    budgets = sorted({row.budget for row in rows})
    yield f"| ours (to SGD-UAP tuned) | {' | '.join(f'{budget:,}' for budget in budgets)} |"
    yield "| --- " * (1 + len(budgets)) + "|"
    for network, norm in dict.fromkeys((row.network, row.norm) for row in rows):
        cells = []
        for budget in budgets:
            ours, tuned = (rates_of(Row(network, norm, budget, rule), runs, images) for rule in ("ours", "tuned"))
            differences = [rate - tuned[seed] for seed, rate in ours.items() if seed in tuned]
            lead = interval(differences)
            if len(differences) > 1 and abs(mean(differences)) > half_interval(differences):
                lead = f"**{lead}**"
            cells.append(f"{mean(ours.values()):.3f} ({lead})" if ours else "")
        if any(cells):
            yield f"| {network}, {norm} | {' | '.join(cells)} |"


def constants(path: Path) -> Iterator[str]:
    """Markdown: held-in rates of SGD-UAP where it was run with several sets of constants; its row has those in bold."""
    found: dict[Row, dict[tuple[Any, ...], list[float]]] = {}
    for row, line in read_all(path):
        if row.rule == "tuned":
            found.setdefault(row, {}).setdefault(constants_of(line["config"]), []).append(line["held_in"])
    yield "| network, norm, evaluations | images of a round | clamp | first step, pixels | held-in fooling rate, mean | seeds |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in (row for row in ROWS if len(found.get(row, ())) > 1):
        for (size, clamp, step_size), rates in found[row].items():
            rate = f"{mean(rates):.3f}"
            rate = f"**{rate}**" if constants_of(row.config) == (size, clamp, step_size) else rate
            limit = "none" if clamp == NO_CLAMP else f"{clamp:g}"
            name = f"{row.network}, {row.norm}, {row.budget:,}"
            yield f"| {name} | {size} | {limit} | {step_size or 'ours'} | {rate} | {len(rates)} |"


def constants_of(config: dict[str, Any]) -> tuple[Any, ...]:
    """Images of a round, clamp, first step in pixels (None: our default)."""
    return config["round_size"], config.get("clamp", CLAMP), config.get("step_size")


def draw(rows: list[Row], runs: Runs, path: Path) -> None:
    """Held-out fooling rate against evaluations: a panel for each network and norm that has runs, the spread of seeds as a band."""
    rows = [row for row in rows if len(rates_of(row, runs, "held_out")) > 1]
    panels = list(dict.fromkeys((row.network, row.norm) for row in rows))
    columns = min(len(panels), 4)
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4 * columns, 3.6 * lines), layout="constrained", squeeze=False, sharey=True
    )
    for axis, (network, norm) in zip(axes.flat, panels, strict=False):
        for rule, title in TITLES.items():
            some = [row for row in rows if (row.network, row.norm, row.rule) == (network, norm, rule)]
            found = {row.budget: list(rates_of(row, runs, "held_out").values()) for row in some}
            if not found:
                continue
            means, sds = ([f(rates) for rates in found.values()] for f in (mean, stdev))
            color = f"C{RULES.index(rule)}"
            axis.plot(list(found), means, color=color, marker="o", ms=4, label=title)
            low, high = ([m + sign * sd for m, sd in zip(means, sds, strict=True)] for sign in (-1, 1))
            axis.fill_between(list(found), low, high, color=color, alpha=0.2, lw=0)
        limits = (0.8 * BUDGETS[0], 1.2 * BUDGETS[-1])
        axis.set(title=f"{network}, {norm}", xscale="log", xlabel="network evaluations", xlim=limits, ylim=(0, 1))
        axis.set_xticks(BUDGETS, [f"{budget // 1000}k" for budget in BUDGETS], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    axes[0, 0].set_ylabel("held-out fooling rate")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
