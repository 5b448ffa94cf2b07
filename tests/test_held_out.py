"""Rounds that begin before the held-out images are there."""

import os
from concurrent.futures import Future
from dataclasses import replace
from threading import Timer

import pytest
import torch
from conftest import random_samples, tiny_worker
from fleets import load, make_fleet, worker_processes

from uap_dist.computing.provenance import check_resumed, with_held_out
from uap_dist.data.write import write_shards
from uap_dist.errors import ResumeError, ShardError
from uap_dist.method.config import ComputeConfig
from uap_dist.rounds.loop import compute
from uap_dist.tracking.checkpoint import JobRecord
from uap_dist.workers.behind import behind, known
from uap_dist.workers.dataset import list_dataset
from uap_dist.workers.worker import Worker

CONFIG = ComputeConfig(round_size=10, block_size=5, radius=20.0, max_passes=2, evaluate_every=1)


def test_the_first_rounds_need_no_held_out_images_and_nothing_else_changes(local_workers, tiny_data):
    train, val = tiny_data
    coming = Future()
    reports = compute(local_workers, train, coming, CONFIG)
    found = [next(reports) for _ in range(3)]  # the fifth round ends the first pass
    coming.set_result(val)
    found += reports
    expected = list(compute(local_workers, train, val, CONFIG))
    assert torch.equal(found[-1].perturbation, expected[-1].perturbation)
    rates = [[r.evaluation and (r.evaluation.train, r.evaluation.val) for r in each] for each in (found, expected)]
    assert rates[0] == rates[1] and sum(rate is not None for rate in rates[0]) == 2


def test_rounds_go_on_where_a_measurement_waits_for_held_out_images(local_workers, tiny_data):
    train, val = tiny_data
    config = replace(CONFIG, max_passes=6, evaluate_every=None)
    coming = Future()
    alarm = Timer(60, lambda: coming.done() or coming.set_exception(TimeoutError()))  # rounds waited
    alarm.start()

    class Workers(type(local_workers)):
        num_rounds = 0

        def map(self, method, tasks, *shared):
            self.num_rounds += method is Worker.solve
            if self.num_rounds == 8 and not coming.done():
                coming.set_result(val)
            return super().map(method, tasks, *shared)

    found = list(compute(Workers(tiny_worker()), train, coming, config))
    alarm.cancel()
    expected = list(compute(local_workers, train, val, config))
    assert len(found) == len(expected) and expected[0].evaluation is not None
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.round_number, ours.fooling, ours.is_last) == (theirs.round_number, theirs.fooling, theirs.is_last)
        assert (ours.evaluation is None) == (theirs.evaluation is None)
        if theirs.evaluation is not None:
            assert ours.evaluation.val == theirs.evaluation.val and torch.equal(ours.perturbation, theirs.perturbation)
    with_arrays = [report.has_arrays for report in found]
    assert not all(with_arrays[:8]) and all(with_arrays[8:])


def test_what_is_wrong_with_held_out_images_ends_the_run_before_its_next_round(local_workers, tiny_data, tmp_path):
    train, _ = tiny_data
    write_shards(random_samples(5, seed=9, side=20), tmp_path, prefix="val", shard_size=5)
    other = list_dataset(local_workers, [str(tmp_path / "val-0000.tar")])
    with pytest.raises(
        ShardError, match=r"val-0000.tar holds images of 20×20 pixels, \S+train-0000.tar of 16×16; give"
    ):
        list_dataset(local_workers, [str(tmp_path / "val-0000.tar")], like=train)
    for outcome, message in (
        (behind(lambda: list_dataset(local_workers, [str(tmp_path / "no.tar")])), "no shard"),
        (known(other), r"val-0000.tar holds images of 20×20 pixels, \S+train-0000.tar of 16×16"),
    ):
        coming = Future()
        reports = compute(local_workers, train, coming, CONFIG)
        next(reports)
        try:
            coming.set_result(outcome.result())
        except ShardError as raised:
            coming.set_exception(raised)
        with pytest.raises(ShardError, match=message):
            next(reports)


def test_a_resumed_run_is_compared_by_held_out_images_as_soon_as_they_are_there(local_workers, tiny_data):
    _, val = tiny_data
    begun = JobRecord("run", {}, {"seed": 0}, {})
    measured = with_held_out(begun, val)
    for saved in (begun, measured):
        check_resumed(saved, begun)
        assert with_held_out(saved, val) == measured
    with pytest.raises(ResumeError, match="val_digest was"):
        with_held_out(measured, val.thin(5))
    with pytest.raises(ResumeError, match="seed was 0, is 1"):
        check_resumed(measured, replace(begun, identity={"seed": 1}))


def test_a_worker_reads_a_shard_while_it_computes(local_ray, shards, tmp_path):
    fleet = make_fleet(1)
    train, val = load(fleet, shards)
    os.mkfifo(tmp_path / "val.tar")  # opening it waits for whoever writes
    reading = behind(lambda: list_dataset(fleet, [str(tmp_path / "val.tar")], read=Worker.read))
    for i in range(5):
        assert len(list(fleet.map(Worker.pixels, [train.examples(0, [i])]))) == 1
    assert not reading.done()
    (tmp_path / "val.tar").write_bytes(b"tar")
    with pytest.raises(ShardError, match="cannot open shard"):  # a pipe is no file to go back in
        reading.result()
    read = list_dataset(fleet, [str(shards / "val-0000.tar")], read=Worker.read)
    fleet.close()
    assert read.digest == val.digest and read.hashes == val.hashes


def test_a_worker_that_dies_while_it_computes_and_reads_is_replaced_once(local_ray, shards, tmp_path):
    fleet = make_fleet(1)
    train, _ = load(fleet, shards)
    os.mkfifo(tmp_path / "val.tar")
    reading = behind(lambda: list_dataset(fleet, [str(tmp_path / "val.tar")], read=Worker.read))
    waiting = fleet.map(Worker.pixels, [train.examples(i % 3, [0]) for i in range(300)])
    next(waiting)
    (process,) = worker_processes()
    process.kill()
    assert len(list(waiting)) == 299
    (tmp_path / "val.tar").write_bytes(b"tar")
    with pytest.raises(ShardError, match="cannot open shard"):
        reading.result()
    lost, num_workers = fleet.stats.workers_lost, fleet.num_workers
    fleet.close()
    assert (lost, num_workers) == (1, 1)
