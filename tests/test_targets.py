"""Targeted perturbations: their goal, the sum of their steps, and what a computation makes of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_worker
from fleets import load, make_fleet
from hypothesis import given
from hypothesis import strategies as st
from test_deepfool import classifier_of, linear
from torch.testing import assert_close

from uap_dist.errors import ConfigError
from uap_dist.method.config import ComputeConfig
from uap_dist.method.log_odds import log_odds, log_odds_sum
from uap_dist.method.rates import FOOLING, TARGETED, Goal, Rate, running_rates
from uap_dist.rounds.loop import compute
from uap_dist.rounds.record import RoundRecord
from uap_dist.workers.dataset import classify
from uap_dist.workers.local import LocalWorkers

CONFIG = ComputeConfig(round_size=10, block_size=5, radius=20.0, max_passes=4, target=3)
LABELS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40)


def test_the_sum_is_that_of_the_targets_log_odds_in_closed_form_on_an_affine_network():
    """The slope of z_t − logsumexp of the others is w_t − Σ p_k w_k, p being the softmax without t."""
    weights, pixels, function = linear(3, 4)
    zero, target = torch.zeros_like(pixels[0]), 2
    labels = torch.tensor([0, 2, 1, 3, 2])
    logits = function(pixels)
    others = logits.clone()
    others[:, target] = -torch.inf
    slopes = weights[target] - others.softmax(1) @ weights
    f = logits[:, target] - others.logsumexp(1)
    expected = sum(w * slope for w, slope in zip(f.square(), slopes, strict=True) if w not in f[[1, 4]].square())
    found = log_odds_sum(classifier_of(function), pixels, zero, labels, weigh=torch.square, goal=Goal(target))
    assert_close(found.total.flatten(), expected)
    assert found.log_odds.isnan().tolist() == [False, True, False, False, True]
    assert_close(found.log_odds[[0, 2, 3]], f[[0, 2, 3]])
    assert found.predicted.equal(logits.argmax(1)) and found.num_evaluations == 10


def test_a_step_along_the_sum_ends_on_the_boundary_of_the_target():
    _, pixels, function = linear(5, 2)  # with two classes the log-odds are linear
    for x, label in zip(pixels, function(pixels).argmax(1), strict=True):
        target = 1 - int(label)
        one = log_odds_sum(
            classifier_of(function),
            x[None],
            torch.zeros_like(x),
            label[None],
            weigh=torch.ones_like,
            goal=Goal(target),
        )
        assert one.log_odds < 0
        after = function((x - one.total * one.log_odds / one.total.square().sum())[None])
        assert_close(log_odds(after, torch.tensor([target])), torch.zeros(1, dtype=torch.float64))
        untargeted = log_odds_sum(
            classifier_of(function), x[None], torch.zeros_like(x), label[None], weigh=torch.ones_like
        )
        assert_close(one.total, untargeted.total)  # away from one of two classes is towards the other


@given(LABELS, st.integers(0, 4))
def test_success_is_the_share_of_the_images_of_other_labels_that_get_the_target(pairs, target):
    clean, perturbed = np.array(pairs).T
    goal = Goal(target)
    rates, others = goal.rates(clean, perturbed), clean != target
    assert (
        rates[FOOLING] == Rate(int((clean != perturbed).sum()), len(clean)) == Goal().rates(clean, perturbed)[FOOLING]
    )
    if others.any():
        assert rates[TARGETED] == Rate(int((perturbed[others] == target).sum()), int(others.sum()))
        assert rates[TARGETED].num_hits <= rates[FOOLING].num_hits
    else:
        assert TARGETED not in rates
    of_arrays, of_tensors = goal.hits(clean, perturbed), goal.hits(torch.tensor(clean), torch.tensor(perturbed))
    for kind in goal.kinds:
        assert all(np.array_equal(a, b.numpy()) for a, b in zip(of_arrays[kind], of_tensors[kind], strict=True))


@pytest.mark.parametrize("options", [{}, {"norm": "l2", "radius": 300.0}, {"local_steps": 5}])
def test_a_targeted_run_reaches_its_target_where_an_untargeted_one_does_not(local_workers, tiny_data, options):
    train, val = tiny_data
    config = replace(CONFIG, **options)
    for target in np.unique(train.clean.labels)[:2].tolist():
        *_, final = compute(local_workers, train, val, replace(config, target=target))
        *_, plain = compute(local_workers, train, val, replace(config, target=None))
        rate = final.evaluation.val_rates[TARGETED]
        labels = classify(local_workers, val, final.perturbation.numpy()).labels
        assert rate == Goal(target).rates(val.clean.labels, labels)[TARGETED]
        of_plain = classify(local_workers, val, plain.perturbation.numpy()).labels
        assert rate.rate > 0.5 and rate.rate > Goal(target).rates(val.clean.labels, of_plain)[TARGETED].rate
        assert set(plain.evaluation.val_rates) == {FOOLING}


def test_images_of_the_target_cost_evaluations_but_do_not_change_the_result(local_workers, tiny_data):
    """With a round's images all of the target, v stays; statistics are of the others."""
    train, val = tiny_data
    label = int(train.clean.labels[0])
    own = train.take(np.flatnonzero(train.clean.labels == label))
    with pytest.raises(ConfigError, match=f"all {own.num_examples} training images the target's label; none is left"):
        next(compute(local_workers, own, val, replace(CONFIG, target=label)))
    config = replace(CONFIG, target=label, augment="none", round_size=1, block_size=1, max_passes=1)
    scale, v = float("inf"), torch.zeros(train.shape)
    places = {key: n for n, key in enumerate(train.keys)}
    assert len(places) == train.num_examples
    counted = 0
    for report in compute(local_workers, train, val, config):
        rate = report.rates[TARGETED]
        counted += rate.num_examples
        if rate.num_examples == 0:  # the momentum goes on, the statistics do not
            assert report.state.iterate.scale == scale and report.means["mean_log_odds"] == 0
            assert "targeted_success_rate/round" not in report.metrics()
            assert report.metrics()["num_images/round_targeted_success"] == 0
        scale, v = report.state.iterate.scale, report.state.iterate.v
    assert counted == int((train.clean.labels != label).sum())
    assert report.num_evaluations == 3 * train.num_examples and v.any()


def test_one_worker_and_two_give_the_same_bits_and_so_does_a_resumed_run(local_ray, shards):
    fleet = make_fleet(2)
    train, val = load(fleet, shards)
    label = int(train.clean.labels[0])
    plain = replace(CONFIG, target=None)
    configs = (replace(CONFIG, target=label), replace(plain, only_classes=(label,)))
    *_, untargeted = compute(LocalWorkers(tiny_worker()), train, val, plain)
    for config in configs:
        *_, shared = compute(fleet, train, val, config)
        here = list(compute(LocalWorkers(tiny_worker()), train, val, config))
        assert torch.equal(shared.perturbation, here[-1].perturbation)
        assert shared.evaluation.val_rates == here[-1].evaluation.val_rates
        *_, resumed = compute(LocalWorkers(tiny_worker()), train, val, config, here[6].state)
        assert torch.equal(resumed.perturbation, here[-1].perturbation)
        assert not torch.equal(untargeted.perturbation, here[-1].perturbation)
    fleet.close()


def test_records_hold_the_rate_its_interval_and_its_running_mean(local_workers, tiny_data):
    train, val = tiny_data
    config = replace(CONFIG, target=int(train.clean.labels[0]), round_size=2, block_size=1)
    history = []
    for report in compute(local_workers, train, val, config):
        history.append(RoundRecord.of(report, {}, history))
    last, rates = history[-1].metrics, report.evaluation.val_rates
    assert (
        Rate.from_metrics(last, "val", TARGETED) == rates[TARGETED] and Rate.from_metrics(last, "val") == rates[FOOLING]
    )
    assert (last["interval/val_targeted_success_low"], last["interval/val_targeted_success_high"]) == rates[
        TARGETED
    ].interval
    rounds = [Rate.from_metrics(record.metrics, "round", TARGETED) for record in history]
    assert {rate.num_examples for rate in rounds} == {0, 1, 2}
    assert Rate.from_metrics(last, "running", TARGETED) == running_rates(rounds[-61:], 60)[-1]


def test_a_target_is_found_by_its_number_or_name():
    names = ["tench", "goldfish", "crane", "crane", "White Shark"]
    for text, label in ((1, 1), ("goldfish", 1), ("white_shark", 4)):
        assert ComputeConfig(target=text).with_labels(names, 5).target == label
    assert (
        ComputeConfig(target=2).with_labels((), 5).goal == Goal(2) and ComputeConfig().with_labels((), 5).target is None
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "target is 5; the network has the labels 0 to 4"),
        (-1, "target is -1; the network has the labels 0 to 4"),
        ("goldfihs", r"target is 'goldfihs', which is no class of the network; nearest names: goldfish \(1\)"),
        ("shark", r"no class of the network; nearest names: White Shark \(4\)"),
        ("crane", "target is 'crane', the name of several classes; give one of the labels 2, 3"),
    ],
)
def test_a_target_that_is_no_class_is_refused_with_the_nearest_names(given, message):
    with pytest.raises(ConfigError, match=message):
        ComputeConfig(target=given).with_labels(["tench", "goldfish", "crane", "crane", "White Shark"], 5)


def test_what_has_no_target_is_refused(local_workers, tiny_data):
    with pytest.raises(ConfigError, match="the paper's rule knows no target; give them with --rule log-odds"):
        ComputeConfig(rule="paper", target=1)
    with pytest.raises(ConfigError, match="target is 'red', but the classes have no names .* give a label from 0 to 3"):
        ComputeConfig(target="red").with_labels((), 4)
    with pytest.raises(ConfigError, match="'red' is the name of a class; call ComputeConfig.with_labels"):
        next(compute(local_workers, *tiny_data, replace(CONFIG, target="red")))
