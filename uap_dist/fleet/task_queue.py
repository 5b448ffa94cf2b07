"""The tasks of one `map`: which ones wait, which worker has which, and the answers. Knows workers, but calls nothing of Ray."""

import time
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Condition
from typing import Any

from uap_dist.errors import DeterminismError
from uap_dist.fleet.actor import RemoteWorker
from uap_dist.workers.messages import Task

MAX_LOSSES_PER_TASK = 3  # workers that died while their nodes lived on: the task itself is to blame
MAX_NODE_LOSSES_PER_TASK = 10  # spot nodes vanish for other reasons, but hardly so many during one task
STRAGGLER_FACTOR, STRAGGLER_MIN_S = 3.0, 2.0  # a straggler takes so many times the median, and at least so many seconds


class Answers:
    """Hands the results of one `map` from the dispatch thread to the caller.

    Attributes:
        error: what ended the `map` early; None while nothing has.
    """

    def __init__(self, num_tasks: int) -> None:
        self.error: Exception | None = None
        self._num_tasks = num_tasks
        self._results: dict[int, Any] = {}  # those that the caller has not taken yet
        self._is_finished = False
        self._changed = Condition()

    def put(self, task: int, result: Any) -> None:
        """Add the result of a task."""
        with self._changed:
            self._results[task] = result
            self._changed.notify()

    def finish(self) -> None:
        """Nothing more will be computed."""
        with self._changed:
            self._is_finished = True
            self._changed.notify()

    def fail(self, error: Exception) -> None:
        """End the `map`: its caller gets the error as soon as it asks for a result."""
        with self._changed:
            self.error = error
            self._changed.notify()

    def __iter__(self) -> Iterator[Any]:
        """Yield the results in the order of the tasks as they come, and forget each.

        Raises:
            Exception: what `fail` was given.
        """
        for task in range(self._num_tasks):
            self._wait_for(partial(self._results.__contains__, task))
            yield self._results.pop(task)
        self._wait_for(lambda: self._is_finished)  # a second answer, to be compared, may still be missing

    def _wait_for(self, is_true: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: is_true() or self.error is not None)
        if self.error is not None:
            raise self.error


@dataclass(frozen=True, eq=False)
class Call:
    """A task, by its index in a queue, that a worker computes since `started` (monotonic clock)."""

    queue: "TaskQueue"
    worker: RemoteWorker
    task: int
    started: float


class TaskQueue:
    """The tasks of one `map`. A task is known by its index.

    Attributes:
        method: of `Worker`.
        tasks: its first argument, each.
        shared: its other arguments, as references into Ray's object store.
        answers: what the caller gets.
        losses: for each task, nodes of the workers that were lost over it; an empty name for a node that was reclaimed.
    """

    def __init__(
        self,
        method: Callable[..., Any],
        tasks: Sequence[Task],
        shared: Sequence[Any] = (),
        verified: Collection[int] = (),
    ) -> None:
        """Put all tasks in the queue; those in `verified` are computed by two workers, whose answers are compared."""
        self.method, self.tasks, self.shared = method, tasks, shared
        self.answers = Answers(len(tasks))
        self.losses: defaultdict[int, list[str]] = defaultdict(list)
        self._unverified = set(verified)
        self._num_wanted: dict[int, int] = {}  # of each waiting task: answers for which no worker was found yet
        self._waiting_by_shard: defaultdict[str, dict[int, None]] = defaultdict(dict)
        self._calls: dict[Call, None] = {}  # on their way
        self._workers: defaultdict[int, set[RemoteWorker]] = defaultdict(set)  # that were ever given the task
        self._answered: set[int] = set()
        self._digests: dict[int, str] = {}  # of first answers that are compared with a second one
        self._durations: list[float] = []  # of first answers, ascending
        for task in [*range(len(tasks)), *verified]:
            self._put(task)
        self._finish_if_complete()

    @property
    def is_complete(self) -> bool:
        """Whether nothing more is to be computed."""
        return self.answers.error is not None or (len(self._answered) == len(self.tasks) and not self._unverified)

    def next_shard(self, held: Collection[str]) -> str:
        """The shard of the first waiting task whose shard is not among these; empty if there is none."""
        return next((self.tasks[task].shard for task in self._num_wanted if self.tasks[task].shard not in held), "")

    def assign(self, idle: Sequence[RemoteWorker]) -> list[tuple[RemoteWorker, int]]:
        """Take waiting tasks for idle workers: first tasks whose shard a worker has read, then any."""
        pairs: list[tuple[RemoteWorker, int]] = []
        left = list(idle)
        for must_hold in (True, False):
            for worker in list(left):
                task = self._take(worker, must_hold=must_hold) if self._num_wanted else None
                if task is not None:
                    left.remove(worker)
                    pairs.append((worker, task))
        return pairs

    def assign_stragglers(
        self, idle: Sequence[RemoteWorker], usual_s: float | None = None
    ) -> list[tuple[RemoteWorker, int]]:
        """Choose, for workers that idle, tasks that take much longer than the others did. The first answer counts: same bits.

        Args:
            idle: workers without a task.
            usual_s: what such a task took before, for a `map` of which no task is done yet.
        """
        if self._durations:
            usual_s = self._durations[len(self._durations) // 2]
        if usual_s is None or not idle:
            return []
        latest_start = time.monotonic() - max(STRAGGLER_MIN_S, STRAGGLER_FACTOR * usual_s)
        num_calls = Counter(call.task for call in self._calls)
        late = [call.task for call in self._calls if num_calls[call.task] == 1 and call.started < latest_start]
        return [pair for pair in zip(idle, late, strict=False) if pair[0] not in self._workers[pair[1]]]

    def begin(self, worker: RemoteWorker, task: int) -> Call:
        """Note that a worker computes a task from now on."""
        call = Call(self, worker, task, time.monotonic())
        self._calls[call] = None
        self._workers[task].add(worker)
        return call

    def end(self, call: Call) -> None:
        """Note that a call has ended, with or without an answer."""
        del self._calls[call]

    def accept(self, call: Call, result: Any, machines: Collection[str]) -> bool:
        """Keep the first answer to a task, compare the second one if it is to be verified, and drop all others.

        If two answers differ, the `map` fails with a DeterminismError.

        Args:
            call: that has ended.
            result: its answer.
            machines: kinds of machines that the workers run on, for the message.

        Returns:
            Whether this is the first answer to its task.
        """
        task = call.task
        if task not in self._answered:
            if task in self._unverified:
                self._digests[task] = result.digest()
            insort(self._durations, time.monotonic() - call.started)
            self._answered.add(task)
            self.answers.put(task, result)
            self._finish_if_complete()
            return True
        if task in self._unverified:
            if result.digest() != self._digests[task]:
                self.answers.fail(
                    DeterminismError(
                        f"two workers gave different bits for {self._describe(task)}; look at the network's layers and "
                        f"at the machines ({'; '.join(sorted(machines))})"
                    )
                )
            self._unverified.remove(task)
            self._finish_if_complete()
        return False

    def put_back(self, task: int) -> None:
        """Have a task computed again whose worker was lost, unless enough answers are there or on their way."""
        num_missing = (task not in self._answered) + (task in self._unverified)
        if self._num_wanted.get(task, 0) + sum(call.task == task for call in self._calls) < num_missing:
            self._put(task)

    def why_give_up(self, task: int, living_nodes: Collection[str]) -> str:
        """Why a task is not computed again although its workers were lost; empty if it is.

        All nodes are looked up each time, because a worker may be seen to die before its node is.
        """
        nodes = self.losses[task]
        num_died = sum(node in living_nodes for node in nodes)
        num_vanished = len(nodes) - num_died
        if num_died < MAX_LOSSES_PER_TASK and num_vanished < MAX_NODE_LOSSES_PER_TASK:
            return ""
        what = f"{num_died} workers" if num_died >= MAX_LOSSES_PER_TASK else f"{num_vanished} nodes"
        return f"{what} were lost over {self._describe(task)}"

    def _put(self, task: int) -> None:
        """Want one more answer to a task."""
        self._num_wanted[task] = self._num_wanted.get(task, 0) + 1
        self._waiting_by_shard[self.tasks[task].shard][task] = None

    def _take(self, worker: RemoteWorker, *, must_hold: bool) -> int | None:
        """Take a task for a worker, of a shard that it has read or the first of all; None if there is none for it."""
        held = (task for shard in worker.shards for task in self._waiting_by_shard.get(shard, ()))
        tasks = held if must_hold else iter(self._num_wanted)
        task = next((task for task in tasks if worker not in self._workers[task]), None)
        if task is not None:
            self._num_wanted[task] -= 1
            if not self._num_wanted[task]:
                del self._num_wanted[task]
                del self._waiting_by_shard[self.tasks[task].shard][task]
        return task

    def _finish_if_complete(self) -> None:
        if self.is_complete:
            self.answers.finish()

    def _describe(self, task: int) -> str:
        return f"the same {self.tasks[task].describe()}"
