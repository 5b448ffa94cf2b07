"""A plan as a person reads it, and as the plan.json that scripts read."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import floor, log2
from typing import Any

from uap_dist.computing.options import ComputeOptions
from uap_dist.foreign_text import escape_markdown
from uap_dist.job_options import GIB
from uap_dist.planning.comparison import count_workers, planned_metrics
from uap_dist.planning.cost_model import FleetPlan
from uap_dist.planning.range import Range
from uap_dist.planning.work import Work
from uap_dist.rounds.concurrent import describe_idle, num_filling
from uap_dist.tracking.console import duration
from uap_dist.tracking.outputs import markdown_table

# (local steps, images of each) of blocks, one for each worker, and the rounds that they need: from benchmarks/rounds.md
FLEET_BLOCKS, FLEET_ROUNDS = ((4, 3), (1, 2)), 48


@dataclass(frozen=True)
class Plan:
    """The cost of a job on fleets of several sizes.

    Attributes:
        options: of the job.
        work: what it has to do.
        fleets: costs by size of the fleet; the last one is the job's own.
        measured_workers: numbers of workers on which costs were measured, in ascending order.
        workers_per_machine: how many workers of the job may share a machine.
        gpus_per_worker: GPUs that each worker takes, possibly a fraction of one.
    """

    options: ComputeOptions
    work: Work
    fleets: Sequence[FleetPlan]
    measured_workers: Sequence[int]
    workers_per_machine: int
    gpus_per_worker: float

    def result(self) -> dict[str, Any]:
        """The contents of plan.json."""
        work = self.work
        return {
            "job": self.options.costs(),
            "num_rounds": work.num_rounds,
            "num_solves": work.num_perturbations * work.num_solves,
            "num_evaluations": asdict(work.num_evaluations),
            "num_classified": work.num_classified,
            "num_train_images": work.train.total_images,
            "num_val_images": work.val.total_images,
            "images_are_estimated": self._has_estimated_images,
            "gpus_per_worker": self.gpus_per_worker,
            "tried_workers": list(self.measured_workers),
            "price_per_gpu_hour": self.options.price_per_gpu_hour,
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
        """Costs on the job's own fleet, under the names used in MLflow."""
        return planned_metrics(self.result())

    def summary(self) -> str:
        """One screen of Markdown."""
        work, config, last = self.work, self.options.config, self.fleets[-1]
        parts = ", ".join(f"{name} {duration(part.expected)}" for name, part in last.parts.items())
        times = f"{work.num_perturbations} × " if work.num_perturbations > 1 else ""
        together = f", {config.members_at_once} perturbations in a batch" if config.members_at_once > 1 else ""
        model = " + ".join(self.options.networks) or self.options.model
        return (
            f"**{escape_markdown(model)}**, {config.norm} ≤ {config.ball_radius:g} pixels, rule {config.rule}: "
            f"{times}{work.num_rounds:,} rounds of {max(work.rounds)} blocks, {times}{work.num_solves:,} solves{together}, "
            f"{_with_range(work.num_evaluations, '{:,.0f}')} network evaluations; {work.num_classified:,} images classified for clean "
            f"labels and measurements.\n\n{self.table()}\n\nOf the {duration(last.seconds.expected)} on "
            f"{count_workers(last.num_workers)}: {parts}.\n\n" + "\n".join(f"* {note}" for note in self.notes())
        )

    def table(self) -> str:
        """A Markdown table with a row for each size of the fleet."""
        rows = [self._row(fleet) for fleet in self.fleets]
        return markdown_table(list(rows[0]), [list(row.values()) for row in rows])

    def _row(self, fleet: FleetPlan) -> dict[str, str]:
        seconds, price, read = fleet.seconds, self._price(fleet), fleet.read_bytes * (1 / GIB)
        hours = fleet.worker_hours * (self.gpus_per_worker or 1)
        return {
            "workers": str(fleet.num_workers),
            "time": duration(seconds.expected),
            "between": f"{duration(seconds.low)}–{duration(seconds.high)}",
            "GPU-hours" if self.gpus_per_worker else "worker-hours": _with_range(hours, "{:.3g}"),
            **({} if price is None else {"price": _with_range(price, "{:.2f}")}),
            "read, GiB": _with_range(read, "{:.2g}"),
            "by each, GiB": f"{read.expected / fleet.num_workers:.2g}",
            "memory of each, GiB": f"{fleet.worker_bytes / GIB:.1f}",
            "decoded images, GiB": f"{fleet.cached_bytes / GIB:.2g}",
            **({"GPU memory, GiB": f"{fleet.gpu_bytes / GIB:.1f}"} if self.gpus_per_worker else {}),
            "idle in rounds": f"{fleet.idle:.0%}",
        }

    def notes(self) -> list[str]:
        """What would make the job faster, then what the figures leave out."""
        return [*self._advice_on_idle(), *self._advice_on_cache(), *self._caveats()]

    def _advice_on_idle(self) -> list[str]:
        work, config, last = self.work, self.options.config, self.fleets[-1]
        size, num_blocks = last.num_workers, max(work.rounds)
        if config.members_at_once > 1:
            idle = describe_idle(size, work.num_perturbations, config)
            return [f"{idle}."] if idle else []
        busy, pool_size = (1, size) if last.has_spans else (num_blocks, num_filling(size, config))
        if size <= busy or work.num_perturbations >= pool_size:
            return []
        remedy = f"a pool of {pool_size} (--num-perturbations) would keep all {size} busy"
        if config.rule == "log-odds" and config.local_steps is None:
            remedy += _local_steps_advice(size, work.num_solves)
        num_idle = size - busy * work.num_perturbations
        if num_idle <= 0:
            return [f"{remedy[0].upper()}{remedy[1:]}."]
        idle = f"{num_idle} of {size} workers have nothing to do"
        if last.has_spans:
            return [
                f"One worker computes the rounds of a perturbation quicker than several would share them, so {idle}; {remedy}."
            ]
        return [
            f"A round has at most {num_blocks} blocks (--round-size {config.round_size}, --block-size {config.block_size}), so {idle} "
            f"while it is solved; {remedy}."
        ]

    def _advice_on_cache(self) -> list[str]:
        fleet, last, notes = self.options.fleet, self.fleets[-1], list[str]()
        if last.cached_bytes > (fleet.cache_gib + fleet.disk_cache_gib) * GIB:
            notes.append(
                f"Decoded images would take {last.cached_bytes / GIB:.1f} GiB of a worker, more than --cache-gib {fleet.cache_gib:g} and "
                f"--disk-cache-gib {fleet.disk_cache_gib:g}: what does not fit is read and decoded again for each of its blocks."
            )
        return notes

    def _caveats(self) -> list[str]:
        work, config, notes = self.work, self.options.config, []
        if self._has_estimated_images:
            notes.append(
                f"The shards hold about {work.train.total_images:,} training and {work.val.total_images:,} held-out images by their "
                "bytes; an index beside them, as jobs/shard.py writes it, makes that exact."
            )
        if config.target_fooling_rate < 1:
            notes.append(
                f"The run ends earlier if {config.target_fooling_rate:g} of the training images (--target-fooling-rate) are fooled before."
            )
        if config.rule == "paper":
            notes.append(
                f"A solve of the paper's rule took {work.evaluations_per_solve.expected:.1f} network evaluations; it takes one for an "
                "image that is fooled already."
            )
        if self.workers_per_machine > max(self.measured_workers):
            notes.append(
                f"{self.workers_per_machine} workers would share a machine, but were not measured together: they may slow each other down."
            )
        measured = " and then on ".join(map(str, self.measured_workers))
        notes.append(
            f"Costs were measured on {measured} of these workers at once. Not included: booting nodes, other load on the machines, and "
            "the end of the processes after everything is written."
        )
        return notes

    @property
    def _has_estimated_images(self) -> bool:
        return self.work.train.is_estimated or self.work.val.is_estimated

    def _price(self, fleet: FleetPlan) -> Range | None:
        price = self.options.price_per_gpu_hour
        return None if price is None else fleet.worker_hours * (self.gpus_per_worker * price)


def fleet_sizes(fewest: int, most: int) -> list[int]:
    """Sizes of the fleet to plan for: the fewest workers, powers of two, and the most; from 1 on if both are the same."""
    first = fewest if fewest < most else 1
    return sorted({first, most, *(2**power for power in range(floor(log2(most)) + 1) if first < 2**power < most)})


def _local_steps_advice(num_workers: int, num_solves: int) -> str:
    """Options for rounds with a block for each worker, as the end of a sentence; empty if there would be too few such rounds."""
    for steps, images in FLEET_BLOCKS:
        block = steps * images
        if FLEET_ROUNDS * num_workers * block <= num_solves:
            return (
                f", or local steps, which give another perturbation in fewer rounds: --round-size {num_workers * block} "
                f"--block-size {block} --local-steps {steps}"
            )
    return ""


def _with_range(range_: Range, form: str) -> str:
    """The expected amount, followed by its range in brackets unless both ends are shown alike."""
    expected, low, high = (form.format(value) for value in (range_.expected, range_.low, range_.high))
    return expected if low == high else f"{expected} ({low}–{high})"
