"""What is measured on: a network with its images, on this machine."""

import os
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import numpy as np
from networks import NETWORKS
from torch import Tensor

from uap_dist.data.patterns import expand_patterns
from uap_dist.models.loading import load_classifier
from uap_dist.versions import git_commit, machine
from uap_dist.workers.dataset import Dataset, classify, fooling_rate, load_dataset
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.reproducible import set_up_torch
from uap_dist.workers.worker import Worker

MAX_HELD_IN = 1_000


class Bench:
    """A network with its images, loaded when they are needed."""

    def __init__(self, network: str, data: Path, models: Path | None = None) -> None:
        """Images lie in the folder `data`, weights in `models` if they do not lie there too."""
        self.network, self.data = NETWORKS[network], data
        self.location = self.network.locate(models or data)

    @cached_property
    def worker(self) -> Worker:
        """Ours."""
        set_up_torch(1)  # and memory, as a worker's process
        return Worker(load_classifier(*self.location), cache_bytes=8 << 30, num_threads=1)

    @cached_property
    def shards(self) -> list[Dataset]:
        """Of training images."""
        urls = expand_patterns([str(self.data / self.network.train)])
        return [load_dataset(LocalWorkers(self.worker), [url]) for url in urls]

    @cached_property
    def train(self) -> Dataset:
        """As the main job's."""
        urls = expand_patterns([str(self.data / self.network.train)])
        return load_dataset(LocalWorkers(self.worker), urls, num_images=self.network.num_train_images)

    @cached_property
    def held_out(self) -> Dataset:
        """As the main job's."""
        urls = expand_patterns([str(self.data / self.network.val)])
        return load_dataset(LocalWorkers(self.worker), urls, num_images=self.network.num_val_images)

    def split(self, seed: int, num_shards: int | None = None) -> tuple[Dataset, Dataset]:
        """Images to compute from, of so many shards (default: `tune_shards`), and held-in ones: others for each seed."""
        shift = seed % len(self.shards)
        shards = self.shards[shift:] + self.shards[:shift]
        num_shards = num_shards or self.network.tune_shards
        train, held_in = join(shards[:num_shards]), join(shards[num_shards:])
        return train, held_in.thin(min(MAX_HELD_IN, held_in.num_examples))

    def rates(self, v: Tensor, held_in: Dataset) -> dict[str, float]:
        """Fooling rates on held-in and held-out images, and on how many."""
        workers, rates = LocalWorkers(self.worker), {}
        for name, images in (("held_in", held_in), ("held_out", self.held_out)):
            found = fooling_rate(images, classify(workers, images, v.numpy()))
            rates |= {name: found.rate, f"num_{name}": found.num_examples}
        return rates


def join(parts: list[Dataset]) -> Dataset:
    """One data set of several."""
    clean = replace(
        parts[0].clean,
        labels=np.concatenate([part.clean.labels for part in parts]),
        confidences=np.concatenate([part.clean.confidences for part in parts]),
    )
    return replace(parts[0], shards=tuple(shard for part in parts for shard in part.shards), clean=clean)


def stamp() -> dict[str, str]:
    """Where and when a line was measured."""
    return {
        "commit": git_commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{machine()}, {os.cpu_count()} cores",
    }
