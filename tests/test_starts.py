"""Several starts, of which one goes on."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from uap_dist.checkpoint import Checkpoint, JobRecord
from uap_dist.compute import compute, plan_course, step_sizes
from uap_dist.config import ComputeConfig
from uap_dist.dataset import classify, fooling_rate
from uap_dist.errors import ConfigError
from uap_dist.norms import measure
from uap_dist.starts import JUDGES, START_ROUNDS, Course

CONFIG = ComputeConfig(round_size=10, block_size=5, radius=20.0, max_passes=25, starts=3)


@pytest.fixture
def reports(local_workers, tiny_data):
    return list(compute(local_workers, *tiny_data, CONFIG))


@given(num_starts=st.integers(1, 10), rest=st.integers(START_ROUNDS + 1, 200))
def test_each_start_has_the_first_places_of_a_run_and_what_goes_on_the_others(num_starts, rest):
    course = Course((num_starts - 1) * START_ROUNDS + rest, num_starts)
    places = [course.place(number) for number in range(course.num_rounds)]
    assert places == list(range(START_ROUNDS)) * (num_starts - 1) + list(range(rest))
    assert course.num_places == rest
    ends = [number + 1 for number in range(course.num_rounds) if course.ends_start(number)]
    assert ends == [START_ROUNDS * (k + 1) for k in range(num_starts)] * (num_starts > 1)


def test_the_start_that_fools_most_goes_on(reports, local_workers, tiny_data):
    train, _ = tiny_data
    ends = [report for report in reports if report.start]
    assert [report.round_number + 1 for report in ends] == [32, 64, 96]
    assert train.num_examples < JUDGES

    def rate(v):
        return fooling_rate(train, classify(local_workers, train, v.numpy())).rate

    assert [report.start.rate for report in ends[:2]] == [rate(report.perturbation) for report in ends[:2]]
    assert rate(ends[-1].perturbation) == max(report.start.rate for report in ends)
    assert len({tuple(report.perturbation.flatten().tolist()) for report in ends}) >= 2
    # the next round is one step of the run away from it, the first of a start one step from zero
    steps = [step_sizes(reports[0].course, n, train.shape, CONFIG)[0] for n in (0, 96)]
    assert measure(reports[32].state.iterate.v, "linf") == pytest.approx(steps[0])
    assert measure(reports[96].state.iterate.v - ends[-1].state.iterate.v, "linf") <= steps[1] + 1e-9
    assert measure(ends[-1].state.iterate.v, "linf") > steps[0]


def test_starts_are_runs_whose_steps_shrink_as_those_of_a_run_of_what_goes_on(reports):
    course = reports[0].course
    alone = Course(course.num_places)
    steps = [report.step for report in reports]
    assert steps[64:] == [step_sizes(alone, n, (3, 16, 16), CONFIG)[0] for n in range(course.num_places)]
    assert steps[:32] == steps[32:64] == steps[64:96]


def test_judging_is_paid_for_within_the_budget(local_workers, tiny_data):
    train, _ = tiny_data
    config = replace(CONFIG, max_passes=None, max_evaluations=2500)
    *_, final = compute(local_workers, *tiny_data, config)
    assert final.num_evaluations == train.num_examples + 2 * final.num_solves + 3 * train.num_examples
    assert 2500 - 2 * config.round_size < final.num_evaluations <= 2500
    assert final.course == plan_course(train.sizes, config) and final.round_number + 1 == final.course.num_rounds


@pytest.mark.parametrize("number", [20, 31, 32, 50, 63, 95, 96])
def test_a_run_goes_on_from_what_was_committed_in_any_of_its_starts(reports, local_workers, tiny_data, number):
    committed = Checkpoint(JobRecord("a", {}, {}, {}), reports[number].state, ()).to_bytes()
    state = Checkpoint.from_bytes(committed).state
    *_, final = compute(local_workers, *tiny_data, CONFIG, state)
    assert torch.equal(final.perturbation, reports[-1].perturbation)
    assert final.num_evaluations == reports[-1].num_evaluations


def test_long_runs_begin_with_eight_starts_unless_they_start_at_random_or_under_l2():
    def course(num_rounds, **options):
        found = plan_course([6000], ComputeConfig(max_evaluations=6000 + 12 * num_rounds, **options))
        return found.num_rounds, found.num_starts

    assert course(774) == (774, 1)
    assert course(775) == (708, 8)  # 800 evaluations judge
    assert course(775, starts=1) == course(775, norm="l2") == course(775, random_start=0.5) == (775, 1)
    assert course(775, norm="l2", starts=2) == (758, 2)
    assert plan_course([6000], ComputeConfig()) == Course(10_000, 8)
    assert plan_course([6000], ComputeConfig(rule="paper")) == Course(10_000)


def test_starts_that_leave_nothing_to_go_on_with_are_refused(tiny_data):
    sizes = tiny_data[0].sizes
    with pytest.raises(
        ConfigError, match=r"8 starts \(--starts\) are 256 rounds, of 15 that the passes .* fewer starts"
    ):
        plan_course(sizes, ComputeConfig(round_size=10, block_size=5, max_passes=3, starts=8))
    with pytest.raises(ConfigError, match="starts is 0; it must be positive"):
        ComputeConfig(starts=0)
    with pytest.raises(ConfigError, match="starts does not belong to rule paper"):
        ComputeConfig(rule="paper", starts=2)
