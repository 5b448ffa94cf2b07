"""Adversarial fine-tuning on universal perturbations: what one training worker does, independent of Ray.

Source: Moosavi-Dezfooli et al., "Universal adversarial perturbations", CVPR 2017, section 3.2; adversarial.py has more.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from uap_dist.errors import ConfigError
from uap_dist.finetuning.adversarial import OnlinePerturbations, perturb
from uap_dist.finetuning.batches import ImageReader, WorkerGroup, WorkerImages
from uap_dist.finetuning.network import make_optimiser, make_trainable, set_training_mode
from uap_dist.finetuning.options import FinetuneConfig
from uap_dist.finetuning.validation import Validation
from uap_dist.fleet.config import FleetConfig
from uap_dist.method.config import ComputeConfig
from uap_dist.method.update import Steps
from uap_dist.models.classifier import Classifier
from uap_dist.models.loading import check_same_weights, load_classifier
from uap_dist.models.weights import fill, write_weights
from uap_dist.models.weights_file import read_weights
from uap_dist.perturbations.pool import PerturbationPool
from uap_dist.rounds.record import RoundRecord
from uap_dist.workers.dataset import Dataset

NETWORK_FILE, OPTIMISER_FILE, ONLINE_FILE = "network.safetensors", "optimiser.pt", "online.safetensors"
TRAINED_ON, HELD_OUT = "trained_on_members", "held_out_members"


@dataclass(frozen=True)
class TrainingTask:
    """The training that every worker takes part in.

    Attributes:
        model, weights: the network before training, as `load_classifier` takes it.
        train, val: training and held-out images.
        pool: perturbations of the network.
        config: of the training.
        fleet: CPU threads and caches of each worker.
        weights_digest: digest of the weights that the driver loaded; if empty, the worker's are not compared with it.
    """

    model: str
    weights: str | None
    train: Dataset
    val: Dataset
    pool: PerturbationPool
    config: FinetuneConfig
    fleet: FleetConfig
    weights_digest: str = ""


class Learner:
    """One of the workers that train a network together. Each has its own part of the images; gradients are averaged in every step.

    Attributes:
        classifier: the network in training.
        measured: what is measured and saved: the same, or with --ema-decay the moving average of it.
        history: one record for each epoch, the first of them before training.
    """

    def __init__(
        self,
        task: TrainingTask,
        *,
        number: int = 0,
        num_workers: int = 1,
        device: torch.device | None = None,
        prepare: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        """Load the network.

        Args:
            task: the training.
            number: number of this worker, from 0.
            num_workers: workers that train together; with more than one, torch.distributed must be initialised.
            device: device to train on; the CPU by default.
            prepare: wraps the network so that gradients are averaged over the workers.

        Raises:
            ClassifierError: the weights are not those that the driver loaded.
            ConfigError: the network has no trainable parameters.
        """
        config = self._config = task.config
        group = self._group = WorkerGroup(number, num_workers, device or torch.device("cpu"))
        self.classifier = load_classifier(task.model, task.weights).to(group.device)
        self.classifier.to(memory_format=torch.channels_last)
        digest, who = self.classifier.weights_digest, f"training worker {number}"
        check_same_weights(task.model, task.weights, digest, task.weights_digest or digest, who)
        make_trainable(self.classifier, task.train.shape)
        self._model = prepare(self.classifier)
        self._average: AveragedModel | None = None
        self.measured = self.classifier
        if config.ema_decay:
            self._average = AveragedModel(
                self.classifier, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True
            )
            self._average.update_parameters(self.classifier)  # the first weights of the average
            self.measured = cast(Classifier, self._average.module)
        part = task.train.part(number, num_workers)
        reader = ImageReader(self.classifier.geometry, task.fleet)
        self._images = WorkerImages(part, reader, config.shuffle_shards)
        self._validation = Validation(self.measured, task.val, reader, config, group)
        self._batch_size = config.batch_size // num_workers
        self._num_steps = task.train.num_examples // num_workers // self._batch_size
        shape = task.train.shape
        trained_on, held_out = config.split(task.pool)
        self._held_out = held_out.resized(shape).to(group.device)
        self._online: OnlinePerturbations | None = None
        if config.online:
            steps = _steps(task.pool, config.epochs * self._num_steps, shape)
            self._online = OnlinePerturbations(shape, steps, config, group)
        self._members = trained_on.resized(shape).to(group.device) if self._online is None else self._online.v
        self._optimiser = make_optimiser(self.classifier, config)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimiser, config.epochs * self._num_steps)
        self._num_evaluations = 0
        self.history: list[RoundRecord] = []

    def run_epoch(self) -> RoundRecord:
        """Train one epoch and measure the network after it; the first call only measures the network before training.

        Raises:
            ConfigError: the loss is no longer finite.
        """
        started = time.perf_counter()
        metrics = self._train_epoch(len(self.history)) if self.history else {}
        seconds = time.perf_counter() - started
        if metrics:
            num_images = self._num_steps * self._config.batch_size
            metrics |= {"epoch/seconds": seconds, "epoch/images_per_second": num_images / seconds}
        metrics |= self._validation.measure({TRAINED_ON: self._members, HELD_OUT: self._held_out})
        metrics |= {"total/evaluations": float(self._num_evaluations)}
        record = RoundRecord(len(self.history), time.time_ns() // 1_000_000, metrics)
        self.history.append(record)
        return record

    @property
    def is_done(self) -> bool:
        """Whether all epochs are done."""
        return len(self.history) > self._config.epochs

    def save(self, folder: Path) -> None:
        """Write weights, optimiser, history and the perturbations of --online, from which `load` continues."""
        write_weights(folder / NETWORK_FILE, self.measured.network, {"epoch": len(self.history) - 1})
        state = {
            "optimiser": self._optimiser.state_dict(),
            "schedule": self._schedule.state_dict(),
            "num_evaluations": self._num_evaluations,
            "history": [record.json for record in self.history],
        }
        if self._average is not None:
            state["in_training"] = self.classifier.network.state_dict()
        torch.save(state, folder / OPTIMISER_FILE)
        if self._online is not None:
            (folder / ONLINE_FILE).write_bytes(save(self._online.state))

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote."""
        path = str(folder / NETWORK_FILE)
        fill(self.measured.network, read_weights(path), path)
        state = torch.load(folder / OPTIMISER_FILE, map_location=self._group.device, weights_only=True)
        if self._average is not None:
            self.classifier.network.load_state_dict(state["in_training"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._schedule.load_state_dict(state["schedule"])
        self._num_evaluations = state["num_evaluations"]
        self.history = [RoundRecord.from_json(line) for line in state["history"]]
        if self._online is not None:
            self._online.load(load_file(folder / ONLINE_FILE))

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        rng = np.random.default_rng([self._config.seed, epoch, self._group.rank])
        torch.manual_seed(int(rng.integers(2**62)))  # of the drawn pool members, and of dropout
        learning_rate = float(self._schedule.get_last_lr()[0])
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._group.device)  # not read before the end
        num_evaluations = 0
        set_training_mode(self.classifier, True, self._config.batch_norm)
        for views in islice(self._images.views(rng, self._batch_size, self._config.augment), self._num_steps):
            pixels, labels = self._group.to_tensors(views)
            batch = perturb(self.classifier, pixels, self._members, self._config)
            loss_sum += self._step(batch.pixels, labels)
            if self._online is not None:
                self._online.step(batch)
            num_evaluations += batch.num_evaluations + 2 * len(pixels)
        self._num_evaluations += int(self._group.sum([num_evaluations])[0])
        (total,) = self._group.sum([loss_sum.item()])
        mean = total / self._num_steps / self._group.size
        if not isfinite(mean):
            raise ConfigError(
                f"the training of epoch {epoch} diverged (loss {mean}); give a --learning-rate below {learning_rate:g}"
            )
        return {"train/loss": mean, "train/learning_rate": learning_rate}

    def _step(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """One step of the optimiser; returns this worker's loss."""
        is_half = self._config.training_precision == "bfloat16"
        with torch.autocast(self._group.device.type, torch.bfloat16, enabled=is_half):
            output = self._model(pixels.contiguous(memory_format=torch.channels_last))
            logits = getattr(output, "logits", output)  # Inception also returns auxiliary logits
            loss = cross_entropy(logits, labels, label_smoothing=self._config.label_smoothing)
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()
        self._schedule.step()
        if self._average is not None:
            self._average.update_parameters(self.classifier)
        return loss.detach()


def _steps(pool: PerturbationPool, num_steps: int, shape: tuple[int, ...]) -> Steps:
    """Ball and period of steps like those that the pool was computed with; paper's steps have no period."""
    first = pool.to_perturbations()[0]
    config = ComputeConfig.from_provenance(first.provenance, first.name)
    steps = config.steps(num_steps, shape)
    return steps or Steps(config.norm, config.ball_radius, max(shape), first_size=0.0, num_rounds=num_steps)
