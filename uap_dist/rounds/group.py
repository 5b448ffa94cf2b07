"""Members of a pool whose rounds one worker computes in one batch.

Each member has its own computation, in a thread of its own, which knows nothing of the others: it asks its workers for spans. A group
waits until all its members have asked, and has one worker compute their spans together.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from threading import Lock, Thread
from typing import Any

from uap_dist.method.config import ComputeConfig
from uap_dist.method.state import RoundReport, State
from uap_dist.rounds.plan import RunPlan
from uap_dist.rounds.span import Span, compute_span, place_of
from uap_dist.workers.local import R, Shared, T, Workers
from uap_dist.workers.worker import Worker

Answer = dict[int, list[RoundReport]]  # by place, see `compute_span`


def in_groups(configs: Mapping[str, ComputeConfig]) -> list[list[str]]:
    """Names of the members that are computed together: their configs differ in nothing but what makes one, and their places differ."""
    groups: list[list[str]] = []
    for name, config in configs.items():
        last = [configs[other] for other in groups[-1]] if groups else []
        if not last or _shared(config) != _shared(last[0]) or place_of(config) in map(place_of, last):
            groups.append([])
        groups[-1].append(name)
    return groups


def _shared(config: ComputeConfig) -> ComputeConfig:
    """A config without what each member of a pool has of its own."""
    return replace(config, seed=0, random_start=None)


def run_together(
    workers: Workers, configs: Mapping[str, ComputeConfig], rounds: Callable[[str, Workers], Iterable[RoundReport]]
) -> dict[str, Iterator[RoundReport]]:
    """The computations of a group by name, all of which must be under way at the same time.

    Args:
        workers: that compute.
        configs: of the members, with different places.
        rounds: begins a member's computation on the workers that it is given.
    """
    group = _Group(workers, [place_of(config) for config in configs.values()])

    def compute(name: str, place: int) -> Iterator[RoundReport]:
        try:
            yield from rounds(name, _Member(group, workers))
        except Exception:
            group.leave(place)
            raise
        group.leave(place)  # not when the generator is closed: then nobody waits, and the process may be ending

    return {name: compute(name, place_of(config)) for name, config in configs.items()}


class _Group:
    """Spans that members ask for, until one worker gets all of them."""

    def __init__(self, workers: Workers, places: Iterable[int]) -> None:
        self._workers, self._places = workers, set(places)
        self._spans: dict[int, tuple[Span, State, RunPlan]] = {}
        self._answer: Future[Answer] = Future()
        self._lock = Lock()

    def ask(self, span: Span, states: Mapping[int, State], plan: RunPlan) -> Future[Answer]:
        """Ask for a span of one member; the answer is that of all members."""
        with self._lock:
            answer = self._answer
            self._spans |= {place: (span, state, plan) for place, state in states.items()}
            self._begin_if_complete()
        return answer

    def leave(self, place: int) -> None:
        """Wait no longer for the member at a place."""
        with self._lock:
            self._places.discard(place)
            self._begin_if_complete()

    def _begin_if_complete(self) -> None:
        if not self._spans or self._spans.keys() < self._places:
            return
        states = {place: self._spans[place][1] for place in sorted(self._spans)}
        rounds = {place: self._spans[place][0].rounds[place] for place in states}
        *_, plan = next(
            iter(self._spans.values())
        )  # they differ only in their seeds, which decide nothing but the rounds
        task = Span(rounds, plan.config.members_at_once)
        Thread(target=self._compute, args=(self._answer, task, states, plan), daemon=True).start()
        self._spans, self._answer = {}, Future()

    def _compute(self, answer: Future[Answer], span: Span, states: dict[int, State], plan: RunPlan) -> None:
        try:
            (found,) = self._workers.map(compute_span, [span], states, plan)
            answer.set_result(found)
        except BaseException as error:
            answer.set_exception(error)


class _Member:
    """The workers as a member of a group sees them."""

    def __init__(self, group: _Group, workers: Workers) -> None:
        self._group, self._workers = group, workers

    @property
    def num_workers(self) -> int:
        return self._workers.num_workers

    @property
    def room_for_spans(self) -> int:
        return self._workers.room_for_spans

    def metrics(self) -> dict[str, float]:
        return self._workers.metrics()

    def map(self, method: Callable[[Worker, T, *Shared], R], tasks: Sequence[T], *shared: *Shared) -> Iterator[R]:
        called: Any = method
        if called is not compute_span:
            return self._workers.map(method, tasks, *shared)
        given: Any = (*tasks, *shared)
        answer: Future[Any] = self._group.ask(*given)
        return (waiting.result() for waiting in (answer,))
