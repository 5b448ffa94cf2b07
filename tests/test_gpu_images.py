"""What a worker does on a GPU beside the network, exercised where there is none: images kept in one tensor, and views taken there."""

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_worker

from uap_dist.data.decode import load_shard
from uap_dist.method.augment import augment, draw_views, take_views
from uap_dist.method.config import ComputeConfig
from uap_dist.method.rates import FOOLING
from uap_dist.models.loading import load_classifier
from uap_dist.rounds.plan import plan_run
from uap_dist.workers.messages import Examples, Together
from uap_dist.workers.solving import gpu_images
from uap_dist.workers.solving.batches import choose, parts_of, solve_chosen
from uap_dist.workers.solving.block_solver import BlockSolver
from uap_dist.workers.solving.gpu_images import GpuImages
from uap_dist.workers.solving.graphs import Graphs


@pytest.fixture
def decoded(shards):
    worker = tiny_worker()
    return [load_shard(str(shards / f"train-000{i}.tar"), worker.classifier.geometry) for i in range(3)]


def examples(shard, start, count, seed=0, label=1):
    return Examples("url", shard.digest, shard.keys[start : start + count], (label,) * count, seed=(seed, 0, 0))


@pytest.mark.parametrize("augmentation", ["none", "flip", "flip-shift"])
def test_views_taken_in_one_operation_are_those_of_the_cpu(augmentation):
    images = np.random.default_rng(0).integers(0, 256, size=(32, 3, 56, 60), dtype=np.uint8)
    rows = np.random.default_rng(1).permutation(32)[:20]
    views = draw_views(20, 60, augmentation, np.random.default_rng(2))
    chosen = map(torch.tensor, (rows, views.flips, views.shifts))
    expected = augment(images[rows], augmentation, np.random.default_rng(2))
    assert np.array_equal(take_views(torch.tensor(images), *chosen).numpy(), expected)


def test_images_are_kept_while_there_is_room_and_where_it_grows(decoded, monkeypatch):
    monkeypatch.setattr(gpu_images, "FIRST_ROOM", 4)
    size = decoded[0].images[0].nbytes
    room = len(decoded[0].keys) + len(decoded[1].keys)
    images = GpuImages(torch.device("cpu"), max_bytes=room * size)
    assert images.rows(examples(decoded[0], 0, 2)) is None
    assert [images.add(shard) for shard in decoded] == [True, True, False]
    assert images.add(decoded[0])  # nothing to be done
    for shard in decoded[:2]:
        rows = images.rows(examples(shard, 3, 4))
        assert np.array_equal(images.pixels[rows].numpy(), shard.images[3:7])
    assert images.rows(examples(decoded[2], 0, 1)) is None and len(images.pixels) == room


@pytest.mark.parametrize("zoom", [None, 0.25], ids=["as-they-are", "zoomed"])
@pytest.mark.parametrize("given", [TINY, (TINY, TINY.replace("Tiny", "Other"))], ids=["one", "several"])
def test_a_block_has_the_same_sums_from_images_that_lie_there(decoded, given, zoom):
    classifier, images = load_classifier(given), GpuImages(torch.device("cpu"), max_bytes=1 << 30)
    solver = plan_run([3], ComputeConfig(zoom=zoom), classifier.networks).solver
    label = [1, 2] if classifier.networks else 1
    blocks = (examples(decoded[0], 2, 3, label=label), None, examples(decoded[1], 0, 2, seed=7, label=label))
    v, scales = (
        5 * torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
    )
    if classifier.networks:
        scales = torch.stack([scales, 3 * scales], 1)
    by_digest = {shard.digest: shard for shard in decoded}
    task = Together(blocks, size=3)
    direct = BlockSolver(torch.device("cpu"), lambda some: by_digest[some.digest], Graphs())
    expected = direct.solve(classifier, task, v, scales, solver, None)
    for shard in decoded:
        images.add(shard)
    choice = torch.tensor(choose(parts_of(task, 16, solver), images))
    found = solve_chosen(choice, v, scales, images.pixels, classifier, solver)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert choice[:, -1].tolist() == [1, 1, 1, 0, 0, 0, 1, 1, 0]
    assert found[1][:, solver.names.index(FOOLING), 1].tolist() == [3, 0, 2]
