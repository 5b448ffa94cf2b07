"""The loop over rounds, with the measurements in between."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from itertools import islice

from uap_dist.method.config import ComputeConfig
from uap_dist.method.state import RoundReport, State
from uap_dist.rounds.plan import RunPlan, plan_run, schedule_rounds
from uap_dist.rounds.round import RoundTasks, evaluate, run_round
from uap_dist.rounds.span import Sharing, Span, compute_span
from uap_dist.workers.behind import known
from uap_dist.workers.dataset import Dataset
from uap_dist.workers.disjoint import check_shapes
from uap_dist.workers.local import Workers


def compute(
    workers: Workers,
    train: Dataset,
    val: Dataset | Future[Dataset],
    config: ComputeConfig,
    state: State | None = None,
    *,
    num_computations: Callable[[], int] = lambda: 1,
) -> Iterator[RoundReport]:
    """Compute a perturbation, round by round, until the target fooling rate or the limit of passes or network evaluations is reached.

    The result depends only on data, network, config and seed, not on the workers or on where a run was resumed.

    Args:
        workers: compute the increments and the fooling rates.
        train: training images with their clean predictions.
        val: held-out images with their clean predictions. If they are still to come, the first measurement waits for them, and
            what goes wrong with them ends the computation before its next round.
        config: options of the computation.
        state: to resume, the `state` of the report after which to go on, which must not have been the last one.
        num_computations: how many computations now use the workers, this one included; see `Sharing`.

    Yields:
        A report for each round; that of the last round has an evaluation on all images. Each holds v, the momentum and the
        perturbation, together 3 MB at 224×224, so keep only the last one. Rounds within a span come without these arrays
        (see `RoundReport.has_arrays`); a worker in this process computes no spans.

    Raises:
        ConfigError: there are fewer training images than in a block, the evaluations do not allow one round, or the images of
            both datasets differ in shape.
    """
    held_out = val if isinstance(val, Future) else known(val)
    plan = plan_run(train.sizes, config)
    before = state or State.start(train.shape, train.num_examples, config)
    sharing = Sharing(workers, train.num_bytes, num_computations)
    upcoming = _Upcoming(train, plan, before.num_rounds)
    while True:
        if held_out.done():
            check_shapes(train, held_out.result())
        reports = _advance(workers, upcoming, before, plan, sharing)
        last_round = upcoming.take(len(reports))
        yield from reports[:-1]
        before, report = reports[-2].state if len(reports) > 1 else before, reports[-1]
        ends = plan.ends_with(report.state)
        if ends or plan.is_due(last_round, before, report.state):
            check_shapes(train, held_out.result())
            images = (train, held_out.result()) if ends else plan.measurements.choose(train, held_out.result())
            report = replace(report, evaluation=evaluate(workers, *images, report.perturbation))
        train_rate = report.evaluation.train if report.evaluation is not None else None
        is_last = ends or (train_rate is not None and train_rate.rate >= config.target_fooling_rate)
        before = report.state
        yield replace(report, is_last=is_last)
        if is_last:
            return


def _advance(
    workers: Workers, upcoming: "_Upcoming", state: State, plan: RunPlan, sharing: Sharing
) -> list[RoundReport]:
    """The reports of the next round, or of those of a span."""
    length = sharing.span_length()
    rounds = upcoming.look_ahead(max(1, length))
    if length:
        (reports,) = workers.map(compute_span, [Span(rounds)], state, plan)
        sharing.note_span(reports)
        return reports
    report = run_round(workers, rounds[0], state, plan.config, plan.num_rounds)
    sharing.note_shared(report)
    return [report]


class _Upcoming:
    """The rounds of a run that are not done yet, as tasks."""

    def __init__(self, train: Dataset, plan: RunPlan, num_done: int) -> None:
        rounds = islice(schedule_rounds(train.sizes, plan.config), num_done, plan.num_rounds)
        self._tasks = (RoundTasks.of(round_, train, plan.config.seed) for round_ in rounds)
        self._waiting: deque[RoundTasks] = deque()

    def look_ahead(self, count: int) -> tuple[RoundTasks, ...]:
        """The next `count` rounds, fewer at the end of the run."""
        self._waiting.extend(islice(self._tasks, max(0, count - len(self._waiting))))
        return tuple(islice(self._waiting, count))

    def take(self, count: int) -> RoundTasks:
        """Take the next `count` rounds away, and return the last of them."""
        for _ in range(count - 1):
            self._waiting.popleft()
        return self._waiting.popleft()
