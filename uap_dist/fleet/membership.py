"""The workers of a fleet: asked for, started, checked, lost and replaced."""

import logging
import time
from itertools import count
from threading import Event

from uap_dist.fleet import ray_cluster  # first: it sets variables that Ray reads when it is imported

# isort: split
import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayError, RayTaskError

from uap_dist.errors import ClassifierError, ConfigError, WorkerLostError
from uap_dist.fleet.actor import Introduction, RemoteWorker, decisive_versions, start_actor
from uap_dist.fleet.config import FleetConfig, need_of
from uap_dist.fleet.metrics import FleetStats
from uap_dist.models.loading import Given, check_same_weights

SECONDS_BETWEEN_CHECKS = 5.0  # of the room that the cluster has
SECONDS_BETWEEN_REMINDERS = 30.0  # in the log, of workers that are still missing

logger = logging.getLogger(__name__)
worker_numbers = count(1)  # names of Ray's actors must be unique, also if one fleet follows another


class Placement:
    """How many workers of which size the cluster is asked for.

    Attributes:
        need: what each worker takes of a node.
        min_workers: number to begin with.
        num_asked: workers that Ray was asked for so far.
    """

    def __init__(self, config: FleetConfig) -> None:
        """Check the request against the cluster.

        Raises:
            ConfigError: a cluster that cannot grow has too little room, or an empty one does not tell whether to use GPUs.
        """
        self.need = need_of(config)
        self.num_asked = 0
        self.min_workers, self._max_workers = config.bounds
        self._timeout_s = config.placement_timeout_s
        self._check_room(config)
        self._last_check = self._last_reminder = time.monotonic()

    def num_to_ask(self) -> int:
        """Workers to ask for now: at first all; later, if their number is open, as many as new nodes have room for."""
        if not self.num_asked:
            return self._max_workers or max(1, self.need.room())
        if self._max_workers is not None or time.monotonic() < self._last_check + SECONDS_BETWEEN_CHECKS:
            return 0
        self._last_check = time.monotonic()
        return max(0, self.need.room() - self.num_asked)

    def describe(self) -> str:
        """The workers that were asked for, such as "1 to 3 workers of 1 CPU and 1 GPU"."""
        low, high = self.min_workers, self.num_asked
        return f"{low if low == high else f'{low} to {high}'} worker{'s' * (high > 1)} of {self.need}"

    def describe_failure(self, num_ready: int) -> str:
        """Why the job gives up waiting for workers, and what to do."""
        return (
            f"{self.describe()} were not placed and ready in {self._timeout_s:g} s: {num_ready} ready, the cluster has "
            f"{ray_cluster.describe()}; give fewer (--num-workers) or smaller ones (--gpus-per-worker, --threads-per-worker), "
            "or more time (--placement-timeout-s)"
        )

    def log_waiting(self, num_ready: int) -> None:
        """Log now and then what everything waits for."""
        if time.monotonic() > self._last_reminder + SECONDS_BETWEEN_REMINDERS:
            self._last_reminder = time.monotonic()
            logger.info(
                "waiting for %s: %d ready, the cluster has %s", self.describe(), num_ready, ray_cluster.describe()
            )

    def _check_room(self, config: FleetConfig) -> None:
        room, need, cluster = self.need.room(), self.need, ray_cluster.describe()
        if not ray_cluster.can_grow() and (room < self.min_workers or not room):
            raise ConfigError(
                f"{self.min_workers} worker{'s' * (self.min_workers > 1)} of {need} each do not fit on this machine "
                f"({cluster}); give fewer (--num-workers) or smaller ones (--threads-per-worker, --gpus-per-worker)"
            )
        if config.verify_determinism and not ray_cluster.can_grow() and room < 2:
            raise ConfigError(
                f"--verify-determinism compares two workers, but only {room} of {need} fits on this machine ({cluster}); "
                "leave it out, or give smaller workers (--threads-per-worker, --gpus-per-worker)"
            )
        if not room and config.gpus_per_worker is None:
            raise ConfigError(
                f"the cluster ({cluster}) has no room for workers now; say what a worker takes of the nodes that the cluster "
                "will start: --gpus-per-worker 1, or 0"
            )


class Membership:
    """The workers of a fleet, each of which is starting, idle, busy, or without the classifier because loading it failed.

    The dispatch thread alone calls what changes it. Workers that Ray cannot place yet stay asked for, which is what an
    autoscaler starts nodes for.

    Attributes:
        placement: the request to the cluster.
        ready: workers that have loaded the classifier.
        idle: those of them that compute nothing.
        starting: workers that load the classifier, by the reference to what Ray returns then.
        machines: kinds of machines that workers ran on, see `versions.machine`.
        kernels: names of nondeterministic torch kernels that workers used.
        error: why no worker may be used until another classifier is loaded, if so.
    """

    def __init__(
        self,
        model: Given,
        weights: str | None,
        weights_digest: str,
        *,
        config: FleetConfig,
        run: str,
        stats: FleetStats,
    ) -> None:
        """Ask Ray for the workers; see `Fleet` for the arguments and errors."""
        self.placement = Placement(config)
        self.ready: list[RemoteWorker] = []
        self.idle: list[RemoteWorker] = []
        self.starting: dict[ray.ObjectRef, RemoteWorker] = {}
        self.machines: set[str] = set()
        self.kernels: set[str] = set()
        self.error: Exception | None = None
        self._config, self._run, self._stats = config, run, stats
        self._model, self._weights, self._weights_digest = model, weights, weights_digest
        self._failed: list[RemoteWorker] = []  # could not load the classifier, and wait for another one
        self._is_settled = Event()  # enough workers are ready, or there is an error
        self.grow()

    @property
    def num_ready(self) -> int:
        """Workers that have loaded the classifier."""
        return len(self.ready)

    @property
    def is_settled(self) -> bool:
        """Whether callers no longer wait for the first workers: enough are ready, or there is an error."""
        return self._is_settled.is_set()

    def wait(self) -> None:
        """Wait for the first workers, see `Fleet.wait`. For any thread."""
        if not self._is_settled.wait(self._config.placement_timeout_s):
            raise WorkerLostError(self.placement.describe_failure(self.num_ready))
        if self.error is not None:
            raise self.error

    def fail(self, error: Exception) -> None:
        """Refuse all use of the workers until another classifier is loaded."""
        self.error = error
        self._is_settled.set()

    def grow(self) -> None:
        """Ask for the workers that are wanted and were not asked for yet."""
        for _ in range(self.placement.num_to_ask()):
            self.placement.num_asked += 1
            self._start_worker()

    def load(self, model: Given, weights: str | None, weights_digest: str) -> None:
        """Have all workers load another classifier. Busy ones are replaced, so that nobody waits for their old tasks."""
        self._model, self._weights, self._weights_digest, self.error = model, weights, weights_digest, None
        busy = [worker for worker in self.ready if worker not in self.idle]
        # a worker that is loading another classifier now loads this one after it
        self._failed += [*self.idle, *self.starting.values()]
        self.ready, self.idle, self.starting = [], [], {}
        self._is_settled.clear()
        try:
            for worker in busy:
                ray.kill(worker.actor)
                self._start_worker()
            while self._failed:
                self._load_classifier(self._failed[0])
                del self._failed[0]
        except Exception as error:
            self.fail(error)
            raise

    def finish_start(self, ref: ray.ObjectRef) -> None:
        """Take in a worker that has answered to its start, or replace it if it was lost."""
        worker = self.starting.pop(ref)
        try:
            introduction = ray.get(ref, timeout=0)
        except RayTaskError as error:
            self._dismiss(worker, error.cause if isinstance(error.cause, Exception) else error)
        except RayError as error:
            reason = self.replace(worker, error)
            logger.warning("%s was lost while it started (%s); another one starts", worker.name, reason)
        else:
            self._admit(worker, introduction)

    def replace(self, worker: RemoteWorker, error: RayError) -> str:
        """Kill a worker that Ray has lost or that does not answer, start another one, and return why."""
        ray.kill(worker.actor)
        for workers in (self.ready, self.idle):
            if worker in workers:
                workers.remove(worker)
        self._stats.workers_lost += 1
        self._start_worker()
        if isinstance(error, GetTimeoutError):
            return f"no answer in {self._config.task_timeout_s:g} s, --task-timeout-s"
        if isinstance(error, OutOfMemoryError):
            return "out of memory"
        if is_preempted(error):
            return "its node was reclaimed"
        return "its node is gone" if worker.node not in {"", *ray_cluster.living_nodes()} else "its process died"

    def note_kernels(self, kernels: frozenset[str]) -> None:
        """Warn once of each nondeterministic kernel."""
        new = sorted(kernels - self.kernels)
        if new:
            self.kernels.update(new)
            logger.warning(
                "%s: torch has no deterministic kernel for %s; the same command may give another result",
                self._model if isinstance(self._model, str) else ", ".join(self._model),
                ", ".join(new),
            )

    def kill_all(self) -> None:
        """End all workers, unless Ray has ended before."""
        for worker in [*self.ready, *self._failed, *self.starting.values()]:
            if ray.is_initialized():
                ray.kill(worker.actor)

    def _start_worker(self) -> None:
        name, need = f"worker-{next(worker_numbers)}", self.placement.need
        self._load_classifier(start_actor(name, self._run, cpus=need.cpus, gpus=need.gpus))

    def _load_classifier(self, worker: RemoteWorker) -> None:
        ref: ray.ObjectRef = worker.actor.start.options(name=f"{worker.name}: load {self._model}").remote(
            decisive_versions(),
            self.placement.need,
            self._config.bounds[1],
            model=self._model,
            weights=self._weights,
            cache_bytes=self._config.cache_bytes,
            disk_cache_bytes=self._config.disk_cache_bytes,
            num_threads=self._config.threads_per_worker,
            decode_threads=self._config.decode_threads,
            precision=self._config.precision,
        )
        self.starting[ref] = worker

    def _admit(self, worker: RemoteWorker, introduction: Introduction) -> None:
        """Let a worker take part that has loaded the driver's weights; other weights end the job, even if it is computing."""
        self._weights_digest = self._weights_digest or introduction.weights_digest
        try:
            check_same_weights(
                self._model, self._weights, introduction.weights_digest, self._weights_digest, worker.name
            )
        except ClassifierError as error:
            self._failed.append(worker)
            self.fail(error)
            return
        worker.node, machine = introduction.node, introduction.machine
        if self.machines and machine not in self.machines:
            logger.warning(
                "workers run on different kinds of machines (%s; %s); the bits may depend on which of them solves what",
                machine,
                "; ".join(sorted(self.machines)),
            )
        self.machines.add(machine)
        self.ready.append(worker)
        self.idle.append(worker)
        if self.is_settled:
            logger.info("%s joins; %d of %d are ready", worker.name, self.num_ready, self.placement.num_asked)
        elif self.num_ready >= self.placement.min_workers:
            self._is_settled.set()

    def _dismiss(self, worker: RemoteWorker, error: Exception) -> None:
        """Handle a worker that cannot load the classifier: a fleet that computes goes on without it, others have an error."""
        if self.is_settled and self.error is None:
            ray.kill(worker.actor)
            logger.warning("%s cannot be used and is not replaced: %s", worker.name, error)
            return
        self._failed.append(worker)
        if self.error is None:
            self.fail(error)


def is_preempted(error: RayError) -> bool:
    """Whether Ray lost the worker because a cloud reclaimed its node."""
    return bool(getattr(error, "preempted", False))
