"""The interface of workers to the driver, and its implementation by one worker in this process."""

from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import Protocol, TypeVar, TypeVarTuple

from uap_dist.workers.messages import Task
from uap_dist.workers.worker import Worker

R = TypeVar("R")
T = TypeVar("T", bound=Task)
Shared = TypeVarTuple("Shared")


class Workers(Protocol):
    """Workers that a driver can use: one in this process (`LocalWorkers`) or actors of Ray (`fleet.fleet.Fleet`)."""

    @property
    def num_workers(self) -> int:
        """Current number of workers."""
        ...

    @property
    def room_for_spans(self) -> int:
        """Bytes of decoded images that each worker can keep; a computation with more gives none of them a span.

        0: no spans at all, except for perturbations that share batches (`members_at_once`).
        """
        ...

    def map(self, method: Callable[[Worker, T, *Shared], R], tasks: Sequence[T], *shared: *Shared) -> Iterator[R]:
        """Yield `method(worker, task, *shared)` for each task, in the order of the tasks.

        Args:
            method: of `Worker`, as `Worker.solve`, or another function of a module.
            tasks: each is computed by one worker.
            shared: arguments that are the same for all tasks.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Metrics of the workers so far, for a round's report."""
        ...


class LocalWorkers:
    """One worker in this process: for notebooks and tests."""

    num_workers = 1
    room_for_spans = 0  # rounds that are computed here anyway gain nothing

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._lock = Lock()  # concurrent computations share the worker, and hooks on its classifier are not thread-safe

    def map(self, method: Callable[[Worker, T, *Shared], R], tasks: Sequence[T], *shared: *Shared) -> Iterator[R]:
        """Yield `method(worker, task, *shared)` for each task, in the order of the tasks."""
        for task in tasks:
            with self._lock:
                result = method(self._worker, task, *shared)
            yield result

    def metrics(self) -> dict[str, float]:
        """Nothing: only a fleet has metrics."""
        return {}
