import re
from dataclasses import asdict, replace
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import encode, random_samples
from hypothesis import given as given_examples
from hypothesis import strategies as st
from torch import nn

from uap_dist.analysis import boundaries, phase_transition, sample_size
from uap_dist.data.decode import Geometry
from uap_dist.data.write import write_shards
from uap_dist.errors import ConfigError, PerturbationError
from uap_dist.evaluation.evaluate import measure_perturbations
from uap_dist.method.config import ComputeConfig
from uap_dist.method.deepfool import deepfool
from uap_dist.method.norms import measure, paper_norm_l2
from uap_dist.method.schedule import plan_rounds
from uap_dist.models.classifier import Classifier, Predictions
from uap_dist.perturbations.files import Perturbation
from uap_dist.rounds.loop import compute
from uap_dist.workers.dataset import Dataset, load_dataset
from uap_dist.workers.listing import Shard
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.worker import Worker

MEMORY = 1 << 28
SHAPE = (3, 16, 16)


class Affine(nn.Module):
    """Three classes with known boundaries."""

    def __init__(self):
        super().__init__()
        weights = torch.randn(3, 768, generator=torch.Generator().manual_seed(5))
        self.weights = nn.Parameter(weights)

    def forward(self, pixels):
        return (pixels.flatten(1) - 128) @ self.weights.T


class Flat(nn.Module):
    """Says the same of every image but of noise, which has a larger deviation than the shards' images."""

    def forward(self, pixels):
        beyond = torch.relu(pixels.std((2, 3)).amax(1, keepdim=True) - 60)
        return torch.tensor([1.0, 0.0, 0.0]) * (1 + beyond)


def workers_of(network):
    classifier = Classifier(network, name="own", geometry=Geometry())
    return LocalWorkers(Worker(classifier, cache_bytes=1 << 30, num_threads=1))


@pytest.fixture
def v():
    return 30 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def test_normals_of_an_affine_classifier_are_those_of_its_boundaries(shards):
    network = Affine()
    workers = workers_of(network)
    data = load_dataset(workers, [str(shards / "train-0000.tar")])
    (found,) = workers.map(Worker.normals, data.blocks(24))
    normals = found.directions.reshape(-1, 768)
    assert len(normals) == 20 and found.num_left_out == 0
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, rtol=1e-6)
    weights = network.weights.detach().numpy()
    pixels = next(workers.map(Worker.pixels, data.blocks(24))).reshape(20, -1).astype(np.float64) - 128
    expected = []
    for x, label in zip(pixels, data.clean.labels, strict=True):
        slopes = np.delete(weights - weights[label], label, 0).astype(np.float64)
        distances = -(slopes @ x) / np.linalg.norm(slopes, axis=1)
        nearest = distances.argmin()
        expected.append(slopes[nearest] / np.linalg.norm(slopes[nearest]))
    np.testing.assert_allclose(normals, expected, atol=1e-5)  # whatever pixels are at 0 or 255
    assert ((pixels == -128) | (pixels == 127)).mean(1).max() > 0.2
    assert found.total.shape == SHAPE and found.total.dtype == np.float64


def test_images_that_deepfool_does_not_move_are_left_out(shards):
    workers = workers_of(Flat())
    data = load_dataset(workers, [str(shards / "train-0000.tar")])
    (found,) = workers.map(Worker.normals, data.blocks(24))
    assert found.directions.shape == (0, *SHAPE) and found.num_left_out == 20 and not found.total.any()
    with pytest.raises(ConfigError, match="2 singular .* DeepFool found only 0 normals; 20 images have none"):
        boundaries.gather_normals(workers, data, 2, MEMORY)
    with pytest.raises(ConfigError, match="the sum of DeepFool perturbations is zero everywhere; it has no direction"):
        list(transition(workers, data, data, torch.ones(SHAPE), boundaries.sum_steps(workers, data, MEMORY)))


def transition(workers, train, val, v, total, **options):
    settings = {"scales": (0.5, 1.0), "num_draws": 2, "seed": 0} | options
    return phase_transition.phase_transition(workers, train, val, v, total, **settings)


def test_normals_sum_and_spectrum_are_those_of_deepfool(local_workers, tiny_data):
    train, _ = tiny_data
    found = boundaries.gather_normals(local_workers, train, 10, MEMORY)
    rows, total = [], np.zeros(SHAPE)
    for block, pixels in zip(train.blocks(24), local_workers.map(Worker.pixels, train.blocks(24)), strict=True):
        classifier = local_workers._worker.classifier
        solved = deepfool(classifier, torch.tensor(pixels).float(), torch.zeros(SHAPE), torch.tensor(block.labels))
        for step, normal, is_solved in zip(solved.steps, solved.normals, solved.is_solved, strict=True):
            if is_solved:
                rows.append(normal.flatten().double())
                total += step.double().numpy()
    assert found.spectrum.num_rows == len(rows) == 47 and found.num_left_out == 0
    np.testing.assert_allclose(found.spectrum.values, torch.linalg.svdvals(torch.stack(rows)), atol=1e-4)
    assert found.spectrum.energy == pytest.approx(len(rows), rel=1e-6)
    np.testing.assert_allclose(found.total, total, rtol=1e-4, atol=1e-4)  # the worker's threads round otherwise
    assert torch.equal(found.total, boundaries.sum_steps(local_workers, train, MEMORY))
    # waves of one block, which all that fits into less memory is, change nothing
    cramped = boundaries.gather_normals(local_workers, train, 10, 2_000_000)
    assert np.array_equal(cramped.spectrum.values, found.spectrum.values)


def test_the_mean_image_is_the_mean(local_workers, tiny_data, tmp_path):
    train, _ = tiny_data
    pixels = np.concatenate(list(local_workers.map(Worker.pixels, train.blocks(24))))
    np.testing.assert_allclose(phase_transition.mean_image(local_workers, train), pixels.mean(0), rtol=1e-12)
    nothing = replace(train, shards=(), clean=replace(train.clean, labels=np.zeros(0, np.int64)))
    with pytest.raises(ConfigError, match="no mean image of zero images"):
        phase_transition.mean_image(local_workers, nothing)
    black = [{**sample, "png": encode(np.zeros((16, 16, 3), np.uint8))} for sample in random_samples(5, seed=3)]
    write_shards(iter(black), tmp_path, prefix="black", shard_size=5)
    dark = load_dataset(local_workers, [str(tmp_path / "black-0000.tar")])
    with pytest.raises(ConfigError, match="the mean image is zero everywhere"):
        list(transition(local_workers, dark, train, torch.ones(SHAPE), torch.ones(SHAPE)))


def test_a_phase_transition_measures_v_as_an_evaluation_does_and_all_others_at_its_norms(local_workers, tiny_data, v):
    train, val = tiny_data
    total = boundaries.sum_steps(local_workers, train, MEMORY)
    points = list(transition(local_workers, train, val, v, total))
    expected = list(measure_perturbations(local_workers, "tiny", "val", val, [Perturbation("v", v)], scales=(0.5, 1.0)))
    for norm in ("l2", "linf"):
        own = [p for p in points if p.kind == phase_transition.UNIVERSAL and p.norm == norm]
        assert [(p.scale, p.norm_l2, p.norm_linf, p.fooling) for p in own] == [
            (m.scale, m.norm_l2, m.norm_linf, m.fooling) for m in expected
        ]
    for p in points:
        assert getattr(p, f"norm_{p.norm}") == pytest.approx(p.scale * measure(v, p.norm), rel=1e-5)
        assert p.fooling.num_examples == 20
    draws = {(p.kind, p.draw) for p in points}
    assert len(points) == 2 * 2 * len(draws) and len(draws) == 1 + 2 + 2 + 2 + 1 + 1
    assert sum(kind == phase_transition.SINGLE for kind, _ in draws) == 2


def test_single_images_are_drawn_with_the_seed(local_workers, tiny_data):
    train, _ = tiny_data
    steps = [list(islice(phase_transition._single_steps(local_workers, train, seed), 3)) for seed in (0, 0, 1)]
    assert all(map(torch.equal, steps[0], steps[1])) and not torch.equal(steps[0][0], steps[2][0])
    assert measure(steps[0][0], "l2") == pytest.approx(1)


def test_vectors_of_the_subspace_lie_in_it(local_workers, tiny_data):
    vectors = boundaries.gather_normals(local_workers, tiny_data[0], 5, MEMORY).spectrum.vectors
    basis = torch.from_numpy(vectors)
    inside = list(boundaries.subspace_directions(vectors, SHAPE, 2, seed=0))
    outside = [d for d in phase_transition.random_directions(SHAPE, 2, seed=0) if d.kind == phase_transition.SPHERE]
    for one, other in zip(inside, outside, strict=True):
        assert torch.allclose(one.v.flatten() @ basis.T @ basis, one.v.flatten(), atol=1e-5)
        assert measure(one.v, "l2") == pytest.approx(1, rel=1e-5) and one.v.shape == SHAPE
        assert (other.v.flatten() @ basis.T).norm() < 0.3 * other.v.norm()
    assert not torch.equal(inside[0].v, inside[1].v)


def test_all_that_is_compared_with_the_subspace_is_as_long(local_workers, tiny_data, v):
    train, val = tiny_data
    normals = boundaries.gather_normals(local_workers, train, 5, MEMORY)
    found = boundaries.analyze_boundaries(
        local_workers, val, v, normals, norm_l2=300.0, num_draws=2, memory_bytes=MEMORY, seed=0
    )
    assert [p.kind for p in found.points] == [
        phase_transition.UNIVERSAL,
        *2 * [boundaries.SUBSPACE],
        *2 * [phase_transition.SPHERE],
    ]
    assert all(p.norm_l2 == pytest.approx(300, rel=1e-5) for p in found.points)
    assert found.random.num_rows == normals.spectrum.num_rows
    # normals of one small network share directions, random vectors do not
    assert found.spectrum.dimension(0.9) < found.random.dimension(0.9)
    assert found.spectrum.values[0] > 1.5 * found.random.values[0]


def test_random_unit_vectors_have_the_spectrum_that_theory_gives():
    spectrum = boundaries.random_spectrum(200, 800, MEMORY, seed=0)
    assert spectrum.energy == pytest.approx(200, rel=1e-5)
    edges = 1 + (200 / 800) ** 0.5, 1 - (200 / 800) ** 0.5  # Marchenko and Pastur, of rows of length 1
    assert spectrum.values[0] == pytest.approx(edges[0], rel=0.05) and spectrum.values[-1] == pytest.approx(
        edges[1], rel=0.05
    )


def test_lengths_of_other_input_sizes_are_as_strong_as_the_papers():
    assert paper_norm_l2((3, 224, 224)) == 2000
    assert paper_norm_l2((3, 112, 112)) == pytest.approx(1000)


CONFIG = ComputeConfig(round_size=10, block_size=5, max_evaluations=47 + 100, radius=20.0, seed=3)


@pytest.fixture
def given(local_workers, tiny_data):
    *_, last = compute(local_workers, *tiny_data, CONFIG)
    provenance = {**asdict(CONFIG), "num_evaluations": last.num_evaluations, "num_train_images": 47}
    return Perturbation("given", last.perturbation, provenance), last


def test_perturbations_of_fewer_images_are_what_the_thinned_data_gives(local_workers, tiny_data, given):
    (train, val), (perturbation, last) = tiny_data, given
    plan = sample_size.configs_by_size(train, sample_size.Recipe.of(perturbation), (12, 47), 2)
    assert list(plan) == [(12, 3), (12, 4), (47, 3), (47, 4)]
    found = {(p.num_images, p.seed): p for p in sample_size.compute_sample_sizes(local_workers, train, val, plan)}
    assert len(found) == 4
    work = last.num_evaluations - 47  # less than 100, as a round more would not fit
    *_, direct = compute(
        local_workers, train.thin_by_blocks(12, 5), val, replace(CONFIG, seed=4, max_evaluations=12 + work)
    )
    point = found[12, 4]
    assert (point.val, point.train) == (direct.evaluation.val, direct.evaluation.train)
    assert point.train.num_examples == 12 and point.val.num_examples == 20
    assert point.num_evaluations == direct.num_evaluations <= 12 + work
    # all images and the own seed give the perturbation itself
    assert (found[47, 3].val, found[47, 3].train) == (last.evaluation.val, last.evaluation.train)
    assert found[47, 3].num_evaluations == last.num_evaluations


def test_numbers_that_cannot_be_are_refused(tiny_data, given):
    train, _ = tiny_data
    for number in (9, 48):
        message = f"of {number} training images (--numbers) cannot be compared: its rounds would have another size;"
        with pytest.raises(ConfigError, match=re.escape(message)):
            sample_size.configs_by_size(train, sample_size.Recipe.of(given[0]), (number,), 1)
    with pytest.raises(PerturbationError, match="published does not say how .* leave images"):
        sample_size.Recipe.of(Perturbation("published", torch.ones(SHAPE)))
    poor = replace(sample_size.Recipe.of(given[0]), num_evaluations=4)
    with pytest.raises(ConfigError, match="do not pay for"):
        sample_size.configs_by_size(train, poor, (47,), 1)


def dataset_of(sizes):
    shards = tuple(
        Shard(
            f"{n}.tar",
            str(n),
            tuple(f"{n}-{i}" for i in range(size)),
            np.full(size, -1),
            np.zeros((size, 16), np.uint8),
        )
        for n, size in enumerate(sizes)
    )
    count = sum(sizes)
    return Dataset(shards, SHAPE, (), Predictions(np.arange(count), np.zeros(count, np.float32)))


def test_few_images_of_many_shards_make_rounds_as_large_as_many_images_do():
    data = dataset_of([10] * 60)
    for number in (39, 600):
        few = data.thin_by_blocks(number, 3)
        assert few.num_examples == number and len(set(few.keys)) == number
        rounds = list(islice(plan_rounds(few.sizes, seed=0, round_size=6, block_size=3), 12))
        assert 5 <= sum(r.num_examples for r in rounds) / len(rounds) <= 6  # shards of ten make blocks of 3, 3, 2 and 2
    assert len(data.thin_by_blocks(39, 3).shards) == 13  # evenly spread, in case the shards are sorted
    with_thin = list(islice(plan_rounds(data.thin(39).sizes, seed=0, round_size=6, block_size=3), 12))
    assert sum(r.num_examples for r in with_thin) / len(with_thin) < 2.1


@given_examples(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8), block_size=st.integers(1, 6), data=st.data()
)
def test_thinning_by_blocks_gives_as_many_examples_as_asked_for(sizes, block_size, data):
    whole = dataset_of(sizes)
    number = data.draw(st.integers(1, sum(sizes)))
    few = whole.thin_by_blocks(number, block_size)
    assert few.num_examples == number and len(set(few.keys)) == number and set(few.keys) <= set(whole.keys)
    assert [whole.keys[label] for label in few.clean.labels] == few.keys
    num_whole_blocks = sum(n // block_size for n in few.sizes)
    assert num_whole_blocks == min(number // block_size, sum(n // block_size for n in sizes))


def test_the_ladder_of_numbers_ends_at_all_and_begins_with_a_round():
    assert sample_size.default_numbers(5000, 6) == (19, 78, 312, 1250, 5000)
    assert sample_size.default_numbers(47, 12) == (47,)
    assert sample_size.default_numbers(500, 1000) == (500,)  # which `configs_by_size` then refuses


def test_a_subspace_that_cannot_be_had_is_refused_before_work():
    check = boundaries.check_subspace
    check(100, 100, SHAPE, MEMORY)
    with pytest.raises(
        ConfigError, match=re.escape("101 singular vectors (--num-singular) asked for, but there are 100 normals")
    ):
        check(101, 100, SHAPE, MEMORY)
    with pytest.raises(ConfigError, match="images have only 768 values"):
        check(800, 1000, SHAPE, MEMORY)
    with pytest.raises(
        ConfigError, match=re.escape("0.001 GiB (--memory-gib) hold 108 of the 109 normals, which leaves 54")
    ):
        check(100, 109, SHAPE, 2**30 // 1000)


def test_what_is_not_a_direction_is_refused(local_workers, tiny_data):
    with pytest.raises(ConfigError, match="the universal perturbation is zero everywhere"):
        list(transition(local_workers, *tiny_data, torch.zeros(SHAPE), torch.ones(SHAPE)))
