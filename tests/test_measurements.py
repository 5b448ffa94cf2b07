"""When a run measures fooling rates, on how many images, and what its records make of them."""

import numpy as np
import pytest
import torch

from uap_dist.computing.run import is_logged
from uap_dist.method.config import ComputeConfig
from uap_dist.method.schedule import Block, Round
from uap_dist.rounds.loop import compute
from uap_dist.rounds.plan import NUM_PLACES, plan_measurements
from uap_dist.rounds.record import RoundRecord

SMALL = {"round_size": 10, "block_size": 5, "radius": 20.0}


def run(workers, data, **options):
    return list(compute(workers, *data, ComputeConfig(**SMALL | options)))


def test_evaluate_every_spares_evaluations_but_not_the_last(local_workers, tiny_data):
    reports = run(local_workers, tiny_data, max_passes=5, evaluate_every=2)
    assert [r.pass_number for r in reports if r.evaluation] == [1, 3, 4]


@pytest.mark.parametrize("options", [{"max_passes": 30}, {"rule": "paper", "max_evaluations": 5_000}])
def test_held_out_images_are_measured_at_ten_places_or_more(local_workers, tiny_data, options):
    reports = run(local_workers, tiny_data, **options)
    *before, final = [r.evaluation for r in reports if r.evaluation]
    assert len(before) == NUM_PLACES - 1 and reports[-1].evaluation is final
    assert all(e.train is None and e.val.num_examples == len(e.val_predictions.labels) == 20 for e in before)
    assert (final.train.num_examples, final.val.num_examples) == tuple(data.num_examples for data in tiny_data)


def places(num_rounds, sizes=(6_000,), **options):
    """Numbers of the rounds that a measurement follows, and of how many images; a round costs 12 evaluations."""
    config = ComputeConfig(**{"rule": "log-odds"} | options)
    plan = plan_measurements(sizes, config, num_rounds)
    rounds = (Round(n, 0, False, (Block(0, tuple(range(6))),)) for n in range(num_rounds - 1))
    spent = [sum(sizes) + 12 * n for n in range(num_rounds)]
    return [r.number for r in rounds if plan.is_due(r, spent[r.number], spent[r.number + 1])], plan.num_images


@pytest.mark.parametrize("num_rounds", [10, 28, 144, 1_000, 40_000])
def test_places_are_dense_at_first_and_spread_over_the_whole_run(num_rounds):
    found, num_images = places(num_rounds)
    assert 8 <= len(found) <= NUM_PLACES - 1 and found == sorted(set(found))
    steps = np.diff([*found, num_rounds - 1])
    assert steps[0] <= steps[-1] <= 0.21 * num_rounds + 1
    # a place is a fiftieth of the whole run's evaluations, divided by the places, but no less than 50 images
    assert num_images == max(50, int(0.02 * 12 * num_rounds / NUM_PLACES))


def test_no_more_held_out_images_are_measured_than_there_are(tiny_data):
    train, val = tiny_data
    none, some = plan_measurements(train.sizes, ComputeConfig(), 40_000).choose(train, val)
    assert none is None and some.num_examples == val.num_examples == 20


def test_a_resumed_run_measures_at_the_same_places(local_workers, tiny_data):
    config = ComputeConfig(**SMALL, max_passes=6)
    whole = list(compute(local_workers, *tiny_data, config))
    for stop in (3, 7):
        rest = list(compute(local_workers, *tiny_data, config, whole[stop].state))
        assert [r.evaluation and r.evaluation.val for r in rest] == [
            r.evaluation and r.evaluation.val for r in whole[stop + 1 :]
        ]


def test_measurements_leave_the_bits_alone(local_workers, tiny_data):
    often, seldom = (run(local_workers, tiny_data, max_passes=4, evaluate_every=every)[-1] for every in (None, 4))
    assert torch.equal(often.perturbation, seldom.perturbation) and often.num_evaluations == seldom.num_evaluations


def test_records_continue_the_running_mean_after_a_resume(local_workers, tiny_data):
    reports = run(local_workers, tiny_data, max_passes=3)

    def records(reports, before):
        history = list(before)
        for report in reports:
            history.append(RoundRecord.of(report, {}, history))
        return history

    whole = records(reports, [])
    stored = [RoundRecord.from_json(record.json) for record in whole[:5]]
    resumed = records(reports[5:], stored)
    assert [r.metrics for r in resumed] == [r.metrics for r in whole] and len(whole) == 15
    for end, record in enumerate(whole, start=1):
        last = [r.fooling for r in reports[:end]]
        while sum(r.num_examples for r in last[1:]) >= 60:
            last = last[1:]
        hits, images = sum(r.num_hits for r in last), sum(r.num_examples for r in last)
        assert (record.metrics["fooling_rate/running"], record.metrics["num_images/running"]) == (hits / images, images)


@pytest.mark.parametrize(("num_rounds", "every"), [(50, 1), (320, 1), (321, 2), (16_700, 53), (None, 1)])
def test_mlflow_gets_as_many_rounds_as_its_charts_show_and_every_measurement(num_rounds, every):
    records = [RoundRecord(step, 0, {"fooling_rate/round": 0.5}) for step in range(1, (num_rounds or 50) + 1)]
    logged = [record.step for record in records if is_logged(record, num_rounds)]
    assert (
        logged == sorted({1, *range(every, len(records) + 1, every)}) and min(160, len(records)) <= len(logged) <= 321
    )
    assert is_logged(RoundRecord(17, 0, {"fooling_rate/val": 0.5}), num_rounds)
