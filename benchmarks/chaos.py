"""Faults, really done to real jobs: the perturbation must keep its bits and MLflow its metrics. See benchmarks/chaos.md.

    python benchmarks/chaos.py                        # all rows, about three quarters of an hour on two cores
    python benchmarks/chaos.py --only driver-kills    # one row
    python benchmarks/chaos.py --small                # all rows with short jobs, as `make test-slow` does them
    python benchmarks/chaos.py --table                # the table of what has been done

The jobs are `jobs/compute.py` on a Ray cluster on loopback that this script starts, with synthetic shards and the network of
benchmarks/faults/victim.py. Rows that fail, or take longer than they may, are named at the end; the exit code is then 1.
"""

import json
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro
from faults import drivers, nodes, pools, storage, tracking, workers
from faults.lab import FULL, SMALL, Lab, open_lab
from faults.runs import Line

FAULTS = (
    workers.worker_counts,
    workers.real_networks,
    workers.worker_kills,
    workers.worker_exits,
    workers.worker_fills_memory,
    workers.worker_raises,
    workers.worker_hangs,
    nodes.node_kills,
    nodes.node_added,
    drivers.driver_kills,
    pools.pool_kills,
    pools.batch_kills,
    pools.pool_outage,
    drivers.job_stop,
    storage.storage_fails,
    storage.checkpoint_cut,
    tracking.tracking_outage,
    tracking.tracking_outage_at_end,
    storage.shard_cut,
    storage.shard_deleted,
    storage.shard_replaced,
    storage.image_broken,
)
ROWS = {fault.__name__.replace("_", "-"): fault for fault in FAULTS}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Do faults to jobs, or print the table of what was done."""

    only: tuple[Literal[tuple(ROWS)], ...] = tuple(ROWS)  # type: ignore[valid-type]
    """Rows to do."""
    table: bool = False
    """Print the table, and do nothing."""
    small: bool = False
    """Short jobs and fewer faults; the table is then of these, and left in the folder."""
    folder: Path = Path("outputs/chaos")
    """Where the jobs run; emptied first."""
    data: Path = Path("../shared")
    """Folder of the real images and networks, for row real-networks."""
    output: Path = Path(__file__).with_name("chaos.jsonl")
    """Results; those of a row that is done again are replaced."""


def main() -> None:
    """Do what was asked for, print the table, and name the rows that failed."""
    options = tyro.cli(Options)
    folder = options.folder.resolve()
    output = folder / "chaos.jsonl" if options.small else options.output
    failed = []
    if not options.table:
        with open_lab(folder, options.data.resolve(), SMALL if options.small else FULL) as lab:
            failed = [name for name in options.only if not do(lab, name, output)]
    _print_table(_read(output))
    if failed:
        sys.exit(f"failed: {' '.join(failed)}")


def do(lab: Lab, name: str, output: Path) -> bool:
    """Whether a row is good; the output then has its lines instead of older ones, and none if it came to no end."""
    started, lines = time.monotonic(), []
    try:
        lines = lab.do(name, ROWS[name])
    except Exception:  # the other rows go on
        traceback.print_exc()
    is_good = bool(lines) and all(line.is_good for line in lines)
    _write(output, [line for line in _read(output) if line.row != name] + lines)
    said = f"{name}: {'good' if is_good else 'FAILED'}, {time.monotonic() - started:.0f} s"
    print(said, file=sys.stderr, flush=True)
    return is_good


def _read(path: Path) -> list[Line]:
    return [Line(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def _write(path: Path, lines: list[Line]) -> None:
    path.write_text("".join(json.dumps(asdict(line), ensure_ascii=False) + "\n" for line in lines))


def _print_table(lines: list[Line]) -> None:
    print("| fault | times | run ended | same bits | metrics complete | seconds lost |\n|" + " --- |" * 6)
    for line in sorted(lines, key=lambda line: list(ROWS).index(line.row)):
        answers = ("yes" if answer else "**no**" for answer in (line.same_bits, line.metrics_complete))
        print(f"| {line.fault} | {line.times} | {line.ended} | {' | '.join(answers)} | {line.seconds_lost} |")


if __name__ == "__main__":
    main()
