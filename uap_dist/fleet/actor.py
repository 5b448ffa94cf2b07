"""A worker behind Ray: what its process does around the calls that fleet.py sends."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from uap_dist.fleet import ray_cluster as ray_cluster  # before Ray, which reads on import what this sets

# isort: split
import ray
from ray.util import get_node_ip_address

from uap_dist.data.cache import Traffic
from uap_dist.errors import ConfigError
from uap_dist.versions import machine, versions
from uap_dist.workers.messages import Examples
from uap_dist.workers.reproducible import noticing_kernels, set_up_torch
from uap_dist.workers.worker import Worker, make_worker

DECISIVE_VERSIONS = ("python", "uap_dist", "torch", "torchvision", "pillow")  # the bits of a result may depend on them

logger = logging.getLogger("uap_dist")


def decisive_versions() -> dict[str, str]:
    """What must be the same on all nodes."""
    found = versions()
    return {name: found[name] for name in DECISIVE_VERSIONS}


@dataclass(frozen=True)
class Introduction:
    """What a worker says of itself when it has loaded the classifier.

    Attributes:
        machine: its kind, as `provenance.machine` names it.
        node: Ray's id of the node.
        weights_digest: of the classifier.
    """

    machine: str
    node: str
    weights_digest: str


@dataclass(frozen=True)
class Answer:
    """What came of a call.

    Attributes:
        result: what the method gave.
        traffic: what was read for it.
        seconds: that it took.
        warnings: of the package, meanwhile.
        kernels: of torch that were used for it and do not repeat their bits.
    """

    result: Any
    traffic: Traffic
    seconds: float
    warnings: tuple[str, ...]
    kernels: frozenset[str] = frozenset()


class UapWorker:
    """An actor; it starts in a method so that what goes wrong comes back as it was raised."""

    _worker: Worker | None = None

    def __init__(self, name: str, run: str) -> None:
        """Log to Ray's log of this process, under the names of the worker and of the MLflow run."""
        self._name, self._node = name, get_node_ip_address()
        logging.basicConfig(format=f"%(asctime)s run {run} {name} %(levelname)s %(message)s")
        logger.setLevel(logging.INFO)

    def __repr__(self) -> str:
        """In Ray's dashboard and logs."""
        return self._name

    def start(self, expected: Mapping[str, str], **how: Any) -> Introduction:
        """Load the classifier. Where that fails, it can be called again.

        Args:
            expected: `decisive_versions` of the driver.
            how: see `make_worker`.

        Raises:
            ConfigError: this node has others.
        """
        own = decisive_versions()
        others = [f"{name} {own[name]} instead of {expected[name]}" for name in own if own[name] != expected[name]]
        if others:
            raise ConfigError(
                f"node {self._node} has {', '.join(others)}; the bits of a result depend on them: install what the driver has"
            )
        set_up_torch(how["num_threads"])
        worker = make_worker(**how)
        if self._worker is not None:
            worker.adopt(self._worker)
        self._worker = worker
        return Introduction(machine(), ray.get_runtime_context().get_node_id(), worker.classifier.weights_digest)

    def call(self, method: Callable[..., Any], task: Examples, upcoming: str, *shared: Any) -> Answer:
        """Run a method of `Worker` on a task, and meanwhile fetch the shard that comes next, if any."""
        assert self._worker is not None
        logger.info("%s %s", method.__name__, task.title)
        started, before = time.perf_counter(), self._worker.traffic
        with _listening() as warnings, noticing_kernels() as kernels:
            if upcoming:
                self._worker.prefetch(upcoming)
            result = method(self._worker, task, *shared)
        traffic, seconds = self._worker.traffic - before, time.perf_counter() - started
        named = tuple(f"{self._name} on {self._node}: {text}" for text in warnings)
        return Answer(result, traffic, seconds, named, frozenset(kernels))


@contextmanager
def _listening() -> Iterator[list[str]]:
    """What the package warns of meanwhile."""
    handler = _Listener(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield handler.heard
    finally:
        logger.removeHandler(handler)


class _Listener(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


def start_actor(name: str, run: str, *, cpus: int, gpus: float) -> Any:
    """Ask Ray for a worker's process; `start` is to be called next.

    Args:
        name: unique in this process.
        run: MLflow run that it works for.
        cpus: that it takes.
        gpus: that it takes, or the share of one.
    """
    actor: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0)(UapWorker)
    return actor.options(name=name).remote(name, run)
