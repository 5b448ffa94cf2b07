"""Spans: consecutive rounds of one perturbation that one worker computes alone, and when that is quicker than sharing each round.

Between two rounds whose blocks workers share lie two calls through Ray. A span of about a second has none.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import median

from uap_dist.method.state import RoundReport, State
from uap_dist.rounds.plan import RunPlan
from uap_dist.rounds.round import RoundTasks, run_round
from uap_dist.workers.local import LocalWorkers, Workers
from uap_dist.workers.worker import Worker

SPAN_S = 1.0  # a span ends with the first round after this time; what a lost worker costs at most
FIRST_LENGTH, MAX_LENGTH = 32, 4096  # rounds that a worker is given at most, at first and later
SPARE = 1.5  # times as many rounds as should fit into SPAN_S
NUM_MEASURED = 5  # last rounds shared by the workers that are compared with spans


@dataclass(frozen=True)
class Span:
    """A task: rounds of one perturbation, one after another.

    Attributes:
        rounds: that the worker computes until its time is over.
    """

    rounds: tuple[RoundTasks, ...]

    @property
    def shard(self) -> str:
        """Not a shard, but what all spans have in common: a worker that has computed one has most training images."""
        return "all training shards"

    @property
    def num_examples(self) -> int:
        """Number of examples in all rounds."""
        return sum(round_.num_examples for round_ in self.rounds)

    @property
    def title(self) -> str:
        """A title for logs: the seed and the first round."""
        seed, number, _ = self.rounds[0].blocks[0].seed
        return f"seed {seed}, from round {number}"

    def describe(self) -> str:
        """Such as "rounds of seed 0 from round 12: key, key, …"."""
        return f"rounds ({self.title}), the first with {self.rounds[0].blocks[0].describe()}"


def compute_span(worker: Worker, span: Span, state: State, plan: RunPlan) -> list[RoundReport]:
    """Compute rounds from a state until SPAN_S is over, a measurement is due, or the run ends; at least one.

    Args:
        worker: computes all of them.
        span: the rounds to come.
        state: before the first of them.
        plan: of the run.

    Returns:
        A report of each round, of which only the last has arrays.
    """
    started = time.perf_counter()
    workers, reports = LocalWorkers(worker), []
    with worker.reproducibly():
        for round_ in span.rounds:
            report = run_round(workers, round_, state, plan.config, plan.num_rounds)
            reports.append(report)
            if plan.ends_with(report.state) or plan.is_due(round_, state, report.state):
                break
            if time.perf_counter() - started > SPAN_S:
                break
            state = report.state
    return [*(report.without_arrays() for report in reports[:-1]), reports[-1]]


class Sharing:
    """Chooses, before each round of a computation, whether all workers share its blocks or one takes a span. No bit depends on it.

    A span it is if there is one worker, or at least as many computations as workers; otherwise if the solves of a round would
    take one worker no longer than the workers take for the round together, calls included. That is measured again when their
    number changes.
    """

    def __init__(self, workers: Workers, train_bytes: int, num_computations: Callable[[], int]) -> None:
        """Begin with nothing measured.

        Args:
            workers: that compute.
            train_bytes: size of the decoded training images. Workers that cannot keep all of them get no spans.
            num_computations: computations that now use the workers, this one included.
        """
        self._workers, self._fits = workers, train_bytes <= workers.room_for_spans
        self._num_computations = num_computations
        self._num_workers = 0
        self._spared_s: deque[float] = deque(
            maxlen=NUM_MEASURED
        )  # of shared rounds: their time beyond that of their solves
        self._round_s: float | None = None  # of a round within the last span

    def span_length(self) -> int:
        """Rounds that the next span may have; 0 if the next round is shared."""
        num_workers = self._workers.num_workers
        if num_workers != self._num_workers:
            self._num_workers = num_workers
            self._spared_s.clear()
        if not self._fits:
            return 0
        if self._num_computations() < num_workers and not self._is_quicker_alone():
            return 0
        if self._round_s is None:
            return FIRST_LENGTH
        return min(MAX_LENGTH, ceil(SPARE * SPAN_S / self._round_s))

    def note_shared(self, report: RoundReport) -> None:
        """Note how long a round took that the workers shared."""
        self._spared_s.append(report.seconds - report.solve_seconds)

    def note_span(self, reports: Sequence[RoundReport]) -> None:
        """Note how long the rounds of a span took."""
        self._round_s = median(report.seconds for report in reports)

    def _is_quicker_alone(self) -> bool:
        return len(self._spared_s) == NUM_MEASURED and sum(self._spared_s) >= 0
