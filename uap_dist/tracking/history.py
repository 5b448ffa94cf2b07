"""The record of a round: its metrics, with step and time."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property

from uap_dist.method.state import RoundReport


@dataclass(frozen=True)
class RoundRecord:
    """A round, or an epoch of fine-tuning, as it is kept in MLflow, in checkpoints and in the curve.

    Attributes:
        step: number of rounds or epochs done.
        timestamp_ms: milliseconds since 1970. It is never changed, because MLflow recognises a metric that is sent twice by its
            step, value and time.
        metrics: by name; see `RoundReport.metrics` and `Workers.metrics`.
    """

    step: int
    timestamp_ms: int
    metrics: Mapping[str, float]

    @classmethod
    def of(cls, report: RoundReport, workers: Mapping[str, float]) -> "RoundRecord":
        """The record of a round that has just been done, including metrics of the workers."""
        return cls(report.round_number + 1, time.time_ns() // 1_000_000, report.metrics() | dict(workers))

    @cached_property
    def json(self) -> str:
        """One line of JSON, cached because every later checkpoint contains it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "RoundRecord":
        """Inverse of `json`."""
        return cls(**json.loads(line))
