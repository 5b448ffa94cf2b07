"""The files of a computation: the perturbation, result.json, pictures/ and tables/."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from uap_dist.computing import plots
from uap_dist.evaluation.label_graph import dominant_labels, label_graph, save_label_graph
from uap_dist.evaluation.plots import save_label_graph as draw_label_graph
from uap_dist.foreign_text import escape_markdown
from uap_dist.method.norms import SYMBOLS, Norm, measure
from uap_dist.method.rates import (
    ATTACKED,
    FOOLING,
    SPARED,
    TARGETED,
    Goal,
    Rate,
    Rates,
    goal_in_words,
    rate_columns,
    rate_titles,
)
from uap_dist.method.state import RoundReport
from uap_dist.models.classes import UNKNOWN_CLASS, label_name
from uap_dist.models.classifier import Predictions
from uap_dist.models.several import of_network, split_kind
from uap_dist.perturbations.files import digest_values, save_perturbation
from uap_dist.perturbations.reading import PERTURBATION_FILE
from uap_dist.rounds.record import RoundRecord
from uap_dist.tracking.outputs import RESULT_FILE, writes_files
from uap_dist.workers.dataset import Dataset
from uap_dist.workers.local import Workers
from uap_dist.workers.worker import Worker

ROUNDS_FILE = "rounds.parquet"
EXAMPLES_FILE = "held-out-examples.parquet"
NUM_PICTURED = 8
NUM_CSV_ROWS = 100
NUM_DOMINANT_LABELS = 5


@dataclass(frozen=True)
class FinishedRun:
    """Results of the computation of one perturbation.

    Attributes:
        final: report of the last round, with its evaluation.
        history: of every round.
        random_rates: held-out rates of a random perturbation that is as large in each norm (see `random_of_same_norms`).
        val: the held-out examples.
        provenance: network, data, config, seed, versions.
        class_names: of the network's labels; empty where not known.
        mlflow_run_id: where it is logged.
    """

    final: RoundReport
    history: Sequence[RoundRecord]
    random_rates: Mapping[Norm, Rates]
    val: Dataset
    provenance: Mapping[str, Any]
    class_names: Sequence[str]
    mlflow_run_id: str

    @property
    def goal(self) -> Goal:
        """What images shall be taken for."""
        return Goal.from_provenance(self.provenance)

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the networks that it was computed for, if they are several."""
        return self.val.clean.networks

    @property
    def _fooling_of_each(self) -> tuple[str, ...]:
        return self.goal.of_networks(self.networks).of_each(FOOLING)

    @property
    def train_rates(self) -> Rates:
        """Rates of the final perturbation on all training images."""
        assert self.final.evaluation is not None and self.final.evaluation.train_rates is not None
        return self.final.evaluation.train_rates

    @property
    def val_rates(self) -> Rates:
        """Rates of the final perturbation on all held-out images."""
        assert self.final.evaluation is not None
        return self.final.evaluation.val_rates

    @property
    def perturbed(self) -> Predictions:
        """Predictions for the held-out images under the final perturbation."""
        assert self.final.evaluation is not None
        return self.final.evaluation.val_predictions

    def random_of(self, kind: str) -> dict[Norm, Rate]:
        """Held-out rates of one kind of random perturbations, by the norm that they share with v; that of the ball first."""
        norms = sorted(self.random_rates, key=lambda norm: norm != self.provenance["norm"])
        return {norm: self.random_rates[norm][kind] for norm in norms}

    def name_random(self, kind: str) -> dict[str, Rate]:
        """Those of `random_of`, named."""
        are_one = self.random_rates["linf"] is self.random_rates["l2"]
        return name_random_rates(self.provenance["norm"], self.random_of(kind), are_one=are_one)

    def random_metrics(self) -> dict[str, float]:
        """Held-out rates of random perturbations, by their names in MLflow.

        They have a group of their own: each is a single point, and MLflow shows the charts of a group in alphabetical order.
        """
        metrics: dict[str, float] = {}
        for kind in self.val_rates:
            by_norm = self.random_of(kind)
            metrics |= rate_columns(f"random/{kind}_rate", next(iter(by_norm.values())))
            metrics |= {f"random/{kind}_rate_{norm}": rate.rate for norm, rate in by_norm.items()}
        return metrics

    @property
    def seconds(self) -> float:
        """Time spent in rounds, without the measurements of fooling rates."""
        return sum(record.metrics["round/seconds"] for record in self.history)

    @property
    def dominant_labels(self) -> list[tuple[str, int]]:
        """The most frequent labels of fooled held-out images: names and numbers of images, those of all networks added up."""
        found = dominant_labels(self.perturbed.labels.ravel(), self.val.clean.labels.ravel())[:NUM_DOMINANT_LABELS]
        return [(label_name(label, self.class_names), count) for label, count in found]

    def result(self) -> dict[str, Any]:
        """The contents of result.json, apart from the provenance."""
        final, target = self.final, self.goal.target
        of_goal: dict[str, Any] = {"goal": goal_in_words(self.goal, self.class_names)}
        if target is not None:
            reached = is_target_reached(self.val_rates[TARGETED], self.random_of(TARGETED).values())
            of_goal |= {"target_name": label_name(target, self.class_names), "is_target_reached": reached}
        return {
            **of_goal,
            **self._worst_network(),
            **{name: value for kind in self.val_rates for name, value in self._rates_of(kind).items()},
            "num_solves": final.num_solves,
            "num_evaluations": final.num_evaluations,
            "num_rounds": final.round_number + 1,
            "norm_linf": measure(final.perturbation, "linf"),
            "norm_l2": measure(final.perturbation, "l2"),
            "dominant_labels": self.dominant_labels,
            "perturbation": PERTURBATION_FILE,
            "perturbation_sha256": digest_values(final.perturbation),
            "seconds": round(self.seconds, 1),
            "mlflow_run_id": self.mlflow_run_id,
        }

    def _worst_network(self) -> dict[str, str]:
        """The network that is fooled least, if there are several."""
        rates = {name: self.val_rates[of_network(FOOLING, name)].rate for name in self.networks}
        return {"worst_network": min(rates, key=lambda name: rates[name])} if rates else {}

    def _rates_of(self, kind: str) -> dict[str, Any]:
        """What result.json says of one kind of rate."""
        val, random, which = self.val_rates[kind], self.random_of(kind), "" if kind == FOOLING else f"_{kind}"
        rates = {
            f"val_{kind}_rate": val.rate,
            f"val_{kind}_rate_interval": val.interval,
            f"num_val_images{which}": val.num_examples,
            f"val_{kind}_rate_random": next(iter(random.values())).rate,
            f"val_{kind}_rate_random_by_norm": {norm: rate.rate for norm, rate in random.items()},
        }
        train = self.train_rates.get(kind)
        if train is not None:
            rates |= {f"train_{kind}_rate": train.rate, f"train_{kind}_rate_interval": train.interval}
        return rates | {f"num_train_images{which}": train.num_examples if train else 0}

    def summary(self) -> str:
        """A summary in Markdown: what was computed, its rates and the random baseline."""
        p, final = self.provenance, self.final
        model = escape_markdown(p["model"])
        titles = rate_titles(self.val_rates, capital=True)
        num_fooled = sum(rate.num_hits for kind, rate in self.val_rates.items() if kind in self._fooling_of_each)
        by = f"the {num_fooled} answers of the networks for fooled" if self.networks else f"the {num_fooled} fooled"
        demo = (
            "\n\nThe images are crops of a few photographs from Python packages: a demonstration, not a measurement."
            if p["demo"]
            else ""
        )
        rates = "\n\n".join(self._rate_in_words(kind, titles[kind]) for kind in self.val_rates)
        taken = ", ".join(f"{escape_markdown(name)} ({count})" for name, count in self.dominant_labels)
        return (
            f"Universal perturbation of **{model}**, {p['norm']} ≤ {p['radius']:g} pixels, rule {p['rule']}, seed {p['seed']}"
            f"{self._goal_in_words()}.\n\n{rates}\n\n"
            f"Most of {by} held-out images get the labels: {taken or 'nothing'}.\n\n"
            f"{final.num_evaluations} network evaluations in {final.round_number + 1} rounds of {self.seconds:.0f} s together.{demo}\n\n"
            "Look at the pictures in the order of their names (curve, held-out images clean and perturbed, the perturbation stretched "
            "and at true scale, where labels go) and at `tables/held-out-examples.parquet` (one row an image; the first rows as .csv)."
        )

    def _goal_in_words(self) -> str:
        return "".join(f", **{escape_markdown(part)}**" for part in goal_in_words(self.goal, self.class_names))

    def _rate_in_words(self, kind: str, title: str) -> str:
        """A paragraph on one kind of rate; whether a target was reached is said first."""
        val, train = self.val_rates[kind], self.train_rates.get(kind)
        beside = ", of the ".join(f"{name}: {r}" for name, r in self.name_random(kind).items())
        text = (
            f"{escape_markdown(title)} on held-out images: **{val}** (95 % interval); a random perturbation of the {beside}; "
            f"on training images: {train or 'none counts'}."
        )
        network, own = split_kind(kind)
        if own != TARGETED:
            return text
        rates = ((self.val_rates, "held-out ones"), (self.train_rates, "training images"))
        all_images = of_network(FOOLING, network) if network else FOOLING
        left_out = [f"{each[all_images].num_examples - each[kind].num_examples} {name}" for each, name in rates]
        others = " and those of classes that are not attacked" if self.goal.has_classes else ""
        text += f" Images that have the target's label already{others} do not count: {', '.join(left_out)}."
        if not is_target_reached(val, self.random_of(kind).values()):
            return f"**The target was not reached:** hardly more images get it than under a random perturbation. {text}"
        return text if val.rate >= 0.5 else f"**Most images do not get the target.** {text}"


def is_target_reached(rate: Rate, random: Iterable[Rate]) -> bool:
    """Whether a targeted success rate is above those of random perturbations by more than both intervals."""
    return rate.interval[0] > max(each.interval[1] for each in random)


def name_random_rates(norm: Norm, rates: Mapping[Norm, Rate], *, are_one: bool) -> dict[str, Rate]:
    """Fooling rates of random perturbations by the norms that they share with v, in words; the norm of the ball first.

    Args:
        norm: of the ball.
        rates: by norm.
        are_one: whether one random perturbation shares both norms; two may happen to have the same rate.
    """
    other: Norm = "l2" if norm == "linf" else "linf"
    if are_one:
        return {"same ℓ∞ and ℓ2 norm": rates[norm]}
    return {f"same {SYMBOLS[each]} norm": rates[each] for each in (norm, other)}


@writes_files
def save_run(folder: Path, run: FinishedRun, workers: Workers) -> None:
    """Write all files of a finished run, result.json last."""
    for name in ("pictures", "tables"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    result = run.result()
    save_perturbation(folder / PERTURBATION_FILE, run.final.perturbation, dict(run.provenance) | result)
    clean, perturbed = (each.labels.ravel() for each in (run.val.clean, run.perturbed))  # of all networks
    graph = label_graph(clean, perturbed, run.class_names, run.goal.target)
    _save_tables(folder / "tables", run)
    save_label_graph(folder / "tables", graph)
    _save_pictures(folder / "pictures", run, workers)
    draw_label_graph(folder / "pictures/5-label-graph.png", graph)
    (folder / RESULT_FILE).write_text(
        json.dumps(result | {"provenance": run.provenance}, indent=2) + "\n", encoding="utf-8"
    )


def _save_pictures(folder: Path, run: FinishedRun, workers: Workers) -> None:
    """Draw the pictures. Their names sort in the order in which to look at them."""
    val, v = run.val, run.final.perturbation
    random = {kind: run.name_random(kind) for kind in run.val_rates}
    plots.save_curve(folder / "1-fooling-rate.png", run.history, random)
    chosen = np.unique(
        np.linspace(0, val.num_examples - 1, NUM_PICTURED).astype(int)
    )  # evenly spread: nobody chose them
    pixels = np.concatenate(list(workers.map(Worker.pixels, val.take(chosen).blocks(NUM_PICTURED))))
    names = [
        [[label_name(each.labels[i], run.class_names) for _, each in p.each()] for i in chosen]
        for p in (val.clean, run.perturbed)
    ]
    plots.save_grid(folder / "2-examples.png", pixels, v, *names)
    plots.save_perturbation(folder / "3-perturbation-stretched.png", v, stretch=True)
    plots.save_perturbation(folder / "4-perturbation-true-scale.png", v, stretch=False)


def _save_tables(folder: Path, run: FinishedRun) -> None:
    """Write a table of held-out examples and one of rounds."""
    examples = _table_of_examples(run)
    pq.write_table(examples, folder / EXAMPLES_FILE)
    # MLflow's page shows CSV but not Parquet
    pyarrow.csv.write_csv(examples.slice(0, NUM_CSV_ROWS), folder / "held-out-examples-first-rows.csv")
    names = list(dict.fromkeys(name for record in run.history for name in record.metrics))
    rounds = [{"round": record.step} | {name: record.metrics.get(name) for name in names} for record in run.history]
    pq.write_table(pa.Table.from_pylist(rounds), folder / ROUNDS_FILE)


def _table_of_examples(run: FinishedRun) -> pa.Table:
    """Key, true class, and predicted labels and confidences of each held-out example, clean and perturbed; of each network."""
    truths = [None if truth == UNKNOWN_CLASS else int(truth) for truth in run.val.truths]
    columns: dict[str, Any] = {"key": run.val.keys, "truth": pa.array(truths, pa.int64())}
    for (network, clean), (_, perturbed) in zip(run.val.clean.each(), run.perturbed.each(), strict=True):
        hits = run.goal.hits(clean.labels, perturbed.labels)
        own = {
            "clean_label": clean.labels,
            "perturbed_label": perturbed.labels,
            "clean_confidence": clean.confidences,
            "perturbed_confidence": perturbed.confidences,
            "is_fooled": clean.labels != perturbed.labels,
            "clean_name": [label_name(label, run.class_names) for label in clean.labels],
            "perturbed_name": [label_name(label, run.class_names) for label in perturbed.labels],
            **({"gets_target": hits[TARGETED][0]} if TARGETED in hits else {}),
            **({"is_attacked": hits[ATTACKED][1], "is_spared": hits[SPARED][1]} if ATTACKED in hits else {}),
        }
        columns |= {of_network(name, network): values for name, values in own.items()} if network else own
    if run.networks:
        columns["is_fooled"] = run.perturbed.differ_from(run.val.clean)
    return pa.table(columns)
