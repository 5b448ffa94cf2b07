"""Several members of a pool in one batch: each has its own v, sums and updates, whoever else is in the batch and whoever computes it."""

import os
import signal
import time
from dataclasses import replace
from itertools import islice
from threading import Thread

import numpy as np
import pytest
import torch
from conftest import tiny_worker
from fleets import load, make_fleet, worker_processes

from uap_dist.errors import ConfigError
from uap_dist.method.config import ComputeConfig
from uap_dist.method.solver import Batch, solve_block
from uap_dist.rounds import span as span_module
from uap_dist.rounds.concurrent import compute_concurrently, describe_idle, num_concurrent
from uap_dist.rounds.group import in_groups, run_together
from uap_dist.rounds.loop import compute
from uap_dist.rounds.plan import count_rounds, schedule_rounds
from uap_dist.workers.local import LocalWorkers

CONFIG = ComputeConfig(round_size=10, block_size=5, max_passes=4, radius=20.0, members_at_once=3, random_start=0.5)


def pool(workers, data, configs):
    """The last report of each member."""
    names = {str(config.seed): config for config in configs}
    computations = {}
    for group in in_groups(names):
        some = {name: names[name] for name in group}
        computations |= run_together(workers, some, lambda name, own: compute(own, *data, names[name]))
    limit = lambda left: num_concurrent(workers.num_workers, left, CONFIG)  # noqa: E731
    return {name: report for name, report in compute_concurrently(computations, limit=limit) if report.is_last}


def same(report, other):
    pairs = zip(
        (report.perturbation, report.state.iterate.v, report.state.iterate.momentum),
        (other.perturbation, other.state.iterate.v, other.state.iterate.momentum),
        strict=True,
    )
    scales = report.state.iterate.scale == other.state.iterate.scale
    return all(torch.equal(a, b) for a, b in pairs) and scales and report.fooling == other.fooling


@pytest.fixture
def members():
    return [replace(CONFIG, seed=seed) for seed in (5, 6, 7, 8)]  # places 2, 0, 1 and then 2 alone


def test_a_member_has_the_same_bits_alone_in_its_batch_and_beside_others(
    tiny_data, local_workers, members, monkeypatch
):
    together = pool(local_workers, tiny_data, members)
    assert len(together) == 4 and len({r.perturbation.numpy().tobytes() for r in together.values()}) == 4
    monkeypatch.setattr(span_module, "SPAN_S", 0.0)  # other lengths of spans
    for config in members:
        *_, alone = compute(local_workers, *tiny_data, config)
        assert same(together[str(config.seed)], alone)
        assert together[str(config.seed)].evaluation.val == alone.evaluation.val


@pytest.mark.parametrize("budget", range(440, 520, 13))
@pytest.mark.parametrize("sizes", [(20, 20, 7), (4, 9, 11, 30)])
def test_members_of_a_batch_have_one_number_of_rounds_which_the_budget_pays_for(sizes, budget):
    """Each member has its own order of blocks, which are not all of one size."""
    configs = [replace(CONFIG, seed=seed, max_passes=None, max_evaluations=budget) for seed in range(12)]
    (number,) = {count_rounds(sizes, config) for config in configs}
    for config in configs:
        solves = sum(round_.num_examples for round_ in islice(schedule_rounds(sizes, config), number))
        assert sum(sizes) + 2 * solves <= budget
        own = count_rounds(sizes, replace(config, members_at_once=1))
        assert own - 1 <= number <= own


def test_bits_do_not_depend_on_which_member_asks_first(tiny_data, local_workers, members):
    """With a budget, which the last rounds of the members' orders use up differently."""
    members = [replace(config, max_passes=None, max_evaluations=252) for config in members[:3]]
    *_, alone = compute(local_workers, *tiny_data, members[2])
    for order in (members, members[::-1]):
        assert same(pool(local_workers, tiny_data, order)["7"], alone)


def test_a_member_that_is_dropped_lets_no_span_begin(tiny_data, local_workers, members):
    """As at the exit of a process, which would wait forever for the start of a thread. The others wait for the member."""
    names, seen = {str(config.seed): config for config in members[:3]}, []
    rest = run_together(local_workers, names, lambda name, own: compute(own, *tiny_data, names[name]))
    for name in ("5", "6"):
        Thread(target=lambda own: seen.append(list(own)), args=(rest[name],), daemon=True).start()
    first = next(rest["7"])
    assert not first.is_last
    time.sleep(1)
    rest["7"].close()
    time.sleep(1)
    assert not seen  # they would have come to their ends


def test_members_need_not_have_the_same_number_of_rounds(tiny_data, local_workers, members):
    """As after a kill, because each member has checkpoints of its own."""
    whole = pool(local_workers, tiny_data, members[:3])
    reports = list(compute(local_workers, *tiny_data, members[0]))
    middle = next(r.state for r in reports[3:] if r.has_arrays)
    states = {"5": middle, "6": None, "7": None}
    names = {str(config.seed): config for config in members[:3]}
    rest = run_together(local_workers, names, lambda name, own: compute(own, *tiny_data, names[name], states[name]))
    found = compute_concurrently(rest, limit=lambda left: left)
    for name, report in found:
        assert not report.is_last or same(report, whole[name])


def test_each_member_is_solved_against_its_own_v_as_if_it_were_alone(tiny_data):
    """Up to rounding, since another size of the batch may have other kernels."""
    classifier = tiny_worker().classifier
    rng = torch.Generator().manual_seed(0)
    pixels, v = 255 * torch.rand(6, 3, 16, 16, generator=rng), 10 * torch.randn(2, 3, 16, 16, generator=rng)
    labels, scales = classifier(pixels).argmax(1), torch.tensor([0.5, 2.0], dtype=torch.float64)
    solver = CONFIG.solver
    is_real = torch.tensor([True] * 5 + [False])
    total, sums = solve_block(classifier, Batch(pixels, labels, is_real), v, scales, solver)
    for i, count in enumerate((3, 2)):
        own = Batch(pixels[3 * i :][:count], labels[3 * i :][:count])
        one, its_sums = solve_block(classifier, own, v[i : i + 1], scales[i : i + 1], solver)
        torch.testing.assert_close(total[i], one[0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(sums[i], its_sums[0], rtol=1e-5)


@pytest.mark.parametrize(("num_workers", "precision"), [(1, "float32"), (2, "float32"), (2, "bfloat16")])
def test_same_bits_for_any_number_of_workers_and_through_kills(local_ray, shards, members, num_workers, precision):
    members = [replace(config, max_passes=30) for config in members]
    here = LocalWorkers(tiny_worker(precision=precision))
    expected = pool(here, load(here, shards), members)
    fleet = make_fleet(num_workers, gpus_per_worker=0, precision=precision)
    data, names = load(fleet, shards), {str(config.seed): config for config in members}
    computations, last = {}, {}
    for group in in_groups(names):
        some = {name: names[name] for name in group}
        computations |= run_together(fleet, some, lambda name, own: compute(own, *data, names[name]))
    for number, (name, report) in enumerate(compute_concurrently(computations, limit=lambda left: left)):
        if number == 20:
            os.kill(worker_processes()[0].pid, signal.SIGKILL)
        if report.is_last:
            last[name] = report
    fleet.close()
    assert all(same(last[name], expected[name]) for name in expected)


def test_what_does_not_fit_is_refused_or_said():
    for options in ({"rule": "paper"}, {"local_steps": 1, "round_size": 6, "block_size": 3}):
        with pytest.raises(ConfigError, match="--members-at-once belongs to"):
            ComputeConfig(members_at_once=2, **options)
    with pytest.raises(ConfigError, match="--members-at-once is 0"):
        ComputeConfig(members_at_once=0)
    assert "2 of 3 places of a batch stay empty" in describe_idle(2, 4, CONFIG)
    assert "1 of 3 workers will have nothing to do: 6 perturbations are 2 batches of 3 (" in describe_idle(3, 6, CONFIG)
    assert "are 1 batch of 3 (--members-at-once), each on one worker; --num-perturbations 9" in describe_idle(
        3, 3, CONFIG
    )
    assert describe_idle(2, 6, CONFIG) == ""
    assert all(num_concurrent(workers, 100, CONFIG) % 3 == 0 for workers in (1, 2, 5))
