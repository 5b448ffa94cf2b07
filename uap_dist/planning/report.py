"""A plan as a person reads it and as a file, and what became of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import floor, log2
from pathlib import Path
from typing import Any

from uap_dist.computing.concurrent import at_once
from uap_dist.errors import ConfigError
from uap_dist.foreign_text import escape_markdown
from uap_dist.method.config import ComputeConfig
from uap_dist.planning.cost_model import FleetPlan, Span, Work
from uap_dist.tracking.checkpoint import name_differences
from uap_dist.tracking.console import duration

PLAN_FILE = "plan.json"
# local steps and images of each, of one block for each worker, and the rounds that they need: those of benchmarks/rounds.md
FLEET_BLOCKS, FLEET_ROUNDS = ((4, 3), (1, 2)), 48
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What a job will cost on fleets of some sizes.

    Attributes:
        job: options that the costs depend on, in plain values as JSON has them.
        config: of the computations.
        work: that is to be done.
        fleets: by size; the last one is that of the job.
        tried: on how many workers at once.
        share_machine: how many workers of the job may share a machine.
        gpus_per_worker: that each takes, or the share of one.
        cache_gib: of decoded images that a worker keeps in memory.
        disk_cache_gib: beyond these, on disk.
        price_per_gpu_hour: in whatever currency; None where not given.
    """

    job: Mapping[str, Any]
    config: ComputeConfig
    work: Work
    fleets: Sequence[FleetPlan]
    tried: Sequence[int]
    share_machine: int
    gpus_per_worker: float
    cache_gib: float
    disk_cache_gib: float
    price_per_gpu_hour: float | None

    def result(self) -> dict[str, Any]:
        """The numbers that scripts read, and that a run is held against."""
        work = self.work
        return {
            "job": self.job,
            "num_rounds": work.num_rounds,
            "num_solves": work.num_perturbations * work.num_solves,
            "num_evaluations": asdict(work.num_evaluations),
            "num_classified": work.num_classified,
            "num_train_images": work.train.total_images,
            "num_val_images": work.val.total_images,
            "images_are_estimated": work.train.is_estimated or work.val.is_estimated,
            "gpus_per_worker": self.gpus_per_worker,
            "tried_workers": list(self.tried),
            "price_per_gpu_hour": self.price_per_gpu_hour,
            "fleets": [self._fleet_result(fleet) for fleet in self.fleets],
        }

    def _fleet_result(self, fleet: FleetPlan) -> dict[str, Any]:
        price = self._price(fleet)
        return {
            "num_workers": fleet.num_workers,
            "seconds": asdict(fleet.seconds),
            "parts_s": {name: asdict(part) for name, part in fleet.parts.items()},
            "worker_hours": asdict(fleet.worker_hours),
            "price": None if price is None else asdict(price),
            "read_gib": asdict(fleet.read_bytes * (1 / GIB)),
            "worker_gib": fleet.worker_bytes / GIB,
            "gpu_gib": fleet.gpu_bytes / GIB,
            "idle": fleet.idle,
        }

    def metrics(self) -> dict[str, float]:
        """What is planned for the job's own fleet, under the names that MLflow uses."""
        return planned_metrics(self.result())

    def summary(self) -> str:
        """One screen of Markdown."""
        work, last = self.work, self.fleets[-1]
        parts = ", ".join(f"{name} {duration(part.expected)}" for name, part in last.parts.items())
        times = f"{work.num_perturbations} × " if work.num_perturbations > 1 else ""
        return (
            f"**{escape_markdown(self.job['model'])}**, {self.config.norm} ≤ {self.config.ball_radius:g} pixels, rule {self.config.rule}: "
            f"{times}{work.num_rounds:,} rounds of {max(work.rounds)} blocks, {times}{work.num_solves:,} solves, "
            f"{_between(work.num_evaluations, '{:,.0f}')} network evaluations; {work.num_classified:,} images classified for clean "
            f"labels and measurements.\n\n{self.table()}\n\nOf the {duration(last.seconds.expected)} on "
            f"{_workers(last.num_workers)}: {parts}.\n\n" + "\n".join(f"* {note}" for note in self.notes())
        )

    def table(self) -> str:
        """A line for each size of the fleet."""
        rows = [self._row(fleet) for fleet in self.fleets]
        lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def _row(self, fleet: FleetPlan) -> dict[str, str]:
        seconds, price, read = fleet.seconds, self._price(fleet), fleet.read_bytes * (1 / GIB)
        return {
            "workers": str(fleet.num_workers),
            "time": duration(seconds.expected),
            "between": f"{duration(seconds.low)}–{duration(seconds.high)}",
            "GPU-hours" if self.gpus_per_worker else "worker-hours": _between(
                fleet.worker_hours * (self.gpus_per_worker or 1), "{:.3g}"
            ),
            **({} if price is None else {"price": _between(price, "{:.2f}")}),
            "read, GiB": _between(read, "{:.2g}"),
            "by each, GiB": f"{read.expected / fleet.num_workers:.2g}",
            "memory of each, GiB": f"{fleet.worker_bytes / GIB:.1f}",
            "decoded images, GiB": f"{fleet.cached_bytes / GIB:.2g}",
            **({"GPU memory, GiB": f"{fleet.gpu_bytes / GIB:.1f}"} if self.gpus_per_worker else {}),
            "idle in rounds": f"{fleet.idle:.0%}",
        }

    def notes(self) -> list[str]:
        """What is to be known about the figures, and what could be better."""
        return [note for note in (*self._advice(), *self._doubts()) if note]

    def _advice(self) -> list[str]:
        work, config, last = self.work, self.config, self.fleets[-1]
        blocks, size = max(work.rounds), last.num_workers
        wanted, notes = at_once(size, config), []
        if size > blocks and work.num_perturbations < wanted:
            all_busy = f"a pool of {wanted} (--num-perturbations) would keep all {size} busy"
            if config.rule == "log-odds" and config.local_steps is None:
                all_busy += _local_steps_advice(size, work.num_solves)
            notes.append(
                f"A round has at most {blocks} blocks (--round-size {config.round_size}, --block-size {config.block_size}), so "
                f"{size - blocks * work.num_perturbations} of {size} workers have nothing to do while it is solved; {all_busy}."
                if size > blocks * work.num_perturbations
                else f"{all_busy[0].upper()}{all_busy[1:]}."
            )
        if last.cached_bytes > (self.cache_gib + self.disk_cache_gib) * GIB:
            notes.append(
                f"Decoded images would take {last.cached_bytes / GIB:.1f} GiB of a worker, more than --cache-gib {self.cache_gib:g} and "
                f"--disk-cache-gib {self.disk_cache_gib:g}: what does not fit is read and decoded again for each of its blocks."
            )
        return notes

    def _doubts(self) -> list[str]:
        work, config = self.work, self.config
        solve = work.evaluations_per_solve
        return [
            f"The shards hold about {work.train.total_images:,} training and {work.val.total_images:,} held-out images by their bytes; "
            "an index beside them, as jobs/shard.py writes it, makes that exact."
            if work.train.is_estimated or work.val.is_estimated
            else "",
            f"It ends earlier where {config.target_fooling_rate:g} of the training images (--target-fooling-rate) are fooled before."
            if config.target_fooling_rate < 1
            else "",
            f"A solve of the paper's rule took {solve.expected:.1f} network evaluations; of an image that is fooled already it takes one."
            if config.rule == "paper"
            else "",
            f"{self.share_machine} workers would share a machine, and were not tried together: they may slow each other down."
            if self.share_machine > max(self.tried)
            else "",
            f"Tried on {' and then on '.join(map(str, self.tried))} of these workers at once. Nodes that must boot, what else runs on the "
            "machines, and the end of the processes after all is written are not in the times.",
        ]

    def _price(self, fleet: FleetPlan) -> Span | None:
        if self.price_per_gpu_hour is None:
            return None
        return fleet.worker_hours * (self.gpus_per_worker * self.price_per_gpu_hour)


def fleet_sizes(fewest: int, most: int) -> list[int]:
    """Sizes that are worth a line: the fewest, powers of two, the most; of one size only, what fewer would take as well."""
    first = fewest if fewest < most else 1
    return sorted({first, most, *(2**power for power in range(floor(log2(most)) + 1) if first < 2**power < most)})


def planned_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """Of a plan as `Plan.result` has it, for the job's own fleet, under the names that MLflow uses."""
    fleet = result["fleets"][-1]
    return {
        "planned/workers": float(fleet["num_workers"]),
        "planned/seconds": fleet["seconds"]["expected"],
        "planned/seconds_low": fleet["seconds"]["low"],
        "planned/seconds_high": fleet["seconds"]["high"],
        "planned/worker_hours": fleet["worker_hours"]["expected"],
        "planned/evaluations": result["num_evaluations"]["expected"],
        "planned/solves": float(result["num_solves"]),
    }


def read_plan(path: Path, job: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a plan of this job, as `Plan.result` has written it.

    Raises:
        ConfigError: no plan, or one of another job; what differs is named.
    """
    try:
        result = json.loads(path.read_text())
        planned, metrics = result["job"], planned_metrics(result)
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is none"
        raise ConfigError(
            f"cannot read a plan from --planned {path}: {reason}; give the {PLAN_FILE} of --plan"
        ) from error
    differences = name_differences(planned, job)
    if differences:
        raise ConfigError(f"--planned {path} is of another job: {differences}; plan again, or leave it out")
    return metrics


@dataclass(frozen=True)
class Spent:
    """What a job took.

    Attributes:
        seconds: from the start of its process until all results were written; None where a run was resumed, whose earlier
            processes left no such figure.
        num_workers: at the end.
        num_evaluations, num_solves: of all perturbations.
    """

    seconds: float | None
    num_workers: int
    num_evaluations: int
    num_solves: int

    @classmethod
    def of(cls, results: Sequence[Mapping[str, Any]], num_workers: int, seconds: float | None) -> "Spent":
        """Of a job whose perturbations' result.json say so."""
        evaluations, solves = (sum(result[key] for result in results) for key in ("num_evaluations", "num_solves"))
        return cls(seconds, num_workers, evaluations, solves)

    def metrics(self) -> dict[str, float]:
        """Under the names that MLflow uses."""
        of_time = (
            {}
            if self.seconds is None
            else {
                "actual/seconds": self.seconds,
                "actual/worker_hours": self.seconds * self.num_workers / 3600,
            }
        )
        return of_time | {"actual/evaluations": float(self.num_evaluations), "actual/solves": float(self.num_solves)}

    def beside(self, planned: Mapping[str, float]) -> str:
        """One sentence, with the plan's metrics."""
        if not planned:
            return "" if self.seconds is None else f"Took {duration(self.seconds)}."
        expected, low, high = (duration(planned[f"planned/seconds{end}"]) for end in ("", "_low", "_high"))
        took = (
            "was resumed, so that its time is not known" if self.seconds is None else f"took {duration(self.seconds)}"
        )
        evaluations = f"{planned['planned/evaluations']:,.0f} network evaluations, spent {self.num_evaluations:,}"
        return (
            f"Planned {expected} ({low}–{high}) on {_workers(round(planned['planned/workers']))}, {took} on {self.num_workers}; "
            f"planned {evaluations}."
        )


def _local_steps_advice(num_workers: int, num_solves: int) -> str:
    """Options of rounds with a block for each worker, as the end of a sentence; empty where those rounds would be too few."""
    for steps, images in FLEET_BLOCKS:
        block = steps * images
        if FLEET_ROUNDS * num_workers * block <= num_solves:
            return (
                f", or local steps, which give another perturbation in fewer rounds: --round-size {num_workers * block} "
                f"--block-size {block} --local-steps {steps}"
            )
    return ""


def _between(span: Span, form: str) -> str:
    """The amount, and in brackets between what it may lie where that is not one figure."""
    expected, low, high = (form.format(value) for value in (span.expected, span.low, span.high))
    return expected if low == high else f"{expected} ({low}–{high})"


def _workers(count: int) -> str:
    return f"{count} worker{'s' * (count > 1)}"
