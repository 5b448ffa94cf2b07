"""Workers as Ray actors: placement, dispatch, and what happens when one is lost. Beside training.py the only module that imports Ray."""

import os

if "RAY_ADDRESS" not in os.environ:
    # Ray reads these on import. The first, despite its name, is what makes a local Ray listen on loopback only.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import atexit
import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from threading import Condition, Event, Thread
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError

from uap_dist.errors import ConfigError, DeterminismError, WorkerLostError
from uap_dist.provenance import machine
from uap_dist.worker import Examples, Worker, make_worker

MAX_LOSSES_PER_TASK = 3
SECONDS_BETWEEN_LOOKS = 5.0
SECONDS_WITHOUT_WORKERS = 0.1
STRAGGLER_FACTOR, STRAGGLER_MIN_S = 3.0, 2.0  # of the median task, and never before so many seconds

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FleetConfig:
    """Who computes; nothing of it changes the result but the number of threads."""

    num_workers: int | None = None
    """Workers. Default: one per GPU of the cluster, or one per `threads_per_worker` CPUs where there is none."""
    threads_per_worker: int = 1
    """CPU threads of each worker (and CPUs that it takes from the cluster). The bits of the result may depend on it."""
    cache_gib: float = 4.0
    """Decoded images that each worker keeps in memory at most, in GiB."""
    disk_cache_gib: float = 8.0
    """Decoded images beyond these that each worker keeps in the folder for temporary files (TMPDIR) at most, in GiB; half of what is
    free there stays free. 0 keeps none; what does not fit is read again for each block."""
    placement_timeout_s: float = 60.0
    """Seconds to wait until all workers are placed and have loaded the network."""
    task_timeout_s: float = 900.0
    """Seconds after which a worker that does not answer is taken for lost, and its block given to another."""
    verify_determinism: bool = False
    """Have one block of each round solved by two workers, and fail on the first bit that differs. Needs two workers."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for name in ("num_workers", "threads_per_worker", "cache_gib", "placement_timeout_s", "task_timeout_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name.replace('_', ' ')} is {value}; it must be positive")
        if not self.disk_cache_gib >= 0:
            raise ConfigError(f"disk cache gib is {self.disk_cache_gib}; it must not be negative")
        if self.verify_determinism and self.num_workers == 1:
            raise ConfigError("verify determinism compares workers; give --num-workers 2 or more")


class _Actor:
    """A worker behind Ray; it starts in a method so that what goes wrong comes back as it was raised."""

    _worker: Worker | None = None

    def start(self, model: str, weights: str | None, cache_bytes: int, disk_cache_bytes: int, num_threads: int) -> str:
        worker = make_worker(
            model, weights, cache_bytes=cache_bytes, disk_cache_bytes=disk_cache_bytes, num_threads=num_threads
        )
        if self._worker is not None:
            worker.adopt(self._worker)
        self._worker = worker
        return machine()

    def call(self, method: str, task: Examples, *shared: Any) -> Any:
        return getattr(self._worker, method)(task, *shared)


@dataclass(eq=False)
class _Member:
    """An actor, and the shards that it has read."""

    actor: ActorHandle[Any]
    shards: set[str] = field(default_factory=set)


@dataclass(eq=False)
class _Batch:
    """The tasks of one `map` and how far they are."""

    method: str
    tasks: Sequence[Examples]
    shared: list[ray.ObjectRef]
    waiting: list[int]
    unverified: set[int]  # tasks that want a second answer, of another worker
    given: defaultdict[int, set[_Member]] = field(default_factory=lambda: defaultdict(set))
    error: Exception | None = None
    done: Event = field(default_factory=Event)
    results: dict[int, Any] = field(default_factory=dict)
    durations: list[float] = field(default_factory=list)
    losses: Counter[int] = field(default_factory=Counter)

    @property
    def is_complete(self) -> bool:
        """Nothing more is to be computed."""
        return self.error is not None or (len(self.results) == len(self.tasks) and not self.unverified)


@dataclass(frozen=True)
class _Call:
    """What a member computes: a task of a batch by its index, or its start (no batch)."""

    member: _Member
    batch: _Batch | None = None
    task: int = -1
    started: float = 0.0
    deadline: float = float("inf")  # a worker that waits for its place is not lost


def connect() -> None:
    """Join the cluster of RAY_ADDRESS (as in a submitted job), else start a Ray of our own on loopback.

    Raises:
        ConfigError: the cluster does not answer.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "local")
    include_dashboard = False if address == "local" else None
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=include_dashboard)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"cannot join the Ray cluster at {address} (RAY_ADDRESS): {error}") from error


class Fleet:
    """Workers with one classifier on a connected Ray; see dataset.Workers.

    One thread of its own does all the dispatching, so that several callers share the workers: where one's tasks leave some
    idle, another's fill them.

    Attributes:
        num_workers: asked of Ray.
        uses_gpu: whether each takes a GPU.
        num_lost: workers that were lost and replaced.
        num_stragglers: tasks that were given to a second worker because the first took long.
        machines: kinds of machines that workers ran on, as `provenance.machine` names them.
    """

    def __init__(self, model: str, weights: str | None, config: FleetConfig) -> None:
        """Ask Ray for the workers; `wait` waits for them."""
        self._config = config
        self.uses_gpu = ray.cluster_resources().get("GPU", 0) >= 1
        self._last_look = time.monotonic()
        self.num_workers = config.num_workers or max(1, self._count_fitting())
        self.num_lost = 0
        self.num_stragglers = 0
        self._num_rounds = 0
        self.machines: set[str] = set()
        self._classifier = (model, weights)
        self._idle: list[_Member] = []
        self._running: dict[ray.ObjectRef, _Call] = {}
        self._batches: list[_Batch] = []
        self._last_call = time.monotonic()
        self._changes: deque[Callable[[], None]] = deque()  # by callers, made by the thread
        self._changed = Condition()
        self._ready = Event()
        self._error: Exception | None = None  # of a worker that could not load the classifier
        self._is_closed = False
        for _ in range(self.num_workers):
            self._start_member()
        self._thread = Thread(target=self._dispatch, name="fleet", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # before Ray ends

    def wait(self) -> None:
        """Return when every worker has its classifier.

        Raises:
            WorkerLostError: Ray cannot place them in time.
            UapDistError: what a worker raised when it loaded the classifier.
        """
        if not self._ready.wait(self._config.placement_timeout_s):
            raise WorkerLostError(self._placement_complaint())
        if self._error is not None:
            raise self._error

    def use(self, model: str, weights: str | None) -> None:
        """Change to another classifier; decoded shards that serve it as well are kept. To be followed by `wait`."""
        self._ready.clear()
        self._change(lambda: self._load(model, weights))

    def map(self, method: str, tasks: Sequence[Examples], *shared: Any) -> list[Any]:
        """Worker.method(task, *shared) for each task, in the order of the tasks, through the loss of workers.

        Raises:
            WorkerLostError: a task whose workers were lost three times, or no worker left and none to be had.
            DeterminismError: two workers gave different bits (`verify_determinism`).
            Exception: what a worker raised; that is no lost worker, and not tried again.
        """
        if self._is_closed:
            raise WorkerLostError("the fleet was closed")
        twice = {self._num_rounds % len(tasks)} if self._config.verify_determinism and method == "solve" else set()
        self._num_rounds += method == "solve"
        waiting = [*range(len(tasks)), *twice]
        batch = _Batch(method, tasks, [ray.put(value) for value in shared], waiting, unverified=twice)
        self._change(lambda: self._accept(batch))
        batch.done.wait()
        if batch.error is not None:
            raise batch.error
        return [batch.results[i] for i in range(len(tasks))]

    def describe(self) -> dict[str, Any]:
        """What it was made of, and what became of it so far."""
        return {
            "machines": "; ".join(sorted(self.machines)),
            "num_workers_at_end": self.num_workers,
            "num_workers_lost": self.num_lost,
            "num_stragglers": self.num_stragglers,
        }

    def close(self) -> None:
        """End all workers."""
        if not self._is_closed:
            self._is_closed = True
            self._change(lambda: None)
            self._thread.join()
            for member in [*self._idle, *(call.member for call in self._running.values())]:
                if ray.is_initialized():
                    ray.kill(member.actor)
            self._fail(WorkerLostError("the fleet was closed"))
            atexit.unregister(self.close)

    def _change(self, change: Callable[[], None]) -> None:
        """Have the thread do something between two looks at the workers."""
        with self._changed:
            self._changes.append(change)
            self._changed.notify()

    def _dispatch(self) -> None:
        """What the thread does until the fleet is closed."""
        while not self._is_closed and ray.is_initialized():  # else its calls would start a Ray of their own
            with self._changed:
                self._changed.wait_for(lambda: self._changes or self._running or self._batches)
                while self._changes:
                    self._changes.popleft()()
            try:
                self._step()
            except Exception as error:  # of nobody's task: of a worker's start, or of Ray
                self._error = error
                self._fail(error)
                self._ready.set()

    def _step(self) -> None:
        """Give tasks to idle workers, wait a moment for answers, and hand over what is complete."""
        self._grow()
        for assign in (self._assign, self._assign_again):
            for batch in self._batches:
                for member, task in assign(batch):
                    self._call(member, batch, task)
        self._collect()
        for batch in [batch for batch in self._batches if batch.is_complete]:
            self._batches.remove(batch)
            batch.done.set()
        is_computing = [call.batch is not None for call in self._running.values()]
        if all(is_computing):
            self._ready.set()
        if any(is_computing):
            self._last_call = time.monotonic()
        elif self._batches and time.monotonic() > self._last_call + self._config.placement_timeout_s:
            self._fail(WorkerLostError(f"too few workers are left; {self._placement_complaint()}"))

    def _accept(self, batch: _Batch) -> None:
        self._batches.append(batch)
        self._last_call = time.monotonic()
        if self._error is not None:
            self._fail(self._error)

    def _fail(self, error: Exception) -> None:
        for batch in self._batches:
            batch.error = error
            batch.done.set()
        self._batches = []

    def _load(self, model: str, weights: str | None) -> None:
        """Have idle workers load another classifier, and replace those that still compute with the old one."""
        self._classifier, self._error = (model, weights), None
        late = [call.member for call in self._running.values()]
        idle, self._idle, self._running = self._idle, [], {}
        for member in idle:
            self._prepare(member)
        for member in late:
            ray.kill(member.actor)
            self._start_member()

    def _count_fitting(self) -> int:
        resources = ray.cluster_resources()
        if self.uses_gpu:
            return int(resources.get("GPU", 0))
        return int(resources.get("CPU", 0) // self._config.threads_per_worker)

    def _grow(self) -> None:
        """Where no number of workers was asked for, take what has joined the cluster."""
        if self._config.num_workers is None and time.monotonic() > self._last_look + SECONDS_BETWEEN_LOOKS:
            self._last_look = time.monotonic()
            for _ in range(self._count_fitting() - self.num_workers):
                self.num_workers += 1
                self._start_member()

    def _start_member(self) -> None:
        actor_class: Any = ray.remote(
            num_cpus=self._config.threads_per_worker, num_gpus=int(self.uses_gpu), max_restarts=0
        )(_Actor)
        self._prepare(_Member(actor_class.remote()))

    def _prepare(self, member: _Member) -> None:
        """Have an actor load the classifier."""
        config = self._config
        budgets = int(config.cache_gib * 2**30), int(config.disk_cache_gib * 2**30)
        arguments = (*self._classifier, *budgets, config.threads_per_worker)
        self._running[member.actor.start.remote(*arguments)] = _Call(member)

    def _call(self, member: _Member, batch: _Batch, task: int) -> None:
        self._idle.remove(member)
        batch.given[task].add(member)
        member.shards.add(batch.tasks[task].shard)
        now = time.monotonic()
        ref: ray.ObjectRef = member.actor.call.remote(batch.method, batch.tasks[task], *batch.shared)
        self._running[ref] = _Call(member, batch, task, now, now + self._config.task_timeout_s)

    def _assign(self, batch: _Batch) -> list[tuple[_Member, int]]:
        """Idle workers and waiting tasks for them: first those whose shard they have read, then any."""
        idle, pairs = list(self._idle), []
        for must_hold in (True, False):
            for task in list(batch.waiting):
                able = (m for m in idle if m not in batch.given[task])
                member = next((m for m in able if batch.tasks[task].shard in m.shards or not must_hold), None)
                if member is not None:
                    idle.remove(member)
                    batch.waiting.remove(task)
                    pairs.append((member, task))
        return pairs

    def _assign_again(self, batch: _Batch) -> list[tuple[_Member, int]]:
        """Workers that still idle, and tasks that take far longer than the others did: the first answer wins, same bits."""
        if not batch.durations:
            return []
        patience = max(STRAGGLER_MIN_S, STRAGGLER_FACTOR * median(batch.durations))
        calls = [call for call in self._running.values() if call.batch is batch]
        once = Counter(call.task for call in calls)
        late = [c.task for c in calls if once[c.task] == 1 and time.monotonic() > c.started + patience]
        pairs = [(m, task) for m, task in zip(self._idle, late, strict=False) if m not in batch.given[task]]
        self.num_stragglers += len(pairs)
        return pairs

    def _collect(self) -> None:
        """Wait for the next answer; keep it if it is the first to its task, and have tasks of lost workers wait again."""
        if not self._running:  # every worker is lost and none could be asked for
            time.sleep(SECONDS_WITHOUT_WORKERS)
            return
        # whoever idles may get a task at any time; where nobody does, only an answer matters
        running = list(self._running)
        done, _ = ray.wait(running, num_returns=1, timeout=0.02 if self._idle else 1.0)
        if done:  # and whatever else has come, in one look
            done, _ = ray.wait(running, num_returns=len(running), timeout=0)
        overdue = [ref for ref, call in self._running.items() if time.monotonic() > call.deadline]
        answered: set[ray.ObjectRef] = {*done, *overdue}
        for ref in answered:
            call = self._running.pop(ref)
            try:
                result = ray.get(ref, timeout=0)
            except RayTaskError as error:
                cause = error.cause if isinstance(error.cause, Exception) else error
                if call.batch is None:
                    ray.kill(call.member.actor)
                    raise cause from None
                self._idle.append(call.member)
                call.batch.error = cause
            except RayError as error:  # lost, out of memory, or no answer in time
                self._bury(call, error)
            else:
                self._idle.append(call.member)
                if call.batch is None:
                    self._greet(result)
                else:
                    self._keep(call, call.batch, result)

    def _greet(self, machine: str) -> None:
        if self.machines and machine not in self.machines:
            logger.warning(
                "workers run on different kinds of machines (%s; %s); the bits may depend on which of them solves what",
                machine,
                "; ".join(sorted(self.machines)),
            )
        self.machines.add(machine)

    def _keep(self, call: _Call, batch: _Batch, result: Any) -> None:
        """The first answer to a task is its result; a second one is compared where that is wanted, else dropped."""
        if call.task not in batch.results:
            batch.results[call.task] = result
            batch.durations.append(time.monotonic() - call.started)
        elif call.task in batch.unverified:
            task = batch.tasks[call.task]
            if result.digest() != batch.results[call.task].digest():
                batch.error = DeterminismError(
                    f"two workers gave different bits for the same examples of {task.shard}: {_name_some(task.keys)}; "
                    f"look at the network's layers and at the machines ({'; '.join(sorted(self.machines))})"
                )
            batch.unverified.remove(call.task)

    def _bury(self, call: _Call, error: RayError) -> None:
        """Replace a lost worker; its task, if nobody else has it, is to be done again."""
        ray.kill(call.member.actor)
        self.num_lost += 1
        self._start_member()
        reason = "died" if isinstance(error, RayActorError) else type(error).__name__
        if call.batch is None:
            logger.warning("a worker was lost while it started (%s); another one starts", reason)
            return
        batch, task = call.batch, call.batch.tasks[call.task]
        logger.warning(
            "a worker was lost (%s) over %d examples of %s; another one starts", reason, len(task.keys), task.shard
        )
        batch.losses[call.task] += 1
        if batch.losses[call.task] >= MAX_LOSSES_PER_TASK:
            batch.error = WorkerLostError(
                f"{MAX_LOSSES_PER_TASK} workers were lost over the same examples of {task.shard}: "
                f"{_name_some(task.keys)}; look at memory (--cache-gib, --block-size) and at these images"
            )
        on_their_way = sum(other.batch is batch and other.task == call.task for other in self._running.values())
        wanted = (call.task not in batch.results) + (call.task in batch.unverified)
        if on_their_way + batch.waiting.count(call.task) < wanted:
            batch.waiting.append(call.task)

    def _placement_complaint(self) -> str:
        total = ray.cluster_resources()
        placed = len(self._idle) + sum(call.batch is not None for call in self._running.values())
        wanted = f"{self._config.threads_per_worker} CPU" + " and 1 GPU" * self.uses_gpu
        return (
            f"{placed} of {self.num_workers} workers of {wanted} each were placed and ready in {self._config.placement_timeout_s:g} s; "
            f"the cluster has {total.get('CPU', 0):g} CPU and {total.get('GPU', 0):g} GPU; give fewer (--num-workers) or longer "
            "(--placement-timeout-s)"
        )


def _name_some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:5]) + ", …" * (len(keys) > 5)
