"""The tasks of one `map`: which wait, which were given to whom, which are answered. Knows actors, but calls nothing of Ray."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Condition
from typing import Any

from uap_dist.fleet import ray_cluster as ray_cluster  # before Ray, which reads on import what this sets

# isort: split
from ray import ObjectRef
from ray.actor import ActorHandle

from uap_dist.workers.messages import Examples

MAX_LOSSES_PER_TASK = 3  # of workers whose node lives on: so many, and the task itself is to blame
MAX_NODE_LOSSES_PER_TASK = 10  # spot nodes vanish for reasons of their own, but hardly so many over one task


@dataclass(eq=False)
class ActorRecord:
    """An actor, the shards that it has read or is about to read, and Ray's id of its node once that is known."""

    actor: ActorHandle[Any]
    name: str
    node: str = ""
    shards: dict[str, None] = field(default_factory=dict)


@dataclass(eq=False)
class Batch:
    """The tasks of one `map` and how far they are."""

    method: Callable[..., Any]
    tasks: Sequence[Examples]
    shared: list[ObjectRef]
    unverified: set[int]  # tasks that want a second answer, of another worker
    given: defaultdict[int, set[ActorRecord]] = field(default_factory=lambda: defaultdict(set))
    error: Exception | None = None
    results: dict[int, Any] = field(default_factory=dict)  # that nobody has taken yet
    answered: set[int] = field(default_factory=set)
    digests: dict[int, str] = field(default_factory=dict)  # of first answers that want a second one
    durations: list[float] = field(default_factory=list)  # ascending
    losses: defaultdict[int, list[str]] = field(
        default_factory=lambda: defaultdict(list)
    )  # nodes of workers lost over a task
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

    def blame(self, task: int, living_nodes: Collection[str]) -> str:
        """Why a task is to be given up over which workers were lost; empty where it is to be done again.

        All nodes are looked at each time: a worker may be seen to die before its node is.
        """
        nodes, examples = self.losses[task], self.tasks[task]
        num_died = sum(node in living_nodes for node in nodes)
        num_gone = len(nodes) - num_died
        if num_died < MAX_LOSSES_PER_TASK and num_gone < MAX_NODE_LOSSES_PER_TASK:
            return ""
        what = f"{num_died} workers" if num_died >= MAX_LOSSES_PER_TASK else f"{num_gone} nodes"
        return f"{what} were lost over the same examples of {examples.shard}: {name_some(examples.keys)}"

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


def name_some(keys: Sequence[str]) -> str:
    """The first keys, for messages."""
    return ", ".join(keys[:5]) + ", …" * (len(keys) > 5)
