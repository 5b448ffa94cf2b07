"""What does a network learn that is fine-tuned on perturbations that repeat themselves? By real jobs. See benchmarks/repetition.md.

    python benchmarks/repetition.py                       # about an hour on two cores
    python benchmarks/repetition.py --table               # what has been measured

Pools of each period; the network is fine-tuned on each, on clean images only, and with --online; fresh perturbations of
each period, and those that others have published, attack what comes of it. Jobs that have left a result in the folder
already are not repeated.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet as pq
import tyro
from comparison.bench import stamp
from networks import NETWORKS

from uap_dist.figures import save_figure
from uap_dist.perturbations.pool import PerturbationPool

JOBS = Path(__file__).parents[1] / "jobs"
PERIODS = (32, 224)  # the default for photographs, and the whole image: no repetition
SIZE, EVALUATIONS = 4, 3_000  # of a pool, and of each of its members
NUM_ATTACKS, ATTACK_SEED = 2, 100  # with as many evaluations as a member of a pool
NUM_IMAGES, NUM_TUNING, NUM_HELD_OUT = 500, 1_000, 500  # computed from, fine-tuned on, measured on
# Epochs of fine-tuning; --online computes no pool, and has as many image gradients as the others with theirs.
EPOCHS = 3
ONLINE_EPOCHS = EPOCHS + SIZE * EVALUATIONS // (2 * NUM_TUNING)
BEFORE = "before"
TRAININGS = {  # period of the pool, options of jobs/finetune.py
    "control": (32, ("--probability", "0", "--epochs", str(EPOCHS))),
    **{f"period-{period}": (period, ("--epochs", str(EPOCHS))) for period in PERIODS},
    "online": (32, ("--online", "--epochs", str(ONLINE_EPOCHS))),
}
KINDS = {"published": False, "random": True}  # whether it is a baseline


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure, or show what has been measured."""

    network: str = "squeezenet"
    """That is fine-tuned and attacked."""
    table: bool = False
    """Print the tables and measure nothing."""
    num_workers: int = 1
    """Of each job."""
    data: Path = Path("../shared")
    """Folder of the images and networks."""
    folder: Path = Path("outputs/repetition")
    """Where the jobs leave their files."""
    output: Path = Path(__file__).with_name("repetition.jsonl")
    """A line of JSON for each network that was attacked, and each pool; written again by each run."""

    def given(self, weights: str | None = None) -> list[str]:
        """Network and number of workers as options of a job."""
        model, own = NETWORKS[self.network].locate(self.data)
        weights = weights or own
        words = ["--model", model, *(("--weights", weights) if weights else ())]
        return [*words, "--num-workers", str(self.num_workers)]

    def images(self, num_train: int = NUM_IMAGES) -> list[str]:
        """Imagenette's images as options of a job."""
        folder = self.data / "data/imagenette"
        words = ["--train-shards", f"{folder}/train-*.tar", "--num-train-images", str(num_train)]
        return [*words, "--val-shards", f"{folder}/val-*.tar", "--num-val-images", str(NUM_HELD_OUT)]


def main() -> None:
    """Measure what is missing, then print the tables."""
    options = tyro.cli(Options)
    if not options.table:
        lines: list[str] = []
        for line in chain(pools(options), attacks(options)):
            lines.append(json.dumps(line | stamp()) + "\n")
            options.output.write_text("".join(lines))
    found = [json.loads(line) for line in options.output.read_text().splitlines()]
    save_picture(options.output.with_suffix(".png"), [line for line in found if "network" in line])
    print("\n".join(tables(found)))


def pools(options: Options) -> Iterator[dict[str, Any]]:
    """What each pool is like."""
    for period in PERIODS:
        pool = PerturbationPool.load(pool_folder(options, period))
        yield {
            "pool": f"period {period}",
            "fooling": rates_of(pool_folder(options, period)),
            "largest_inner_product": pool.nearest_pairs()[0][0],
            "energy": energy_by_frequency(pool.perturbations.numpy()),
        }


def attacks(options: Options) -> Iterator[dict[str, Any]]:
    """What is left of each network's accuracy, and what fools it."""
    networks: dict[str, str | None] = {BEFORE: None} | {name: fine_tune(options, name) for name in TRAININGS}
    fresh = {
        name: {str(period): attack(options, name, weights, period) for period in PERIODS}
        for name, weights in networks.items()
        if name != BEFORE
    }
    fresh[BEFORE] = {str(period): rates_of(pool_folder(options, period)) for period in PERIODS}
    table = published(options, networks)
    for name in networks:
        own = [row for row in table if row["classifier"] == name]
        rates = {kind: [row["fooling_rate"] for row in own if row["is_baseline"] == b] for kind, b in KINDS.items()}
        top1 = {"top1_clean": own[0]["top1_clean"], "num_images": own[0]["fooling_rate_num_images"]}
        yield {"network": name, "fresh": fresh[name]} | rates | top1


def pool_folder(options: Options, period: int) -> Path:
    """A pool of one period."""
    folder = options.folder / f"pool-{period}"
    words = ["--period", str(period), "--num-perturbations", str(SIZE), "--max-evaluations", str(EVALUATIONS)]
    run("compute.py", folder, *options.given(), *options.images(), *words)
    return folder / "pool"


def fine_tune(options: Options, name: str) -> str:
    """The weights of the network after one of the trainings."""
    period, words = TRAININGS[name]
    folder, pool = options.folder / f"tuned-{name}", str(pool_folder(options, period))
    run("finetune.py", folder, *options.given(), *options.images(NUM_TUNING), "--pool", pool, *words)
    return str(folder / "network.safetensors")


def attack(options: Options, name: str, weights: str | None, period: int) -> list[float]:
    """Fooling rates of fresh perturbations, which know nothing of the training."""
    folder = options.folder / f"attack-{name}-{period}"
    words = ["--period", str(period), "--num-perturbations", str(NUM_ATTACKS), "--seed", str(ATTACK_SEED)]
    words += ["--max-evaluations", str(EVALUATIONS)]
    run("compute.py", folder, *options.given(weights), *options.images(), *words)
    return rates_of(folder / "pool")


def rates_of(pool: Path) -> list[float]:
    """Fooling rates of a pool's members, on the network that they were computed on."""
    return [member["val_fooling_rate"] for member in PerturbationPool.load(pool).members]


def published(options: Options, networks: Mapping[str, str | None]) -> list[dict[str, Any]]:
    """The measurements of what others have published on each network, and of noise."""
    folder, references = options.folder / "published", options.data / "reference"
    model, own = NETWORKS[options.network].locate(options.data)
    words = ["--models", *(f"{name}={model}={weights or own}" for name, weights in networks.items())]
    words += ["--perturbations", *(f"{path}:255" for path in sorted((references / "lts4").iterdir()))]
    words += [*(f"{path}:1" for path in sorted((references / "sgd-uap").iterdir()))]
    words += ["--shards", f"{options.data}/data/imagenette/val-*.tar", "--num-images", str(NUM_HELD_OUT)]
    table = folder / "tables/evaluation.parquet"
    run("evaluate.py", folder, *words, "--num-workers", str(options.num_workers), leaves=table)
    return pq.read_table(table).to_pylist()


def energy_by_frequency(perturbations: np.ndarray) -> list[float]:
    """Share of the energy of v (M×C×H×W) in eighths of the band from 0 to half a cycle per pixel, mean over members."""
    height, width = perturbations.shape[-2:]
    energy = np.abs(np.fft.fft2(perturbations)) ** 2
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    band = np.minimum((16 * radius).astype(int), 7)  # the corners belong to the last
    shares = np.array([energy[..., band == number].sum(axis=(1, 2)) for number in range(8)])
    return [round(float(share), 4) for share in (shares / shares.sum(axis=0)).mean(axis=1)]


def run(job: str, output: Path, *words: str, leaves: Path | None = None) -> None:
    """A job, unless it has left its last file already."""
    if not (leaves or output / "result.json").exists():
        shutil.rmtree(output, ignore_errors=True)
        print("python", f"jobs/{job}", *words, flush=True)
        subprocess.run([sys.executable, str(JOBS / job), *words, "--output", str(output)], check=True)


def save_picture(path: Path, lines: list[dict[str, Any]]) -> None:
    """Fooling rates of fresh perturbations against clean top-1: a line for each network, a marker for each kind of attack."""
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    attacks = {f"fresh, period {period}": marker for period, marker in zip(PERIODS, "os", strict=True)}
    for number, line in enumerate(lines):
        rates = [mean(rates) for rates in line["fresh"].values()] + [mean(line["published"])]
        axes.plot([line["top1_clean"]] * len(rates), rates, color=f"C{number}", alpha=0.4)
        for (attack, marker), rate in zip((attacks | {"published": "^"}).items(), rates, strict=True):
            axes.plot(line["top1_clean"], rate, marker, color=f"C{number}", label=attack if number == 0 else None)
        axes.annotate(
            line["network"], (line["top1_clean"], max(rates)), xytext=(-6, -3), textcoords="offset points", ha="right"
        )
    axes.set(xlabel="clean top-1", ylabel="fooling rate, mean", ylim=(0, 1.05))
    axes.margins(x=0.2)
    axes.legend()
    save_figure(figure, path)


def tables(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: pools, and what is left of networks that were fine-tuned on them."""
    yield "| pool | fooling rate of members, mean | largest inner product | energy by eighths of the band, lowest first |"
    yield "| --- | --- | --- | --- |"
    for line in (line for line in lines if "pool" in line):
        energy = ", ".join(f"{share:.3f}" for share in line["energy"])
        yield f"| {line['pool']} | {mean(line['fooling']):.3f} | {line['largest_inner_product']:.2f} | {energy} |"
    heads = ("fine-tuned on", "clean top-1", *(f"fresh, period {period}" for period in PERIODS))
    yield f"\n| {' | '.join((*heads, 'published, mean', 'published, most', 'random', 'images'))} |"
    yield "| --- " * (len(heads) + 4) + "|"
    for line in (line for line in lines if "network" in line):
        fresh = [
            f"**{mean(rates):.3f}** ({', '.join(f'{rate:.3f}' for rate in rates)})" for rates in line["fresh"].values()
        ]
        rates = (mean(line["published"]), max(line["published"]), mean(line["random"]))
        cells = (f"{line['top1_clean']:.3f}", *fresh, *(f"{rate:.3f}" for rate in rates), str(line["num_images"]))
        yield f"| {line['network']} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
