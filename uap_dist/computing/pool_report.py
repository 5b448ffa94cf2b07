"""The files of a pool, beside those of its members: the perturbations, their fooling rates and how diverse they are."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from uap_dist.computing import plots
from uap_dist.computing.report import EXAMPLES_FILE, ROUNDS_FILE, name_random_rates
from uap_dist.evaluation.coverage import (
    VERBS,
    Coverage,
    by_symbol,
    class_rows,
    common_goal,
    coverage_rows,
    measure_random_coverage,
)
from uap_dist.evaluation.plots import save_coverage, save_matrix
from uap_dist.foreign_text import escape_markdown
from uap_dist.method.norms import Norm
from uap_dist.method.rates import FOOLING, Rate, rate_titles
from uap_dist.models.several import of_network
from uap_dist.perturbations.files import load_perturbations
from uap_dist.perturbations.pool import DIVERSE, PerturbationPool
from uap_dist.tracking.outputs import RESULT_FILE, markdown_table, writes_files
from uap_dist.workers.dataset import Dataset
from uap_dist.workers.local import Workers

POOL_FOLDER = "pool"
MEMBERS_FOLDER = "members"
NUM_PAIRS_NAMED = 3


@dataclass(frozen=True)
class FinishedPool:
    """A pool whose members have been computed, each in a folder of its own.

    Attributes:
        pool: of all members.
        results: of each member, what its result.json says.
        rounds: metrics of each member's rounds.
        examples: of each member, its table of held-out examples.
        random_coverage: of as many random perturbations, by the norm that they share with the members.
        mlflow_run_id: where the pool is logged.
    """

    pool: PerturbationPool
    results: Mapping[str, Mapping[str, Any]]
    rounds: Mapping[str, Sequence[Mapping[str, float]]]
    examples: Mapping[str, pa.Table]
    random_coverage: Mapping[Norm, Coverage]
    mlflow_run_id: str

    @classmethod
    def of(cls, folders: Mapping[str, Path], workers: Workers, val: Dataset, mlflow_run_id: str) -> "FinishedPool":
        """Load the members from their folders, by name, and measure random perturbations beside them."""
        pool = PerturbationPool.of(load_perturbations([f"{name}={folder}" for name, folder in folders.items()]))
        results = {
            name: json.loads((folder / RESULT_FILE).read_text(encoding="utf-8")) for name, folder in folders.items()
        }
        rounds = {name: pq.read_table(folder / "tables" / ROUNDS_FILE).to_pylist() for name, folder in folders.items()}
        examples = {name: pq.read_table(folder / "tables" / EXAMPLES_FILE) for name, folder in folders.items()}
        goal = common_goal(pool.to_perturbations()).of_networks(val.clean.networks)
        random = measure_random_coverage(workers, val, pool.perturbations, goal)
        return cls(pool, results, rounds, examples, random, mlflow_run_id)

    @cached_property
    def coverage(self) -> Coverage:
        """Of the held-out images."""
        tables, goal = list(self.examples.values()), common_goal(self.pool.to_perturbations())
        perturbed = np.stack([_labels(table, "perturbed_label", self.networks) for table in tables])
        clean = _labels(tables[0], "clean_label", self.networks)
        return Coverage.of(list(self.examples), goal.of_networks(self.networks), clean, perturbed)

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the networks that it was computed for, if they are several."""
        first, *_ = self.pool.to_perturbations()
        return tuple(first.provenance.get("networks") or ())

    @property
    def mean_rates(self) -> dict[str, float]:
        """Mean held-out rates of the members, by kind."""
        results = self.results.values()
        first, *_ = results
        kinds = [name.removeprefix("val_").removesuffix("_rate") for name in first if re.fullmatch("val_.*_rate", name)]
        kinds = [kind for kind in kinds if all(f"val_{kind}_rate" in result for result in results)]
        return {kind: sum(result[f"val_{kind}_rate"] for result in results) / len(results) for kind in kinds}

    @property
    def random_rates(self) -> dict[str, dict[str, Rate]]:
        """Held-out rates of random perturbations, by kind and by the norms that they share with the first member."""
        first, found = next(iter(self.results.values())), {}
        norm = self.pool.shared["norm"]
        for kind in self.mean_rates:
            count = first["num_val_images" + ("" if kind == FOOLING else f"_{kind}")]
            by_norm = {norm: _rate(share, count) for norm, share in first[f"val_{kind}_rate_random_by_norm"].items()}
            found[kind] = name_random_rates(norm, by_norm, are_one=self._has_one_baseline)
        return found

    @property
    def _has_one_baseline(self) -> bool:
        """Whether random perturbations share both norms with the members."""
        return self.random_coverage["linf"] is self.random_coverage["l2"]

    def result(self) -> dict[str, Any]:
        """The contents of result.json."""
        value, pair = self.pool.nearest_pairs()[0]
        first, rates, coverage = next(iter(self.results.values())), {}, f"val_coverage{self.coverage.suffix}"
        for kind, mean in self.mean_rates.items():
            rates[f"mean_val_{kind}_rate"] = mean
            rates |= {name: first[name] for name in (f"val_{kind}_rate_random", f"val_{kind}_rate_random_by_norm")}
        return {
            "num_perturbations": len(self.results),
            **rates,
            "num_val_images": first["num_val_images"],
            coverage: self.coverage.rates[-1].rate,
            f"{coverage}_random_by_norm": {norm: each.rates[-1].rate for norm, each in self.random_coverage.items()},
            "largest_inner_product": value,
            "nearest_pair": pair,
            "is_diverse": value <= DIVERSE,
            "pool": POOL_FOLDER,
            "members": self.results,
            "mlflow_run_id": self.mlflow_run_id,
        }

    def metrics(self) -> dict[str, float]:
        """The pool's metrics by their names in MLflow."""
        coverage = f"pool/val_coverage{self.coverage.suffix}"
        return {
            **{f"pool/mean_val_{kind}_rate": mean for kind, mean in self.mean_rates.items()},
            coverage: self.coverage.rates[-1].rate,
            **{f"{coverage}_random/{n}": each.rates[-1].rate for n, each in self.random_coverage.items()},
            "pool/largest_inner_product": self.pool.nearest_pairs()[0][0],
            "pool/num_perturbations": float(len(self.results)),
        }

    def summary(self) -> str:
        """A summary in Markdown: what was computed, its fooling rates, and whether it is diverse."""
        p = self.pool.shared
        model = escape_markdown(p["model"])
        pairs = self.pool.nearest_pairs()[:NUM_PAIRS_NAMED]
        value = pairs[0][0]
        named = ", ".join(
            f"{escape_markdown(a)} and {escape_markdown(b)} ({product:z.2f})" for product, (a, b) in pairs
        )
        titles = rate_titles(self.mean_rates)
        rates = " ".join(
            f"Mean held-out {escape_markdown(titles[kind])} **{mean:.3f}**; a random perturbation of the "
            + ", of the ".join(f"{name}: {rate}" for name, rate in self.random_rates[kind].items())
            + "."
            for kind, mean in self.mean_rates.items()
        )
        together = {norm: each.rates[-1] for norm, each in self.random_coverage.items()}
        chance = ", of the ".join(
            f"{name}: {rate.rate:.3f}"
            for name, rate in name_random_rates(p["norm"], together, are_one=self._has_one_baseline).items()
        )
        verdict = "diverse" if value <= DIVERSE else "**not diverse**"
        return (
            f"Pool of {len(self.results)} universal perturbations of **{model}**, {p['norm']} ≤ {p['radius']:g} pixels"
            f"{self._goal_in_words()}. {rates} "
            f"At least one member {VERBS[self.coverage.kind]} {self.coverage.rates[-1]}, the first alone "
            f"{self.coverage.rates[0].rate:.3f}; as many random perturbations of the {chance}. "
            f"By the paper's criterion (normalised inner products of at most {DIVERSE:g}) the pool is {verdict}: "
            f"the largest is {value:z.2f}. Nearest: {named}.\n\n"
            f"{self.markdown()}\n\n"
            "Look at the pictures in the order of their names (curves, inner products, members, coverage); each member's run lies "
            "below this one."
        )

    def _goal_in_words(self) -> str:
        first, reached = (
            next(iter(self.results.values())),
            [r.get("is_target_reached", True) for r in self.results.values()],
        )
        goal = "".join(f", **{escape_markdown(part)}**" for part in first.get("goal", ()))
        missed = reached.count(False)
        return goal + (f"; **{missed} of {len(reached)} members did not reach the target**" if missed else "")

    def markdown(self) -> str:
        """A table of the members."""
        rows = []
        for name, result in self.results.items():
            rates = [_rate_of(result, part, kind) or "–" for kind in self.mean_rates for part in ("val", "train")]
            label, count = result["dominant_labels"][0] if result["dominant_labels"] else ("–", 0)
            size, taken = f"{result['norm_l2']:.0f}", f"{escape_markdown(label)} ({count})"
            rows.append([escape_markdown(name), *map(str, rates), size, taken])
        titles = rate_titles(self.mean_rates).values()
        rate_heads = [head for title in titles for head in (f"held-out {escape_markdown(title)}", "training")]
        heads = ["member", *rate_heads, "norm ℓ2", "label of most fooled images"]
        return markdown_table(heads, rows)


def _columns(name: str, networks: Sequence[str]) -> list[str]:
    """The columns of examples that hold something of each network."""
    return [of_network(name, network) for network in networks] or [name]


def _labels(examples: pa.Table, name: str, networks: Sequence[str]) -> np.ndarray:
    """Labels of N examples; of several networks N×S."""
    columns = [examples[column].to_numpy() for column in _columns(name, networks)]
    return np.stack(columns, 1) if networks else columns[0]


def _rate_of(result: Mapping[str, Any], part: str, kind: str) -> Rate | None:
    """A rate of a member's result.json, on its held-out (val) or training (train) images; None if none of these counts."""
    count = result[f"num_{part}_images" + ("" if kind == FOOLING else f"_{kind}")]
    return _rate(result[f"{part}_{kind}_rate"], count) if count else None


def _rate(share: float, num_examples: int) -> Rate:
    """The rate that result.json stores as a share and a number of images."""
    return Rate(round(share * num_examples), num_examples)


@writes_files
def save_pool(folder: Path, finished: FinishedPool) -> None:
    """Write all files of a finished pool, except those of its members; result.json last."""
    for name in ("pictures", "tables"):
        (folder / name).mkdir(exist_ok=True)
    pool = finished.pool
    pool.save(folder / POOL_FOLDER)
    names = [member["name"] for member in pool.members]
    products = pool.inner_products().numpy()
    plots.save_curves(folder / "pictures/1-fooling-rates.png", finished.rounds, finished.random_rates)
    title = "normalised inner products of members"
    save_matrix(folder / "pictures/2-inner-products.png", products, names, names, title=title, limits=(0, 1))
    plots.save_perturbations(folder / "pictures/3-members.png", pool.perturbations, names)
    random_coverage = by_symbol(finished.random_coverage)
    save_coverage(folder / "pictures/4-coverage.png", finished.coverage, random_coverage, "What the pool covers")
    clean = next(iter(finished.examples.values()))
    labels, label_names = (
        np.concatenate([clean[column].to_numpy() for column in _columns(name, finished.networks)])
        for name in ("clean_label", "clean_name")
    )
    classes = class_rows(finished.coverage, dict(zip(labels.tolist(), label_names.tolist(), strict=True)))
    for name, rows in (
        ("coverage", coverage_rows(finished.coverage, finished.random_coverage)),
        ("coverage-by-class", classes),
    ):
        pyarrow.csv.write_csv(pa.Table.from_pylist(rows), folder / f"tables/{name}.csv")
    table = pa.table({"member": names, **dict(zip(names, products.T, strict=True))})
    pyarrow.csv.write_csv(table, folder / "tables/inner-products.csv")
    members: list[dict[str, Any]] = [
        {"member": name} | {key: value for key, value in result.items() if isinstance(value, str | int | float)}
        for name, result in finished.results.items()
    ]
    pyarrow.csv.write_csv(pa.Table.from_pylist(members), folder / "tables/members.csv")
    (folder / RESULT_FILE).write_text(json.dumps(finished.result(), indent=2) + "\n", encoding="utf-8")
