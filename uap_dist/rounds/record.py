"""The record of a round: its metrics, with step and time."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from uap_dist.method.rates import Rate
from uap_dist.method.state import RoundReport

RUNNING_IMAGES = (
    60  # images in the running mean of the rounds' fooling rates; a round of six can only have a rate of k/6
)


@dataclass(frozen=True)
class RoundRecord:
    """A round, or an epoch of fine-tuning, as it is kept in MLflow, in checkpoints and in the curve.

    Attributes:
        step: number of rounds or epochs done.
        timestamp_ms: milliseconds since 1970. It is never changed, because MLflow recognises a metric that is sent twice by its
            step, value and time.
        metrics: by name; see `RoundReport.metrics` and `Workers.metrics`. `fooling_rate/running` is the fooling rate over the last
            rounds that have RUNNING_IMAGES images together, and `num_images/running` the number of these images; other kinds of
            rates have the like, over RUNNING_IMAGES rounds at most.
    """

    step: int
    timestamp_ms: int
    metrics: Mapping[str, float]

    @classmethod
    def of(
        cls, report: RoundReport, workers: Mapping[str, float], earlier: Sequence["RoundRecord"] = ()
    ) -> "RoundRecord":
        """The record of a round that has just been done.

        Args:
            report: of the round.
            workers: metrics of the workers.
            earlier: records of the rounds before it, from which the running mean continues.
        """
        last = earlier[-RUNNING_IMAGES:]  # enough of them, because every round has at least one image
        metrics: dict[str, float] = {}
        for kind, rate in report.rates.items():
            num_hits, num_examples = rate.num_hits, rate.num_examples
            for record in reversed(last):
                if num_examples >= RUNNING_IMAGES:
                    break
                before = Rate.from_metrics(record.metrics, "round", kind)
                num_hits, num_examples = num_hits + before.num_hits, num_examples + before.num_examples
            metrics |= Rate(num_hits, num_examples).point("running", kind)
        return cls(report.round_number + 1, int(1000 * report.finished), report.metrics() | metrics | dict(workers))

    @property
    def json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "RoundRecord":
        """Inverse of `json`."""
        return cls(**json.loads(line))
