"""What `jobs/compute.py --plan` says a run takes, and what the run then takes: benchmarks/plan.md.

    python benchmarks/plan.py             # all rows, about a quarter of an hour on two cores
    python benchmarks/plan.py --table     # the table of what has been measured

Rows that are in the output already are not repeated, so it goes on where it was stopped. Nothing else should run on the machine.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
import tyro
from networks import NETWORKS, Network

from uap_dist.versions import git_commit

JOB = Path(__file__).parents[1] / "jobs/compute.py"
RUNS: dict[str, tuple[Network, tuple[str, ...]]] = {
    "squeezenet-3000": (NETWORKS["squeezenet"], ("--max-evaluations", "3000")),
    "resnet20-8000": (replace(NETWORKS["resnet20"], num_train_images=5000), ("--max-evaluations", "8000")),
    "resnet20-pool": (
        NETWORKS["resnet20"],
        ("--max-evaluations", "6000", "--num-perturbations", "6", "--members-at-once", "3"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure rows, or print the table."""

    only: tuple[str, ...] = tuple(RUNS)
    """Runs to measure."""
    num_workers: tuple[int, ...] = (1, 2)
    """Sizes of the fleet."""
    repeats: int = 1
    """Times that each is to have been measured."""
    table: bool = False
    """Print the table of what has been measured, and measure nothing."""
    data: Path = Path("../shared")
    """Folder of the images and networks."""
    output: Path = Path(__file__).with_name("plan.jsonl")
    """One line of JSON for each is added here."""


def main() -> None:
    """Measure what is missing, then print the table."""
    options = tyro.cli(Options)
    rows = [(name, num_workers) for name in options.only for num_workers in options.num_workers]
    for name, num_workers in [] if options.table else rows:
        done = [line for line in _lines(options.output) if (line["run"], line["num_workers"]) == (name, num_workers)]
        for _ in range(options.repeats - len(done)):
            line = measure(name, num_workers, options.data)
            with options.output.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
    print("\n".join(table(options.output)))


def measure(name: str, num_workers: int, data: Path) -> dict[str, Any]:
    """Plan the run, run it, and put both side by side."""
    network, more = RUNS[name]
    model, weights = network.locate(data.resolve())
    words = [
        *("--model", model, *(("--weights", weights) if weights else ())),
        *("--train-shards", str(data.resolve() / network.train), "--num-train-images", str(network.num_train_images)),
        *("--val-shards", str(data.resolve() / network.val), "--num-val-images", str(network.num_val_images)),
        *(*more, "--num-workers", str(num_workers)),
    ]
    with TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        store = f"sqlite:///{folder}/mlflow.db"
        mlflow.MlflowClient(store).search_experiments()  # makes its tables, which would else be in the first job's time
        planning_s = _run(folder, [*words, "--plan", "--output", "plan"])
        whole_s = _run(folder, [*words, "--planned", "plan/plan.json", "--output", "out"])
        plan = json.loads((folder / "plan/plan.json").read_text())
        run_id = json.loads((folder / "out/result.json").read_text())["mlflow_run_id"]
        metrics = mlflow.MlflowClient(store).get_run(run_id).data.metrics
    return {
        "run": name,
        "num_workers": num_workers,
        **{
            f"planned_{key.removeprefix('planned/')}": value
            for key, value in metrics.items()
            if key.startswith("planned/")
        },
        **{f"actual_{key.removeprefix('spent/')}": value for key, value in metrics.items() if key.startswith("spent/")},
        "parts_s": {part: range_["expected"] for part, range_ in plan["fleets"][-1]["parts_s"].items()},
        "planning_s": planning_s,
        "whole_s": whole_s,
        "commit": git_commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def _run(folder: Path, words: list[str]) -> float:
    """Seconds of the job as whoever starts it sees them."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "RAY_"))}
    started = time.time()
    subprocess.run([sys.executable, str(JOB), *words], cwd=folder, check=True, capture_output=True, env=environment)
    return round(time.time() - started, 1)


def table(path: Path) -> Iterator[str]:
    """Markdown: a line for each run."""
    yield "| run | workers | planned, s | between | took, s | took / planned | evaluations planned | spent | --plan itself, s |"
    yield "| --- " * 9 + "|"
    for line in sorted(_lines(path), key=lambda line: (line["run"], line["num_workers"])):
        yield (
            f"| {line['run']} | {line['num_workers']} | {line['planned_seconds']:.0f} "
            f"| {line['planned_seconds_low']:.0f}–{line['planned_seconds_high']:.0f} | {line['actual_seconds']:.0f} "
            f"| **{line['actual_seconds'] / line['planned_seconds']:.2f}** | {line['planned_evaluations']:,.0f} "
            f"| {line['actual_evaluations']:,.0f} | {line['planning_s']:.0f} |"
        )


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    main()
