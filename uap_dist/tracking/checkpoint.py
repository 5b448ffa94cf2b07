"""Rounds committed to storage and read back: one file a round, the last few kept.

A file's name ends in the digest of its bytes, so that one which was not written to its end, or has changed since, is no commit and
the one before is taken. That holds alike for local folders and for object stores.
"""

import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyarrow import fs

from uap_dist.data.locations import explain, locate, make_own_folder, persist, try_to_write
from uap_dist.errors import ConfigError, ResumeError
from uap_dist.method.state import State
from uap_dist.method.update import Iterate
from uap_dist.tracking.history import RoundRecord

KEPT = 3
DIGEST_LENGTH = 16
UNFINISHED = "unfinished"  # name of a local file that is being written
FORMAT = 2  # of a checkpoint's file; one more where an older program could not go on with it, or a newer one with an older file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobRecord:
    """What stays the same over all rounds of a run, in plain values as JSON has them.

    Attributes:
        run_id: of MLflow.
        options: of the job, to go on with.
        identity: what decides the bits: data, network, config, seed.
        environment: what the bits may depend on beside it: kinds of devices, versions.
        program: which job it is of: compute, finetune or plan.
        part_of: MLflow run to resume, where it is another one: the pool's, of a member.
    """

    run_id: str
    options: Mapping[str, Any]
    identity: Mapping[str, Any]
    environment: Mapping[str, Any]
    program: str = "compute"
    part_of: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A committed round."""

    job: JobRecord
    state: State
    history: Sequence[RoundRecord]

    def to_bytes(self) -> bytes:
        """An .npz file: v and momentum (C×H×W float64) and the log-odds' scale, all else as JSON."""
        state, file = self.state, io.BytesIO()
        texts = {
            "job": json.dumps(asdict(self.job)),
            "counters": json.dumps([state.num_rounds, state.num_solves, state.num_evaluations]),
            "history": "\n".join(record.json for record in self.history),
        }
        arrays: dict[str, Any] = {name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()}
        arrays |= {name: np.asarray(value) for name, value in vars(state.iterate).items()}
        arrays["format"] = np.asarray(FORMAT)
        np.savez(file, **arrays)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Checkpoint":
        """What `to_bytes` gave; ResumeError where that of another version did."""
        with np.load(io.BytesIO(data)) as file:
            found = file["format"].item() if "format" in file else 1
            if found != FORMAT:
                raise ResumeError(f"is of another version of uap_dist (its format is {found}, this one reads {FORMAT})")
            v, momentum, scale = torch.tensor(file["v"]), torch.tensor(file["momentum"]), file["scale"].item()
            job, counters, history = (file[name].tobytes().decode() for name in ("job", "counters", "history"))
        return cls(
            JobRecord(**json.loads(job)),
            State(Iterate(v, momentum, scale), *json.loads(counters)),
            [RoundRecord.from_json(line) for line in history.splitlines()],
        )


class CheckpointStore:
    """The checkpoints of one run in one folder; a context manager that ends with the last commit done.

    Commits run in a thread of their own, one at a time, so that a slow store costs no round its time.
    """

    def __init__(self, location: str) -> None:
        """Of a local folder or a URL (see `locate`).

        Raises:
            ConfigError: no such file system.
        """
        self.location = location
        self._filesystem, self._folder = locate(location)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None
        self._num_failed = 0  # commits since the last one that was written

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=True)
        if self._num_failed:
            logger.warning("the last %d commits to %s failed", self._num_failed, self.location)

    def start(self, checkpoint: Checkpoint) -> None:
        """Commit now, so that a storage that cannot be written to is known before hours of work.

        Raises:
            ConfigError: it cannot be written to.
        """
        with self._writable():
            self._write(checkpoint)

    def prepare(self) -> None:
        """Write and delete a file where commits will lie; of a run that is refused afterwards nothing is left.

        Raises:
            ConfigError: it cannot be done.
        """
        with self._writable():
            if isinstance(self._filesystem, fs.LocalFileSystem):
                try_to_write(Path(self._folder))
                return
            is_new = self._filesystem.get_file_info(self._folder).type == fs.FileType.NotFound
            trial = f"{self._folder}/{UNFINISHED}"
            with self._filesystem.open_output_stream(trial) as file:
                file.write(b"uap_dist")
            self._filesystem.delete_file(trial)
            if is_new:  # deleting an object leaves a folder there
                self._filesystem.delete_dir(self._folder)

    def commit(self, checkpoint: Checkpoint) -> None:
        """Write a round once the one before is written; where that fails, say so and go on: the next commit holds all of it."""
        self.wait()
        self._last = self._thread.submit(self._try_to_write, checkpoint)

    def wait(self) -> None:
        """Return when the last commit is written, or has failed."""
        if self._last is not None:
            self._last.result()

    def remove(self) -> None:
        """Delete the folder with all in it; a store that does not let us is left as it is."""
        self.wait()
        with suppress(OSError):
            self._filesystem.delete_dir(self._folder)

    def newest(self) -> Checkpoint:
        """The last commit that is whole.

        Raises:
            ResumeError: there is none.
        """
        found = self.find_newest()
        if found is None:
            raise ResumeError(
                f"no checkpoint in {self.location}; give an MLflow run, or the folder that its tag `checkpoints` names"
            )
        return found

    def find_newest(self) -> Checkpoint | None:
        """The last commit that is whole, if there is one.

        Raises:
            ResumeError: the storage cannot be read, or another version wrote it.
        """
        try:
            found, _ = persist(self.location, self._read_newest, "checkpoints in")
        except OSError as error:
            raise ResumeError(f"cannot read checkpoints in {error}") from error
        return found

    def _read_newest(self) -> Checkpoint | None:
        for path in reversed(self._paths()):
            with self._filesystem.open_input_stream(path, compression=None) as stream:
                data = stream.read()
            if path.endswith(f"-{_digest(data)}.npz"):
                return self._unpack(data, path)
            logger.warning("checkpoint %s is not whole; taking the one before", path)
        return None

    def _unpack(self, data: bytes, path: str) -> Checkpoint:
        try:
            return Checkpoint.from_bytes(data)
        except ResumeError as error:
            raise ResumeError(f"checkpoint {path} {error}; go on with that version, or start a new run") from error

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"cannot write checkpoints to {explain(self.location, error)} (--storage)") from error

    def _try_to_write(self, checkpoint: Checkpoint) -> None:
        try:
            self._write(checkpoint)
        except OSError as error:
            if not self._num_failed:
                logger.warning(
                    "rounds from %d on are not committed to %s; the job goes on, and tries again after each",
                    checkpoint.state.num_rounds,
                    explain(self.location, error),
                )
            self._num_failed += 1
        else:
            if self._num_failed:
                logger.info("round %d is committed, after %d were not", checkpoint.state.num_rounds, self._num_failed)
            self._num_failed = 0

    def _write(self, checkpoint: Checkpoint) -> None:
        data = checkpoint.to_bytes()
        path = f"{self._folder}/round-{checkpoint.state.num_rounds:08d}-{_digest(data)}.npz"
        # an object store shows an object when it is whole; on a local disk that takes a rename
        is_local = isinstance(self._filesystem, fs.LocalFileSystem)
        target = f"{self._folder}/{UNFINISHED}" if is_local else path
        if is_local:
            make_own_folder(Path(self._folder))
        with self._filesystem.open_output_stream(target) as file:
            file.write(data)
        if is_local:
            self._filesystem.move(target, path)
        for path in self._paths()[:-KEPT]:
            self._filesystem.delete_file(path)

    def _paths(self) -> list[str]:
        """Of all checkpoints, the newest last."""
        infos = self._filesystem.get_file_info(fs.FileSelector(self._folder, allow_not_found=True))
        return sorted(info.path for info in infos if info.base_name.startswith("round-"))


def check_identity(saved: JobRecord, now: JobRecord) -> None:
    """Refuse to go on where the result would be another one, and warn where it may be.

    Raises:
        ResumeError: names what differs.
    """
    differences = name_differences(saved.identity, now.identity)
    if differences:
        raise ResumeError(
            f"run {saved.run_id} cannot be resumed, its result would be another one: {differences}; give it what it had, or start a new run"
        )
    differences = name_differences(saved.environment, now.environment)
    if differences:
        logger.warning("resumed elsewhere, the bits may differ from those of an uninterrupted run: %s", differences)


def name_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In what two mappings differ, in words; empty where they do not."""
    return "; ".join(
        f"{name} was {saved.get(name)}, is {now.get(name)}"
        for name in sorted({*saved, *now})
        if saved.get(name) != now.get(name)
    )


def _digest(data: bytes) -> str:
    return sha256(data).hexdigest()[:DIGEST_LENGTH]
