"""SGA and DM-UAP beside ours (benchmarks/rivals.py) at toy size: on an affine network and a tiny one in this process."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY
from test_rules import TINY_NETWORK
from torch import nn
from torch.nn import functional as F

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import rivals
from comparison import published
from networks import NETWORKS

from uap_dist.data.decode import Geometry
from uap_dist.method.norms import add_perturbation, random_perturbation
from uap_dist.models.classifier import Classifier
from uap_dist.models.loading import load_classifier

RADIUS = 10.0


def sga(*of, seed, **options):
    (v,), cost = published.sga(*of, seeds=[seed], **options)
    return v, cost


@pytest.fixture
def affine():
    """A classifier whose logits are affine in the pixels, 300 images, and their labels."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(3 * 8 * 8, 6)
    linear.weight.data = torch.randn(linear.weight.shape, generator=generator) / 100
    linear.bias.data = -128 * linear.weight.data.sum(1)
    classifier = Classifier(nn.Sequential(nn.Flatten(), linear), name="affine", geometry=Geometry())
    pixels = (128 + 40 * torch.randn(300, 3, 8, 8, generator=generator)).clamp(0, 255).round()
    return classifier, pixels, classifier(pixels).argmax(1)


def fooling_rate(affine, v):
    classifier, pixels, labels = affine
    return float((classifier(add_perturbation(pixels, v)).argmax(1) != labels).float().mean())


@pytest.mark.parametrize(("attack", "in_an_epoch"), [(sga, 4), (published.dm_uap, 10 + 10 + 1)])
def test_rivals_stay_in_the_ball_cost_what_the_papers_say_and_beat_noise(affine, attack, in_an_epoch, monkeypatch):
    monkeypatch.setattr(published, "EPOCHS", 6)
    v, num_evaluations = attack(*affine, seed=0, radius=RADIUS)
    assert v.shape == (3, 8, 8) and v.abs().max() <= RADIUS * (1 + 1e-6)
    assert num_evaluations == 300 * (1 + 2 * 6 * in_an_epoch)
    noise = random_perturbation((3, 8, 8), norm="linf", radius=RADIUS, seed=0)
    found, by_chance = fooling_rate(affine, v), fooling_rate(affine, noise)
    assert found > by_chance + 0.3


def test_sga_repeats_a_seed_beside_others_and_takes_steps_of_a_tenth_of_the_radius(affine, monkeypatch):
    monkeypatch.setattr(published, "EPOCHS", 2)
    alone, _ = sga(*affine, seed=1, radius=RADIUS)
    (first, beside), _ = published.sga(*affine, seeds=(0, 1), radius=RADIUS)
    assert (beside - alone).abs().gt(1e-4).float().mean() < 0.02  # signs of slopes near zero depend on rounding
    assert (beside - first).abs().gt(1e-4).float().mean() > 0.02
    assert torch.allclose(alone, alone.round(), atol=1e-4)


def test_sga_takes_the_slope_through_the_clip(affine):
    classifier, pixels, labels = affine
    white = torch.full_like(pixels[None, :5], 254.0)
    v = torch.full((1, 3, 8, 8), -2.0)
    v[..., :4] = 2.0  # clipped there
    slopes = published._slopes(classifier, white, labels[None, :5], v)
    assert not slopes[..., :4].any() and slopes[..., 4:].all()


def test_dm_uap_moves_weights_and_images_to_smaller_losses_no_farther_than_their_radii():
    classifier = load_classifier(TINY)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    x = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = classifier(255 * x).argmax(1)

    def loss(images):
        return float(F.cross_entropy(classifier(255 * images), labels))

    near = published._move_images(classifier, x, labels, 2.0)
    assert loss(near) < loss(x) and (near - x).flatten(1).norm(dim=1).max() <= 2.0 + 1e-5
    assert near.min() >= 0 and near.max() <= 1
    at_first = loss(x)
    published._move_weights(classifier, x, labels, 0.1)
    moved = torch.cat([(value - before[name]).flatten() for name, value in classifier.state_dict().items()])
    assert loss(x) < at_first and 0.05 < moved.norm() <= 0.1 + 1e-5
    assert not classifier.training and not any(weight.requires_grad for weight in classifier.parameters())


def test_dm_uap_leaves_the_classifier_as_it_was(affine):
    classifier, pixels, labels = affine
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    published.dm_uap(classifier, pixels[:20], labels[:20], seed=0, radius=RADIUS)
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())


@pytest.fixture
def options(shards, tmp_path, monkeypatch):
    monkeypatch.setitem(NETWORKS, "tiny", TINY_NETWORK)
    order = ((("random", None),), (("ours", 200), ("ceiling", 300)), (("sga", None),), (("dm-uap", None),))
    monkeypatch.setattr(rivals, "ORDER", tuple((methods, rivals.ALL) for methods in order))
    monkeypatch.setattr(published, "EPOCHS", 2)
    return rivals.Options(networks=("tiny",), seeds=(0, 1), data=shards, output=tmp_path / "rivals.jsonl")


def test_every_run_is_measured_once_and_stands_beside_the_rivals(options, capsys):
    rivals.run(replace(options, only=("ours-*",), seeds=(1,)))
    rivals.run(options)
    rivals.run(options)
    lines = rivals.read(options.output)
    assert [(line["method"], line["seed"]) for line in lines] == [
        ("ours", 1),
        *(("random", seed) for seed in (0, 1)),
        ("ours", 0),
        *((method, seed) for method in ("ceiling", "sga", "dm-uap") for seed in (0, 1)),
    ]
    cost = {line["method"]: line["evaluations"] for line in lines}
    assert cost["random"] == 0 and cost["dm-uap"] == (1 + 2 * 2 * 21) * 47 and 47 < cost["ours"] <= 200
    assert 200 < cost["ceiling"] <= 300
    assert {line["num_source"] for line in lines if line["method"] == "ceiling"} == {20}
    assert all(line["rate"] == line["source_rate"] for line in lines if line["method"] == "ceiling")
    title, _, header, rule, *rows = "\n".join(rivals.table(lines)).splitlines()
    assert title.startswith("**tiny**, 20 held-out images") and header.count("|") == rule.count("|")
    ours = next(row for row in rows if row.startswith("| ours |")).split(" | ")
    rates = {m: [line["rate"] for line in lines if line["method"] == m] for m in ("ours", "sga")}
    assert float(ours[3].split()[0]) == pytest.approx(sum(rates["ours"]) / 2 - sum(rates["sga"]) / 2, abs=6e-4)


def test_nothing_begins_that_the_time_does_not_allow(options, capsys):
    rivals.run(replace(options, time_limit_s=0.0))
    assert not rivals.read(options.output)
    assert "no time left" in capsys.readouterr().out


def test_a_gpu_machine_needs_neither_ray_nor_mlflow():
    words = "import sys, rivals; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", words], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    assert not {"ray", "mlflow"} & set(done.stdout.split())
