"""Spans: consecutive rounds of one perturbation that one worker computes alone, and when that is quicker than sharing each round.

Between two rounds whose blocks workers share lie two calls through Ray. A span of about a second has none.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from statistics import median

from uap_dist.method.config import ComputeConfig
from uap_dist.method.state import RoundReport, State
from uap_dist.rounds.plan import RoundTasks, RunPlan
from uap_dist.rounds.round import Members, Outcome, run_rounds
from uap_dist.workers.local import LocalWorkers, Workers
from uap_dist.workers.worker import Worker

SPAN_S = 1.0  # a span ends with the first round after this time; what a lost worker costs at most
FIRST_LENGTH, MAX_LENGTH = 32, 4096  # rounds that a worker is given at most, at first and later
SPARE = 1.5  # times as many rounds as should fit into SPAN_S
ROUNDS_AHEAD = 8  # that a GPU is given before the numbers of the first of them are waited for
NUM_MEASURED = 5  # last rounds shared by the workers that are compared with spans
AGAIN_S = 30.0  # of spans, after which they are compared again: some shared rounds are a hundredth of that


@dataclass(frozen=True)
class Span:
    """A task: rounds of one perturbation, or of several that one worker computes in one batch.

    Attributes:
        rounds: that the worker computes until its time is over, by place in the batch.
        num_places: in the batch; empty ones are filled up.
    """

    rounds: Mapping[int, tuple[RoundTasks, ...]]
    num_places: int = 1

    @property
    def shard(self) -> str:
        """Not a shard, but what all spans have in common: a worker that has computed one has most training images."""
        return "all training shards"

    @property
    def num_examples(self) -> int:
        """Number of examples in all rounds."""
        return sum(round_.num_examples for some in self.rounds.values() for round_ in some)

    @property
    def title(self) -> str:
        """A title for logs: seeds and first rounds."""
        firsts = (some[0].blocks[0].seed for some in self.rounds.values())
        return "; ".join(f"seed {seed}, from round {number}" for seed, number, _ in firsts)

    def describe(self) -> str:
        """Such as "rounds of seed 0 from round 12: key, key, …"."""
        first = next(iter(self.rounds.values()))[0]
        return f"rounds ({self.title}), the first with {first.blocks[0].describe()}"


def place_of(config: ComputeConfig) -> int:
    """Place of a perturbation in the batch, which bits may depend on; not on what is at the other places."""
    return config.seed % config.members_at_once


def compute_span(
    worker: Worker, span: Span, states: Mapping[int, State], plan: RunPlan
) -> dict[int, list[RoundReport]]:
    """Compute rounds from a state until SPAN_S is over, a measurement is due, or a run ends; at least one.

    Everything happens on the worker's device.

    Args:
        worker: computes all of them.
        span: the rounds to come.
        states: before the first of them, by place.
        plan: of the runs, which differ only in their seeds.

    Returns:
        By place, a report of each round, of which only the last has arrays.
    """
    started = time.perf_counter()
    workers, members = LocalWorkers(worker), Members.of(states, span.num_places, worker.device)
    log = _Log(span.rounds, is_on_gpu=worker.device.type == "cuda")
    with worker.reproducibly():
        for each in zip(*span.rounds.values(), strict=False):
            rounds, before = dict(zip(span.rounds, each, strict=True)), members.states
            outcome = run_rounds(workers, rounds, members, plan, worker.graphs.call)
            log.add(outcome)
            members = outcome.after
            states = members.states
            if any(plan.ends_with(states[i]) or plan.is_due(rounds[i], before[i], states[i]) for i in rounds):
                break
            if time.perf_counter() - started > SPAN_S:
                break
    return log.finish()


class _Log:
    """The reports of a span. They are taken some rounds late, so that a GPU never has to wait for the next round.

    When a round on a GPU was over is not known then; each is said to have taken an equal part of the span.
    """

    def __init__(self, places: Iterable[int], *, is_on_gpu: bool) -> None:
        self._reports: dict[int, list[RoundReport]] = {place: [] for place in places}
        self._waiting: deque[tuple[Outcome, float]] = deque()
        self._is_on_gpu = is_on_gpu
        self._started = self._last = time.perf_counter()

    def add(self, outcome: Outcome) -> None:
        before, self._last = self._last, time.perf_counter()
        self._waiting.append((outcome, self._last - before))
        if len(self._waiting) > ROUNDS_AHEAD:
            self._take(has_arrays=False)

    def finish(self) -> dict[int, list[RoundReport]]:
        while self._waiting:
            self._take(has_arrays=len(self._waiting) == 1)
        if self._is_on_gpu:
            seconds = time.perf_counter() - self._started
            self._reports = {
                place: [replace(report, seconds=seconds / len(some)) for report in some]
                for place, some in self._reports.items()
            }
        return {place: [*some[:-1], some[-1].to_send()] for place, some in self._reports.items()}

    def _take(self, *, has_arrays: bool) -> None:
        outcome, seconds = self._waiting.popleft()
        for place, report in outcome.reports(lambda: seconds, has_arrays=has_arrays).items():
            self._reports[place].append(report)


class Sharing:
    """Chooses, before each round of a computation, whether all workers share its blocks or one takes a span. No bit depends on it.

    A span it is if several perturbations go through the network in one batch, if there is one worker, or if there are at least as
    many computations as workers; otherwise if the solves of a round would take one worker no longer than the workers take for the
    round together, calls included. That is measured again when their number changes, and now and then, because workers may have had
    other things to do.
    """

    def __init__(
        self, workers: Workers, train_bytes: int, num_computations: Callable[[], int], *, is_batched: bool = False
    ) -> None:
        """Begin with nothing measured.

        Args:
            workers: that compute.
            train_bytes: size of the decoded training images. Workers that cannot keep all of them get no spans.
            num_computations: computations that now use the workers, this one included.
            is_batched: whether its config has several perturbations in one batch.
        """
        self._is_batched = is_batched
        self._workers, self._fits = workers, train_bytes <= workers.room_for_spans
        self._num_computations = num_computations
        self._num_workers = 0
        # of shared rounds: their time beyond that of their solves
        self._spared_s: deque[float] = deque(maxlen=NUM_MEASURED)
        self._round_s: float | None = None  # of a round within the last span
        self._alone_since = inf  # (monotonic clock) spans were found to be quicker

    def measure_again(self) -> None:
        """Share the next rounds, and compare anew."""
        self._spared_s.clear()
        self._alone_since = inf

    def span_length(self) -> int:
        """Rounds that the next span may have; 0 if the next round is shared."""
        num_workers = self._workers.num_workers
        if num_workers != self._num_workers:
            self._num_workers = num_workers
            self.measure_again()
        if not self._is_batched and not self._is_worth_it(num_workers):
            return 0
        if self._round_s is None:
            return FIRST_LENGTH
        return min(MAX_LENGTH, max(1, ceil(SPARE * SPAN_S / self._round_s)))

    def note_shared(self, report: RoundReport) -> None:
        """Note how long a round took that the workers shared."""
        self._spared_s.append(report.seconds - report.solve_seconds)

    def note_span(self, reports: Sequence[RoundReport]) -> None:
        """Note how long the rounds of a span took."""
        self._round_s = median(report.seconds for report in reports)

    def _is_worth_it(self, num_workers: int) -> bool:
        return self._fits and (self._num_computations() >= num_workers or self._is_quicker_alone())

    def _is_quicker_alone(self) -> bool:
        if time.monotonic() > self._alone_since + AGAIN_S:
            self.measure_again()
        is_quicker = len(self._spared_s) == NUM_MEASURED and sum(self._spared_s) >= 0
        if is_quicker:
            self._alone_since = min(self._alone_since, time.monotonic())
        return is_quicker
