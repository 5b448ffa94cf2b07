import pickle
import time
from dataclasses import replace
from threading import Event

import numpy as np
import pytest
import torch
from conftest import tiny_worker

from uap_dist.errors import WorkerLostError
from uap_dist.method.config import ComputeConfig
from uap_dist.rounds.concurrent import compute_concurrently, describe_idle, keep_last_arrays, num_concurrent
from uap_dist.rounds.loop import compute
from uap_dist.workers.local import LocalWorkers


def configs(count):
    return {
        f"seed-{seed}": ComputeConfig(seed=seed, max_passes=2, round_size=10, block_size=5) for seed in range(count)
    }


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_each_gives_what_it_gives_alone_and_no_report_is_lost(tiny_data, local_workers, at_once):
    def begin():
        return {name: compute(local_workers, *tiny_data, config) for name, config in configs(3).items()}

    alone = {name: list(reports) for name, reports in begin().items()}
    together = list(compute_concurrently(begin(), limit=lambda num_left: at_once))
    for name, reports in alone.items():
        own = [report for other, report in together if other == name]
        assert [r.round_number for r in own] == [r.round_number for r in reports] and own[-1].is_last
        assert all(torch.equal(a.perturbation, b.perturbation) for a, b in zip(own, reports, strict=True))
    if at_once == 1:
        assert [name for name, _ in together] == [name for name, reports in alone.items() for _ in reports]


def test_reports_that_wait_for_a_slow_reader_are_small_but_for_the_last(tiny_data, local_workers):
    config = replace(configs(1)["seed-0"], evaluate_every=1)
    alone = list(compute(local_workers, *tiny_data, config))
    reports = list(keep_last_arrays(compute(local_workers, *tiny_data, config)))
    assert max(len(pickle.dumps(report)) for report in reports[:-1]) < 3_000 < len(pickle.dumps(alone[0]))
    assert torch.equal(reports[-1].perturbation, alone[-1].perturbation)
    assert np.array_equal(reports[-1].evaluation.val_predictions.labels, alone[-1].evaluation.val_predictions.labels)
    for report, full in zip(reports, alone, strict=True):
        assert (report.fooling, report.num_evaluations) == (full.fooling, full.num_evaluations)
        assert (report.evaluation is None) == (full.evaluation is None)
        assert report.evaluation is None or report.evaluation.val == full.evaluation.val


def test_no_more_than_so_many_share_the_workers(tiny_data):
    active, largest, all_begun = set(), [], Event()

    def watched(name, config):
        active.add(name)
        largest.append(len(active))
        if len(active) == 2:
            all_begun.set()
        assert all_begun.wait(20)
        *rest, last = compute(LocalWorkers(tiny_worker()), *tiny_data, config)
        yield from rest
        active.remove(name)
        yield last

    ended = [
        name
        for name, report in compute_concurrently(
            {n: watched(n, c) for n, c in configs(5).items()}, limit=lambda num_left: 2
        )
        if report.is_last
    ]
    assert sorted(ended) == sorted(configs(5)) and max(largest) == 2


def test_a_fleet_that_one_perturbation_cannot_use_is_told_what_would():
    said = describe_idle(8, 1, ComputeConfig())
    assert "6 of 8 workers will have nothing to do" in said and "--num-perturbations 8" in said
    assert describe_idle(2, 1, ComputeConfig()) == describe_idle(8, 4, ComputeConfig()) == ""


def test_few_computations_all_run_at_once_and_of_many_one_more_than_workers():
    config = ComputeConfig()
    assert [num_concurrent(4, left, config) for left in (1, 4, 7, 8, 100)] == [1, 4, 7, 5, 5]


def test_what_one_raises_reaches_the_caller(tiny_data, local_workers):
    others_rounds, failed = [], Event()

    def failing():
        yield next(compute(local_workers, *tiny_data, configs(1)["seed-0"]))
        failed.set()
        raise WorkerLostError("no more")

    def endless():
        while True:
            yield next(compute(local_workers, *tiny_data, configs(1)["seed-0"]))
            others_rounds.append(time.monotonic())

    with pytest.raises(WorkerLostError, match="no more"):
        for _ in compute_concurrently({"a": failing(), "b": endless()}, limit=lambda num_left: 2):
            assert failed.wait(20)
    ended = time.monotonic()
    time.sleep(1)
    assert not others_rounds or max(others_rounds) < ended + 0.5  # it ends after the round that it is in


def test_one_that_has_nothing_left_and_none_at_all_just_end(tiny_data, local_workers):
    config = configs(1)["seed-0"]
    rest = compute(local_workers, *tiny_data, config)
    found = list(compute_concurrently({"empty": iter(()), "a": rest}, limit=lambda num_left: 1))
    assert [report.round_number for _, report in found] == list(range(10))
    assert list(compute_concurrently({}, limit=lambda num_left: 2)) == []


def test_the_next_begins_while_the_caller_is_busy_with_the_last_report(tiny_data, local_workers):
    has_begun, seen = Event(), 0

    def watched(config):
        has_begun.set()
        yield from compute(local_workers, *tiny_data, config)

    first, second = configs(2).values()
    both = {"first": compute(local_workers, *tiny_data, first), "second": watched(second)}
    for name, report in compute_concurrently(both, limit=lambda num_left: 1):
        if name == "first" and report.is_last:  # what now draws its pictures
            seen += 1
            assert has_begun.wait(20)
    assert seen == 1


def test_more_begin_when_more_workers_come(tiny_data, local_workers):
    allowed, begun = [1], []

    def watched(name, config):
        begun.append(name)
        yield from compute(local_workers, *tiny_data, config)

    for _ in compute_concurrently({n: watched(n, c) for n, c in configs(3).items()}, limit=lambda num_left: allowed[0]):
        if allowed == [1]:
            assert begun == ["seed-0"]
            allowed[0] = 3
    assert len(begun) == 3
