"""Which worker gets which task, and when a task is done, without Ray."""

import hashlib
from types import SimpleNamespace

import pytest

from uap_dist.errors import DeterminismError
from uap_dist.fleet import task_queue
from uap_dist.fleet.actor import RemoteWorker
from uap_dist.fleet.task_queue import TaskQueue
from uap_dist.workers.messages import Examples
from uap_dist.workers.worker import Worker

FIRST, SECOND, THIRD = (RemoteWorker(None, name) for name in ("first", "second", "third"))
MACHINES = {"CPU, AVX2", "CPU, AVX512"}


class Result(str):
    def digest(self):
        return hashlib.sha256(self.encode()).hexdigest()


def queue_of(*shards, **options):
    return TaskQueue(Worker.solve, [Examples(shard, keys=("x", "y")) for shard in shards], **options)


def begin(queue, *idle):
    return [queue.begin(worker, task) for worker, task in queue.assign(idle)]


def answer(queue, call, text):
    queue.end(call)
    return queue.accept(call, Result(text), MACHINES)


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(task_queue.time, "monotonic", lambda: clock.now)
    return clock


def test_answers_come_in_the_order_of_the_tasks_whatever_the_order_of_the_workers():
    queue = queue_of("a", "b", "c")
    for call, text in zip(begin(queue, FIRST, SECOND, THIRD)[::-1], "321", strict=True):
        assert answer(queue, call, text)
    assert queue.is_complete and list(queue.answers) == ["1", "2", "3"]


def test_a_map_without_tasks_is_complete():
    assert queue_of().is_complete and list(queue_of().answers) == []


def test_workers_get_tasks_of_shards_that_they_have_read_first():
    queue = queue_of("a", "b", "a", "c")
    reader = RemoteWorker(None, "reader", shards={"c": None, "b": None})
    assert queue.assign([FIRST, reader]) == [(reader, 3), (FIRST, 0)]
    assert queue.assign([FIRST, reader]) == [(reader, 1), (FIRST, 2)] and queue.assign([SECOND]) == []


def test_only_a_task_that_takes_much_longer_than_the_others_is_given_to_one_more_worker(clock):
    queue = queue_of("a", "b", "c")
    slow, *others = begin(queue, FIRST, SECOND, THIRD)
    clock.now = 1.0
    for call in others:
        answer(queue, call, "in time")
    clock.now = 2.9  # less than three times the median
    assert queue.assign_stragglers([SECOND]) == []
    clock.now = 3.1
    assert queue.assign_stragglers([FIRST]) == []  # it is computing this task
    ((worker, task),) = queue.assign_stragglers([SECOND, THIRD])
    again = queue.begin(worker, task)
    assert (worker, task) == (SECOND, slow.task) and queue.assign_stragglers([THIRD]) == []
    assert answer(queue, again, "first") and not answer(queue, slow, "late")
    assert list(queue.answers) == ["first", "in time", "in time"]


def test_a_verified_task_needs_the_same_bits_from_another_worker():
    queue = queue_of("a", "b", verified={1})
    calls = begin(queue, FIRST, SECOND)
    assert all(answer(queue, call, "bits") for call in calls) and not queue.is_complete
    assert queue.assign([SECOND]) == []  # it has computed this task itself
    (check,) = begin(queue, FIRST)
    assert not answer(queue, check, "bits") and queue.is_complete
    assert list(queue.answers) == ["bits", "bits"]


def test_other_bits_fail_the_map_even_after_its_last_result_was_taken():
    queue = queue_of("a.tar", verified={0})
    first, check = (*begin(queue, FIRST), *begin(queue, SECOND))
    answer(queue, first, "bits")
    answers = iter(queue.answers)
    assert next(answers) == "bits"
    answer(queue, check, "other bits")
    message = r"different bits for the same examples of a.tar: x, y; .* machines \(CPU, AVX2; CPU, AVX512\)"
    with pytest.raises(DeterminismError, match=message):
        next(answers)


def test_a_task_of_a_lost_worker_waits_again_unless_another_worker_computes_it():
    queue = queue_of("a")
    (lost,) = begin(queue, FIRST)
    queue.end(lost)
    queue.put_back(0)
    queue.put_back(0)
    assert queue.assign([FIRST]) == []  # not to the worker that was given it before
    (again,) = begin(queue, SECOND)
    queue.put_back(0)
    assert queue.assign([THIRD]) == []
    assert answer(queue, again, "done") and list(queue.answers) == ["done"]


def test_a_task_is_to_blame_for_workers_that_died_and_not_for_nodes_that_vanished():
    queue = queue_of("a.tar")
    queue.losses[0] = ["gone", "alive", "gone", "", "alive", "gone"]
    assert queue.why_give_up(0, {"alive"}) == ""
    assert queue.why_give_up(0, {"alive", "gone"}) == "5 workers were lost over the same examples of a.tar: x, y"
    queue.losses[0] += ["gone"] * 6
    assert queue.why_give_up(0, {"alive"}) == "10 nodes were lost over the same examples of a.tar: x, y"
