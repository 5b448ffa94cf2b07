"""Fine-tuning by real jobs: what it does to clean top-1 and to fresh perturbations. See benchmarks/finetune.md.

    python benchmarks/finetune.py                                  # all rows, about an hour on two cores
    python benchmarks/finetune.py --only resnet20-linf10-plain     # one row
    python benchmarks/finetune.py --table                          # the tables of what has been measured
    python benchmarks/finetune.py --tune resnet20 --grid '[{"learning_rate": 0.001}, {"learning_rate": 0.01}]'

Jobs that have left a result in the folder already are not repeated, so it goes on where it was stopped. --tune learns from all training
shards but the last, and measures on that one: nothing in it looks at held-out images.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tyro
from networks import NETWORKS

from uap_dist.data.patterns import expand_patterns
from uap_dist.finetuning.options import FinetuneConfig
from uap_dist.finetuning.report import BEFORE, FRESH, RANDOM
from uap_dist.finetuning.trainer import HELD_OUT, NETWORK_FILE, TRAINED_ON, Learner, TrainingTask
from uap_dist.fleet.config import FleetConfig
from uap_dist.method.config import ComputeConfig
from uap_dist.models.loading import load_classifier
from uap_dist.perturbations.pool import PerturbationPool
from uap_dist.rounds.loop import compute
from uap_dist.versions import git_commit
from uap_dist.workers.dataset import load_dataset
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.worker import Worker

ATTACK, ATTACK_EVALUATIONS = "attack", 32_000
JOBS = Path(__file__).parents[1] / "jobs"
POOLS = {  # network, members, options of jobs/compute.py
    "resnet20-linf10": ("resnet20", 10, ("--max-evaluations", "8000", "--augment", "none")),
    "resnet20-linf8": ("resnet20", 10, ("--max-evaluations", "8000", "--augment", "none", "--radius", "8")),
    "squeezenet-linf10": ("squeezenet", 5, ("--max-evaluations", "3000")),
}
ONLINE = (
    "--online",
    "--epochs",
    "14",
)  # with as many image gradients as two repetitions of five epochs and their fresh pools
ROWS = {  # pool, options of jobs/finetune.py
    "resnet20-linf10-control": ("resnet20-linf10", ("--probability", "0")),
    "resnet20-linf10-plain": ("resnet20-linf10", ("--repetitions", "2")),
    "resnet20-linf10-adaptive": ("resnet20-linf10", ("--repetitions", "2", "--adaptive")),
    "resnet20-linf8-plain": ("resnet20-linf8", ("--repetitions", "2")),
    "resnet20-linf8-online": ("resnet20-linf8", ONLINE),
    "resnet20-linf8-adaptive": ("resnet20-linf8", ("--repetitions", "2", "--adaptive")),
    "resnet20-linf10-online": ("resnet20-linf10", ONLINE),
    "squeezenet-linf10-plain": ("squeezenet-linf10", ("--learning-rate", "0.00001")),
}
for _row in ("resnet20-linf8-plain", "resnet20-linf8-online", "resnet20-linf10-plain", "resnet20-linf10-online"):
    for _seed in (1, 2):
        ROWS[f"{_row}-seed{_seed}"] = (ROWS[_row][0], (*ROWS[_row][1], "--seed", str(_seed)))


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure rows, or print their table, or look for options on held-in images."""

    only: tuple[str, ...] = tuple(ROWS)
    """Rows to measure."""
    table: bool = False
    """Print the tables of what has been measured, and measure nothing."""
    tune: str | None = None
    """Network whose grid is measured on held-in images."""
    tune_pool: str | None = None
    """Pool for --tune; if not given, the network's first."""
    grid: str = "[{}]"
    """JSON list of FinetuneConfig fields, one object an entry."""
    data: Path = Path("../shared")
    """Folder of the images and networks."""
    num_workers: int = 2
    """Workers of each job."""
    folder: Path = Path("outputs/finetune")
    """Where the jobs leave their files."""
    output: Path = Path(__file__).with_name("finetune.jsonl")
    """Results; a row that is measured again is replaced, lines of --tune are added."""


def main() -> None:
    """Measure what was asked for, then print the tables."""
    options = tyro.cli(Options)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.tune is not None:
        for entry in json.loads(options.grid):
            line = (
                {"tune": options.tune, "pool": options.tune_pool, "entry": entry}
                | tune(options, options.tune, entry)
                | _provenance()
            )
            print(json.dumps(line), flush=True)
            _write(options.output, [*_read(options.output), line])
    elif not options.table:
        for row in options.only:
            lines = [{"row": row} | line | _provenance() for line in measure(options, row)]
            kept = [line for line in _read(options.output) if line.get("row") != row]
            _write(options.output, [*kept, *lines])
    print("\n".join(_tables(options.output)))


def measure(options: Options, row: str) -> Iterator[dict[str, Any]]:
    """The comparisons of jobs/finetune.py, and what a command it was."""
    pool, words = ROWS[row]
    network, _, of_pool = POOLS[pool]
    output = options.folder / row
    if not (output / "result.json").exists():
        found = _compute_pool(options, pool)
        shutil.rmtree(output, ignore_errors=True)
        _run("finetune.py", *_describe(options, network), "--pool", str(found), *words, "--output", str(output))
    result = json.loads((output / "result.json").read_text())
    evaluations = result["evaluations"]
    for comparison in result["comparisons"]:
        yield comparison | {"evaluations": evaluations[comparison["network"]]}
    ball = of_pool[of_pool.index("--radius") :][:2] if "--radius" in of_pool else ()
    weights = {BEFORE: None, list(evaluations)[-1]: str(output / NETWORK_FILE)}
    for state, file in weights.items():
        folder = options.folder / (f"attack-{pool}" if file is None else f"attack-{row}")
        yield {"network": state, "group": ATTACK} | _attack(options, network, file, ball, folder)


def _attack(options: Options, name: str, weights: str | None, ball: tuple[str, ...], output: Path) -> dict[str, Any]:
    """A run of jobs/compute.py with its defaults against a network, which knows nothing of how that was trained."""
    if not (output / "result.json").exists():
        shutil.rmtree(output, ignore_errors=True)
        words = _describe(options, name, weights)
        _run("compute.py", *words, *ball, "--max-evaluations", str(ATTACK_EVALUATIONS), "--output", str(output))
    result = json.loads((output / "result.json").read_text())
    return {"fooling": result["val_fooling_rate"], "fooling_num_images": result["num_val_images"]}


def tune(options: Options, name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """After fine-tuning on all training shards but the last, on that one: clean top-1, held-out members, fresh perturbations."""
    network = NETWORKS[name]
    model, weights = network.locate(options.data)
    pool_name = options.tune_pool or next(pool for pool in POOLS if POOLS[pool][0] == name)
    pool = PerturbationPool.load(_compute_pool(options, pool_name))
    *shards, last = expand_patterns([str(options.data / network.train)])
    workers = LocalWorkers(Worker(load_classifier(model, weights), cache_bytes=8 << 30, num_threads=1))
    train, held_in = load_dataset(workers, shards), load_dataset(workers, [last])
    started = time.monotonic()
    learner = Learner(TrainingTask(model, weights, train, held_in, pool, FinetuneConfig(**entry), FleetConfig()))
    while not learner.is_done:
        record = learner.run_epoch()
    with tempfile.TemporaryDirectory() as folder:
        learner.save(Path(folder))
        classifier = load_classifier(model, str(Path(folder) / NETWORK_FILE))
    workers = LocalWorkers(Worker(classifier, cache_bytes=8 << 30, num_threads=1))
    train, held_in = load_dataset(workers, shards), load_dataset(workers, [last])
    config = ComputeConfig.from_provenance(dict(pool.shared) | dict(pool.members[0]), pool_name)
    strong = ComputeConfig(norm=config.norm, radius=config.radius, max_evaluations=ATTACK_EVALUATIONS)
    fooling = []
    for each in (config, strong):
        (final,) = deque(compute(workers, train, held_in, each), maxlen=1)
        assert final.evaluation is not None
        fooling.append(final.evaluation.val.rate)
    return {
        "top1_clean_before": learner.history[0].metrics["top1/clean"],
        "top1_clean": record.metrics["top1/clean"],
        f"fooling_rate_{HELD_OUT}": record.metrics[f"fooling_rate/{HELD_OUT}"],
        "fooling_rate_fresh": fooling[0],
        f"fooling_rate_{ATTACK}": fooling[1],
        "num_images": held_in.num_examples,
        "seconds": round(time.monotonic() - started, 1),
    }


def _compute_pool(options: Options, name: str) -> Path:
    network, count, words = POOLS[name]
    output = options.folder / f"pool-{name}"
    if not (output / "result.json").exists():
        shutil.rmtree(output, ignore_errors=True)
        words += ("--num-perturbations", str(count), "--output", str(output))
        _run("compute.py", *_describe(options, network), *words)
    return output / "pool"


def _describe(options: Options, name: str, weights: str | None = None) -> list[str]:
    """Network and data as options of a job; all training images, and the network's own weights unless others are given."""
    network = NETWORKS[name]
    model, own = network.locate(options.data)
    weights = weights or own
    words = ["--model", model, *(("--weights", weights) if weights else ())]
    words += ["--train-shards", str(options.data / network.train), "--val-shards", str(options.data / network.val)]
    return [*words, "--num-val-images", str(network.num_val_images), "--num-workers", str(options.num_workers)]


def _run(job: str, *words: str) -> None:
    print("python", f"jobs/{job}", *words, flush=True)
    subprocess.run([sys.executable, str(JOBS / job), *words], check=True)


def _tables(path: Path) -> Iterator[str]:
    """Markdown of what was measured."""
    lines = _read(path)
    tuned = [line for line in lines if "tune" in line]
    if tuned:
        heads = ("held-in images", "options", "clean top-1 before", "after", "members held out", "fresh")
        yield _header(*heads, f"{ATTACK_EVALUATIONS:,} evaluations", "images")
        for line in tuned:
            rates = (line["top1_clean_before"], line["top1_clean"], line[f"fooling_rate_{HELD_OUT}"])
            shown = " | ".join(f"{rate:.3f}" for rate in (*rates, line["fooling_rate_fresh"]))
            attack = line.get(f"fooling_rate_{ATTACK}")
            shown += " | –" if attack is None else f" | {attack:.3f}"
            words = ", ".join(f"{key} {value}" for key, value in line["entry"].items()) or "default"
            yield f"| {line.get('pool') or line['tune']} | {words} | {shown} | {line['num_images']} |"
        yield ""
    yield _header(
        "row",
        "date",
        "network",
        "evaluations",
        "clean top-1",
        "trained on",
        "held out",
        "fresh",
        "random",
        f"{ATTACK_EVALUATIONS:,} evaluations",
        "images",
    )
    for row in (row for row in ROWS if any(line.get("row") == row for line in lines)):
        own = [line for line in lines if line.get("row") == row]
        for network in dict.fromkeys(line["network"] for line in own):
            by_group = {line["group"]: line for line in own if line["network"] == network}
            cells = [
                f"{by_group[group]['fooling']:.3f} ({by_group[group]['top1']:.3f})"
                for group in (TRAINED_ON, HELD_OUT, FRESH, RANDOM)
            ]
            fresh = by_group[FRESH]
            cells[2] = f"**{cells[2]}**" if network != BEFORE else cells[2]
            cells.append(f"**{by_group[ATTACK]['fooling']:.3f}**" if ATTACK in by_group else "–")
            cost = f"{fresh['evaluations']:,}" if "evaluations" in fresh else "–"
            words = (
                row,
                fresh["date"],
                network,
                cost,
                f"{fresh['top1_clean']:.3f}",
                *cells,
                str(fresh["fooling_num_images"]),
            )
            yield f"| {' | '.join(words)} |"


def _header(*columns: str) -> str:
    return f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|"


def _provenance() -> dict[str, str]:
    return {"commit": git_commit(), "date": datetime.now(UTC).date().isoformat()}


def _write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
