"""Checkpoints: rounds committed to storage and read back, one file for each round, of which the last few are kept.

The name of a file ends in the digest of its bytes. A file that was not written completely, or was damaged later, does not match its
name, and the previous one is used. This works in local folders and object stores alike.
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

NUM_KEPT = 3
DIGEST_LENGTH = 16  # hexadecimal digits
UNFINISHED = "unfinished"  # name of a local file that is being written
FORMAT = 3  # of the file; incremented when older and newer versions cannot read each other's checkpoints

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobRecord:
    """What is the same for all rounds of a run, as JSON values.

    Attributes:
        run_id: MLflow run.
        options: options of the job, with which it is resumed.
        identity: what determines the bits of the result: data, network, config and seed.
        environment: what the bits may depend on beyond that: kinds of devices and versions.
        program: name of the job: compute, finetune or plan.
        part_of: MLflow run to resume instead of this one, which is part of it, such as the run of the pool; None if there is none.
    """

    run_id: str
    options: Mapping[str, Any]
    identity: Mapping[str, Any]
    environment: Mapping[str, Any]
    program: str = "compute"
    part_of: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A committed round: the job, its state after the round, and the records of all rounds so far."""

    job: JobRecord
    state: State
    history: Sequence[RoundRecord]

    def to_bytes(self) -> bytes:
        """The contents of an .npz file: v and momentum (C×H×W float64), the scale of the log-odds, and everything else as JSON."""
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
        """Inverse of `to_bytes`; ResumeError if another version wrote the file."""
        with np.load(io.BytesIO(data)) as file:
            found = file["format"].item() if "format" in file else 1
            if found != FORMAT:
                raise ResumeError(
                    f"is of another version of uap_dist (its format is {found}, this version reads {FORMAT})"
                )
            v, momentum, scale = torch.tensor(file["v"]), torch.tensor(file["momentum"]), file["scale"].item()
            job, counters, history = (file[name].tobytes().decode() for name in ("job", "counters", "history"))
        return cls(
            JobRecord(**json.loads(job)),
            State(Iterate(v, momentum, scale), *json.loads(counters)),
            [RoundRecord.from_json(line) for line in history.splitlines()],
        )


class CheckpointStore:
    """The checkpoints of one run in one folder, as a context manager that waits for the last commit at its end.

    Commits run one at a time in a background thread, so slow storage does not delay rounds.

    Attributes:
        location: local folder or URL.
    """

    def __init__(self, location: str) -> None:
        """Use a local folder or a URL (see `locate`), which need not exist.

        Raises:
            ConfigError: the file system does not exist.
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
        """Commit in the foreground, so that a failure is known before hours of work.

        Raises:
            ConfigError: the storage cannot be written to.
        """
        with self._writable():
            self._write(checkpoint)

    def prepare(self) -> None:
        """Check that the storage can be written to, with a file that is deleted again; a run that is refused later leaves nothing.

        Raises:
            ConfigError: the storage cannot be written to.
        """
        with self._writable():
            if isinstance(self._filesystem, fs.LocalFileSystem):
                try_to_write(Path(self._folder))
                return
            is_new = self._filesystem.get_file_info(self._folder).type == fs.FileType.NotFound
            probe = f"{self._folder}/{UNFINISHED}"
            with self._filesystem.open_output_stream(probe) as file:
                file.write(b"uap_dist")
            self._filesystem.delete_file(probe)
            if is_new:  # deleting an object leaves an empty folder
                self._filesystem.delete_dir(self._folder)

    def commit(self, checkpoint: Checkpoint) -> None:
        """Write a round in the background, once the previous one is written.

        A failure is only logged, because the next commit has everything that this one has.
        """
        self.wait()
        self._last = self._thread.submit(self._try_to_write, checkpoint)

    def wait(self) -> None:
        """Return once the last commit has been written or has failed."""
        if self._last is not None:
            self._last.result()

    def remove(self) -> None:
        """Delete the folder and everything in it, if the storage allows it."""
        self.wait()
        with suppress(OSError):
            self._filesystem.delete_dir(self._folder)

    def newest(self) -> Checkpoint:
        """The newest intact checkpoint.

        Raises:
            ResumeError: there is none, the storage cannot be read, or another version wrote it.
        """
        found = self.find_newest()
        if found is None:
            raise ResumeError(
                f"no checkpoint in {self.location}; give an MLflow run, or the folder that its tag `checkpoints` names"
            )
        return found

    def find_newest(self) -> Checkpoint | None:
        """The newest intact checkpoint, None if there is none.

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
            logger.warning("checkpoint %s is damaged; using the previous one", path)
        return None

    def _unpack(self, data: bytes, path: str) -> Checkpoint:
        try:
            return Checkpoint.from_bytes(data)
        except ResumeError as error:
            raise ResumeError(f"checkpoint {path} {error}; resume with that version, or start a new run") from error

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
                    "round %d could not be committed to %s; the job continues, and tries again after every round",
                    checkpoint.state.num_rounds,
                    explain(self.location, error),
                )
            self._num_failed += 1
        else:
            if self._num_failed:
                logger.info(
                    "round %d is committed; the %d commits before it failed",
                    checkpoint.state.num_rounds,
                    self._num_failed,
                )
            self._num_failed = 0

    def _write(self, checkpoint: Checkpoint) -> None:
        data = checkpoint.to_bytes()
        path = f"{self._folder}/round-{checkpoint.state.num_rounds:08d}-{_digest(data)}.npz"
        # object stores show only complete objects; on a local disk this takes a rename
        is_local = isinstance(self._filesystem, fs.LocalFileSystem)
        target = f"{self._folder}/{UNFINISHED}" if is_local else path
        if is_local:
            make_own_folder(Path(self._folder))
        with self._filesystem.open_output_stream(target) as file:
            file.write(data)
        if is_local:
            self._filesystem.move(target, path)
        for path in self._paths()[:-NUM_KEPT]:
            self._filesystem.delete_file(path)

    def _paths(self) -> list[str]:
        """Paths of all checkpoints, the newest last."""
        infos = self._filesystem.get_file_info(fs.FileSelector(self._folder, allow_not_found=True))
        return sorted(info.path for info in infos if info.base_name.startswith("round-"))


def check_identity(saved: JobRecord, now: JobRecord) -> None:
    """Check that a resumed job gives the result of the saved one, and log a warning if it may not.

    Raises:
        ResumeError: the result would differ; the message names what does.
    """
    differences = name_differences(saved.identity, now.identity)
    if differences:
        raise ResumeError(
            f"run {saved.run_id} cannot be resumed, because its result would differ: {differences}; restore these, or start a new run"
        )
    differences = name_differences(saved.environment, now.environment)
    if differences:
        logger.warning(
            "resumed in another environment; the bits may differ from those of an uninterrupted run: %s", differences
        )


def name_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The differences of two mappings in words, such as "seed was 0, is 1"; empty if they are equal."""
    return "; ".join(
        f"{name} was {saved.get(name)}, is {now.get(name)}"
        for name in sorted({*saved, *now})
        if saved.get(name) != now.get(name)
    )


def _digest(data: bytes) -> str:
    return sha256(data).hexdigest()[:DIGEST_LENGTH]
