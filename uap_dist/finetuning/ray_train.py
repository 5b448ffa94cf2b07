"""Training workers as Ray Train runs them: placed, restarted from their last checkpoint, heard epoch by epoch.

Ray is imported here, and in the modules of fleet/.
"""

import os

os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")  # a Prometheus exporter for each worker
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths of networks and weights stay what they are

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig, TrainingFailedError
from torch import Tensor

from uap_dist.data.locations import locate
from uap_dist.errors import UapDistError, WorkerLostError
from uap_dist.finetuning.trainer import HELD_OUT, NETWORK_FILE, Learner, Task
from uap_dist.models.weights import read_weights
from uap_dist.tracking.history import RoundRecord
from uap_dist.workers.reproducible import set_up_torch

MAX_RESTARTS = 10  # of all workers together, because one was lost
MAX_FAILED_STARTS = 20  # of half a minute each, where Ray cannot place them
SECONDS_BETWEEN_LOOKS = 0.3
SCORE = f"top1/{HELD_OUT}"  # of the epoch whose checkpoint is kept beside the last one


class _Mailbox:
    """Where the first worker leaves what the driver shall see; it outlives the workers, as Ray's Queue does, and is silent."""

    def __init__(self) -> None:
        self._letters: list[RoundRecord | UapDistError] = []

    def put(self, letter: RoundRecord | UapDistError) -> None:
        self._letters.append(letter)

    def take(self) -> list[RoundRecord | UapDistError]:
        letters, self._letters = self._letters, []
        return letters


class Training:
    """A fine-tuning on Ray Train, which goes on where one of the same name and storage was stopped."""

    def __init__(self, task: Task, *, name: str, storage: str, num_workers: int, uses_gpu: bool) -> None:
        """Nothing starts before `epochs`.

        Args:
            task: what the workers are told.
            name: of its folder in the storage.
            storage: local folder or URL that every worker can write to.
            num_workers: that train together; they share each batch.
            uses_gpu: whether each takes a GPU.
        """
        mailbox_class: Any = ray.remote(num_cpus=0)(_Mailbox)
        self._mailbox: ActorHandle[Any] = mailbox_class.remote()
        self._outcome: SimpleQueue[Result | Exception] = SimpleQueue()
        filesystem, path = locate(storage)
        resources = {"CPU": float(task.num_threads)} | ({"GPU": 1.0} if uses_gpu else {})
        self._trainer = ray.train.torch.TorchTrainer(
            _train,
            train_loop_config={"task": task, "mailbox": self._mailbox},
            scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=uses_gpu, resources_per_worker=resources),
            run_config=RunConfig(
                name=name,
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(MAX_RESTARTS, controller_failure_limit=MAX_FAILED_STARTS),  # type: ignore[call-arg]
                checkpoint_config=CheckpointConfig(1, SCORE, "max"),  # Ray Train keeps the last one as well
            ),
        )
        self._result: Result | None = None

    def epochs(self) -> Iterator[RoundRecord]:
        """A record for each epoch when its checkpoint stands, from 0, the network as it came; resumed, the earlier ones again.

        Raises:
            UapDistError: what went wrong on a worker.
            WorkerLostError: workers were lost or could not be placed too often.
        """
        Thread(target=self._fit, name="training", daemon=True).start()
        num_seen, is_over = 0, False
        while not is_over:
            is_over = not self._outcome.empty()  # asked first, so that nothing is left in the mailbox then
            letters: list[RoundRecord | UapDistError] = ray.get(self._mailbox.take.remote())
            for letter in letters:
                if isinstance(letter, UapDistError):
                    raise letter
                if letter.step == num_seen:  # workers that were restarted begin with what is known
                    num_seen += 1
                    yield letter
            time.sleep(SECONDS_BETWEEN_LOOKS)
        ray.kill(self._mailbox)
        outcome = self._outcome.get()
        if isinstance(outcome, Exception):
            raise WorkerLostError(f"the training was given up: {_last_line(outcome)}") from outcome
        self._result = outcome

    def weights(self) -> dict[str, Tensor]:
        """The tensors of the trained network; to be called when there are no more epochs."""
        assert self._result is not None and self._result.checkpoint is not None
        with self._result.checkpoint.as_directory() as folder:
            return read_weights(f"{folder}/{NETWORK_FILE}")

    def _fit(self) -> None:
        try:
            self._outcome.put(self._trainer.fit())
        except (TrainingFailedError, RayError) as error:
            self._outcome.put(error)


def _train(config: dict[str, Any]) -> None:
    """What each worker runs; its own errors end the training at once instead of being tried again."""
    try:
        _train_to_the_end(config["task"], config["mailbox"])
    except UapDistError as error:
        _post(config["mailbox"], error)


def _train_to_the_end(task: Task, mailbox: ActorHandle[Any]) -> None:
    set_up_torch(task.num_threads)
    context = ray.train.get_context()
    learner = Learner(
        task,
        number=context.get_world_rank(),
        num_workers=context.get_world_size(),
        device=ray.train.torch.get_device(),
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
            # report returns before Ray has written down which checkpoint is the last; shown earlier, an epoch could be done twice
            ray.train.get_all_reported_checkpoints(ray.train.CheckpointConsistencyMode.COMMITTED)
            _post(mailbox, record)


def _post(mailbox: ActorHandle[Any], letter: RoundRecord | UapDistError) -> None:
    ray.get(mailbox.put.remote(letter))


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
