"""Fine-tuning on Ray Train, which places the training workers and restarts them from their last checkpoint.

Beside fleet/ this is the only module that imports Ray.
"""

import os

os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")  # otherwise each worker runs a Prometheus exporter
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # keeps relative paths of networks and weights valid

import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig, TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from uap_dist.data.locations import locate
from uap_dist.errors import UapDistError, WorkerLostError
from uap_dist.finetuning.trainer import Learner, TrainingTask
from uap_dist.fleet.ray_cluster import Need, hide_gpus_of_others
from uap_dist.models.weights_file import read_weights
from uap_dist.rounds.record import RoundRecord
from uap_dist.workers.reproducible import set_up_torch

MAX_RESTARTS = 10  # after the loss of a worker, which restarts all of them
MAX_FAILED_STARTS = 20  # attempts of half a minute each to place the workers
SECONDS_BETWEEN_LOOKS = 0.3


class _Mailbox:
    """An actor through which workers send records and errors to the driver. It survives restarts, and logs less than Ray's Queue."""

    def __init__(self) -> None:
        self._messages: list[RoundRecord | UapDistError] = []

    def put(self, message: RoundRecord | UapDistError) -> None:
        self._messages.append(message)

    def take(self) -> list[RoundRecord | UapDistError]:
        messages, self._messages = self._messages, []
        return messages


class Training:
    """A fine-tuning on Ray Train. It resumes one of the same name and storage that was stopped."""

    def __init__(self, task: TrainingTask, *, name: str, storage: str, num_workers: int, uses_gpu: bool) -> None:
        """Prepare the training; `epochs` starts it.

        Args:
            task: network, data and options.
            name: of the training's folder in the storage.
            storage: local folder or URL that all workers can write to.
            num_workers: workers among which each batch is split.
            uses_gpu: whether each worker takes a GPU.
        """
        # where the driver is: with another node the mailbox would be lost, and only workers are started again
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        mailbox_class: Any = ray.remote(num_cpus=0)(_Mailbox)
        self._mailbox: ActorHandle[Any] = mailbox_class.options(scheduling_strategy=here).remote()
        self._outcome: Future[Result] = Future()
        filesystem, path = locate(storage)
        resources = {"CPU": float(task.fleet.threads_per_worker)} | ({"GPU": 1.0} if uses_gpu else {})
        self._trainer = ray.train.torch.TorchTrainer(
            _train,
            train_loop_config={"task": task, "mailbox": self._mailbox},
            scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=uses_gpu, resources_per_worker=resources),
            run_config=RunConfig(
                name=name,
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(MAX_RESTARTS, controller_failure_limit=MAX_FAILED_STARTS),  # type: ignore[call-arg]
                checkpoint_config=CheckpointConfig(1),
            ),
        )
        self._result: Result | None = None

    def epochs(self) -> Iterator[RoundRecord]:
        """Train, and yield a record of each epoch once its checkpoint is stored; epoch 0 is the network before training.

        A training that resumes yields the records of its earlier epochs first.

        Raises:
            UapDistError: what a worker raised.
            WorkerLostError: workers were lost, or could not be placed, too many times.
        """
        Thread(target=self._fit, name="training", daemon=True).start()
        num_seen, is_over = 0, False
        while not is_over:
            is_over = self._outcome.done()  # before the mailbox is emptied, so that no message is missed
            messages: list[RoundRecord | UapDistError] = ray.get(self._mailbox.take.remote())
            for message in messages:
                if isinstance(message, UapDistError):
                    raise message
                if message.step == num_seen:  # restarted workers send the earlier records again
                    num_seen += 1
                    yield message
            time.sleep(SECONDS_BETWEEN_LOOKS)
        ray.kill(self._mailbox)
        try:
            self._result = self._outcome.result()
        except (TrainingFailedError, RayError) as error:
            raise WorkerLostError(f"the training was given up: {_last_line(error)}") from error

    def tensors(self, file: str) -> dict[str, Tensor]:
        """Tensors by name of a file that `Learner.save` writes. To be called after the last epoch."""
        assert self._result is not None and self._result.checkpoint is not None
        with self._result.checkpoint.as_directory() as folder:
            return read_weights(f"{folder}/{file}")

    def _fit(self) -> None:
        try:
            self._outcome.set_result(self._trainer.fit())
        except BaseException as error:  # so that the caller gets it, who waits for an outcome
            self._outcome.set_exception(error)


def _train(config: dict[str, Any]) -> None:
    """Run on each worker. An error of this package goes to the driver, which ends the training instead of retrying."""
    try:
        _train_to_the_end(config["task"], config["mailbox"])
    except UapDistError as error:
        _post(config["mailbox"], error)


def _train_to_the_end(task: TrainingTask, mailbox: ActorHandle[Any]) -> None:
    hide_gpus_of_others()
    set_up_torch(task.fleet.threads_per_worker)
    context = ray.train.get_context()
    device, size = ray.train.torch.get_device(), context.get_world_size()
    need = Need(task.fleet.threads_per_worker, float(device.type == "cuda"))
    threads = task.fleet.decode_threads or need.share_of_cpus(size)
    task = replace(task, fleet=replace(task.fleet, decode_threads=threads))
    learner = Learner(
        task,
        number=context.get_world_rank(),
        num_workers=size,
        device=device,
        prepare=ray.train.torch.prepare_model,
    )
    is_first = context.get_world_rank() == 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            learner.load(Path(folder))
    if is_first:
        for record in learner.history:
            _post(mailbox, record)
    while not learner.is_done:
        record = learner.run_epoch()
        with tempfile.TemporaryDirectory() as folder:
            if is_first:
                learner.save(Path(folder))
            ray.train.report(dict(record.metrics), checkpoint=Checkpoint(folder) if is_first else None)
        if is_first:
            # report returns before Ray has recorded the checkpoint as the last one: an epoch sent now might be trained again
            ray.train.get_all_reported_checkpoints(ray.train.CheckpointConsistencyMode.COMMITTED)
            _post(mailbox, record)


def _post(mailbox: ActorHandle[Any], message: RoundRecord | UapDistError) -> None:
    ray.get(mailbox.put.remote(message))


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
