"""What a run leaves as files: the perturbation, pictures, the curve, the table of held-out examples."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from uap_dist.compute import RoundReport
from uap_dist.dataset import Dataset, Workers
from uap_dist.errors import ConfigError
from uap_dist.fooling import Rate
from uap_dist.history import RoundRecord
from uap_dist.label_graph import label_graph, save_label_graph
from uap_dist.norms import measure
from uap_dist.perturbations import PERTURBATION_FILE
from uap_dist.shards import UNKNOWN_CLASS
from uap_dist.worker import Predictions

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_PICTURED = 8
NUM_CSV_ROWS = 100
PICTURE_SIDE = 224


def output_folder(output: Path | None, name: str, *, may_hold_files: bool = False) -> Path:
    """The folder for a job's files, made and known to be writable; outputs/<name>-<time> where none is given.

    Raises:
        ConfigError: a URL, a folder that holds files, or one that cannot be written to.
    """
    folder = output or Path("outputs") / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    if re.match(r"\w+:/", str(folder)):
        raise ConfigError(f"--output {output} is a URL; give a folder (the same files go to MLflow)")
    if not may_hold_files and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; give another --output")
    try:  # now, not when hours of work are to be saved
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise ConfigError(f"cannot write to --output {folder}: {error.strerror}") from error
    return folder.resolve()


def save_perturbation(folder: Path, perturbation: Tensor, provenance: Mapping[str, Any]) -> None:
    """Write v (C×H×W float32, pixels) under the name "perturbation", its provenance as JSON in the file's metadata."""
    metadata = {"provenance": json.dumps(provenance, sort_keys=True), "unit": "pixels 0..255, RGB, C×H×W"}
    save_file({"perturbation": perturbation.contiguous()}, folder / PERTURBATION_FILE, metadata=metadata)


def save_pictures(folder: Path, perturbation: Tensor) -> None:
    """V as pictures: stretched to the full range, and at true scale on grey."""
    v = perturbation.numpy().transpose(1, 2, 0)
    largest = max(float(np.abs(v).max()), 1e-12)
    zoom = -(-PICTURE_SIDE // v.shape[0])  # whole pixels, so that a small perturbation stays crisp
    for name, scale in (("perturbation-stretched.png", 127 / largest), ("perturbation-true-scale.png", 1.0)):
        picture = np.clip(np.rint(128 + scale * v), 0, 255).astype(np.uint8)
        Image.fromarray(picture.repeat(zoom, axis=0).repeat(zoom, axis=1)).save(folder / name)


def save_curve(folder: Path, history: Sequence[RoundRecord], random_rate: Rate) -> None:
    """Fooling rate against network evaluations: training and held-out with 95 % intervals, each round's, and the baseline."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    rounds = [record.metrics for record in history]
    measured = [metrics for metrics in rounds if "fooling_rate/val" in metrics]

    def column(metrics: Sequence[Mapping[str, float]], name: str) -> list[float]:
        return [one[name] for one in metrics]

    axes.plot(
        column(rounds, "total/evaluations"),
        column(rounds, "fooling_rate/round"),
        ".",
        ms=4,
        color="0.75",
        label="images of each round, before it",
    )
    evaluations = column(measured, "total/evaluations")
    for name, label, colour in (("train", "training", "tab:gray"), ("val", "held-out", "tab:blue")):
        rate = f"fooling_rate/{name}"
        count = measured[-1][f"num_images/{name}"]
        axes.plot(evaluations, column(measured, rate), marker="o", color=colour, label=f"{label} ({count:.0f} images)")
        low, high = column(measured, f"{rate}_low"), column(measured, f"{rate}_high")
        axes.fill_between(evaluations, low, high, color=colour, alpha=0.2, lw=0)
    axes.axhline(
        random_rate.rate,
        color="tab:red",
        ls="--",
        label=f"random, same norm ({random_rate.num_examples} held-out images)",
    )
    axes.set(
        xlabel="network evaluations", ylabel="fooling rate", ylim=(0, 1), title="Fooling rate, 95 % Wilson intervals"
    )
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(folder / "fooling-rate.png", dpi=130)
    plt.close(figure)


def save_table(folder: Path, dataset: Dataset, perturbed: Predictions, class_names: Sequence[str]) -> None:
    """One row for each held-out example as Parquet (and the first as CSV): key, truth, labels and confidences before and after."""
    truths = [None if truth == UNKNOWN_CLASS else int(truth) for truth in dataset.truths]
    columns = {
        "key": dataset.keys,
        "truth": pa.array(truths, pa.int64()),
        "clean_label": dataset.clean.labels,
        "perturbed_label": perturbed.labels,
        "clean_confidence": dataset.clean.confidences,
        "perturbed_confidence": perturbed.confidences,
        "is_fooled": dataset.clean.labels != perturbed.labels,
        "clean_name": [label_name(label, class_names) for label in dataset.clean.labels],
        "perturbed_name": [label_name(label, class_names) for label in perturbed.labels],
    }
    table = pa.table(columns)
    pq.write_table(table, folder / "held-out-examples.parquet")
    # MLflow's page shows CSV but not Parquet
    pyarrow.csv.write_csv(table.slice(0, NUM_CSV_ROWS), folder / "held-out-examples-first-rows.csv")


def save_grid(
    folder: Path, pixels: np.ndarray, perturbation: Tensor, clean: Sequence[str], perturbed: Sequence[str]
) -> None:
    """Images (N×C×H×W uint8) above themselves perturbed, with the labels before and after."""
    shown = np.clip(np.rint(pixels + perturbation.numpy()), 0, 255).astype(np.uint8)
    figure, axes = plt.subplots(2, len(pixels), figsize=(1.9 * len(pixels), 4.6), layout="constrained", squeeze=False)
    for row, (images, names) in enumerate(((pixels, clean), (shown, perturbed))):
        for axis, image, name, before in zip(axes[row], images, names, clean, strict=True):
            axis.imshow(image.transpose(1, 2, 0))
            axis.set_title(_shorten(name), fontsize=9, color="black" if name == before else "tab:red")
            axis.set_axis_off()
    figure.suptitle("held-out images: clean above, perturbed below (red: label changed)", fontsize=10)
    figure.savefig(folder / "examples.png", dpi=130)
    plt.close(figure)


def label_name(label: int, class_names: Sequence[str]) -> str:
    """The class's name, or its index where names are not known."""
    return class_names[label] if class_names else str(label)


def _shorten(name: str) -> str:
    return name if len(name) <= 22 else name[:21] + "…"


def save_run(folder: Path, run: "FinishedRun", workers: Workers, class_names: Sequence[str]) -> None:
    """Every file of a finished run, result.json last."""
    final, val = run.final, run.val
    assert final.evaluation is not None
    perturbed = final.evaluation.val_predictions
    result = run.result()
    save_perturbation(folder, final.perturbation, dict(run.provenance) | result)
    save_pictures(folder, final.perturbation)
    save_curve(folder, run.history, run.random_rate)
    save_table(folder, val, perturbed, class_names)
    save_label_graph(folder, label_graph(val.clean.labels, perturbed.labels, class_names))
    shown = np.unique(
        np.linspace(0, val.num_examples - 1, NUM_PICTURED).astype(int)
    )  # evenly spread: nobody chose them
    places = [(shard, i) for shard, size in enumerate(val.sizes) for i in range(size)]
    pixels = np.concatenate(workers.map("pixels", [val.examples(places[n][0], [places[n][1]]) for n in shown]))
    before, after = ([label_name(p.labels[i], class_names) for i in shown] for p in (val.clean, perturbed))
    save_grid(folder, pixels, final.perturbation, before, after)
    (folder / "result.json").write_text(json.dumps(result | {"provenance": run.provenance}, indent=2) + "\n")


@dataclass(frozen=True)
class FinishedRun:
    """What a run has measured.

    Attributes:
        final: report of the last round, with its evaluation.
        history: of every round.
        random_rate: held-out fooling rate of a random perturbation of the same norm.
        val: the held-out examples.
        provenance: network, data, config, seed, versions.
        mlflow_run_id: where it is logged.
    """

    final: RoundReport
    history: Sequence[RoundRecord]
    random_rate: Rate
    val: Dataset
    provenance: Mapping[str, Any]
    mlflow_run_id: str

    @property
    def seconds(self) -> float:
        """Spent in rounds, measurements for the report not counted."""
        return sum(record.metrics["round/seconds"] for record in self.history)

    def result(self) -> dict[str, Any]:
        """The numbers that scripts read."""
        final = self.final
        assert final.evaluation is not None
        train, val = final.evaluation.train, final.evaluation.val
        return {
            "val_fooling_rate": val.rate,
            "val_fooling_rate_interval": val.interval,
            "num_val_images": val.num_examples,
            "val_fooling_rate_random": self.random_rate.rate,
            "train_fooling_rate": train.rate,
            "train_fooling_rate_interval": train.interval,
            "num_train_images": train.num_examples,
            "num_solves": final.num_solves,
            "num_evaluations": final.num_evaluations,
            "num_rounds": final.round_number + 1,
            "norm_linf": measure(final.perturbation, "linf"),
            "norm_l2": measure(final.perturbation, "l2"),
            "perturbation": PERTURBATION_FILE,
            "perturbation_sha256": sha256(final.perturbation.numpy().tobytes()).hexdigest(),
            "seconds": round(self.seconds, 1),
            "mlflow_run_id": self.mlflow_run_id,
        }

    def summary(self) -> str:
        """A few lines of Markdown: what was computed, how well it fools, against what."""
        p, final = self.provenance, self.final
        assert final.evaluation is not None
        demo = (
            "\n\nThe images are crops of a few photographs from Python packages: a demonstration, not a measurement."
            if p["demo"]
            else ""
        )
        return (
            f"Universal perturbation of **{p['model']}**, {p['norm']} ≤ {p['radius']:g} pixels, rule {p['rule']}, seed {p['seed']}.\n\n"
            f"Fooling rate on held-out images: **{final.evaluation.val}** (95 % interval); "
            f"a random perturbation of the same norm: {self.random_rate}; on training images: {final.evaluation.train}.\n\n"
            f"{final.num_evaluations} network evaluations in {final.round_number + 1} rounds of {self.seconds:.0f} s together.{demo}\n\n"
            "Look at `fooling-rate.png` (curve), `examples.png` (some held-out images), `perturbation-stretched.png`, "
            "`held-out-examples.parquet` (one row an image; the first rows as .csv)."
        )
