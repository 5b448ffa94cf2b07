"""What a run keeps of every round: its metrics, when and after how many rounds."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property

from uap_dist.method.state import RoundReport


@dataclass(frozen=True)
class RoundRecord:
    """A round as MLflow, the checkpoint and the curve know it.

    Attributes:
        step: rounds done.
        timestamp_ms: since 1970, fixed once: MLflow takes the same metric, step, value and time twice for one point.
        metrics: see RoundReport.metrics and Workers.metrics.
    """

    step: int
    timestamp_ms: int
    metrics: Mapping[str, float]

    @classmethod
    def of(cls, report: RoundReport, workers: Mapping[str, float]) -> "RoundRecord":
        """The round as it has just been done, with what the workers say of themselves."""
        return cls(report.round_number + 1, time.time_ns() // 1_000_000, report.metrics() | dict(workers))

    @cached_property
    def json(self) -> str:
        """One line; kept, because every later checkpoint holds it again."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "RoundRecord":
        """What `json` gave."""
        return cls(**json.loads(line))
