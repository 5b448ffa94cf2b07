"""Workers as Ray actors, as callers see them."""

import atexit
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from uap_dist.fleet import ray_cluster as ray_cluster  # first: it sets variables that Ray reads when it is imported

# isort: split
import ray

from uap_dist.fleet.config import FleetConfig
from uap_dist.fleet.dispatcher import Dispatcher, DispatchThread, Request
from uap_dist.fleet.membership import Membership
from uap_dist.fleet.metrics import FleetStats
from uap_dist.fleet.task_queue import TaskQueue
from uap_dist.models.loading import Given
from uap_dist.workers.local import R, Shared, T
from uap_dist.workers.worker import Worker


class Fleet:
    """Workers with one classifier on a connected Ray; see `workers.local.Workers`.

    Several threads may call it: its one dispatch thread shares the workers among them, so that the tasks of one caller fill
    the workers that those of another leave idle.

    Attributes:
        need: what each worker takes of a node.
        machines: kinds of machines that workers ran on, see `versions.machine`.
        stats: totals so far.
        room_for_spans: see Workers.
    """

    def __init__(
        self, model: Given, weights: str | None, config: FleetConfig, run: str = "", *, weights_digest: str = ""
    ) -> None:
        """Ask Ray for the workers; `wait` waits for the first ones.

        Args:
            model: name of the classifier, or of several, see `load_classifier`.
            weights: likewise.
            config: number and size of the workers.
            run: id of the MLflow run, for logs.
            weights_digest: of the classifier as the driver has loaded it; if empty, as the first worker loads it. Workers
                that load other weights are refused.

        Raises:
            ConfigError: the workers do not fit on a cluster that does not grow.
        """
        self.stats = FleetStats()
        # two workers would not compute equally many rounds in a span, so what they answer could not be compared
        self.room_for_spans = 0 if config.verify_determinism else config.cache_bytes + config.disk_cache_bytes
        self._verifies, self._num_verified = config.verify_determinism, 0
        self._membership = Membership(model, weights, weights_digest, config=config, run=run, stats=self.stats)
        self.need, self.machines = self._membership.placement.need, self._membership.machines
        self._dispatcher = Dispatcher(self._membership, config=config, run=run, stats=self.stats)
        self._thread = DispatchThread(self._dispatcher)
        atexit.register(self.close)  # before Ray's own handler

    @property
    def num_asked(self) -> int:
        """Workers that Ray was asked for so far."""
        return self._membership.placement.num_asked

    @property
    def num_workers(self) -> int:
        """Workers that are ready now; 1 if none is."""
        return max(1, self._membership.num_ready)

    def wait(self) -> None:
        """Return when as many workers as the config begins with have loaded the classifier.

        Raises:
            WorkerLostError: Ray cannot place them in time.
            ClassifierError: a worker has loaded other weights than the driver.
            UapDistError: what a worker raised when it loaded the classifier.
        """
        self._membership.wait()

    def use(self, model: Given, weights: str | None, *, weights_digest: str = "") -> None:
        """Have the workers load another classifier. They keep decoded shards that serve it as well. Call `wait` next.

        If workers cannot load it, `wait` raises their error, and they can be given another one.

        Args:
            model: as in `__init__`.
            weights: likewise.
            weights_digest: likewise.

        Raises:
            WorkerLostError: the fleet was closed, or Ray has ended.
            Exception: what went wrong when the workers were to be told.
        """
        done: Future[None] = Future()

        def load() -> None:
            self._dispatcher.load(model, weights, weights_digest)
            done.set_result(None)

        self._thread.ask(Request(load, done.set_exception))
        done.result()

    def map(self, method: Callable[[Worker, T, *Shared], R], tasks: Sequence[T], *shared: *Shared) -> Iterator[R]:
        """Yield `method(worker, task, *shared)` for each task, in the order of the tasks, through the loss of workers.

        All tasks are under way when it returns; a result is forgotten once the caller has it.

        Raises:
            WorkerLostError: a task over which three workers were lost whose nodes live on, or ten nodes; no worker is left
                and none can be had; or the fleet was closed or given another classifier.
            DeterminismError: two workers gave different bits (`verify_determinism`).
            Exception: what a worker raised; that is no lost worker, and not tried again.
        """
        if self._thread.end is not None:
            raise self._thread.end
        called: Callable[..., Any] = method  # mypy takes a generic callable to be no particular one
        verified: set[int] = set()
        if called is Worker.solve and self._verifies:
            verified = {self._num_verified % len(tasks)}  # of each round another block
            self._num_verified += 1
        queue = TaskQueue(method, tasks, [ray.put(value) for value in shared], verified)
        self._thread.ask(Request(lambda: self._dispatcher.accept(queue), queue.answers.fail))
        return iter(queue.answers)

    def describe(self) -> dict[str, Any]:
        """What the fleet ran on, and what happened to it so far."""
        return {
            "machines": "; ".join(sorted(self.machines)),
            "num_workers_at_end": self._membership.num_ready,
            "num_workers_lost": self.stats.workers_lost,
            "num_stragglers": self.stats.stragglers,
            "nondeterministic_kernels": ", ".join(sorted(self._membership.kernels)) or "none",
        }

    def describe_request(self) -> str:
        """The workers that were asked for, such as "1 to 3 workers of 1 CPU and 1 GPU"."""
        return self._membership.placement.describe()

    def metrics(self) -> dict[str, float]:
        """See Workers."""
        return {"workers/number": float(self._membership.num_ready)} | self.stats.metrics()

    def close(self) -> None:
        """End all workers."""
        if not self._thread.is_closed:
            self._thread.close()
            self._membership.kill_all()
            atexit.unregister(self.close)
