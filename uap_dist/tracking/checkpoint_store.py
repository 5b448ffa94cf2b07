"""Checkpoints in a folder or an object store, where no file is ever rewritten.

A state is one file, of which the last few are kept. The history of a run is stored in segments: each commit writes one with the
records of its new rounds and the name of the segment before it, so that what is written grows with the rounds and not with their
square. A state names the last segment of its history.

The name of each file ends in the digest of its bytes. A file that was not written completely, or was damaged later, does not match its
name, and the previous state is used. This works in local folders and object stores alike.
"""

import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from hashlib import sha256
from math import inf
from pathlib import Path

from pyarrow import fs

from uap_dist.data.locations import STORE_ERRORS, explain, locate, make_own_folder, persist, try_to_write
from uap_dist.errors import ConfigError, ResumeError
from uap_dist.rounds.record import RoundRecord
from uap_dist.tracking.checkpoint import Checkpoint

NUM_KEPT = 3
DIGEST_LENGTH = 16  # hexadecimal digits
UNFINISHED = "unfinished"  # name of a local file that is being written

logger = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of one run in one folder, as a context manager that commits the newest state at its end.

    Commits run one at a time in a background thread, and none begins while one is under way, so slow storage never delays rounds.

    Attributes:
        location: local folder or URL.
    """

    def __init__(self, location: str, every_s: float = 0.0) -> None:
        """Use a local folder or a URL (see `locate`), which need not exist, and write to it every so many seconds at most.

        Raises:
            ConfigError: the file system does not exist.
        """
        self.location = location
        self._filesystem, self._folder = locate(location)
        self._files = _Files(self._filesystem, self._folder)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._every_s, self._last_begun = every_s, -inf
        self._last: Future[None] | None = None
        self._newest: Checkpoint | None = None  # that was not given to the thread yet
        self._segment = ""  # the last one that is stored
        self._num_failed = 0  # commits since the last one that was written

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()
        if self._newest is not None:
            self._begin(self._newest)
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
        """Take a round as the newest, and write it in the background if it is time and no commit is under way.

        A round that is not written is replaced by the next one. A failure is only logged, for the same reason.
        """
        self._newest = checkpoint
        is_idle = self._last is None or self._last.done()
        if is_idle and time.monotonic() >= self._last_begun + self._every_s:
            self._begin(checkpoint)

    def _begin(self, checkpoint: Checkpoint) -> None:
        self._newest, self._last_begun = None, time.monotonic()
        self._last = self._thread.submit(self._try_to_write, checkpoint)

    def wait(self) -> None:
        """Return once the last commit has been written or has failed."""
        if self._last is not None:
            self._last.result()

    def forget_newest(self) -> None:
        """Leave out the newest state, unless it is written already, because nothing is left to resume."""
        self._newest = None

    def remove(self) -> None:
        """Delete the folder and everything in it, if the storage allows it."""
        self.wait()
        self.forget_newest()
        with suppress(*STORE_ERRORS):
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
        for name in reversed(self._files.names("round-")):
            path = f"{self._folder}/{name}"
            data = self._files.read(name)
            if data is not None:
                checkpoint = self._unpack(data, path)
                history = self._read_history(checkpoint.segment)
                if history is not None:
                    return replace(checkpoint, history=history)
            logger.warning("checkpoint %s is damaged; using the previous one", path)
        return None

    def _read_history(self, segment: str) -> list[RoundRecord] | None:
        """The records in a segment and in all before it; None if one of them is damaged."""
        records: list[RoundRecord] = []
        while segment:
            data = self._files.read(segment)
            if data is None:
                return None
            segment, *lines = data.decode().splitlines()
            records[:0] = map(RoundRecord.from_json, lines)
        return records

    def _unpack(self, data: bytes, path: str) -> Checkpoint:
        try:
            return Checkpoint.from_bytes(data)
        except ResumeError as error:
            raise ResumeError(f"checkpoint {path} {error}; resume with that version, or start a new run") from error

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except STORE_ERRORS as error:
            raise ConfigError(f"cannot write checkpoints to {explain(self.location, error)} (--storage)") from error

    def _try_to_write(self, checkpoint: Checkpoint) -> None:
        try:
            self._write(checkpoint)
        except Exception as error:  # whatever it is, as an ArrowException of Google's store, the job continues
            if not self._num_failed:
                logger.warning(
                    "round %d could not be committed to %s; the job continues, and tries again",
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
        last = checkpoint.state.num_rounds
        segment = self._segment or checkpoint.segment
        first = 1 + (int(segment.split("-")[2]) if segment else 0)
        if first <= last:
            lines = [segment, *(record.json for record in checkpoint.history[first - 1 : last])]
            segment = self._files.put(f"history-{first:08d}-{last:08d}", "jsonl", "\n".join(lines).encode())
        self._segment = segment
        self._files.put(f"round-{last:08d}", "npz", replace(checkpoint, segment=segment).to_bytes())
        for name in self._files.names("round-")[:-NUM_KEPT]:
            self._files.delete(name)


class _Files:
    """Files in a folder whose names end in the digests of their bytes."""

    def __init__(self, filesystem: fs.FileSystem, folder: str) -> None:
        self._filesystem, self._folder = filesystem, folder

    def put(self, name: str, extension: str, data: bytes) -> str:
        """Write a file, and return its name with the digest."""
        name = f"{name}-{_digest(data)}.{extension}"
        # object stores show only complete objects; on a local disk this takes a rename
        is_local = isinstance(self._filesystem, fs.LocalFileSystem)
        target = f"{self._folder}/{UNFINISHED if is_local else name}"
        if is_local:
            make_own_folder(Path(self._folder))
        with self._filesystem.open_output_stream(target) as file:
            file.write(data)
        if is_local:
            self._filesystem.move(target, f"{self._folder}/{name}")
        return name

    def read(self, name: str) -> bytes | None:
        """The contents of a file; None if they do not match its name, or it is not there."""
        try:
            with self._filesystem.open_input_stream(f"{self._folder}/{name}", compression=None) as stream:
                data: bytes = stream.read()
        except FileNotFoundError:
            return None
        return data if f"-{_digest(data)}." in name else None

    def names(self, prefix: str) -> list[str]:
        """Those that begin so, in the order of the alphabet."""
        infos = self._filesystem.get_file_info(fs.FileSelector(self._folder, allow_not_found=True))
        return sorted(info.base_name for info in infos if info.base_name.startswith(prefix))

    def delete(self, name: str) -> None:
        """Delete a file."""
        self._filesystem.delete_file(f"{self._folder}/{name}")


def _digest(data: bytes) -> str:
    return sha256(data).hexdigest()[:DIGEST_LENGTH]
