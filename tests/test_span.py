"""Spans: rounds that one worker computes one after another give the bits of rounds that workers share."""

import os
import signal
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import tiny_worker
from fleets import load, make_fleet, worker_processes

from uap_dist.method.config import ComputeConfig
from uap_dist.method.state import State
from uap_dist.rounds import span as span_module
from uap_dist.rounds.loop import compute
from uap_dist.rounds.plan import RoundTasks, plan_run, schedule_rounds
from uap_dist.rounds.span import NUM_MEASURED, Sharing, Span, compute_span
from uap_dist.workers.local import LocalWorkers

CONFIG = ComputeConfig(round_size=20, block_size=5, max_passes=8, radius=20.0)
CONFIGS = {
    "log-odds": CONFIG,
    "l2": replace(CONFIG, norm="l2", radius=300.0),
    "paper": replace(CONFIG, rule="paper"),
    "paper with a budget": replace(CONFIG, rule="paper", max_passes=None, max_evaluations=1_500),
    "local steps": replace(CONFIG, round_size=30, block_size=10, local_steps=5, period=8),
}


def tasks_of(train, config):
    plan = plan_run(train.sizes, config)
    rounds = (RoundTasks.of(round_, train, config.seed) for round_ in schedule_rounds(train.sizes, config))
    return plan, tuple(islice(rounds, plan.num_rounds or 100))


def same(report, other):
    (a, b), (c, d) = ((r.state.iterate.v, r.state.iterate.momentum) for r in (report, other))
    return (
        torch.equal(a, c)
        and torch.equal(b, d)
        and report.state.iterate.scale == other.state.iterate.scale
        and torch.equal(report.perturbation, other.perturbation)
        and (report.num_solves, report.num_evaluations) == (other.num_solves, other.num_evaluations)
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_spans_of_any_length_have_the_bits_and_the_reports_of_single_rounds(
    tiny_data, local_workers, name, monkeypatch
):
    """A span ends where a measurement is due, at its time or at the end, and the next one goes on from its state."""
    train, val = tiny_data
    expected = list(compute(local_workers, train, val, CONFIGS[name]))
    plan, tasks = tasks_of(train, CONFIGS[name])
    for seconds in (0.0, 1000.0):
        monkeypatch.setattr(span_module, "SPAN_S", seconds)
        state, found, lengths = State.start(train.shape, train.clean.labels, CONFIGS[name]), [], []
        while len(found) < len(expected):
            reports = compute_span(tiny_worker(), Span({0: tasks[len(found) :]}), {0: state}, plan)[0]
            assert [report.has_arrays for report in reports] == [False] * (len(reports) - 1) + [True]
            assert all(report.seconds > 0.5 * report.solve_seconds > 0 for report in reports)
            found, state = found + reports, reports[-1].state
            lengths.append(len(reports))
            assert same(found[-1], expected[len(found) - 1])
        assert len(found) == len(expected)
        ends = np.cumsum(lengths) - 1
        assert {i for i, report in enumerate(expected) if report.evaluation is not None} <= set(ends)
        assert (max(lengths) == 1) == (seconds == 0)
        for ours, theirs in zip(found, expected, strict=True):
            timed = {"round/seconds", "round/images_per_second"}
            a, b = (
                {k: v for k, v in r.metrics().items() if k not in timed}
                for r in (ours, replace(theirs, evaluation=None))
            )
            assert a == b


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_same_bits_for_any_number_of_workers_kills_and_computations(local_ray, shards, num_workers, monkeypatch):
    here = LocalWorkers(tiny_worker())
    config = replace(CONFIG, max_passes=40)
    expected = list(compute(here, *load(here, shards), config))
    fleet = make_fleet(num_workers, gpus_per_worker=0)
    data = load(fleet, shards)
    shared_and_span, found = set(), []
    for report in compute(fleet, *data, config):
        shared_and_span.add(report.has_arrays)
        found.append(report)
        if report.round_number in (3, 60):
            os.kill(worker_processes()[0].pid, signal.SIGKILL)
    fleet.close()
    assert [r.fooling for r in found] == [r.fooling for r in expected]
    assert same(found[-1], expected[-1])
    assert found[-1].evaluation.val == expected[-1].evaluation.val
    assert shared_and_span == {True, False}  # this network takes less time than a call, so one worker does the rest


def test_a_worker_that_hangs_is_overtaken_whatever_it_computes(local_ray, shards):
    """Also where a `map` has one task, as a span or a small measurement, so that no other task tells how long it takes."""
    fleet = make_fleet(2, gpus_per_worker=0)
    data = load(fleet, shards)
    config, stopped = replace(CONFIG, max_passes=60), []
    for report in compute(fleet, *data, config):
        if report.round_number == 60:  # long after the fifth shared round
            stopped.append(max(worker_processes(), key=lambda p: sum(p.cpu_times()[:2])))
            stopped[0].suspend()
    stopped[0].resume()
    lost = fleet.stats.workers_lost
    fleet.close()
    here = LocalWorkers(tiny_worker())
    *_, expected = compute(here, *load(here, shards), config)
    assert same(report, expected) and lost == 0


class FakeWorkers:
    """Only what `Sharing` asks; nothing is computed."""

    def __init__(self, num_workers, room=100):
        self.num_workers, self.room_for_spans = num_workers, room


def report(tiny_report, solve_seconds, seconds):
    return replace(tiny_report, solve_seconds=solve_seconds, seconds=seconds)


@pytest.fixture
def tiny_report(tiny_data, local_workers):
    return next(compute(local_workers, *tiny_data, CONFIG))


def test_one_worker_and_as_many_computations_as_workers_take_spans_if_the_images_fit():
    assert Sharing(FakeWorkers(1), 100, lambda: 1).span_length() > 1
    assert Sharing(FakeWorkers(1), 101, lambda: 1).span_length() == 0
    assert Sharing(FakeWorkers(3), 100, lambda: 3).span_length() > 1
    assert Sharing(FakeWorkers(3), 100, lambda: 2).span_length() == 0
    assert Sharing(FakeWorkers(3, room=0), 1, lambda: 3).span_length() == 0


def test_a_lone_computation_takes_spans_once_its_solves_are_measured_to_be_shorter_than_its_rounds(
    tiny_report, monkeypatch
):
    workers = FakeWorkers(4)
    sharing = Sharing(workers, 100, lambda: 1)
    for number in range(NUM_MEASURED):
        assert sharing.span_length() == 0, number
        sharing.note_shared(report(tiny_report, 0.010, 0.040))
    assert sharing.span_length() > 1
    sharing.note_span([report(tiny_report, 0.010, 0.010)] * 3)
    assert sharing.span_length() == 150
    sharing.measure_again()
    for _ in range(NUM_MEASURED):
        assert sharing.span_length() == 0
        sharing.note_shared(report(tiny_report, 0.010, 0.040))
    assert sharing.span_length() == 150
    monkeypatch.setattr(span_module, "AGAIN_S", 0.0)
    assert sharing.span_length() == 0  # now and then it is measured again
    monkeypatch.undo()
    workers.num_workers = 5  # one more has joined: it is measured again, and the rounds are longer now
    for _ in range(2 * NUM_MEASURED):
        assert sharing.span_length() == 0
        sharing.note_shared(report(tiny_report, 0.4, 0.2))
