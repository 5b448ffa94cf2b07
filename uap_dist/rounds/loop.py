"""The loop over rounds, with the measurements in between."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import islice

from uap_dist.errors import ConfigError
from uap_dist.method.config import ComputeConfig
from uap_dist.method.rates import Goal
from uap_dist.method.state import RoundReport, State
from uap_dist.rounds.plan import RoundTasks, RunPlan, plan_run, schedule_rounds
from uap_dist.rounds.round import evaluate, run_round
from uap_dist.rounds.span import Sharing, Span, compute_span, place_of
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
        val: held-out images with their clean predictions. If they are still to come, reports wait for them from the first one on
            that has a measurement, while rounds go on, and what goes wrong with them ends the computation before its next round.
        config: options of the computation.
        state: to resume, the `state` of the report after which to go on, which must not have been the last one.
        num_computations: how many computations now use the workers, this one included; see `Sharing`.

    Yields:
        A report for each round; that of the last round has an evaluation on all images. Each holds v, the momentum and the
        perturbation, together 3 MB at 224×224, so keep only the last one. Rounds within a span, and those that waited for
        held-out images, come without these arrays (see `RoundReport.has_arrays`); a worker in this process computes no spans.

    Raises:
        ConfigError: there are fewer training images than in a block, the evaluations do not allow one round, or no image counts.
        ShardError: the images of both datasets differ in size.
    """
    config = config.balanced(train.clean.labels)
    plan = plan_run(train.sizes, config, train.clean.networks)
    _check_goal(plan.solver.goal, train, "training images")
    held_out = val if isinstance(val, Future) else known(val)
    before = state or State.start(train.shape, train.clean.labels, config)
    sharing = Sharing(workers, train.num_bytes, num_computations, is_batched=config.members_at_once > 1)
    upcoming = _Upcoming(train, plan, before.num_rounds)
    waiting = _Waiting(workers, train, held_out, plan)
    outgoing: Iterator[RoundReport] = iter(())
    is_there = False
    while True:
        if held_out.done() and not is_there:
            is_there = True
            check_shapes(train, held_out.result())
            sharing.measure_again()  # until now workers classified these images, too
        coming = _begin(workers, upcoming, before, plan, sharing)
        yield from outgoing  # while workers compute
        reports, outgoing = coming(), iter(())
        last_round = upcoming.take(len(reports))
        start, before = reports[-2].state if len(reports) > 1 else before, reports[-1].state
        ends = plan.ends_with(before)
        waiting.add(reports, is_due=ends or plan.is_due(last_round, start, before))
        if ends or not waiting.is_for_images:
            outgoing = waiting.take(ends)
        if ends or plan.measurements.num_images is None:  # the run may end here
            for report in outgoing:
                yield report
                if report.is_last:
                    return


def _check_goal(goal: Goal, images: Dataset, what: str) -> None:
    pushed = goal.pushes(images.clean.labels)
    if goal.networks and not pushed.all(1).any():
        raise ConfigError(
            f"on none of {images.num_examples} {what} do all networks give a label that the perturbation is to change"
        )
    if not pushed.any():
        left_out = "the target's label" if goal.attacks(images.clean.labels).any() else "labels that are not attacked"
        raise ConfigError(f"the network gives all {images.num_examples} {what} {left_out}; none is left that counts")


class _Waiting:
    """Reports on their way to the caller, from the first one on that is to be measured while held-out images are still to come."""

    def __init__(self, workers: Workers, train: Dataset, held_out: Future[Dataset], plan: RunPlan) -> None:
        self._workers, self._train, self._held_out, self._plan = workers, train, held_out, plan
        self._reports: list[RoundReport] = []
        self._due: set[int] = set()  # their numbers of rounds

    @property
    def is_for_images(self) -> bool:
        """Whether rounds go on meanwhile: not where the fooling rate may end the run."""
        return bool(self._due) and self._plan.measurements.num_images is not None and not self._held_out.done()

    def add(self, reports: Sequence[RoundReport], *, is_due: bool) -> None:
        """Add reports, the last of which may be due for a measurement. Of those before, only such reports keep their arrays."""
        if self._reports and self._reports[-1].round_number not in self._due:
            self._reports[-1] = self._reports[-1].without_arrays()
        self._reports += reports
        if is_due:
            self._due.add(reports[-1].round_number)

    def take(self, ends: bool) -> Iterator[RoundReport]:
        """All reports, measured where that is due, once the images are there; `ends`: the last one ends the run."""
        reports, due, self._reports, self._due = self._reports, self._due, [], set()
        for report in reports:
            if report.round_number not in due:
                yield report
                continue
            is_last = ends and report is reports[-1]
            val = self._held_out.result()
            check_shapes(self._train, val)
            goal = self._plan.solver.goal
            _check_goal(goal, val, "held-out images")
            images = (self._train, val) if is_last else self._plan.measurements.choose(self._train, val)
            evaluation = evaluate(self._workers, *images, report.perturbation, goal)
            reached = evaluation.train is not None and evaluation.train.rate >= self._plan.config.target_fooling_rate
            yield replace(report, evaluation=evaluation, is_last=is_last or reached)


def _begin(
    workers: Workers, upcoming: "_Upcoming", state: State, plan: RunPlan, sharing: Sharing
) -> Callable[[], list[RoundReport]]:
    """Begin the next span, or get ready for the next round; the result waits for their reports."""
    length = sharing.span_length()
    rounds = upcoming.look_ahead(max(1, length))
    if length:
        place = place_of(plan.config)
        span = Span({place: rounds}, plan.config.members_at_once)
        answers = workers.map(compute_span, [span], {place: state}, plan)

        def finish_span() -> list[RoundReport]:
            (answer,) = answers
            sharing.note_span(answer[place])
            return answer[place]

        return finish_span

    def share_round() -> list[RoundReport]:
        report = run_round(workers, rounds[0], state, plan)
        sharing.note_shared(report)
        return [report]

    return share_round


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
