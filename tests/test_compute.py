import io
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import random_samples, tiny_worker
from PIL import Image

from uap_dist.computing.rounds import NUM_PLACES, compute, count_rounds, describe_steps, plan_measurements, run_round
from uap_dist.data.write import write_shards
from uap_dist.errors import ConfigError, PerturbationError, ShardError
from uap_dist.method.config import ComputeConfig, warn_of_default_radius
from uap_dist.method.norms import measure
from uap_dist.method.schedule import Block, Round
from uap_dist.method.state import State
from uap_dist.tracking.history import RoundRecord
from uap_dist.workers.dataset import classify, load_dataset
from uap_dist.workers.disjoint import check_disjoint
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.worker import Worker

SMALL = {"round_size": 10, "block_size": 5, "radius": 20.0}


def run(workers, data, **options):
    return list(compute(workers, *data, ComputeConfig(**SMALL | options)))


def test_log_odds_beats_random_on_held_out_images(local_workers, tiny_data):
    from uap_dist.method.norms import random_perturbation
    from uap_dist.workers.dataset import classify, fooling_rate

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
    network = tiny_worker().classifier.double()
    from uap_dist.method.schedule import plan_rounds

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


def test_a_thinned_dataset_is_evenly_spread_and_keeps_its_labels(local_workers, tiny_data):
    train, _ = tiny_data
    assert train.thin(train.num_examples).digest == train.digest
    some = train.thin(7)
    assert some.num_examples == 7 and some.keys == [train.keys[i * train.num_examples // 7] for i in range(7)]
    labels = dict(zip(train.keys, train.clean.labels, strict=True))
    assert [labels[key] for key in some.keys] == some.clean.labels.tolist()
    again = classify(local_workers, some, np.zeros(train.shape, np.float32))
    assert again.labels.tolist() == some.clean.labels.tolist()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_random_start_is_that_share_of_the_radius_in_a_direction_of_the_seed(tiny_data, norm):
    def start(**options):
        return State.start(
            tiny_data[0].shape, tiny_data[0].num_examples, ComputeConfig(norm=norm, radius=20.0, **options)
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
    start = State.start(train.shape, train.num_examples, local)
    after, report = run_round(local_workers, train, Round(0, 0, False, (block,)), start, local, planned=1)
    alone, state = ComputeConfig(round_size=5, block_size=5, **common), start
    for number in range(3):
        part = Block(0, block.examples[5 * number : 5 * number + 5])
        state, _ = run_round(local_workers, train, Round(number, 0, False, (part,)), state, alone, planned=3)
    assert torch.allclose(after.iterate.v, state.iterate.v, atol=1e-5) and state.iterate.v.abs().max() > 2
    assert torch.allclose(after.iterate.momentum, state.iterate.momentum, atol=1e-5)
    assert (after.num_solves, after.num_evaluations) == (state.num_solves, state.num_evaluations)
    assert report.fooling.num_examples == 15


def test_local_steps_fool_in_a_fraction_of_the_rounds(local_workers, tiny_data):
    reports = run(local_workers, tiny_data, max_passes=4, round_size=20, block_size=10, local_steps=5, radius=20.0)
    assert len(reports) == 12
    assert reports[-1].evaluation.val.rate >= run(local_workers, tiny_data, max_passes=4)[-1].evaluation.val.rate - 0.1
    assert measure(reports[-1].perturbation, "linf") == 20


def test_the_first_step_doubles_where_blocks_are_averaged():
    def first(**options):
        return ComputeConfig(radius=10.0, **options).steps(100, (3, 16, 16)).sizes(0)

    assert first(round_size=20, block_size=10) == (8.0,)
    alone, averaged = (first(round_size=size, block_size=10, local_steps=2) for size in (10, 20))
    assert len(alone) == 2 and alone[0] == pytest.approx(8.0 * (125 / 200) ** 0.5)
    assert averaged == tuple(2 * size for size in alone)
    assert first(round_size=20, block_size=10, local_steps=2, step_size=3.0)[0] == 3.0


def test_a_perturbation_repeats_itself_unless_the_period_is_the_image(local_workers, tiny_data):
    for period, repeats in ((4, True), (16, False), (None, False)):
        v = run(local_workers, tiny_data, max_passes=1, period=period)[-1].perturbation
        assert torch.equal(v[:, 4:, 4:], v[:, :-4, :-4]) == repeats


def test_passes_default_to_ten_unless_evaluations_bound_them():
    assert count_rounds([50], ComputeConfig(round_size=25, block_size=25)) == 20
    assert count_rounds([50], ComputeConfig(round_size=25, block_size=25, max_evaluations=10_050)) == 200
    assert count_rounds([50], ComputeConfig(rule="paper", max_evaluations=10_050)) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": 0.0}, "radius is 0.0; it must be a positive"),
        ({"norm": "l1"}, "norm is 'l1'; it must be one of linf, l2"),
        ({"rule": "best"}, "rule is 'best'"),
        ({"target_fooling_rate": 0.0}, r"target fooling rate is 0.0; it must lie in \(0, 1\]"),
        ({"target_fooling_rate": 1.5}, "it must lie in"),
        ({"max_passes": 0}, "max passes is 0; it must be positive"),
        ({"candidates": 5}, "candidates does not belong to rule log-odds"),
        ({"rule": "paper", "step_size": 5.0}, "step size does not belong to rule paper"),
        ({"random_start": 1.5}, "random start is 1.5; it must lie in"),
        ({"seed": -1}, "seed is -1"),
        ({"rule": "paper", "candidates": 1}, "candidates is 1; it must be at least 2"),
        ({"augment": "rotate"}, "augment is 'rotate'; it must be one of none, flip, flip-shift"),
        ({"period": 0}, "period is 0; it must be positive"),
        ({"rule": "paper", "period": 8}, "period does not belong to rule paper"),
        ({"rule": "paper", "local_steps": 3}, "local steps does not belong to rule paper"),
        ({"local_steps": 0}, "local steps is 0; it must be positive and divide the block size, 3"),
        ({"local_steps": 2}, "local steps is 2; it must be positive and divide the block size, 3"),
        ({"round_size": 10, "block_size": 4}, "round size 10 is not a positive multiple of block size 4"),
    ],
)
def test_a_config_that_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ComputeConfig(**options)


def test_a_budget_below_one_round_says_what_is_needed(local_workers, tiny_data):
    with pytest.raises(
        ConfigError, match="do not pay for the clean labels of 47 training images and one round; give at least 67"
    ):
        run(local_workers, tiny_data, max_evaluations=60)


def test_more_images_than_there_are_and_shards_on_both_sides_are_refused(local_workers, tiny_data, shards):
    url = str(shards / "val-0000.tar")
    for options in ({"num_images": 0}, {"max_bad_fraction": 1.5}):
        with pytest.raises(ConfigError, match="it must"):
            load_dataset(local_workers, [url], **options)
    with pytest.raises(ConfigError, match="asked for 21 images, but the 1 shards from .* hold 20"):
        load_dataset(local_workers, [url], num_images=21)
    with pytest.raises(ShardError, match="training shard .* is also a held-out shard"):
        check_disjoint(tiny_data[1], load_dataset(local_workers, [url], num_images=5))


def png_to_webp(sample):
    data = io.BytesIO()
    Image.open(io.BytesIO(sample["png"])).save(data, "WEBP", lossless=True)
    return {"__key__": f"copy-of-{sample['__key__']}", "webp": data.getvalue()}


def test_held_out_images_that_are_training_images_are_left_out_or_end_it(local_workers, tiny_data, tmp_path, caplog):
    train, val = tiny_data
    assert check_disjoint(train, val) is val and not val.shared
    copies = [png_to_webp(sample) for sample in list(random_samples(47, seed=1))[30:32]]
    own = list(random_samples(18, seed=5))
    write_shards([*own[:9], copies[0], *own[9:], copies[1]], tmp_path, prefix="v", shard_size=10)
    mixed = load_dataset(local_workers, [str(tmp_path / f"v-{i:04d}.tar") for i in range(2)])
    with pytest.raises(
        ShardError,
        match=r"^2 of 20 held-out images are training images too, more than the allowed share 0.01 \(--max-bad-fraction\); "
        "the first: .*v-0000.tar: copy-of-s1-030 = .*train-0001.tar: s1-030; hold out",
    ):
        check_disjoint(train, mixed)
    left = check_disjoint(train, mixed, max_shared_fraction=0.1)
    assert left.keys == [sample["__key__"] for sample in own] and left.sizes == [9, 9] and len(left.shared) == 2
    rows = [mixed.keys.index(key) for key in left.keys]
    assert np.array_equal(left.clean.labels, mixed.clean.labels[rows]) and left.hashes == [
        mixed.hashes[i] for i in rows
    ]
    assert "left out 2 of 20 held-out images that are training images too: " + left.shared[0] in caplog.text
    write_shards(copies, tmp_path, prefix="c", shard_size=10)
    copied = load_dataset(local_workers, [str(tmp_path / "c-0000.tar")])
    with pytest.raises(ShardError, match="2 of 2 held-out images are training images too"):
        check_disjoint(train, copied, max_shared_fraction=1.0)


def test_the_same_images_in_another_order_are_no_held_out_images(local_workers, tiny_data, tmp_path):
    write_shards(list(random_samples(47, seed=1))[::-1], tmp_path, prefix="v", shard_size=20)
    val = load_dataset(local_workers, [str(tmp_path / "v-0001.tar")])
    with pytest.raises(ShardError, match="20 of 20 held-out images are training images too"):
        check_disjoint(tiny_data[0], val)


def test_equal_keys_and_images_that_are_there_twice_are_said(local_workers, tiny_data, tmp_path, caplog):
    others = [{**sample, "__key__": f"s1-{i:03d}"} for i, sample in enumerate(random_samples(4, seed=6))]
    write_shards([*others, {**others[2], "__key__": "again"}], tmp_path, prefix="v", shard_size=4)
    val = load_dataset(local_workers, [str(tmp_path / f"v-{i:04d}.tar") for i in range(2)])
    assert val.num_examples == 5
    assert "1 of 5 images duplicate an earlier one pixel for pixel and are counted again; the first: " in caplog.text
    assert f"{tmp_path}/v-0001.tar: again = {tmp_path}/v-0000.tar: s1-002" in caplog.text
    assert check_disjoint(tiny_data[0], val) is val
    assert "4 of 5 held-out images have the key of a training image but other pixels, the first s1-000" in caplog.text


def test_the_first_images_are_taken(local_workers, tiny_data, shards):
    urls = [str(shards / f"train-{i:04d}.tar") for i in range(3)]
    part = load_dataset(local_workers, urls, num_images=23)
    assert part.keys == tiny_data[0].keys[:23] and part.sizes == [20, 3]
    assert np.array_equal(part.clean.labels, tiny_data[0].clean.labels[:23])
    assert part.digest != tiny_data[0].digest


def test_bad_images_are_counted_and_too_many_end_it(local_workers, tmp_path, caplog):
    samples = list(random_samples(20, seed=3))
    samples[4]["png"] = b"broken"
    write_shards(samples, tmp_path, prefix="t", shard_size=20)
    url = str(tmp_path / "t-0000.tar")
    dataset = load_dataset(local_workers, [url], max_bad_fraction=0.05)
    assert dataset.num_examples == 19 and len(dataset.bad) == 1 and "s3-004" in caplog.text
    with pytest.raises(ShardError, match="1 of 20 images cannot be decoded, more than the allowed share 0.01"):
        load_dataset(local_workers, [url])


def test_pictures_that_make_no_example_are_said(local_workers, tmp_path, caplog):
    samples = [{**sample, "mask.png": sample["png"]} for sample in random_samples(7, seed=3)]
    write_shards(samples, tmp_path, prefix="t", shard_size=9)
    assert load_dataset(local_workers, [str(tmp_path / "t-0000.tar")]).num_examples == 7
    assert "left out 7 files that may be pictures" in caplog.text and "t-0000.tar: s3-000.mask.png; " in caplog.text


def test_a_config_is_read_back_from_what_a_perturbation_says_of_itself():
    config = ComputeConfig(norm="l2", max_evaluations=900, augment="flip", seed=3, random_start=0.5)
    provenance = asdict(config) | {"radius": config.ball_radius, "model": "x"}
    assert ComputeConfig.from_provenance(provenance, "v") == replace(config, radius=2000.0)
    with pytest.raises(PerturbationError, match="v does not say how it was computed"):
        ComputeConfig.from_provenance({}, "v")


def test_the_record_of_a_run_says_its_period_and_first_step():
    config = ComputeConfig(norm="l2", radius=90.0, round_size=10, block_size=5)
    assert describe_steps(600, (1, 30, 30), config) == {
        "steps.period": 128,
        "steps.first_size": 1.2 * 3 * (125 / 600) ** 0.5,
    }
    assert describe_steps(600, (1, 30, 30), replace(config, period=8, step_size=2.0)) == {
        "steps.period": 8,
        "steps.first_size": 2.0,
    }
    assert describe_steps(None, (1, 30, 30), ComputeConfig(rule="paper")) == {}


@pytest.mark.parametrize(
    ("options", "side", "is_warned"),
    [({}, 32, True), ({}, 260, False), ({"radius": 2000.0}, 32, False), ({"norm": "linf"}, 32, False)],
)
def test_the_default_l2_radius_is_questioned_on_images_of_another_size(options, side, is_warned, caplog):
    warn_of_default_radius(ComputeConfig(**{"norm": "l2"} | options), (3, side, side))
    assert ("the same root mean square is 286 (--radius 286)" in caplog.text) == is_warned
