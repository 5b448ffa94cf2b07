import numpy as np
import pytest
import torch
from conftest import tiny_worker

from uap_dist.errors import ConfigError
from uap_dist.method.config import ComputeConfig
from uap_dist.method.norms import measure, random_perturbation
from uap_dist.method.schedule import Block, Round, plan_rounds
from uap_dist.method.state import State
from uap_dist.rounds.loop import compute
from uap_dist.rounds.plan import RoundTasks, plan_run
from uap_dist.rounds.round import run_round
from uap_dist.workers.dataset import classify, fooling_rate
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.worker import Worker

SMALL = {"round_size": 10, "block_size": 5, "radius": 20.0}


def run(workers, data, **options):
    return list(compute(workers, *data, ComputeConfig(**SMALL | options)))


def test_log_odds_beats_random_on_held_out_images(local_workers, tiny_data):
    final = run(local_workers, tiny_data, max_passes=4)[-1]
    noise = random_perturbation((3, 16, 16), norm="linf", radius=20.0, seed=0).numpy()
    random = fooling_rate(tiny_data[1], classify(local_workers, tiny_data[1], noise))
    assert final.evaluation.val.rate > random.rate + 0.2
    assert measure(final.perturbation, "linf") == 20


def test_blocks_of_one_image_follow_the_papers_loop(local_workers, tiny_data):
    """The paper's algorithm 1 with DeepFool, written again in float64, one image after another."""
    train, _ = tiny_data
    options = {"round_size": 1, "block_size": 1, "rule": "paper", "max_passes": 1, "radius": 20.0}
    reports = run(local_workers, tiny_data, **options)
    network = tiny_worker().classifier.double().cpu()
    v = torch.zeros(3, 16, 16)
    starts = np.cumsum([0, *train.sizes])
    for round_, report in zip(plan_rounds(train.sizes, seed=0, round_size=1, block_size=1), reports, strict=False):
        (block,) = round_.blocks
        task = train.examples(block.shard, block.examples)
        x = torch.tensor(next(local_workers.map(Worker.pixels, [task])), dtype=torch.float64)
        label = int(train.clean.labels[starts[block.shard] + block.examples[0]])
        expected = (v.double() + reference_deepfool(network, x, v, label)).clamp(-20, 20)
        # from the same v each time, and to a share of the step: rounding may decide where the next one leads, and whether a step so
        # close to the boundary is the last
        before, v = v, report.perturbation
        assert (v - expected).norm() <= 0.01 * (expected - before).norm() + 1e-3
    assert measure(reports[-1].perturbation, "linf") > 5


def reference_deepfool(network, x, v, label):
    start = x + v
    is_inside = (start >= -1e-3) & (start <= 255 + 1e-3)
    r = torch.zeros_like(x)
    for _ in range(10):
        z = (start + r).clamp(0, 255).requires_grad_()
        logits = network(z)[0]
        if logits.argmax() != label:
            break
        own = torch.autograd.grad(logits[label], z, retain_graph=True)[0]
        best = None
        for k in range(len(logits)):
            if k != label:
                w = torch.autograd.grad(logits[k], z, retain_graph=True)[0] - own
                w = w * is_inside * torch.where(w < 0, z > 1e-3, z < 255 - 1e-3)
                distance = (logits[label] - logits[k]).detach() / w.norm()
                if best is None or distance < best[0]:
                    best = distance, w
        r = r + 1.02 * best[0] * best[1] / best[1].norm()
        r = torch.where(is_inside, r.clamp(-start, 255 - start), r)
    return r[0]


@pytest.mark.parametrize(
    ("rule", "norm"), [("log-odds", "linf"), ("log-odds", "l2"), ("paper", "linf"), ("paper", "l2")]
)
def test_same_config_same_bits_and_another_seed_other_bits(tiny_data, rule, norm):
    finals = [
        run(LocalWorkers(tiny_worker(cache)), tiny_data, rule=rule, norm=norm, max_passes=1, seed=seed)[-1].perturbation
        for seed, cache in ((0, 1 << 30), (0, 1), (1, 1 << 30))
    ]
    assert torch.equal(finals[0], finals[1]) and not torch.equal(finals[0], finals[2])
    assert measure(finals[0], norm) <= 20 * (1 + 1e-6)


def test_a_budget_is_never_exceeded_and_counts_the_clean_labels(local_workers, tiny_data):
    reports = run(local_workers, tiny_data, max_evaluations=150)
    assert reports[-1].num_evaluations <= 150 < reports[-1].num_evaluations + 20
    assert reports[-1].num_evaluations == 47 + 2 * reports[-1].num_solves
    assert [r.num_rounds for r in reports] == [len(reports)] * len(reports)


def test_the_papers_rule_stops_once_its_evaluations_are_spent(local_workers, tiny_data):
    reports = run(local_workers, tiny_data, rule="paper", max_evaluations=300)
    assert reports[-2].num_evaluations < 300 <= reports[-1].num_evaluations
    assert reports[-1].evaluation is not None and reports[0].means["deepfool_success"] == 1


def test_target_on_the_training_images_ends_the_run_after_a_pass(local_workers, tiny_data):
    reports = run(local_workers, tiny_data, max_passes=50, target_fooling_rate=0.5)
    assert reports[-1].evaluation.train.rate >= 0.5 and reports[-1].pass_number < 49
    assert all(r.evaluation.train.rate < 0.5 for r in reports[:-1] if r.evaluation)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_random_start_is_that_share_of_the_radius_in_a_direction_of_the_seed(tiny_data, norm):
    def start(**options):
        return State.start(
            tiny_data[0].shape, tiny_data[0].clean.labels, ComputeConfig(norm=norm, radius=20.0, **options)
        )

    first, second = (start(random_start=0.5, seed=seed) for seed in (0, 1))
    for state in (first, second):
        assert measure(state.iterate.v, norm) == pytest.approx(10, rel=1e-6)
        assert state.num_evaluations == 47 and not state.iterate.momentum.any()
    assert abs(torch.cosine_similarity(first.iterate.v.flatten(), second.iterate.v.flatten(), dim=0)) < 0.2
    assert not start().iterate.v.any() and not start(random_start=0.0).iterate.v.any()


def test_a_random_start_lies_under_the_first_round(local_workers, tiny_data):
    plain, moved = (
        run(local_workers, tiny_data, max_passes=1, augment="none", random_start=share) for share in (None, 0.5)
    )
    assert not torch.equal(plain[0].perturbation, moved[0].perturbation)
    assert plain[0].fooling.rate == 0 and moved[0].num_evaluations == plain[0].num_evaluations


def test_local_steps_of_a_lone_block_are_rounds_of_their_own(local_workers, tiny_data):
    """Three rounds of five images of one shard, and the same images as one block in three steps."""
    train = tiny_data[0].part(0, 3)
    block = Block(0, tuple(range(15)))
    common = {"radius": 20.0, "augment": "none", "step_size": 2.0, "max_passes": 1}
    local = ComputeConfig(round_size=15, block_size=15, local_steps=3, **common)
    start = State.start(train.shape, train.clean.labels, local)
    tasks = RoundTasks.of(Round(0, 0, False, (block,)), train, seed=0)
    report = run_round(local_workers, tasks, start, plan_run(train.sizes, local))
    after = report.state
    alone, state = ComputeConfig(round_size=5, block_size=5, **common), start
    for number in range(3):
        part = Block(0, block.examples[5 * number : 5 * number + 5])
        tasks = RoundTasks.of(Round(number, 0, False, (part,)), train, seed=0)
        state = run_round(local_workers, tasks, state, plan_run(train.sizes, alone)).state
    assert torch.allclose(after.iterate.v, state.iterate.v, atol=1e-5) and state.iterate.v.abs().max() > 2
    assert torch.allclose(after.iterate.momentum, state.iterate.momentum, atol=1e-5)
    assert (after.num_solves, after.num_evaluations) == (state.num_solves, state.num_evaluations)
    assert report.fooling.num_examples == 15


def test_local_steps_fool_in_a_fraction_of_the_rounds(local_workers, tiny_data):
    reports = run(local_workers, tiny_data, max_passes=4, round_size=20, block_size=10, local_steps=5, radius=20.0)
    assert len(reports) == 12
    assert reports[-1].evaluation.val.rate >= run(local_workers, tiny_data, max_passes=4)[-1].evaluation.val.rate - 0.1
    assert measure(reports[-1].perturbation, "linf") == 20


def test_a_perturbation_repeats_itself_unless_the_period_is_the_image(local_workers, tiny_data):
    for period, repeats in ((4, True), (16, False), (None, False)):
        v = run(local_workers, tiny_data, max_passes=1, period=period)[-1].perturbation
        assert torch.equal(v[:, 4:, 4:], v[:, :-4, :-4]) == repeats


@pytest.mark.parametrize("options", [{}, {"random_start": 0.5}, {"norm": "l2", "radius": 200.0, "random_start": 0.5}])
def test_an_achromatic_perturbation_is_the_same_in_all_channels(local_workers, tiny_data, options):
    v = run(local_workers, tiny_data, max_passes=1, achromatic=True, **options)[-1].perturbation
    assert torch.equal(v[0], v[1]) and torch.equal(v[0], v[2]) and v[0].any()
    state = State.start((3, 8, 8), tiny_data[0].clean.labels, ComputeConfig(achromatic=True, **options))
    assert measure(state.iterate.v, state_norm := options.get("norm", "linf")) == pytest.approx(
        options.get("random_start", 0.0) * ComputeConfig(norm=state_norm, radius=options.get("radius")).ball_radius
    )


@pytest.mark.parametrize("options", [{}, {"round_size": 20, "block_size": 10, "local_steps": 5}])
def test_zoomed_views_reach_the_network(local_workers, tiny_data, options):
    plain, zoomed = (run(local_workers, tiny_data, max_passes=2, zoom=most, **options)[-1] for most in (None, 0.25))
    assert not torch.equal(plain.perturbation, zoomed.perturbation)
    assert zoomed.num_evaluations == plain.num_evaluations and zoomed.evaluation.val.rate > 0


def test_a_budget_below_one_round_says_what_is_needed(local_workers, tiny_data):
    with pytest.raises(
        ConfigError, match="do not pay for the clean labels of 47 training images and one round; give at least 67"
    ):
        run(local_workers, tiny_data, max_evaluations=60)
