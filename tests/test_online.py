"""Perturbations that move with the network in training: their gradient, their steps, and that all workers hold the same."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from uap_dist.data.decode import Geometry
from uap_dist.finetuning.adversarial import OnlinePerturbations, PerturbedImages, perturb
from uap_dist.finetuning.batches import WorkerGroup
from uap_dist.finetuning.options import FinetuneConfig
from uap_dist.finetuning.trainer import TRAINED_ON, Learner, TrainingTask
from uap_dist.fleet.config import FleetConfig
from uap_dist.method.norms import measure, random_perturbation
from uap_dist.method.update import Steps
from uap_dist.models.classifier import Classifier
from uap_dist.perturbations.pool import PerturbationPool
from uap_dist.workers.reproducible import set_up_torch

ALONE = WorkerGroup(0, 1, torch.device("cpu"))
SHAPE = (3, 4, 4)
RADIUS = 20.0


class Linear(nn.Module):
    """Two classes whose logits are linear in the pixels."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.normal = 0.01 * torch.randn(SHAPE, generator=generator)

    def forward(self, x):
        score = (x * self.normal).sum((1, 2, 3))
        return torch.stack([score, torch.zeros_like(score)], 1)


def linear(seed):
    return Classifier(Linear(seed), name="linear", geometry=Geometry())


def online(norm="linf", period=32, **options):
    config = FinetuneConfig(online=True, **options)
    return OnlinePerturbations(SHAPE, Steps(norm, RADIUS, period, first_size=1.0, num_rounds=1), config, ALONE), config


def images(seed, count=12):
    return 255 * torch.rand((count, *SHAPE), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_against_a_linear_network_each_ends_where_the_loss_is_largest(norm):
    """For images of one class that is the point of the ball farthest against the normal of the boundary."""
    classifier, (moving, config) = linear(3), online(norm, online_perturbations=2, online_step=0.1, probability=1.0)
    pixels = 100 + images(3) / 5  # none is clipped
    for _ in range(100):
        batch = perturb(classifier, pixels, moving.v, config)
        cross_entropy(classifier(batch.pixels), torch.zeros(len(pixels), dtype=torch.int64)).backward()
        moving.step(batch)
    normal = classifier.network.normal
    expected = -RADIUS * (normal.sign() if norm == "linf" else normal / normal.norm())
    torch.testing.assert_close(moving.v, expected.expand(2, *SHAPE), rtol=0, atol=0.05 if norm == "l2" else 0)


@given(seed=st.integers(0, 2**31), num_perturbations=st.integers(1, 3))
@settings(max_examples=10)
def test_the_gradient_is_that_of_the_loss_at_v(seed, num_perturbations):
    """Clipped pixels and images that are left clean have none."""
    classifier, (moving, config) = linear(seed), online(online_perturbations=num_perturbations)
    pixels, truths = images(seed), torch.arange(12) % 2
    torch.manual_seed(seed)
    batch = perturb(classifier, pixels, moving.v, config)
    cross_entropy(classifier(batch.pixels), truths).backward()

    torch.manual_seed(seed)
    chosen, is_shown = torch.randint(num_perturbations, (12,)), torch.rand(12) < 0.75
    v = moving.v.clone().requires_grad_()
    shown = torch.stack(
        [(x + v[c]).clamp(0, 255) if s else x for x, c, s in zip(pixels, chosen, is_shown, strict=True)]
    )
    (expected,) = torch.autograd.grad(cross_entropy(classifier(shown), truths), v)
    torch.testing.assert_close(batch.pixels, shown)
    found = torch.stack([batch.added.grad[batch.members == m].sum(0) for m in range(num_perturbations)])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_they_start_apart_on_the_ball_and_stay_in_it(norm):
    moving, config = online(norm, online_perturbations=3, online_step=0.5)
    first = moving.v.clone()
    assert len({v.numpy().tobytes() for v in first}) == 3
    assert not torch.equal(first, online(norm, online_perturbations=3, seed=1)[0].v)
    for seed in range(5):
        batch = perturb(linear(seed), images(seed), moving.v, config)
        (batch.pixels**2).sum().backward()
        moving.step(batch)
    for v in (*first, *moving.v):
        assert measure(v, norm) <= RADIUS * (1 + 1e-6)
    assert not torch.equal(first, moving.v)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_training_shows_what_an_attack_would_deliver(norm):
    moving, config = online(norm, online_perturbations=1, online_step=0.7)
    batch = perturb(linear(0), images(0), moving.v, config)
    cross_entropy(linear(0)(batch.pixels), torch.zeros(12, dtype=torch.int64)).backward()
    moving.step(batch)
    inner = moving.state["v"].float()
    is_inside = (inner.abs() < RADIUS) & (inner.abs() > RADIUS / 4)
    assert is_inside.any()
    expected = torch.where(is_inside, RADIUS * inner.sign(), inner) if norm == "linf" else inner
    assert torch.equal(moving.v[is_inside], expected[is_inside])


def test_steps_repeat_themselves_as_those_of_the_attack():
    moving, config = online(period=2, online_step=0.1, online_perturbations=1)
    first = moving.state["v"].clone()
    batch = perturb(linear(0), images(0), moving.v, config)
    cross_entropy(linear(0)(batch.pixels), torch.zeros(12, dtype=torch.int64)).backward()
    moving.step(batch)
    (moved,) = (moving.state["v"] - first).sign() * (first.abs() == RADIUS)  # by clipping some stay where they are
    for row in (0, 2):
        for column in (0, 2):
            tile = moved[:, row : row + 2, column : column + 2]
            other = moved[:, :2, :2]
            assert ((tile == other) | (tile == 0) | (other == 0)).all()


@pytest.fixture
def task(tiny_data):
    members = torch.stack([random_perturbation((3, 16, 16), norm="linf", radius=40.0, seed=seed) for seed in (0, 1)])
    shared = {"norm": "linf", "radius": 40.0, "rule": "log-odds"}
    pool = PerturbationPool(members, shared, [{"name": "a"}, {"name": "b"}])
    config = FinetuneConfig(batch_size=8, epochs=3, learning_rate=1e-3, online=True, online_perturbations=2)
    return TrainingTask(TINY, None, *tiny_data, pool, config, FleetConfig())


def gradients(number):
    """What a worker's backward pass has left, as if from five images."""
    added = torch.zeros(5, *SHAPE, requires_grad=True)
    added.grad = torch.randn(added.shape, generator=torch.Generator().manual_seed(number))
    return PerturbedImages(added, added, torch.tensor([0, 1, 1, 0, 1]), 0)


def train_together(number, task, folder):
    """One of two workers, without Ray; saves what it ends with."""
    set_up_torch(1)
    where = f"file://{folder / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=where, rank=number, world_size=2)
    moving, _ = online(online_perturbations=2)
    moving._group = WorkerGroup(number, 2, torch.device("cpu"))
    moving.step(gradients(number))
    learner = Learner(task, number=number, num_workers=2, prepare=DistributedDataParallel)
    while not learner.is_done:
        learner.run_epoch()
    torch.save({"one step": moving.state, "trained": learner._online.state}, folder / f"{number}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_take_the_steps_of_their_sum_and_hold_the_same_bits(task, tmp_path):
    torch.multiprocessing.spawn(train_together, (task, tmp_path), nprocs=2)
    one, other = (torch.load(tmp_path / f"{number}.pt") for number in range(2))
    for what, state in one.items():
        assert all(torch.equal(state[name], other[what][name]) for name in ("v", "momentum"))
    both, _ = online(online_perturbations=2)
    first, second = gradients(0), gradients(1)
    first.added.grad.add_(second.added.grad)
    both.step(first)
    torch.testing.assert_close(one["one step"]["v"], both.state["v"])
    torch.testing.assert_close(one["one step"]["momentum"], both.state["momentum"])


def test_what_is_measured_is_what_moved(task):
    """Perturbations that follow a network which hardly learns fool it more than the random ones they began as; nothing else is paid."""
    learner = Learner(replace(task, config=replace(task.config, learning_rate=1e-6, online_step=0.3)))
    rates = []
    while not learner.is_done:
        rates.append(learner.run_epoch().metrics[f"fooling_rate/{TRAINED_ON}"])
    assert rates[-1] > rates[0] + 0.1
    assert learner.history[-1].metrics["total/evaluations"] == 3 * 2 * 40
    with torch.no_grad():
        val = torch.tensor(next(iter(learner._validation._images.in_order(20)))[0]).float()
        shown = (val + learner._online.v[torch.arange(20) % 2]).clamp(0, 255)
        fooled = learner.classifier(shown).argmax(1) != learner.classifier(val).argmax(1)
    assert fooled.float().mean() == pytest.approx(rates[-1])


@pytest.mark.parametrize(("config", "period"), [({"rule": "log-odds", "period": 4}, 4), ({"rule": "paper"}, 16)])
def test_balls_and_periods_are_those_of_the_pool(task, config, period):
    """The paper's rule has no period: steps against it do not repeat themselves."""
    shared = {"norm": "l2", "radius": 300.0} | config
    pool = PerturbationPool(task.pool.perturbations, shared, task.pool.members)
    moving = Learner(replace(task, pool=pool))._online
    assert (moving._steps.period == period) and moving._steps.norm == "l2"
    assert all(measure(v, "l2") == pytest.approx(300) for v in moving.v)
