"""Which worker computes what: the dispatch thread, tasks, stragglers, second answers, and tasks of lost workers."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Condition, Thread

from uap_dist.fleet import ray_cluster  # first: it sets variables that Ray reads when it is imported

# isort: split
import ray
from ray.exceptions import RayError, RayTaskError

from uap_dist.errors import WorkerLostError
from uap_dist.fleet.actor import READING, Answer, RemoteWorker
from uap_dist.fleet.config import FleetConfig
from uap_dist.fleet.membership import Membership, is_preempted
from uap_dist.fleet.metrics import Dashboard, FleetStats
from uap_dist.fleet.task_queue import Call, TaskQueue
from uap_dist.models.loading import Given
from uap_dist.workers.worker import Worker

ADVICE = "look at memory (--cache-gib, --block-size) and at these images"
IDLE_CHECK_S = 5.0  # while nothing is to be done
TIMEOUT_WITH_IDLE_S, TIMEOUT_S = 0.02, 1.0  # of a wait for answers: idle workers may get a task at any time
SECONDS_WITHOUT_WORKERS = 0.1

logger = logging.getLogger(__name__)


class Dispatcher:
    """Gives the tasks of all callers to idle workers and takes the answers. Only the dispatch thread calls it."""

    def __init__(self, membership: Membership, *, config: FleetConfig, run: str, stats: FleetStats) -> None:
        self._membership, self._config, self._stats = membership, config, stats
        self._dashboard = Dashboard(run)
        self._queues: list[TaskQueue] = []
        self._calls: dict[ray.ObjectRef, Call] = {}
        self._reading: set[RemoteWorker] = set()  # shards, beside what they compute
        self._held_shards: set[str] = set()  # that some worker has read or is about to read
        self._usual_s: dict[Callable[..., object], float] = {}  # what the last call of a method took
        self._last_progress = time.monotonic()

    @property
    def has_work(self) -> bool:
        """Whether there are tasks, or answers on their way."""
        return bool(self._queues or self._calls or self._membership.starting)

    def accept(self, queue: TaskQueue) -> None:
        """Dispatch the tasks of a queue as well from now on."""
        self._queues.append(queue)
        self._last_progress = time.monotonic()

    def load(self, model: Given, weights: str | None, weights_digest: str) -> None:
        """Have the workers load another classifier; tasks for the present one fail."""
        self._fail_all(WorkerLostError("the workers were given another classifier meanwhile"))
        self._calls = {}
        self._reading.clear()
        self._membership.load(model, weights, weights_digest)

    def give_up(self, error: Exception) -> None:
        """Tell everybody who waits, and all who ask for something before another classifier is loaded."""
        self._membership.fail(error)
        self._fail_all(error)

    def step(self) -> None:
        """Give tasks to idle workers, wait a moment for answers, and take them."""
        members = self._membership
        members.grow()
        self._dashboard.update(self._stats, num_workers=members.num_ready, num_in_flight=len(self._calls))
        if members.error is not None:
            self._fail_all(members.error)
        self._assign()
        self._collect()
        self._queues = [queue for queue in self._queues if not queue.is_complete]
        if self._calls:
            self._last_progress = time.monotonic()
        elif self._queues and time.monotonic() > self._last_progress + self._config.placement_timeout_s:
            failure = members.placement.describe_failure(members.num_ready)
            self._fail_all(WorkerLostError(f"no worker is left; {failure}"))
        if not members.is_settled or (self._queues and not members.num_ready):
            members.placement.log_waiting(members.num_ready)

    def _fail_all(self, error: Exception) -> None:
        for queue in self._queues:
            if not queue.is_complete:
                queue.answers.fail(error)
        self._queues = []

    def _assign(self) -> None:
        for queue in self._queues:
            for worker, task in queue.assign(self._idle(queue)):
                self._call(worker, queue, task)
        for queue in self._queues:
            for worker, task in queue.assign_stragglers(self._idle(queue), self._usual_s.get(queue.method)):
                self._call(worker, queue, task)
                self._stats.stragglers += 1

    def _idle(self, queue: TaskQueue) -> Sequence[RemoteWorker]:
        """Workers that can take a task of a queue: while a worker computes, it can read a shard for later."""
        if queue.method is Worker.read:
            return [worker for worker in self._membership.ready if worker not in self._reading]
        return self._membership.idle

    def _call(self, worker: RemoteWorker, queue: TaskQueue, task: int) -> None:
        is_read = queue.method is Worker.read
        if is_read:
            self._reading.add(worker)
        else:
            self._membership.idle.remove(worker)
        given = queue.tasks[task]
        self._hold(worker, given.shard)
        upcoming = queue.next_shard(self._held_shards) if is_read or queue.method is Worker.load else ""
        if upcoming:
            self._hold(worker, upcoming)
        name = f"{worker.name}: {queue.method.__name__} {given.title}"
        actor = worker.actor
        ref: ray.ObjectRef = (
            actor.read.options(name=name, concurrency_group=READING).remote(given, upcoming, *queue.shared)
            if is_read
            else actor.call.options(name=name).remote(queue.method, given, upcoming, *queue.shared)
        )
        self._calls[ref] = queue.begin(worker, task)

    def _hold(self, worker: RemoteWorker, shard: str) -> None:
        """Note that a worker has read a shard or is about to."""
        worker.shards[shard] = None
        self._held_shards.add(shard)

    def _collect(self) -> None:
        """Wait for the next answer, and take all that are there; a call beyond its deadline counts as answered."""
        refs = [*self._membership.starting, *self._calls]
        if not refs:  # every worker is lost and none could be asked for
            time.sleep(SECONDS_WITHOUT_WORKERS)
            return
        done, _ = ray.wait(refs, num_returns=1, timeout=TIMEOUT_WITH_IDLE_S if self._membership.idle else TIMEOUT_S)
        if done:
            done, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        latest_start = time.monotonic() - self._config.task_timeout_s
        overdue = [ref for ref, call in self._calls.items() if call.started < latest_start]
        answered: set[ray.ObjectRef] = {*done, *overdue}
        for ref in answered:
            if ref in self._calls:
                self._finish(self._calls.pop(ref), ref)
            else:
                self._membership.finish_start(ref)

    def _finish(self, call: Call, ref: ray.ObjectRef) -> None:
        call.queue.end(call)
        try:
            answer = ray.get(ref, timeout=0)
        except RayTaskError as error:
            self._release(call)
            call.queue.answers.fail(error.cause if isinstance(error.cause, Exception) else error)
        except RayError as error:  # the worker is lost, or has not answered in time
            self._replace(call, error)
        else:
            self._release(call)
            self._accept(call, answer)

    def _release(self, call: Call) -> None:
        """Let a worker take another task, unless it was lost over another one."""
        if call.queue.method is Worker.read:
            self._reading.discard(call.worker)
        elif call.worker in self._membership.ready:
            self._membership.idle.append(call.worker)

    def _accept(self, call: Call, answer: Answer) -> None:
        for warning in answer.warnings:
            logger.warning("%s", warning)
        self._membership.note_kernels(answer.kernels)
        self._stats.traffic += answer.traffic
        self._stats.seconds_busy += answer.seconds
        self._usual_s[call.queue.method] = time.monotonic() - call.started
        if call.queue.accept(call, answer.result, self._membership.machines):
            self._stats.solves += answer.solves

    def _replace(self, call: Call, error: RayError) -> None:
        """Replace a lost worker and have its task computed again, unless that has cost too many workers."""
        queue, worker = call.queue, call.worker
        self._reading.discard(worker)
        if worker not in self._membership.ready:  # it was lost over another task, which is told
            queue.put_back(call.task)
            return
        reason = self._membership.replace(worker, error)
        logger.warning(
            "%s was lost (%s) over %s; another one starts",
            worker.name,
            reason,
            queue.tasks[call.task].describe(),
        )
        queue.losses[call.task].append("" if is_preempted(error) else worker.node)
        failure = queue.why_give_up(call.task, ray_cluster.living_nodes())
        if failure:
            queue.answers.fail(WorkerLostError(f"{failure} (the last one: {reason}); {ADVICE}"))
        queue.put_back(call.task)


@dataclass(frozen=True)
class Request:
    """What a caller asks the dispatch thread to do, and how the caller hears of an error."""

    act: Callable[[], None]
    fail: Callable[[Exception], None]


class DispatchThread:
    """The one thread that runs a dispatcher until the fleet is closed or Ray ends.

    Whatever ends it, nobody waits for it any longer: all who wait get an error, and so does everybody who asks later.

    Attributes:
        end: why the thread has ended; None while it runs.
        is_closed: whether it was told to end.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        """Start it."""
        self.end: WorkerLostError | None = None
        self.is_closed = False
        self._dispatcher = dispatcher
        self._requests: deque[Request] = deque()
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="fleet", daemon=True)
        self._thread.start()

    def ask(self, request: Request) -> None:
        """Have the thread do something between two steps of the dispatcher. For any thread.

        Raises:
            WorkerLostError: the thread has ended.
        """
        with self._changed:
            if self.end is not None:
                raise self.end
            self._requests.append(request)
            self._changed.notify()

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self.is_closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        reason = "ended unexpectedly, with the thread that dispatches its tasks"
        try:
            while self._goes_on():
                self._handle_requests()
                try:
                    if self._goes_on():
                        self._dispatcher.step()
                except Exception as error:  # of no task, but of Ray
                    self._dispatcher.give_up(error)
            reason = "was closed" if self.is_closed else "ended with Ray"
        finally:
            with self._changed:
                self.end = WorkerLostError(f"the fleet {reason}")
                for request in self._requests:
                    request.fail(self.end)
            self._dispatcher.give_up(self.end)

    def _goes_on(self) -> bool:
        return not self.is_closed and ray.is_initialized()  # any call would start a new Ray

    def _handle_requests(self) -> None:
        """Wait for something to do, and do what callers ask for; they get the errors."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._requests or self._dispatcher.has_work or self.is_closed, timeout=IDLE_CHECK_S
            )
        while self._requests and self._goes_on():
            request = self._requests[0]  # it stays in the queue until it is done, to be told if that ends the thread
            try:
                request.act()
            except Exception as error:
                request.fail(error)
            self._requests.popleft()
