"""Workers as Ray actors: how many, who solves what, and what happens when one is lost."""

import atexit
import logging
import time
from bisect import insort
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from threading import Condition, Event, Thread
from typing import Any

from uap_dist.fleet import ray_cluster  # before Ray, which reads on import what this sets

# isort: split
import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayError, RayTaskError

from uap_dist.errors import ClassifierError, ConfigError, DeterminismError, WorkerLostError
from uap_dist.fleet.actor import Answer, Introduction, decisive_versions, start_actor
from uap_dist.fleet.config import FleetConfig, need_of
from uap_dist.fleet.metrics import Dashboard, Tally
from uap_dist.fleet.task_queue import ActorRecord, Batch, Call, name_some
from uap_dist.models.weights import check_same_weights
from uap_dist.workers.local import R, Shared
from uap_dist.workers.messages import Examples
from uap_dist.workers.worker import Worker

WHAT_TO_LOOK_AT = "look at memory (--cache-gib, --block-size) and at these images"
SECONDS_BETWEEN_LOOKS = 5.0
SECONDS_BETWEEN_COMPLAINTS = 30.0
SECONDS_WITHOUT_WORKERS = 0.1
STRAGGLER_FACTOR, STRAGGLER_MIN_S = 3.0, 2.0  # of the median task, and never before so many seconds

logger = logging.getLogger(__name__)
worker_numbers = count(1)  # of a process: names of Ray's actors are unique, also where one fleet follows another


@dataclass(frozen=True)
class Change:
    """What a caller wants done by the thread that dispatches, and who is told what went wrong with it."""

    make: Callable[[], None]
    fail: Callable[[Exception], None]


class Fleet:
    """Workers with one classifier on a connected Ray; see dataset.Workers.

    One thread of its own does all the dispatching, so that several callers share the workers: where one's tasks leave some
    idle, another's fill them. Workers that Ray cannot place yet stay asked for, which is what an autoscaler starts nodes for.

    Attributes:
        need: what each takes of a node.
        num_asked: workers that Ray was asked for.
        tally: what became of it so far.
        machines: kinds of machines that workers ran on, as `provenance.machine` names them.
        kernels: of torch that workers used and that do not repeat their bits.
    """

    def __init__(
        self, model: str, weights: str | None, config: FleetConfig, run: str = "", *, weights_digest: str = ""
    ) -> None:
        """Ask Ray for the workers; `wait` waits for as many as it begins with.

        Args:
            model: of the classifier, see `load_classifier`.
            weights: of the classifier.
            config: who computes.
            run: MLflow run, for logs.
            weights_digest: of the classifier as the driver loaded it; empty: as the first worker does. Workers that load
                others are refused.

        Raises:
            ConfigError: more workers, or other ones, than a cluster that does not grow can ever hold.
        """
        self._config, self._run = config, run
        self.need = need_of(config)
        self._first, self._most = config.bounds
        self._check_room()
        self._last_look = self._last_complaint = self._last_shown = time.monotonic()
        self.num_asked = self._num_ready = 0
        self.tally, self._dashboard = Tally(), Dashboard(run)
        self.machines: set[str] = set()
        self.kernels: set[str] = set()
        self._classifier, self._weights_digest = (model, weights), weights_digest
        self._idle: list[ActorRecord] = []
        self._empty: list[
            ActorRecord
        ] = []  # without the classifier that was asked for last; `use` has them load another
        self._running: dict[ray.ObjectRef, Call] = {}
        self._batches: list[Batch] = []
        self._held: set[str] = set()  # shards that some member has read or is about to read
        self._last_call = time.monotonic()
        self._changes: deque[Change] = deque()  # by callers, made by the thread
        self._changed = Condition()
        self._ready = Event()
        self._error: Exception | None = None  # of a worker that could not load the classifier
        self._is_closed = False
        self._end: WorkerLostError | None = None  # why nothing is dispatched any more
        self._ask_for(self._most or max(1, self.need.room()))
        self._thread = Thread(target=self._dispatch, name="fleet", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # before Ray ends

    @property
    def num_workers(self) -> int:
        """Workers that are there now, with the classifier loaded; 1 where there is none yet."""
        return max(1, self._num_ready)

    def wait(self) -> None:
        """Return when as many workers as it begins with have their classifier.

        Raises:
            WorkerLostError: Ray cannot place them in time.
            ClassifierError: a worker has loaded other weights than the driver.
            UapDistError: what a worker raised when it loaded the classifier.
        """
        if not self._ready.wait(self._config.placement_timeout_s):
            raise WorkerLostError(self._complain_in_the_end())
        if self._error is not None:
            raise self._error

    def use(self, model: str, weights: str | None, *, weights_digest: str = "") -> None:
        """Change to another classifier; decoded shards that serve it as well are kept. To be followed by `wait`.

        What workers say of a classifier that they cannot load, `wait` raises; they can be given another one then.

        Args:
            model: as in `__init__`.
            weights: likewise.
            weights_digest: likewise.

        Raises:
            WorkerLostError: the fleet was closed, or Ray has ended.
            Exception: what went wrong when the workers were to be told.
        """
        changed: Future[None] = Future()

        def change() -> None:
            self._load(model, weights, weights_digest)
            changed.set_result(None)

        self._change(Change(change, changed.set_exception))
        changed.result()

    def map(
        self, method: Callable[[Worker, Examples, *Shared], R], tasks: Sequence[Examples], *shared: *Shared
    ) -> Iterator[R]:
        """Yield `method(worker, task, *shared)` for each task, in the order of the tasks, through the loss of workers.

        All are under way when it returns; an answer is forgotten once it was taken.

        Raises:
            WorkerLostError: a task over which three workers were lost whose nodes live on, or ten nodes; no worker left and none
                to be had; or a fleet that was closed or given another classifier meanwhile.
            DeterminismError: two workers gave different bits (`verify_determinism`).
            Exception: what a worker raised; that is no lost worker, and not tried again.
        """
        if self._end is not None:
            raise self._end
        called: Callable[..., Any] = method  # mypy holds that a generic method can be no particular one
        is_round = called is Worker.solve
        twice = {self.tally.rounds % len(tasks)} if self._config.verify_determinism and is_round else set()
        self.tally.rounds += is_round
        batch = Batch(method, tasks, [ray.put(value) for value in shared], unverified=twice)
        self._change(Change(lambda: self._accept(batch), batch.fail))
        return batch.answers()

    def describe(self) -> dict[str, Any]:
        """What it was made of, and what became of it so far."""
        return {
            "machines": "; ".join(sorted(self.machines)),
            "num_workers_at_end": self._num_ready,
            "num_workers_lost": self.tally.workers_lost,
            "num_stragglers": self.tally.stragglers,
            "nondeterministic_kernels": ", ".join(sorted(self.kernels)) or "none",
        }

    def metrics(self) -> dict[str, float]:
        """See Workers."""
        return {"fleet/workers": float(self._num_ready)} | self.tally.metrics()

    def describe_wish(self) -> str:
        """The workers that were asked for, in words."""
        low, high = self._first, self.num_asked
        return f"{low if low == high else f'{low} to {high}'} worker{'s' * (high > 1)} of {self.need}"

    def close(self) -> None:
        """End all workers."""
        if not self._is_closed:
            self._stop()
            for member in [*self._idle, *self._empty, *(call.member for call in self._running.values())]:
                if ray.is_initialized():
                    ray.kill(member.actor)
            atexit.unregister(self.close)

    def _stop(self) -> None:
        """End the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _check_room(self) -> None:
        room = self.need.room()
        if not ray_cluster.can_grow() and (room < self._first or not room):
            raise ConfigError(
                f"{self._first} worker{'s' * (self._first > 1)} of {self.need} each do not fit on this machine "
                f"({ray_cluster.describe()}); give fewer (--num-workers) or smaller ones (--threads-per-worker, --gpus-per-worker)"
            )
        if self._config.verify_determinism and not ray_cluster.can_grow() and room < 2:
            raise ConfigError(
                f"verify determinism compares two workers, but only {room} of {self.need} fits on this machine ({ray_cluster.describe()}); "
                "leave it out, or give smaller ones (--threads-per-worker, --gpus-per-worker)"
            )
        if not room and self._config.gpus_per_worker is None:
            raise ConfigError(
                f"the cluster ({ray_cluster.describe()}) has no room for workers now; say what one takes of the nodes that it "
                "starts: --gpus-per-worker 1, or 0"
            )

    def _change(self, change: Change) -> None:
        """Have the thread do something between two looks at the workers."""
        with self._changed:
            if self._end is not None:
                raise self._end
            self._changes.append(change)
            self._changed.notify()

    def _dispatch(self) -> None:
        """What the thread does until the fleet is closed, or Ray ends; whatever ends it, nobody waits for it any longer."""
        reason = "ended unexpectedly, with the thread that gives out its tasks"
        try:
            while self._goes_on():
                self._make_changes()
                try:
                    if self._goes_on():
                        self._step()
                except Exception as error:  # of nobody's task: of a worker's start, or of Ray
                    self._give_up(error)
            reason = "was closed" if self._is_closed else "ended with Ray"
        finally:
            with self._changed:
                self._end = WorkerLostError(f"the fleet {reason}")
                for change in self._changes:
                    change.fail(self._end)
            self._give_up(self._end)

    def _goes_on(self) -> bool:
        return not self._is_closed and ray.is_initialized()  # else its calls would start a Ray of their own

    def _make_changes(self) -> None:
        """Wait for something to do, and do what callers want; what goes wrong with that is theirs."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._changes or self._running or self._batches or self._is_closed, SECONDS_BETWEEN_LOOKS
            )
        while self._changes and self._goes_on():
            change = self._changes[0]  # and it stays there while it is made, to be told where that ends the thread
            try:
                change.make()
            except Exception as error:
                change.fail(error)
            self._changes.popleft()

    def _step(self) -> None:
        """Give tasks to idle workers, wait a moment for answers, and hand over what is complete."""
        self._grow()
        self._show()
        for assign in (self._assign, self._assign_again):
            for batch in self._batches:
                for member, task in assign(batch):
                    self._call(member, batch, task)
        self._collect()
        self._batches = [batch for batch in self._batches if not batch.is_complete]
        is_computing = [call.batch is not None for call in self._running.values()]
        self._num_ready = len(self._idle) + sum(is_computing)
        if self._num_ready >= self._first:
            self._ready.set()
        if any(is_computing):
            self._last_call = time.monotonic()
        elif self._batches and time.monotonic() > self._last_call + self._config.placement_timeout_s:
            self._fail(WorkerLostError(f"no worker is left; {self._complain_in_the_end()}"))
        if not self._ready.is_set() or (self._batches and not self._num_ready):
            self._complain()

    def _accept(self, batch: Batch) -> None:
        self._batches.append(batch)
        self._last_call = time.monotonic()
        if self._error is not None:
            self._fail(self._error)

    def _give_up(self, error: Exception) -> None:
        """Tell everybody who waits, and whoever asks for something before another `use`."""
        self._error = error
        self._fail(error)
        self._ready.set()

    def _fail(self, error: Exception) -> None:
        for batch in self._batches:
            if not batch.is_complete:
                batch.fail(error)
        self._batches = []

    def _load(self, model: str, weights: str | None, weights_digest: str) -> None:
        """Have workers load another classifier, and replace those that still compute with the old one."""
        self._fail(WorkerLostError("the workers were given another classifier meanwhile"))
        self._classifier, self._weights_digest, self._error = (model, weights), weights_digest, None
        calls = list(self._running.values())
        # of those that load another one now, Ray has them load this one after it
        self._empty += [*self._idle, *(call.member for call in calls if call.batch is None)]
        self._idle, self._running, self._num_ready = [], {}, 0
        self._ready.clear()
        try:
            for call in calls:
                if call.batch is not None:
                    ray.kill(call.member.actor)
                    self._start_member()
            while self._empty:
                self._prepare(self._empty[0])
                del self._empty[0]
        except Exception as error:
            self._give_up(error)
            raise

    def _grow(self) -> None:
        """Where no number of workers was asked for, take what has joined the cluster."""
        if self._most is None and time.monotonic() > self._last_look + SECONDS_BETWEEN_LOOKS:
            self._last_look = time.monotonic()
            self._ask_for(self.need.room() - self.num_asked)

    def _ask_for(self, num_workers: int) -> None:
        for _ in range(num_workers):
            self.num_asked += 1
            self._start_member()

    def _start_member(self) -> None:
        name = f"worker-{next(worker_numbers)}"
        self._prepare(ActorRecord(start_actor(name, self._run, cpus=self.need.cpus, gpus=self.need.gpus), name))

    def _prepare(self, member: ActorRecord) -> None:
        """Have an actor load the classifier."""
        model, weights = self._classifier
        ref: ray.ObjectRef = member.actor.start.options(name=f"{member.name}: load {model}").remote(
            decisive_versions(),
            model=model,
            weights=weights,
            cache_bytes=int(self._config.cache_gib * 2**30),
            disk_cache_bytes=int(self._config.disk_cache_gib * 2**30),
            num_threads=self._config.threads_per_worker,
        )
        self._running[ref] = Call(member)

    def _call(self, member: ActorRecord, batch: Batch, task: int) -> None:
        self._idle.remove(member)
        batch.given[task].add(member)
        examples = batch.tasks[task]
        member.shards[examples.shard] = None
        self._held.add(examples.shard)
        now = time.monotonic()
        name = f"{member.name}: {batch.method.__name__} {examples.title}"
        upcoming = batch.next_shard(self._held) if batch.method is Worker.load else ""
        if upcoming:  # the member is the first to be given it
            member.shards[upcoming] = None
            self._held.add(upcoming)
        ref: ray.ObjectRef = member.actor.call.options(name=name).remote(
            batch.method, examples, upcoming, *batch.shared
        )
        self._running[ref] = Call(member, batch, task, now, now + self._config.task_timeout_s)

    def _assign(self, batch: Batch) -> list[tuple[ActorRecord, int]]:
        """Idle workers and waiting tasks for them: first those whose shard they have read, then any."""
        pairs: list[tuple[ActorRecord, int]] = []
        idle = list(self._idle)
        for must_hold in (True, False):
            for member in list(idle):
                task = batch.take(member, must_hold=must_hold) if batch.waiting else None
                if task is not None:
                    idle.remove(member)
                    pairs.append((member, task))
        return pairs

    def _assign_again(self, batch: Batch) -> list[tuple[ActorRecord, int]]:
        """Workers that still idle, and tasks that take far longer than the others did: the first answer wins, same bits."""
        if not batch.durations or not self._idle:
            return []
        patience = max(STRAGGLER_MIN_S, STRAGGLER_FACTOR * batch.durations[len(batch.durations) // 2])
        calls = [call for call in self._running.values() if call.batch is batch]
        once = Counter(call.task for call in calls)
        late = [c.task for c in calls if once[c.task] == 1 and time.monotonic() > c.started + patience]
        pairs = [(m, task) for m, task in zip(self._idle, late, strict=False) if m not in batch.given[task]]
        self.tally.stragglers += len(pairs)
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
                answer = ray.get(ref, timeout=0)
            except RayTaskError as error:
                cause = error.cause if isinstance(error.cause, Exception) else error
                if call.batch is None:
                    self._dismiss(call.member, cause)
                else:
                    self._idle.append(call.member)
                    call.batch.fail(cause)
            except RayError as error:  # lost, out of memory, or no answer in time
                self._bury(call, error)
            else:
                if call.batch is None:
                    self._greet(call.member, answer)
                else:
                    self._idle.append(call.member)
                    self._keep(call, call.batch, answer)

    def _greet(self, member: ActorRecord, introduction: Introduction) -> None:
        """Let a worker take part that has the driver's weights; another one is an error even while the rest computes."""
        self._weights_digest = self._weights_digest or introduction.weights_digest
        try:
            check_same_weights(*self._classifier, introduction.weights_digest, self._weights_digest, member.name)
        except ClassifierError:
            self._empty.append(member)
            raise
        self._idle.append(member)
        member.node, machine = introduction.node, introduction.machine
        if self.machines and machine not in self.machines:
            logger.warning(
                "workers run on different kinds of machines (%s; %s); the bits may depend on which of them solves what",
                machine,
                "; ".join(sorted(self.machines)),
            )
        self.machines.add(machine)
        if self._ready.is_set():
            num_there = len(self._idle) + sum(call.batch is not None for call in self._running.values())
            logger.info("%s joins; %d of %d are there", member.name, num_there, self.num_asked)

    def _dismiss(self, member: ActorRecord, error: Exception) -> None:
        """A worker could not load the classifier: all wait for another one then, but a fleet that computes does without this worker."""
        if self._ready.is_set() and self._error is None:
            ray.kill(member.actor)
            logger.warning("%s cannot be used, and no other one is asked for in its place: %s", member.name, error)
            return
        self._empty.append(member)
        if self._error is None:
            self._give_up(error)

    def _keep(self, call: Call, batch: Batch, answer: Answer) -> None:
        """The first answer to a task is its result; a second one is compared where that is wanted, else dropped."""
        for warning in answer.warnings:
            logger.warning("%s", warning)
        self._note_kernels(answer.kernels)
        self.tally.traffic += answer.traffic
        self.tally.seconds_busy += answer.seconds
        if call.task not in batch.answered:
            if batch.method is Worker.solve:
                self.tally.solves += len(batch.tasks[call.task].keys)
            if call.task in batch.unverified:
                batch.digests[call.task] = answer.result.digest()
            insort(batch.durations, time.monotonic() - call.started)
            with batch.changed:
                batch.answered.add(call.task)
                batch.results[call.task] = answer.result
                batch.changed.notify()
        elif call.task in batch.unverified:
            task = batch.tasks[call.task]
            if answer.result.digest() != batch.digests[call.task]:
                batch.fail(
                    DeterminismError(
                        f"two workers gave different bits for the same examples of {task.shard}: {name_some(task.keys)}; "
                        f"look at the network's layers and at the machines ({'; '.join(sorted(self.machines))})"
                    ),
                )
            with batch.changed:
                batch.unverified.remove(call.task)
                batch.changed.notify()

    def _note_kernels(self, kernels: frozenset[str]) -> None:
        """Say once of each kernel that its bits may be others the next time."""
        new = sorted(kernels - self.kernels)
        if new:
            self.kernels.update(new)
            logger.warning(
                "%s: torch has no kernel that repeats its bits for %s; the same command may give another result",
                self._classifier[0],
                ", ".join(new),
            )

    def _bury(self, call: Call, error: RayError) -> None:
        """Replace a lost worker; its task, if nobody else has it, is to be done again."""
        ray.kill(call.member.actor)
        self.tally.workers_lost += 1
        self._start_member()
        is_preempted = getattr(error, "preempted", False)
        node = "" if is_preempted else call.member.node
        reason = self._describe_loss(error, call.member.node, is_preempted)
        if call.batch is None:
            logger.warning("%s was lost while it started (%s); another one starts", call.member.name, reason)
            return
        batch, task = call.batch, call.batch.tasks[call.task]
        logger.warning(
            "%s was lost (%s) over %d examples of %s; another one starts",
            call.member.name,
            reason,
            len(task.keys),
            task.title,
        )
        batch.losses[call.task].append(node)
        complaint = batch.blame(call.task, ray_cluster.living_nodes())
        if complaint:
            batch.fail(WorkerLostError(f"{complaint} (the last one: {reason}); {WHAT_TO_LOOK_AT}"))
        on_their_way = sum(other.batch is batch and other.task == call.task for other in self._running.values())
        wanted = (call.task not in batch.answered) + (call.task in batch.unverified)
        if on_their_way + batch.waiting.get(call.task, 0) < wanted:
            batch.put(call.task)

    def _describe_loss(self, error: RayError, node: str, is_preempted: bool) -> str:
        if isinstance(error, GetTimeoutError):
            return f"no answer in {self._config.task_timeout_s:g} s, --task-timeout-s"
        if isinstance(error, OutOfMemoryError):
            return "out of memory"
        if is_preempted:
            return "its node was reclaimed"
        return "its node is gone" if node and node not in ray_cluster.living_nodes() else "its process died"

    def _show(self) -> None:
        """What Ray's dashboard shows."""
        seconds = time.monotonic() - self._last_shown
        if seconds > SECONDS_BETWEEN_LOOKS:
            in_flight = sum(call.batch is not None for call in self._running.values())
            self._dashboard.show(self.tally, seconds=seconds, num_workers=self._num_ready, in_flight=in_flight)
            self._last_shown += seconds

    def _complain(self) -> None:
        """Say now and then what everything waits for."""
        if time.monotonic() > self._last_complaint + SECONDS_BETWEEN_COMPLAINTS:
            self._last_complaint = time.monotonic()
            logger.info("waiting for %s: %s", self.describe_wish(), self._describe_place())

    def _describe_place(self) -> str:
        return f"{self._num_ready} ready, the cluster has {ray_cluster.describe()}"

    def _complain_in_the_end(self) -> str:
        return (
            f"{self.describe_wish()} were not placed and ready in {self._config.placement_timeout_s:g} s: {self._describe_place()}; "
            "give fewer (--num-workers) or smaller ones (--gpus-per-worker, --threads-per-worker), or longer (--placement-timeout-s)"
        )
