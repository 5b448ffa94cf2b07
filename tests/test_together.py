from threading import Event

import pytest
import torch
from conftest import tiny_worker

from uap_dist.compute import ComputeConfig, compute
from uap_dist.dataset import LocalWorkers
from uap_dist.errors import WorkerLostError
from uap_dist.together import compute_together


def configs(count):
    return {
        f"seed-{seed}": ComputeConfig(seed=seed, max_passes=2, round_size=10, block_size=5) for seed in range(count)
    }


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_each_gives_what_it_gives_alone_and_no_report_is_lost(tiny_data, local_workers, at_once):
    def begin():
        return {name: compute(local_workers, *tiny_data, config) for name, config in configs(3).items()}

    alone = {name: list(reports) for name, reports in begin().items()}
    together = list(compute_together(begin(), at_once=at_once))
    for name, reports in alone.items():
        own = [report for other, report in together if other == name]
        assert [r.round_number for r in own] == [r.round_number for r in reports] and own[-1].is_last
        assert all(torch.equal(a.perturbation, b.perturbation) for a, b in zip(own, reports, strict=True))
    if at_once == 1:
        assert [name for name, _ in together] == [name for name, reports in alone.items() for _ in reports]


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
        for name, report in compute_together({n: watched(n, c) for n, c in configs(5).items()}, at_once=2)
        if report.is_last
    ]
    assert sorted(ended) == sorted(configs(5)) and max(largest) == 2


def test_what_one_raises_reaches_the_caller(tiny_data, local_workers):
    def failing():
        yield next(compute(local_workers, *tiny_data, configs(1)["seed-0"]))
        raise WorkerLostError("no more")

    with pytest.raises(WorkerLostError, match="no more"):
        list(compute_together({"a": failing()}, at_once=2))
    assert list(compute_together({}, at_once=2)) == []
