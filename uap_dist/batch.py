"""The tasks of one `map`: which wait, which were given to whom, which are answered. Knows actors, but calls nothing of Ray."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Condition
from typing import Any

from uap_dist import cluster as cluster  # before Ray, which reads on import what this sets

# isort: split
from ray import ObjectRef
from ray.actor import ActorHandle

from uap_dist.worker import Examples


@dataclass(eq=False)
class ActorRecord:
    """An actor, and the shards that it has read or is about to read."""

    actor: ActorHandle[Any]
    name: str
    shards: dict[str, None] = field(default_factory=dict)


@dataclass(eq=False)
class Batch:
    """The tasks of one `map` and how far they are."""

    method: str
    tasks: Sequence[Examples]
    shared: list[ObjectRef]
    unverified: set[int]  # tasks that want a second answer, of another worker
    given: defaultdict[int, set[ActorRecord]] = field(default_factory=lambda: defaultdict(set))
    error: Exception | None = None
    results: dict[int, Any] = field(default_factory=dict)  # that nobody has taken yet
    answered: set[int] = field(default_factory=set)
    digests: dict[int, str] = field(default_factory=dict)  # of first answers that want a second one
    durations: list[float] = field(default_factory=list)  # ascending
    losses: Counter[int] = field(default_factory=Counter)
    changed: Condition = field(default_factory=Condition)

    def __post_init__(self) -> None:
        """All tasks wait: in their order, and by shard."""
        self.waiting: dict[int, int] = {}  # how many answers are wanted of a task
        self._by_shard: defaultdict[str, dict[int, None]] = defaultdict(dict)
        for task in [*range(len(self.tasks)), *self.unverified]:
            self.put(task)

    @property
    def is_complete(self) -> bool:
        """Nothing more is to be computed."""
        return self.error is not None or (len(self.answered) == len(self.tasks) and not self.unverified)

    def has(self, task: int) -> bool:
        """Whether its answer, or an error, is there."""
        return task in self.results or self.error is not None

    def answers(self) -> Iterator[Any]:
        """In the order of the tasks, as they come; each is forgotten once it was taken.

        Raises:
            Exception: what `fail` was given.
        """
        for task in range(len(self.tasks)):
            with self.changed:
                self.changed.wait_for(partial(self.has, task))
                if self.error is not None:
                    raise self.error
                result = self.results.pop(task)
            yield result
        with self.changed:  # second answers may still be on their way
            self.changed.wait_for(lambda: self.is_complete)
        if self.error is not None:
            raise self.error

    def fail(self, error: Exception) -> None:
        """End it; whoever waits for answers gets the error."""
        with self.changed:
            self.error = error
            self.changed.notify()

    def put(self, task: int) -> None:
        """Have one more worker asked."""
        self.waiting[task] = self.waiting.get(task, 0) + 1
        self._by_shard[self.tasks[task].shard][task] = None

    def next_shard(self, held: set[str]) -> str:
        """Of the first task that waits and is of none of these shards; empty where there is none."""
        return next((self.tasks[task].shard for task in self.waiting if self.tasks[task].shard not in held), "")

    def take(self, member: ActorRecord, *, must_hold: bool) -> int | None:
        """A task for a member, no longer waiting: of a shard that it holds, or the first of all; None where there is none for it."""
        held = (task for shard in member.shards for task in self._by_shard.get(shard, ()))
        tasks = held if must_hold else iter(self.waiting)
        task = next((task for task in tasks if member not in self.given[task]), None)
        if task is not None:
            self.waiting[task] -= 1
            if not self.waiting[task]:
                del self.waiting[task]
                del self._by_shard[self.tasks[task].shard][task]
        return task


@dataclass(frozen=True)
class Call:
    """What a member computes: a task of a batch by its index, or its start (no batch)."""

    member: ActorRecord
    batch: Batch | None = None
    task: int = -1
    started: float = 0.0
    deadline: float = float("inf")  # a worker that waits for its place is not lost
