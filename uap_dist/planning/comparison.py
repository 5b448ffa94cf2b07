"""What a run took, compared with its plan."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uap_dist.errors import ConfigError
from uap_dist.tracking.checkpoint import name_differences
from uap_dist.tracking.console import duration
from uap_dist.tracking.outputs import writes_files

PLAN_FILE = "plan.json"


def planned_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """MLflow metrics of a plan, for the job's own fleet, from the contents of its plan.json."""
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


@writes_files
def save_plan(folder: Path, result: Mapping[str, Any]) -> None:
    """Write a plan as `Plan.result` has it."""
    (folder / PLAN_FILE).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def read_plan(path: Path, options: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a plan, read from its plan.json.

    Args:
        path: of plan.json.
        options: options of the run that its cost depends on, as JSON values; the plan must be of the same ones.

    Raises:
        ConfigError: the file is not a plan, or is one of a job with other options; the message names what differs.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        planned, metrics = result["job"], planned_metrics(result)
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a plan"
        raise ConfigError(
            f"cannot read a plan from --planned {path}: {reason}; give the {PLAN_FILE} of --plan"
        ) from error
    differences = name_differences(planned, options)
    if differences:
        raise ConfigError(f"--planned {path} is of another job: {differences}; plan again, or leave it out")
    return metrics


@dataclass(frozen=True)
class Spent:
    """What a job took.

    Attributes:
        seconds: from the start of its process until all results were written; None for a resumed run, because those of its
            earlier processes are not known.
        num_workers: at the end.
        num_evaluations, num_solves: of all perturbations.
    """

    seconds: float | None
    num_workers: int
    num_evaluations: int
    num_solves: int

    @classmethod
    def of(cls, results: Sequence[Mapping[str, Any]], num_workers: int, seconds: float | None) -> "Spent":
        """What a job took, from the result.json of each of its perturbations."""
        evaluations, solves = (sum(result[key] for result in results) for key in ("num_evaluations", "num_solves"))
        return cls(seconds, num_workers, evaluations, solves)

    def metrics(self) -> dict[str, float]:
        """The same under the names used in MLflow."""
        metrics = {"spent/evaluations": float(self.num_evaluations), "spent/solves": float(self.num_solves)}
        if self.seconds is not None:
            metrics |= {
                "spent/seconds": self.seconds,
                "spent/worker_hours": self.seconds * self.num_workers / 3600,
            }
        return metrics

    def beside(self, planned: Mapping[str, float]) -> str:
        """One sentence that compares it with the metrics of a plan; these may be empty."""
        if not planned:
            return "" if self.seconds is None else f"Took {duration(self.seconds)}."
        expected, low, high = (duration(planned[f"planned/seconds{end}"]) for end in ("", "_low", "_high"))
        took = "was resumed, so its time is not known" if self.seconds is None else f"took {duration(self.seconds)}"
        return (
            f"Planned {expected} ({low}–{high}) on {count_workers(round(planned['planned/workers']))}, {took} on {self.num_workers}; "
            f"planned {planned['planned/evaluations']:,.0f} network evaluations, spent {self.num_evaluations:,}."
        )


def count_workers(count: int) -> str:
    """A number of workers in words, such as "1 worker"."""
    return f"{count} worker{'s' * (count > 1)}"
