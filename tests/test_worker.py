import shutil

import numpy as np
import pytest
import torch
from conftest import tiny_worker

from uap_dist.errors import ShardError
from uap_dist.method.config import ComputeConfig
from uap_dist.workers.messages import Examples

V = np.random.default_rng(0).normal(0, 5, size=(1, 3, 16, 16)).astype(np.float32)


def examples(url, worker, count=6):
    listing = worker.load(Examples(url))
    return Examples(url, listing.digest, listing.keys[:count], (0,) * count, seed=(1, 2, 3))


@pytest.mark.parametrize("rule", ["log-odds", "paper"])
def test_results_do_not_depend_on_what_is_cached(shards, rule):
    url = str(shards / "train-0000.tar")
    roomy, cramped = tiny_worker(), tiny_worker(cache_bytes=1)
    task = examples(url, roomy)
    cramped.load(Examples(url))
    results = [worker.solve(task, V, ComputeConfig(rule=rule).solver) for worker in (roomy, cramped, tiny_worker())]
    for other in results[1:]:
        assert np.array_equal(results[0].total, other.total)
        assert results[0].digest() == other.digest()


def test_a_sum_is_the_sum_over_its_examples(shards):
    worker = tiny_worker()
    task = examples(str(shards / "train-0000.tar"), worker)
    solver = ComputeConfig(augment="none").solver
    whole = worker.solve(task, V, solver)
    parts = [worker.solve(Examples(task.shard, task.digest, (key,), (0,)), V, solver) for key in task.keys]
    np.testing.assert_allclose(whole.total, sum(part.total for part in parts), rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(whole.sums, sum(part.sums for part in parts), rtol=1e-5)
    assert (whole.sums[0, :, 1] == 6).all()


def test_classify_agrees_with_the_network(shards):

    worker = tiny_worker()
    task = examples(str(shards / "train-0000.tar"), worker)
    shown = np.clip(worker.pixels(task) + V[0], 0, 255)
    probabilities = worker.classifier(torch.tensor(shown, device=worker.device)).softmax(1).cpu()
    (found,) = worker.classify(task, V)
    assert found.labels.tolist() == probabilities.argmax(1).tolist()
    np.testing.assert_allclose(found.confidences, probabilities.max(1).values.numpy(), rtol=1e-5)


def test_the_classifier_is_replaced_by_the_first_task_that_uses_it_and_not_by_reading_images(shards):
    task = examples(str(shards / "train-0000.tar"), tiny_worker())
    for use in (lambda worker: worker.classify(task, V), lambda worker: worker.normals(task)):
        worker = tiny_worker()
        loaded = worker.classifier
        worker.pixels(task)
        assert worker.classifier is loaded
        use(worker)
        accelerated = worker.classifier
        use(worker)
        assert worker.classifier is accelerated is not loaded


def test_a_shard_that_changes_during_the_run_is_detected(shards, tmp_path):
    url = str(tmp_path / "t.tar")
    shutil.copy(shards / "train-0000.tar", url)
    task = examples(url, tiny_worker())
    shutil.copy(shards / "train-0001.tar", url)
    with pytest.raises(ShardError, match="changed during the run"):
        tiny_worker().solve(task, V, ComputeConfig().solver)


def test_precision_is_that_of_labels_and_increments_and_of_nothing_afterwards(shards):
    url = str(shards / "train-0000.tar")
    full, half, tf32 = (tiny_worker(precision=name) for name in ("float32", "bfloat16", "tf32"))
    task = examples(url, full)
    (expected,), (found,) = (worker.classify(task, V) for worker in (full, half))
    assert found.labels.tolist() == expected.labels.tolist() and found.confidences.dtype == np.float32
    assert 0 < np.abs(found.confidences - expected.confidences).max() < 0.05
    expected, found, same = (worker.solve(task, V, ComputeConfig().solver) for worker in (full, half, tf32))
    assert found.total.dtype == np.float32 and found.digest() != expected.digest()
    assert np.linalg.norm(found.total - expected.total) < 0.05 * np.linalg.norm(expected.total)
    assert same.digest() == expected.digest()  # CPUs have no tf32
    assert not torch.is_autocast_enabled("cpu")
