from dataclasses import replace
from math import exp, inf

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from uap_dist.method.config import ComputeConfig
from uap_dist.method.norms import measure
from uap_dist.method.update import (
    MOMENTUM,
    REMEMBERED,
    WIDTH,
    Iterate,
    Steps,
    average_update,
    channel_mean,
    cosine,
    finish,
    log_odds_update,
    paper_update,
    remember,
    repeat_mean,
    weigh,
)


def steps(norm, radius, period):
    return Steps(norm, radius, period, first_size=0.5, num_rounds=1)


def random(seed, scale=1.0):
    return scale * torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_paper_rule_adds_and_projects():
    iterate = paper_update(Iterate(random(0), torch.zeros(3, 4, 4)), random(1), gain=2.0, norm="linf", radius=1.0)
    assert_close(iterate.v, (random(0) + 2 * random(1)).clamp(-1, 1))


def test_log_odds_rule_takes_a_sign_step_of_the_momentum_for_linf():
    before = Iterate(random(0, 0.1), random(1))
    after = log_odds_update(before, random(2), 0.5, steps("linf", 10.0, period=4))
    momentum = MOMENTUM * random(1) + random(2)
    assert_close(after.momentum, momentum)
    assert_close(after.v, before.v + 0.5 * momentum.sign())


def test_log_odds_rule_does_not_depend_on_the_size_of_all_sums():
    start = Iterate.zero((3, 4, 4))
    of_run = steps("l2", 10.0, period=4)
    small, large = (log_odds_update(start, scale * random(2), 0.5, of_run) for scale in (1e-6, 1e6))
    assert_close(small.v, large.v)
    assert small.v.square().mean().sqrt().item() == pytest.approx(0.5)


def test_a_round_without_increments_changes_nothing_but_the_momentum():
    before = Iterate(random(0), torch.zeros(3, 4, 4, dtype=torch.float64))
    after = log_odds_update(before, torch.zeros(3, 4, 4, dtype=torch.float64), 1.0, steps("l2", 100.0, period=4))
    assert torch.equal(after.v, before.v) and after.v.isfinite().all()


def test_weights_are_the_slope_of_the_smoothed_fooling_rate():
    log_odds = torch.linspace(-30, 30, 61, dtype=torch.float64, requires_grad=True)
    rate = torch.sigmoid(-log_odds / (10 * WIDTH))
    (slope,) = torch.autograd.grad(rate.sum(), log_odds)
    weights = weigh(log_odds.detach(), 10.0)
    assert_close(weights / weights.max(), slope / slope.min())
    assert log_odds[weights.argmax()] == 0
    assert weigh(log_odds.detach(), inf).unique().numel() == 1
    assert not weigh(torch.tensor([1e30, -1e30, torch.inf]), 1.0).any()


@given(sizes=st.lists(st.floats(0, 1e6), min_size=1, max_size=20), at_once=st.integers(1, 5))
def test_the_scale_is_an_exponential_moving_average(sizes, at_once):

    def after(iterate, some):
        total, count = torch.tensor([sum(some), len(some)], dtype=torch.float64)
        return remember(iterate, total, count, most_images=max(5, len(some)))

    iterate = Iterate.zero((1,))
    assert iterate.scale == inf and after(iterate, []).scale == inf
    for start in range(0, len(sizes), at_once):
        iterate = after(iterate, sizes[start : start + at_once])
    assert min(sizes) * (1 - 1e-12) <= iterate.scale <= max(sizes) * (1 + 1e-12)
    assert after(replace(iterate, scale=torch.ones(())), [0.0] * REMEMBERED).scale == pytest.approx(exp(-1))
    assert after(iterate, []).scale == iterate.scale


def test_local_steps_of_blocks_are_averaged_and_projected():
    start = Iterate(random(0), random(1))
    after = average_update(start, torch.stack([random(2), random(3)]), steps("linf", 1.0, period=4))
    assert_close(after.v, (random(0) + random(2)).clamp(-1, 1))
    assert_close(after.momentum, random(3))


def test_the_default_period_grows_with_the_length_of_the_run_under_l2():
    config = ComputeConfig(norm="l2", round_size=10, block_size=5)
    shape = (3, 4, 4)
    periods = [config.steps(rounds, shape).period for rounds in (1, 149, 150, 599, 600, 10**6)]
    assert periods == [32, 32, 64, 64, 128, 128]
    assert ComputeConfig(norm="linf").steps(10**6, shape).period == 32
    assert replace(config, period=96).steps(600, shape).period == 96


@given(height=st.integers(1, 12), width=st.integers(1, 12), period=st.integers(1, 13))
def test_the_mean_over_periods_is_the_nearest_periodic_tensor(height, width, period):
    values = torch.randn(2, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = repeat_mean(values, period)
    if period >= max(height, width):
        assert torch.equal(found, values)
        return
    assert_close(found[:, period:], found[:, : max(0, height - period)])
    assert_close(found[:, :, period:], found[:, :, : max(0, width - period)])
    assert_close(repeat_mean(found, period), found)
    assert abs(float(((values - found) * found).sum())) < 1e-9  # an orthogonal projection


def test_steps_repeat_themselves():
    after = log_odds_update(Iterate.zero((3, 4, 4)), random(2), 0.5, steps("linf", 10.0, period=2))
    tile = random(2).reshape(3, 2, 2, 2, 2).mean((1, 3)).sign() / 2
    assert_close(after.v, tile.repeat(1, 2, 2))


def test_achromatic_steps_are_those_of_the_mean_over_channels():
    plain = steps("linf", 10.0, period=2)
    after = log_odds_update(Iterate.zero((3, 4, 4)), random(2), 0.5, replace(plain, achromatic=True))
    grey = random(2).mean(0, keepdim=True).expand(3, 4, 4)
    assert_close(channel_mean(random(2)), grey)
    assert_close(after.v, log_odds_update(Iterate.zero((3, 4, 4)), grey, 0.5, plain).v)
    assert torch.equal(after.v[0], after.v[1]) and torch.equal(after.v[0], after.v[2]) and after.v.any()


def test_step_sizes_follow_a_cosine_however_they_are_divided_into_rounds():
    sizes = [cosine(8.0, n, 60) for n in range(60)]
    assert sizes[0] == 8 and sizes == sorted(sizes, reverse=True) and 0 < sizes[-1] < 0.01
    assert sum(sizes) == pytest.approx(8 * 60 / 2 + 4)
    for per_round in (1, 3):
        of_run = Steps("linf", 10.0, 32, first_size=8.0, num_rounds=60 // per_round, per_round=per_round)
        assert [size for number in range(60 // per_round) for size in of_run.sizes(number)] == sizes


def test_finish_moves_linf_into_the_corner_and_leaves_l2():
    assert measure(finish(random(0, 5), norm="linf", radius=3.0), "linf") == 3
    assert torch.equal(finish(random(0), norm="l2", radius=3.0), random(0))
