"""Fine-tuning in this process: the learner, its images, its factors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY, random_samples
from torch import nn

from uap_dist.data.decode import Geometry
from uap_dist.data.write import write_shards
from uap_dist.errors import ClassifierError, ConfigError, ShardError
from uap_dist.evaluation.evaluate import measure_perturbations
from uap_dist.finetuning.adversarial import smallest_factors
from uap_dist.finetuning.batches import ImageReader, WorkerImages
from uap_dist.finetuning.network import check_labels, check_trainable, check_truths, make_optimiser
from uap_dist.finetuning.options import FinetuneConfig
from uap_dist.finetuning.trainer import HELD_OUT, NETWORK_FILE, TRAINED_ON, Learner, TrainingTask
from uap_dist.fleet.config import FleetConfig
from uap_dist.method.norms import random_perturbation
from uap_dist.models.classifier import Classifier
from uap_dist.models.loading import load_classifier
from uap_dist.perturbations.pool import PerturbationPool
from uap_dist.workers.dataset import load_dataset, reload_dataset
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.worker import Worker

NORMED = TINY.replace(":Tiny", ":Normed")


@pytest.fixture
def pool():
    """Two members of random signs: one to train on, one held out."""
    members = torch.stack([random_perturbation((3, 16, 16), norm="linf", radius=40.0, seed=seed) for seed in (0, 1)])
    shared = {"norm": "linf", "radius": 40.0, "rule": "log-odds"}
    return PerturbationPool(members, shared, [{"name": "a"}, {"name": "b"}])


def reader(**options):
    return ImageReader(Geometry(), FleetConfig(**options))


def learner(data, pool, model=TINY, **options):
    config = FinetuneConfig(**{"batch_size": 8, "epochs": 2, "learning_rate": 1e-3} | options)
    return Learner(TrainingTask(model, None, *data, pool, config, FleetConfig()))


def test_a_worker_with_other_weights_than_the_driver_is_refused(tiny_data, pool):
    task = TrainingTask(TINY, None, *tiny_data, pool, FinetuneConfig(), FleetConfig(), weights_digest="0" * 64)
    with pytest.raises(ClassifierError, match="training worker 0 loaded other weights of .*:Tiny than the driver"):
        Learner(task)


def finish(some):
    while not some.is_done:
        some.run_epoch()
    return some.classifier.network.state_dict()


def same(state, other):
    return all(torch.equal(state[key], other[key]) for key in state)


def test_factor_is_the_smallest_of_the_ladder_that_fools():
    class Threshold(nn.Module):  # label 1 where the first pixel is above 100
        def forward(self, x):
            return torch.stack([torch.full((len(x),), 100.0), x[:, 0, 0, 0]], 1)

    classifier = Classifier(Threshold(), name="t", geometry=Geometry(), std=(1 / 255,) * 3)
    pixels, added = torch.full((4, 3, 2, 2), 50.0), torch.zeros(4, 3, 2, 2)
    added[:, 0, 0, 0] = torch.tensor([60.0, 101.0, 250.0, 30.0])  # fooled from α = 0.83, 0.495 and 0.2 on, and never
    factors, spent = smallest_factors(classifier, pixels, added, (0.25, 0.5, 1.0))
    assert factors.tolist() == [1.0, 0.5, 0.25, 1.0]
    assert spent == 4 + 4 + 3


def test_every_image_is_shown_once_an_epoch_in_an_order_of_its_own(tiny_data):
    train, _ = tiny_data
    parts = [WorkerImages(train.part(number, 2), reader(), num_shards=1) for number in range(2)]
    whole = WorkerImages(train, reader(), num_shards=9)
    everything = np.concatenate([images for images, _ in whole.in_order(7)])
    assert len(everything) == 47
    for seed in (0, 1):
        batches = [b for part in parts for b in part.views(np.random.default_rng(seed), 1, "none")]
        found = {images.tobytes(): truth for images, (truth,) in batches}
        assert len(batches) == len(found) == 47 and set(found) == {image[None].tobytes() for image in everything}
    first, second = (
        np.concatenate([truths for _, truths in whole.views(np.random.default_rng(seed), 5, "none")]) for seed in (0, 1)
    )
    assert len(first) == 45 and not np.array_equal(first, second)


@pytest.mark.parametrize("augmentation", ["none", "flip-shift", "random-resized-crop"])
def test_images_and_truths_stay_together(tiny_data, augmentation):
    train, _ = tiny_data
    part = WorkerImages(train, reader(), num_shards=2)
    for images, truths in part.views(np.random.default_rng(0), 4, augmentation):
        assert (images.mean((2, 3)).argmax(1) == truths).mean() > 0.7  # the class is the strongest colour


def test_a_shard_that_has_changed_is_refused(tmp_path, local_workers):
    write_shards(random_samples(9, seed=5), tmp_path, prefix="x", shard_size=9)
    dataset = load_dataset(local_workers, [str(tmp_path / "x-0000.tar")])
    write_shards(random_samples(9, seed=6), tmp_path, prefix="x", shard_size=9)
    with pytest.raises(ShardError, match="changed during the run"):
        next(WorkerImages(dataset, reader(), 1).in_order(3))
    with pytest.raises(ShardError, match="changed during the run"):
        next(WorkerImages(dataset, reader(), 1).views(np.random.default_rng(0), 3, "random-resized-crop"))


def test_it_learns_and_repeats_to_the_bit(tiny_data, pool):
    one, other = (
        learner(tiny_data, pool, epochs=8, learning_rate=0.01),
        learner(tiny_data, pool, epochs=8, learning_rate=0.01),
    )
    assert same(finish(one), finish(other))
    assert not same(one.classifier.network.state_dict(), finish(learner(tiny_data, pool, seed=1)))
    first, *_, last = one.history
    assert last.step == 8 and last.metrics["train/learning_rate"] < 0.001
    assert last.metrics["top1/clean"] > first.metrics["top1/clean"] + 0.2
    assert last.metrics[f"fooling_rate/{TRAINED_ON}"] < first.metrics[f"fooling_rate/{TRAINED_ON}"]
    assert last.metrics["total/evaluations"] == 8 * 2 * 40  # five batches of eight of 47 images


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adaptive": True, "model": NORMED, "batch_norm": "train"},
        {"online": True, "online_perturbations": 2},
        {"online": True, "adaptive": True},
        {"training_precision": "bfloat16", "augment": "random-resized-crop"},
        {"optimiser": "adamw"},
        {"ema_decay": 0.9, "model": NORMED},
    ],
)
def test_an_interrupted_training_ends_in_the_same_bits(tiny_data, pool, tmp_path, options):
    whole = learner(tiny_data, pool, **options)
    finish(whole)
    part = learner(tiny_data, pool, **options)
    part.run_epoch(), part.run_epoch()
    part.save(tmp_path)
    rest = learner(tiny_data, pool, **options)
    rest.load(tmp_path)
    assert same(finish(rest), whole.classifier.network.state_dict())
    metrics = [[{k: v for k, v in r.metrics.items() if "second" not in k} for r in x.history] for x in (rest, whole)]
    assert metrics[0] == metrics[1]


def test_the_average_of_the_weights_is_measured_and_saved_and_trains_nothing(tiny_data, pool, tmp_path):
    plain, averaged = learner(tiny_data, pool), learner(tiny_data, pool, ema_decay=0.75)
    expected = {key: value.clone() for key, value in plain.classifier.network.state_dict().items()}

    def average(*_):
        for key, value in plain.classifier.network.state_dict().items():
            expected[key] = 0.75 * expected[key] + 0.25 * value

    plain._optimiser.register_step_post_hook(average)
    assert same(finish(plain), finish(averaged))
    measured = averaged.measured.network.state_dict()
    assert not same(measured, averaged.classifier.network.state_dict())
    for key, value in expected.items():
        torch.testing.assert_close(measured[key], value)
    averaged.save(tmp_path)
    saved = load_classifier(TINY, str(tmp_path / NETWORK_FILE))
    assert same(saved.network.state_dict(), measured)
    workers = LocalWorkers(Worker(saved, cache_bytes=1 << 30, num_threads=1))
    val = reload_dataset(workers, tiny_data[1])
    assert averaged.history[-1].metrics["top1/clean"] == float((val.clean.labels == val.truths).mean())


@pytest.mark.parametrize(("smoothing", "is_same"), [(1.0, True), (0.0, False), (0.5, False)])
def test_labels_that_are_spread_over_all_classes_are_no_longer_seen(tiny_data, pool, smoothing, is_same):
    train, val = tiny_data
    other = replace(train, shards=tuple(replace(shard, truths=0 * shard.truths) for shard in train.shards))
    a, b = (finish(learner((data, val), pool, label_smoothing=smoothing, epochs=1)) for data in (train, other))
    assert same(a, b) == is_same


@pytest.mark.parametrize(
    ("norm", "kind", "rate"),
    [
        (nn.Identity(), torch.optim.SGD, 0.0001),
        (nn.BatchNorm2d(3), torch.optim.SGD, 0.01),
        (nn.LayerNorm(8), torch.optim.AdamW, 0.00001),
        (nn.Sequential(nn.LayerNorm(8), nn.BatchNorm2d(3)), torch.optim.SGD, 0.01),
    ],
)
def test_the_optimiser_follows_the_networks_norms_unless_it_is_given(norm, kind, rate):
    network = nn.Sequential(nn.Conv2d(3, 3, 1), norm)
    classifier = Classifier(network, name="n", geometry=Geometry())
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    found = make_optimiser(classifier, FinetuneConfig())
    assert type(found) is kind and found.param_groups[0]["lr"] == rate
    given = make_optimiser(classifier, FinetuneConfig(optimiser="adamw", learning_rate=0.5))
    assert type(given) is torch.optim.AdamW and given.param_groups[0]["lr"] == 0.5


def test_steps_in_bfloat16_are_nearly_those_in_float32(tiny_data, pool):
    """Weights stay in float32: they are not rounded after each step."""
    half, full = (learner(tiny_data, pool, training_precision=precision) for precision in ("bfloat16", "float32"))
    a, b, first = finish(half), finish(full), load_classifier(TINY).network.state_dict()
    assert not same(a, b)
    for key in a:
        moved, error = (b[key] - first[key]).norm(), (a[key] - b[key]).norm()
        assert a[key].dtype == torch.float32 and error < 0.1 * moved


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
def test_what_learns_is_what_was_left_trainable(tiny_data, pool, batch_norm):
    trained = learner(tiny_data, pool, NORMED, batch_norm=batch_norm)
    before = {key: value.clone() for key, value in trained.classifier.network.state_dict().items()}
    after = finish(trained)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    statistics = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    learned = {f"{layer}.{kind}" for layer in ("conv", "norm", "head") for kind in ("weight", "bias")}
    assert changed == learned | (statistics if batch_norm == "train" else set())


def test_rates_of_an_epoch_are_those_of_an_evaluation(tiny_data, pool):
    train, val = tiny_data
    trained = learner(tiny_data, pool)
    finish(trained)
    classifier = load_classifier(TINY)
    classifier.network.load_state_dict(trained.classifier.network.state_dict())
    workers = LocalWorkers(Worker(classifier, cache_bytes=1 << 30, num_threads=1))
    data = reload_dataset(workers, val)
    a, b = measure_perturbations(workers, "tiny", "val", data, pool.to_perturbations())
    metrics = trained.history[-1].metrics
    for group, m in ((TRAINED_ON, a), (HELD_OUT, b)):
        assert metrics[f"fooling_rate/{group}"] == m.fooling.rate and metrics[f"num_images/{group}"] == 20
        assert metrics[f"top1/{group}"] == m.top1.rate
    assert metrics["top1/clean"] == a.top1_clean.rate and metrics["top5/clean"] == 1.0  # of four classes


def test_two_workers_see_all_images_between_them(tiny_data, pool):
    """What each measures on its part of the held-out images, together, is what one measures on all."""
    config = FinetuneConfig(batch_size=8)
    task = TrainingTask(TINY, None, *tiny_data, pool, config, FleetConfig())
    parts = [task.val.part(number, 3) for number in range(3)]
    assert [key for part in parts for key in part.keys] == task.val.keys
    assert sorted(part.num_examples for part in parts) == [6, 7, 7]
    assert np.array_equal(np.concatenate([part.truths for part in parts]), task.val.truths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0; it must be positive"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan"),
        ({"probability": 1.5}, r"probability is 1.5; it must lie in \[0, 1\]"),
        ({"weight_decay": -1.0}, "must not be negative"),
        ({"ladder": (0.5, 0.5)}, "ladder is .*ascending positive numbers"),
        ({"ladder": ()}, "ladder is"),
        ({"ladder": (0.5, 1.0)}, "ladder belongs to --adaptive"),
        ({"augment": "rotate"}, "augment is 'rotate'; it must be one of none, flip, flip-shift, random-resized-crop"),
        ({"momentum": 1.0}, r"momentum is 1.0; it must lie in \[0, 1\)"),
        ({"ema_decay": 1.0}, r"--ema-decay is 1.0; it must lie in \[0, 1\)"),
        ({"label_smoothing": 1.5}, r"--label-smoothing is 1.5; it must lie in \[0, 1\]"),
        ({"optimiser": "adam"}, "optimiser is 'adam'; it must be one of sgd, adamw"),
        ({"training_precision": "half"}, "--training-precision is 'half'; it must be one of float32, bfloat16"),
        ({"batch_norm": "off"}, "--batch-norm is 'off'; it must be frozen or train"),
        ({"online": True, "online_perturbations": 0}, "--online-perturbations is 0; it must be positive"),
        ({"online": True, "online_step": float("nan")}, r"--online-step is nan; it must lie in \(0, 1\]"),
        ({"online_perturbations": 3}, "--online-perturbations belongs to --online; give that as well"),
        ({"online_step": 0.5}, "--online-step belongs to --online"),
        ({"online": True, "held_out_members": 1}, "no member of the pool is trained on; leave out --held-out-members"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        FinetuneConfig(**options)


def test_pools_and_batches_that_cannot_be_shared_are_refused(pool):
    with pytest.raises(ConfigError, match="the pool has 2 members, of which 2 would be held out; give a larger pool"):
        FinetuneConfig(held_out_members=2).split(pool)
    with pytest.raises(ConfigError, match="the pool has 1 members, of which 1 would be held out"):
        FinetuneConfig().split(pool.take(0, 1))
    assert [len(part.members) for part in FinetuneConfig(held_out_members=1).split(pool)] == [1, 1]
    with pytest.raises(ConfigError, match="batch size 9 is not a multiple of 2 workers"):
        FinetuneConfig(batch_size=9).check_workers(2)
    with pytest.raises(ConfigError, match="47 training images are fewer than one batch of 64"):
        FinetuneConfig().check_images(47)


def test_a_network_without_anything_to_learn_is_refused(tiny_data, pool, tmp_path):
    (tmp_path / "fixed.py").write_text(
        f"import sys; sys.path.insert(0, {str(TINY.rpartition('/')[0])!r})\n"
        "from tiny import Tiny\ndef fixed():\n    return Tiny().requires_grad_(False)\n"
    )
    with pytest.raises(ConfigError, match="has no trainable parameters"):
        check_trainable(load_classifier(f"{tmp_path / 'fixed.py'}:fixed"))
    with pytest.raises(ConfigError, match="has no trainable parameters"):
        learner(tiny_data, pool, f"{tmp_path / 'fixed.py'}:fixed")


def test_a_training_that_diverges_says_so(tiny_data, pool):
    trained = learner(tiny_data, pool, learning_rate=1e30)
    trained.run_epoch()
    with pytest.raises(ConfigError, match=r"the training of epoch 1 diverged .*give a --learning-rate below 1e\+30"):
        trained.run_epoch()


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (lambda cls: None, "for 20 of 20 training images there are no labels; give shards with .cls"),
        (lambda cls: 17, "20 of 20 training images have labels outside the network's 4 classes, such as 17"),
        (
            lambda cls: 0,
            "of the training images, no more than always predicting class 0 .1.000.: its classes are not the data",
        ),
    ],
)
def test_labels_that_are_not_the_networks_are_refused(label, message, tmp_path, tiny_data, local_workers):
    samples = ({**s, "cls": label(s["cls"])} for s in random_samples(20, seed=7))
    samples = ({k: v for k, v in s.items() if v is not None} for s in samples)
    write_shards(samples, tmp_path, prefix="other", shard_size=20)
    other = load_dataset(local_workers, [str(tmp_path / "other-0000.tar")])
    with pytest.raises(ConfigError, match=message):
        check_truths(load_classifier(TINY), other, tiny_data[1])
        check_labels(other)
