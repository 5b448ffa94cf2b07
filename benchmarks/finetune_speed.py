"""How quick fine-tuning is, beside its parts: decoding alone, the training step alone. See benchmarks/finetune.md.

    python benchmarks/finetune_speed.py      # some minutes on two idle cores

One training worker in this process. *Decoding*: the views of an epoch as a worker reads them, with empty caches. *Step*:
perturbation, forward, backward and optimiser on one batch again and again. *First epoch*: both, decoding ahead of the steps.
*Second epoch*: of decoded images.
Ideally the first epoch is as quick as the slower of its parts.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from networks import NETWORKS

from uap_dist.data.patterns import expand_patterns
from uap_dist.finetuning.adversarial import perturb
from uap_dist.finetuning.batches import ImageReader, LabelledImages, WorkerImages
from uap_dist.finetuning.options import FinetuneConfig
from uap_dist.finetuning.trainer import Learner, TrainingTask
from uap_dist.fleet.config import FleetConfig
from uap_dist.method.norms import random_perturbation
from uap_dist.models.loading import load_classifier
from uap_dist.perturbations.pool import PerturbationPool
from uap_dist.versions import git_commit, machine
from uap_dist.workers.dataset import load_dataset
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.worker import Worker


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure."""

    network: str = "squeezenet"
    """Of benchmarks/networks.py."""
    decode_threads: tuple[int, ...] = (1, 2)
    """Threads that decode."""
    step_threads: int = 1
    """Of torch."""
    num_images: int = 500
    """Training images of an epoch."""
    batch_size: int = 32
    """Of a step."""
    augment: str = "flip"
    """Views: flip decodes once, random-resized-crop in each epoch."""
    data: Path = Path("../shared")
    """Folder of the images and networks."""


def main() -> None:
    """A row for each number of threads."""
    options = tyro.cli(Options)
    torch.set_num_threads(options.step_threads)
    print(f"{machine()}, {os.cpu_count()} CPUs; commit {git_commit()}; {options}\n")
    print("| decode threads | decoding, images/s | step, images/s | first epoch, images/s | second epoch, images/s |")
    print("| --- | --- | --- | --- | --- |")
    for num_threads in options.decode_threads:
        print(
            f"| {num_threads} | " + " | ".join(f"{speed:.0f}" for speed in measure(options, num_threads)) + " |",
            flush=True,
        )


def measure(options: Options, num_threads: int) -> list[float]:
    """Images/s of decoding, of steps, of a first and of a second epoch."""
    network = NETWORKS[options.network]
    model, weights = network.locate(options.data)
    classifier = load_classifier(model, weights)
    workers = LocalWorkers(Worker(classifier, cache_bytes=8 << 30, num_threads=options.step_threads))
    urls = expand_patterns([str(options.data / network.train)])
    train = load_dataset(workers, urls, num_images=options.num_images)
    config = FinetuneConfig(batch_size=options.batch_size, augment=options.augment, epochs=2)
    fleet = FleetConfig(decode_threads=num_threads)
    noise = torch.stack([random_perturbation(train.shape, norm="linf", radius=10.0, seed=seed) for seed in range(2)])
    pool = PerturbationPool(noise, {"norm": "linf", "radius": 10.0}, [{"name": "first"}, {"name": "second"}])
    learner = Learner(TrainingTask(model, weights, train, train.thin(options.batch_size), pool, config, fleet))
    count = options.num_images // options.batch_size * options.batch_size
    images = WorkerImages(train, ImageReader(classifier.geometry, fleet), config.shuffle_shards)
    batches: list[LabelledImages] = []

    def decode() -> None:
        batches.extend(images.views(np.random.default_rng(0), options.batch_size, config.augment))

    def step() -> None:
        for _ in range(count // options.batch_size):
            pixels, labels = learner._group.to_tensors(batches[0])
            learner._step(perturb(learner.classifier, pixels, learner._members, config).pixels, labels)

    decoding = timed(decode)
    epochs = [timed(partial(learner._train_epoch, number)) for number in (1, 2)]
    return [count / seconds for seconds in (decoding, timed(step), *epochs)]


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
