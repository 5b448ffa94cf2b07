"""Networks that are shown the wrong unit, and labels that are numbered otherwise."""

import numpy as np
import pytest
import torch
from conftest import random_samples
from torch import nn

from uap_dist.data.decode import Geometry
from uap_dist.data.write import write_shards
from uap_dist.errors import ClassifierError
from uap_dist.models.classifier import Classifier
from uap_dist.workers.accuracy import check_accuracy
from uap_dist.workers.dataset import load_dataset
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.worker import Worker


class Strongest(nn.Module):
    """The strongest colour of pixels of 0..1, as `random_samples` labels them; saturated, and so wrong, at 0..255."""

    def __init__(self, divisor: float = 1.0, shift: int = 0) -> None:
        super().__init__()
        self.divisor, self.shift = divisor, shift

    def forward(self, pixels):
        x = pixels / self.divisor
        means = x.mean((2, 3)) - 30 * torch.relu(x.mean((2, 3)) - 1)  # turned round beyond 1
        return means.roll(self.shift, 1)


def accuracy(network, shards):
    classifier = Classifier(network, name="strongest", geometry=Geometry())
    workers = LocalWorkers(Worker(classifier, cache_bytes=1 << 30, num_threads=1))
    return check_accuracy(workers, load_dataset(workers, shards), "strongest")[""]


@pytest.fixture
def data(shards):
    return [str(shards / f"train-{i:04d}.tar") for i in range(3)]


def test_a_network_that_expects_0_to_1_is_rejected_with_advice(data):
    with pytest.raises(
        ClassifierError, match=r"strongest classifies 0\.\d+ of the .* divided by 255: it expects 0..1 .* pixels / 255"
    ):
        accuracy(Strongest(), data)


def test_an_accurate_network_causes_no_warning(data, caplog):
    rate = accuracy(Strongest(255.0), data)
    assert rate.num_examples == 47 and rate.rate > 0.9 and not caplog.text


def test_class_numbers_that_differ_from_the_labels_cause_a_warning(data, caplog):
    rate = accuracy(Strongest(255.0, shift=1), data)
    assert rate.rate < 0.2 and "are its classes numbered in the same way as the labels (.cls)?" in caplog.text


def test_images_without_labels_cause_no_warning(tmp_path, caplog):
    samples = [{key: value for key, value in sample.items() if key != "cls"} for sample in random_samples(9, seed=5)]
    write_shards(samples, tmp_path, prefix="x", shard_size=9)
    assert accuracy(Strongest(), [str(tmp_path / "x-0000.tar")]) is None and not caplog.text


def test_a_network_with_one_label_for_all_dark_images_is_not_rejected(tmp_path, caplog):
    rng = np.random.default_rng(0)
    samples = [sample | {"cls": int(rng.random() < 0.2)} for sample in random_samples(60, seed=6)]
    write_shards(samples, tmp_path, prefix="x", shard_size=60)

    class Bright(nn.Module):  # 0 of dark images, which is right of most
        def forward(self, pixels):
            mean = pixels.mean((1, 2, 3))
            return torch.stack([10 - mean, mean], 1)

    rate = accuracy(Bright(), [str(tmp_path / "x-0000.tar")])
    assert rate.rate < 0.5 and "numbered" in caplog.text
