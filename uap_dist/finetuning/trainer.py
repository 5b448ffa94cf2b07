"""Adversarial fine-tuning on a pool: what one of the training workers does, as a plain class that knows no Ray.

Source: Moosavi-Dezfooli et al., "Universal adversarial perturbations", CVPR 2017, section 3.2.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import isfinite
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy

from uap_dist.data.decode import UNKNOWN_CLASS
from uap_dist.errors import ConfigError
from uap_dist.finetuning.batches import Batch, Share
from uap_dist.finetuning.config import FinetuneConfig
from uap_dist.method.augment import augment
from uap_dist.method.deepfool import add_perturbation
from uap_dist.method.rates import Rate
from uap_dist.models.classifier import Classifier
from uap_dist.models.loading import load_classifier
from uap_dist.models.weights import check_same_weights, fill, read_weights, write_weights
from uap_dist.perturbations.pool import PerturbationPool
from uap_dist.perturbations.transform import AddUniversalPerturbation
from uap_dist.tracking.history import RoundRecord
from uap_dist.workers.dataset import CLASSIFY_SIZE, Dataset

NETWORK_FILE, OPTIMISER_FILE = "network.safetensors", "optimiser.pt"
TRAINED_ON, HELD_OUT = "trained_on_members", "held_out_members"


@dataclass(frozen=True)
class Task:
    """What every training worker is told.

    Attributes:
        model, weights: the network to begin with, as `load_classifier` takes it.
        weights_digest: of it as the driver loaded it; empty where nobody says.
        train, val: images to learn from, and held-out ones.
        pool: perturbations of the network.
        config: of the training.
        num_threads: of each worker on the CPU.
    """

    model: str
    weights: str | None
    train: Dataset
    val: Dataset
    pool: PerturbationPool
    config: FinetuneConfig
    num_threads: int
    weights_digest: str = ""


class Learner:
    """One of several workers that train the same network on images of its own; they meet in every step's gradient."""

    def __init__(
        self,
        task: Task,
        *,
        number: int = 0,
        num_workers: int = 1,
        device: torch.device | None = None,
        prepare: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        """Load the network.

        Raises:
            ClassifierError: its weights are not those that the driver loaded.

        Args:
            task: what is to be done.
            number: of this worker, from 0.
            num_workers: that train together; more than one need torch.distributed.
            device: that it trains on.
            prepare: wraps the network so that gradients are averaged over the workers.
        """
        config = self._config = task.config
        self._number, self._num_workers = number, num_workers
        self._device = device or torch.device("cpu")
        self.classifier = load_classifier(task.model, task.weights).to(self._device)
        digest, who = self.classifier.weights_digest, f"training worker {number}"
        check_same_weights(task.model, task.weights, digest, task.weights_digest or digest, who)
        _make_trainable(self.classifier, task.train.shape)
        self._model = prepare(self.classifier)
        geometry, window = self.classifier.geometry, config.shuffle_shards
        self._train = Share(task.train.part(number, num_workers), geometry, window)
        self._val = Share(task.val.part(number, num_workers), geometry, window)
        self._first_val = number * task.val.num_examples // num_workers
        self._pools = dict(zip((TRAINED_ON, HELD_OUT), config.split(task.pool), strict=True))
        self._add = AddUniversalPerturbation(self._pools[TRAINED_ON], config.probability)
        self._batch_size = config.batch_size // num_workers
        self._num_batches = task.train.num_examples // num_workers // self._batch_size
        self._optimiser = torch.optim.SGD(
            [parameter for parameter in self.classifier.parameters() if parameter.requires_grad],
            lr=config.learning_rate or (0.01 if any(_batch_norms(self.classifier)) else 0.0001),
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimiser, config.epochs * self._num_batches)
        self._num_evaluations = 0
        self.history: list[RoundRecord] = []

    def run_epoch(self) -> RoundRecord:
        """The next epoch, and what the network is worth after it; the first call only measures what it is worth before any."""
        started = time.perf_counter()
        metrics = self._train_epoch(len(self.history)) if self.history else {}
        seconds = time.perf_counter() - started
        if metrics:
            num_images = self._num_batches * self._config.batch_size
            metrics |= {"epoch/seconds": seconds, "epoch/images_per_second": num_images / seconds}
        metrics |= self._measure() | {"total/evaluations": float(self._num_evaluations)}
        record = RoundRecord(len(self.history), time.time_ns() // 1_000_000, metrics)
        self.history.append(record)
        return record

    @property
    def is_done(self) -> bool:
        """Whether all epochs are behind it."""
        return len(self.history) > self._config.epochs

    def save(self, folder: Path) -> None:
        """Weights, optimiser and history, from which another worker goes on."""
        write_weights(folder / NETWORK_FILE, self.classifier.network, {"epoch": len(self.history) - 1})
        state = {
            "optimiser": self._optimiser.state_dict(),
            "schedule": self._schedule.state_dict(),
            "num_evaluations": self._num_evaluations,
            "history": [record.json for record in self.history],
        }
        torch.save(state, folder / OPTIMISER_FILE)

    def load(self, folder: Path) -> None:
        """What `save` wrote."""
        path = str(folder / NETWORK_FILE)
        fill(self.classifier.network, read_weights(path), path)
        state = torch.load(folder / OPTIMISER_FILE, map_location=self._device, weights_only=True)
        self._optimiser.load_state_dict(state["optimiser"])
        self._schedule.load_state_dict(state["schedule"])
        self._num_evaluations = state["num_evaluations"]
        self.history = [RoundRecord.from_json(line) for line in state["history"]]

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        rng = np.random.default_rng([self._config.seed, epoch, self._number])
        torch.manual_seed(int(rng.integers(2**62)))  # members and dropout
        rate, loss_sum, num_evaluations = float(self._schedule.get_last_lr()[0]), 0.0, 0
        self._set_training(True)
        for images, truths in islice(self._train.shuffled(rng, self._batch_size), self._num_batches):
            pixels, labels = self._tensors((augment(images, self._config.augment, rng), truths))
            shown, spent = self._perturb(pixels)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
                output = self._model(shown)
                loss = cross_entropy(getattr(output, "logits", output), labels)  # Inception gives others beside
            self._optimiser.zero_grad()
            loss.backward()
            self._optimiser.step()
            self._schedule.step()
            loss_sum, num_evaluations = loss_sum + float(loss.detach()), num_evaluations + spent + 2 * len(pixels)
        self._num_evaluations += int(self._sum_over_workers([num_evaluations])[0])
        (total,) = self._sum_over_workers([loss_sum])
        mean = total / self._num_batches / self._num_workers
        if not isfinite(mean):
            raise ConfigError(
                f"the training of epoch {epoch} diverged (loss {mean}); give less than --learning-rate {rate:g}"
            )
        return {"train/loss": mean, "train/learning_rate": rate}

    def _perturb(self, pixels: Tensor) -> tuple[Tensor, int]:
        """Images as they are trained on, and the network evaluations that it took to choose factors."""
        added, is_perturbed = (x.to(self._device) for x in self._add.draw(len(pixels), tuple(pixels.shape[1:])))
        factors, spent = is_perturbed.float(), 0
        rows = is_perturbed.nonzero().squeeze(1)
        if self._config.adaptive and len(rows):
            self._set_training(False)
            factors[rows], spent = smallest_factors(self.classifier, pixels[rows], added[rows], self._config.ladder)
            self._set_training(True)
        return add_perturbation(pixels, factors.view(-1, 1, 1, 1) * added), spent

    def _measure(self) -> dict[str, float]:
        """Top-1 and top-5 of clean held-out images; fooling rate and top-1 of them under each part of the pool, members taking turns."""
        self._set_training(False)
        if self._num_workers > 1:  # each has statistics of its own until the next step; the first one's are saved
            for buffer in self.classifier.buffers():
                distributed.broadcast(buffer, 0)
        counts = dict.fromkeys(("images", "top1/clean", "top5/clean"), 0)
        counts |= {f"{what}/{name}": 0 for what in ("fooling_rate", "top1") for name in self._pools}
        first = self._first_val
        for batch in self._val.in_order(CLASSIFY_SIZE):
            pixels, truths = self._tensors(batch)
            with torch.no_grad():
                logits = self.classifier(pixels)
                clean = logits.argmax(1)
                top5 = logits.topk(min(5, logits.shape[1]), 1).indices
                counts["images"] += len(pixels)
                counts["top1/clean"] += int((clean == truths).sum())
                counts["top5/clean"] += int((top5 == truths[:, None]).sum())
                for name, pool in self._pools.items():
                    turns = torch.arange(first, first + len(pixels)) % len(pool.members)
                    v = self._resized(pool, tuple(pixels.shape[1:]))[turns].to(self._device)
                    labels = self.classifier(add_perturbation(pixels, v)).argmax(1)
                    counts[f"fooling_rate/{name}"] += int((labels != clean).sum())
                    counts[f"top1/{name}"] += int((labels == truths).sum())
            first += len(pixels)
        total = dict(zip(counts, map(int, self._sum_over_workers(list(counts.values()))), strict=True))
        num_images = total.pop("images")
        metrics = {name: count / num_images for name, count in total.items() if name.startswith("top")}
        for name in self._pools:
            metrics |= Rate(total[f"fooling_rate/{name}"], num_images).metrics(name)
        return metrics

    def _resized(self, pool: PerturbationPool, shape: tuple[int, ...]) -> Tensor:
        return torch.stack([perturbation.resized(shape) for perturbation in pool.to_perturbations()])

    def _set_training(self, is_training: bool) -> None:
        self.classifier.train(is_training)
        if self._config.batch_norm == "frozen":
            for module in _batch_norms(self.classifier):
                module.eval()

    def _tensors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images, truths = batch
        pixels = torch.tensor(images, dtype=torch.float32, device=self._device)
        return pixels, torch.tensor(truths, device=self._device)

    def _sum_over_workers(self, values: Sequence[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self._device)
        if self._num_workers > 1:
            distributed.all_reduce(total)
        return total.tolist()


def check_trainable(classifier: Classifier) -> None:
    """Raise ConfigError for a network that has nothing to learn."""
    if not classifier.trainable:
        raise ConfigError(f"{classifier.name} has no trainable parameters; leave some with requires_grad")


def check_truths(classifier: Classifier, train: Dataset, val: Dataset) -> None:
    """Refuse data whose labels cannot be this classifier's.

    Raises:
        ConfigError: images without a label, or labels outside its classes.
    """
    with torch.no_grad():
        num_classes = classifier(torch.zeros(1, *train.shape)).shape[1]
    for what, dataset in (("training", train), ("held-out", val)):
        truths = dataset.truths
        unknown = int((truths == UNKNOWN_CLASS).sum())
        if unknown:
            raise ConfigError(
                f"{unknown} of {len(truths)} {what} images have no label; give shards with .cls (jobs/shard.py writes them)"
            )
        outside = truths[(truths < 0) | (truths >= num_classes)]
        if len(outside):
            raise ConfigError(
                f"{len(outside)} of {len(truths)} {what} images have labels outside the network's {num_classes} classes, as {outside[0]}; "
                "give a network with a head for these classes"
            )


def check_labels(train: Dataset) -> None:
    """Refuse training images, with their clean predictions, of which the classifier names no more than by guessing.

    Raises:
        ConfigError: it does not.
    """
    counts = np.bincount(train.truths)
    top1, guess = float((train.clean.labels == train.truths).mean()), float(counts.max() / train.num_examples)
    if top1 <= guess:
        raise ConfigError(
            f"the network names {top1:.3f} of the training images rightly, no more than always saying {counts.argmax()} ({guess:.3f}): "
            "its classes are not the data's labels; give weights that know them"
        )


def smallest_factors(
    classifier: Classifier, pixels: Tensor, added: Tensor, ladder: Sequence[float]
) -> tuple[Tensor, int]:
    """For each image the smallest α of the ladder at which clip(x + α v) has another label than x, the largest where none has.

    Args:
        classifier: as it is now, in inference mode.
        pixels: N×C×H×W, 0..255.
        added: N×C×H×W, pixels: v of each image.
        ladder: α, ascending.

    Returns:
        α of each image (N), and how many network evaluations it took.

    Source: the footnote to section 3.2 of the paper; its ladder is not given there.
    """
    factors = torch.full((len(pixels),), float(ladder[-1]), device=pixels.device)
    is_open = torch.ones(len(pixels), dtype=torch.bool, device=pixels.device)
    with torch.no_grad():
        labels, spent = classifier(pixels).argmax(1), len(pixels)
        for factor in ladder[:-1]:
            rows = is_open.nonzero().squeeze(1)
            if not len(rows):
                break
            shown = add_perturbation(pixels[rows], factor * added[rows])
            fooled = rows[classifier(shown).argmax(1) != labels[rows]]
            factors[fooled], is_open[fooled] = factor, False
            spent += len(rows)
    return factors, spent


def _make_trainable(classifier: Classifier, shape: Sequence[int]) -> None:
    """Those parameters learn that were trainable when the network was made, and that its logits depend on."""
    for name, parameter in classifier.network.named_parameters():
        parameter.requires_grad_(name in classifier.trainable)
    logits = classifier(torch.full((2, *shape), 128.0, device=classifier.mean.device))
    if not logits.requires_grad:
        raise ConfigError(f"{classifier.name} has no trainable parameters; leave some with requires_grad")
    logits.sum().backward()
    for parameter in classifier.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def _batch_norms(classifier: Classifier) -> Iterator[nn.Module]:
    return (module for module in classifier.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
