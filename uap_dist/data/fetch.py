"""Fetching shards, each copied from its store to a temporary file before anything reads it, or only parts of one."""

import hashlib
import os
import platform
import time
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from shutil import copyfileobj
from tempfile import TemporaryFile, gettempdir
from typing import BinaryIO

from pyarrow import fs

from uap_dist.data.locations import NO_ROOM, is_url, locate, persist
from uap_dist.data.tars import READ_SIZE, Place
from uap_dist.errors import ShardError

MAX_GAP = 64 << 10  # bytes; parts that are no farther apart are read together
NUM_READ_AT_ONCE = 24  # parts
COPY_SIZE = 8 << 20  # bytes per request to the store
HEAD_SIZE = 512  # bytes of a tar's first header


class ShardFile:
    """A shard's bytes on this machine, read once from start to end; they are hashed, counted and timed on the way.

    Attributes:
        url: of the shard.
        num_retries: attempts at fetching it beyond the first.
        num_bytes: read so far.
        seconds: spent reading them.
        head: the first `HEAD_SIZE` bytes.
    """

    def __init__(self, url: str, file: BinaryIO, num_retries: int = 0) -> None:
        self.url, self.num_retries = url, num_retries
        self._file = file
        self._hash = hashlib.sha256()
        self.num_bytes, self.seconds = 0, 0.0
        self.head = file.read(HEAD_SIZE)
        file.seek(0)

    def read(self, size: int = -1) -> bytes:
        """Read up to `size` bytes, like a binary file."""
        started = time.perf_counter()
        data = self._file.read(size)
        self.seconds += time.perf_counter() - started
        self._hash.update(data)
        self.num_bytes += len(data)
        return data

    def read_at(self, offset: int, size: int) -> bytes:
        """Read bytes again that were read before, wherever the file is; they are neither hashed nor counted."""
        return os.pread(self._file.fileno(), size, offset)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def digest(self) -> str:
        """SHA-256 (hex) of the whole file; reads it to its end and closes it."""
        while self.read(READ_SIZE):  # whatever follows a compressed tar
            pass
        self.close()
        return self._hash.hexdigest()


def fetch(url: str) -> ShardFile:
    """Open a local shard, or copy one from a store to a temporary file without a name, which no killed process leaves behind.

    Shards are fetched first, so network errors are retried here and a truncated tar means a truncated tar.

    Raises:
        ShardError: there is no such shard, the store refuses or keeps failing, or this machine has no room for the copy.
    """
    if not is_url(url):
        try:
            return ShardFile(url, open(url, "rb", READ_SIZE))
        except FileNotFoundError as error:
            raise ShardError(
                f"no shard {url} on {platform.node()}; every node must see it: give a path that all of them share, or a URL (s3://)"
            ) from error
        except OSError as error:
            raise ShardError(f"cannot open shard {url}: {error}") from error
    try:
        copy, num_retries = persist(url, partial(_copy, url), "shard")
    except OSError as error:
        if error.errno in NO_ROOM:
            raise ShardError(f"cannot keep shard {url} in {gettempdir()} (TMPDIR): {error.strerror}") from error
        raise ShardError(f"cannot read shard {error}") from error
    return ShardFile(url, copy, num_retries)


def read_parts(url: str, places: Sequence[Place]) -> tuple[list[bytes], int, int]:
    """Read parts of a shard in a store or on disk; returns these, the bytes that were read and the number of retries.

    Raises:
        OSError: the store refuses or keeps failing; the message is one line, see `persist`.
    """
    spans: list[Place] = []
    for offset, size in sorted(places):
        start, length = spans[-1] if spans else (0, -MAX_GAP - 1)
        if offset <= start + length + MAX_GAP:
            spans[-1] = start, max(length, offset + size - start)
        else:
            spans.append((offset, size))

    def read() -> list[bytes]:
        filesystem, path = locate(url)
        if isinstance(filesystem, fs.PyFileSystem):
            return filesystem.handler.read_spans(path, spans)
        with filesystem.open_input_file(path) as stream, ThreadPoolExecutor(NUM_READ_AT_ONCE) as pool:
            return list(pool.map(lambda span: stream.read_at(span[1], span[0]), spans))

    found, num_retries = persist(url, read, "shard")
    starts = [start for start, _ in spans]
    parts = []
    for offset, size in places:
        number = bisect_right(starts, offset) - 1
        parts.append(found[number][offset - starts[number] :][:size])
    return parts, sum(map(len, found)), num_retries


def _copy(url: str) -> BinaryIO:
    """A copy of an object in a temporary file, open at its start.

    Raises:
        OSError: the copy is incomplete, or the object was replaced meanwhile, so that the copy may mix two objects.
    """
    filesystem, path = locate(url)
    with ExitStack() as failing:
        file = failing.enter_context(TemporaryFile())
        if isinstance(filesystem, fs.PyFileSystem):
            filesystem.handler.copy(path, file)
            failing.pop_all()
            return file
        with filesystem.open_input_file(path) as stream:
            size, before = stream.size(), stream.metadata()
            copyfileobj(stream, file, COPY_SIZE)
        if file.tell() != size:
            raise OSError(f"received {file.tell()} of {size} bytes")
        with filesystem.open_input_file(path) as stream:
            if stream.metadata() != before:
                raise OSError("it was replaced while it was read")
        file.seek(0)
        failing.pop_all()
    return file
