"""A worker as a Ray actor: what its process does around each task, and how the driver sees it."""

import gc
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any

from uap_dist.fleet import ray_cluster as ray_cluster  # first: it sets variables that Ray reads when it is imported

# isort: split
import ray
from ray.actor import ActorHandle
from ray.util import get_node_ip_address

from uap_dist.data.cache import Traffic
from uap_dist.errors import ConfigError
from uap_dist.versions import DECISIVE_VERSIONS, machine, versions
from uap_dist.workers.messages import Task
from uap_dist.workers.reproducible import noticing_kernels, set_up_torch
from uap_dist.workers.worker import Worker, make_worker

READING = "reading"  # Ray's name of the thread that reads shards while the other one computes

logger = logging.getLogger("uap_dist")


def decisive_versions() -> dict[str, str]:
    """Versions that must be the same on all nodes."""
    found = versions()
    return {name: found[name] for name in DECISIVE_VERSIONS}


@dataclass(eq=False)
class RemoteWorker:
    """A worker as the driver sees it.

    Attributes:
        actor: handle of its Ray actor, a `UapWorker`.
        name: of the actor.
        node: Ray's id of its node, once the worker has loaded the classifier.
        shards: URLs of the shards that it has read or is about to read, in order.
    """

    actor: ActorHandle[Any]
    name: str
    node: str = ""
    shards: dict[str, None] = field(default_factory=dict)


@dataclass(frozen=True)
class Introduction:
    """What a worker reports when it has loaded the classifier.

    Attributes:
        machine: kind of its machine, see `versions.machine`.
        node: Ray's id of its node.
        weights_digest: of the classifier.
    """

    machine: str
    node: str
    weights_digest: str


@dataclass(frozen=True)
class Answer:
    """What a worker returns for a task.

    Attributes:
        result: of the method.
        traffic: what the worker has read since its last answer.
        seconds: time that the task took.
        warnings: that the package logged since then.
        solves: increments that were computed for it.
        kernels: names of nondeterministic torch kernels that the task used.
    """

    result: Any
    traffic: Traffic
    seconds: float
    warnings: tuple[str, ...]
    solves: int = 0
    kernels: frozenset[str] = frozenset()


class UapWorker:
    """The Ray actor. It loads its classifier in `start`, not in `__init__`, so that errors reach the driver unchanged."""

    _worker: Worker | None = None

    def __init__(self, name: str, run: str) -> None:
        """Hide GPUs that this worker did not ask for, and write logs of this process with the names of the worker and of the MLflow run."""
        ray_cluster.hide_gpus_of_others()
        self._name, self._node = name, get_node_ip_address()
        logging.basicConfig(format=f"%(asctime)s run {run} {name} %(levelname)s %(message)s")
        logger.setLevel(logging.INFO)
        self._warnings = _WarningRecorder()
        logger.addHandler(self._warnings)
        self._lock, self._reported = Lock(), Traffic()

    def __repr__(self) -> str:
        """The name that Ray's dashboard and logs show."""
        return self._name

    def start(
        self, expected: Mapping[str, str], need: ray_cluster.Need, max_workers: int | None, **options: Any
    ) -> Introduction:
        """Load the classifier. It can be called again, for another classifier or after an error.

        Args:
            expected: `decisive_versions` of the driver.
            need: what each worker takes of a node.
            max_workers: of the fleet; None: as many as fit.
            options: of `make_worker`; without a number of threads that decode, this worker's share of the node's CPUs.

        Raises:
            ConfigError: this node has other versions.
        """
        own = decisive_versions()
        others = [f"{name} {own[name]} instead of {expected[name]}" for name in own if own[name] != expected[name]]
        if others:
            raise ConfigError(
                f"node {self._node} has {', '.join(others)}; the bits of a result depend on them: install the driver's versions"
            )
        set_up_torch(options["num_threads"])
        options["decode_threads"] = options["decode_threads"] or need.share_of_cpus(max_workers)
        worker = make_worker(**options)
        if self._worker is not None:
            worker.adopt(self._worker)
        self._worker = worker
        _spare_collections()
        self._warnings.take()  # they are in this process's log, and the driver's own classifier gave them too
        return Introduction(machine(), ray.get_runtime_context().get_node_id(), worker.classifier.weights_digest)

    def call(self, method: Callable[..., Any], task: Task, upcoming: str, *shared: Any) -> Answer:
        """Run a method of `Worker` on a task, while the shard `upcoming` (empty: none) is fetched in the background."""
        assert self._worker is not None
        solved = self._worker.num_solves
        with noticing_kernels() as kernels:
            answer = self._run(method, task, upcoming, *shared)
        return replace(answer, solves=self._worker.num_solves - solved, kernels=frozenset(kernels))

    def read(self, task: Task, upcoming: str, *shared: Any) -> Answer:
        """Run `Worker.read`; Ray calls this in another thread than `call`."""
        return self._run(Worker.read, task, upcoming, *shared)

    def _run(self, method: Callable[..., Any], task: Task, upcoming: str, *shared: Any) -> Answer:
        assert self._worker is not None
        logger.info("%s %s", method.__name__, task.title)
        started = time.perf_counter()
        if upcoming:
            self._worker.prefetch(upcoming)
        result = method(self._worker, task, *shared)
        seconds = time.perf_counter() - started
        with self._lock:
            so_far = self._worker.traffic  # once, because the other thread may be adding to it
            traffic, self._reported = so_far - self._reported, so_far
        warnings = tuple(f"{self._name} on {self._node}: {text}" for text in self._warnings.take())
        return Answer(result, traffic, seconds, warnings)


def _spare_collections() -> None:
    """Leave what there is now out of all later garbage collections: to look through torch's objects takes a quarter of a second."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


class _WarningRecorder(logging.Handler):
    """Keeps the warnings that the package logs until they are taken."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())

    def take(self) -> list[str]:
        """The warnings since the last time."""
        taken, self._messages = self._messages, []
        return taken


def start_actor(name: str, run: str, *, cpus: int, gpus: float) -> RemoteWorker:
    """Ask Ray for a worker's actor; its `start` must be called before any task.

    Args:
        name: unique in this process.
        run: id of the MLflow run, for the worker's log.
        cpus: number that the worker takes.
        gpus: number that the worker takes, or its share of one.
    """
    threads: Any = {"concurrency_groups": {READING: 1}}  # beside the one that computes; Ray's annotations lack it
    actor: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, **threads)(UapWorker)
    return RemoteWorker(actor.options(name=name).remote(name, run), name)
