"""What a worker keeps of its shards: decoded images in memory and on disk, and the bytes of the shard that is to come."""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from shutil import disk_usage
from tempfile import TemporaryFile, gettempdir

import numpy as np

from uap_dist.data.decode import DecodedShard, Geometry, decode_shard
from uap_dist.data.fetch import ShardFile, fetch
from uap_dist.data.locations import is_url
from uap_dist.errors import UapDistError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Traffic:
    """What a worker has read so far; two of them can be added and subtracted.

    Attributes:
        bytes_read: of shards, from stores and from local files.
        seconds_reading: that the worker stood still until it had them.
        shards_read: how often a shard was read, whole or for some of its images.
        cache_hits: tasks whose images were decoded already.
        cache_misses: shards read again, because their decoded images had not fitted into memory and disk.
        retries: attempts at reading a shard beyond the first.
    """

    bytes_read: int = 0
    seconds_reading: float = 0.0
    shards_read: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    retries: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


class ShardCache:
    """Decoded shards of one geometry.

    Attributes:
        geometry: they are decoded to.
        traffic: since the beginning.
    """

    def __init__(self, geometry: Geometry, *, memory_bytes: int, disk_bytes: int) -> None:
        """An empty one.

        Args:
            geometry: how images are brought to the input size.
            memory_bytes: decoded images kept in memory at most.
            disk_bytes: kept at most, beyond these, in the folder for temporary files; half of what is free there now is left free.
        """
        self.geometry, self.traffic = geometry, Traffic()
        self._memory_bytes, self._disk_bytes = self._memory_room, self._disk_room = memory_bytes, disk_bytes
        self._left_free = disk_usage(gettempdir()).free // 2
        self._kept: dict[str, DecodedShard] = {}
        self._seen: set[str] = set()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: tuple[str, Future[ShardFile]] | None = None

    def at(self, geometry: Geometry) -> "ShardCache":
        """This one, where it is of that geometry; else an emptied one, which keeps its counts and what is being fetched."""
        if geometry != self.geometry:
            self.geometry, self._kept, self._seen = geometry, {}, set()
            self._memory_room, self._disk_room = self._memory_bytes, self._disk_bytes
        return self

    @property
    def memory_bytes(self) -> int:
        """Of decoded images that are kept in memory."""
        return self._memory_bytes - self._memory_room

    def whole(self, url: str) -> DecodedShard:
        """All of a shard; kept if there is room.

        Raises:
            ShardError: see `fetch` and `decode_shard`.
        """
        return self._find(url) or self._keep(url, self._read(url))

    def some(self, url: str, keys: set[str]) -> DecodedShard:
        """Those images of a shard, or all where it is kept or read for the first time.

        Raises:
            ShardError: see `fetch` and `decode_shard`.
        """
        if url not in self._seen:
            return self.whole(url)
        return self._find(url) or self._read(url, keys)

    def prefetch(self, url: str) -> None:
        """Have a thread fetch a shard that is soon asked for, one at a time; a local file needs none.

        What goes wrong is nobody's concern before the shard is asked for, and then tried again.
        """
        if is_url(url) and url not in self._kept and (self._ahead is None or self._ahead[0] != url):
            if self._ahead is not None:
                self._ahead[1].cancel()  # if it has not begun
            self._ahead = url, self._thread.submit(fetch, url)

    def _find(self, url: str) -> DecodedShard | None:
        shard = self._kept.get(url)
        self.traffic += Traffic(cache_hits=int(shard is not None))
        return shard

    def _read(self, url: str, keys: set[str] | None = None) -> DecodedShard:
        started = time.perf_counter()
        file = self._fetch(url)
        waited = time.perf_counter() - started
        shard = decode_shard(file, self.geometry, keys)
        self.traffic += Traffic(
            bytes_read=file.num_bytes,
            seconds_reading=waited + file.seconds,
            shards_read=1,
            cache_misses=int(url in self._seen),
            retries=file.num_retries,
        )
        self._seen.add(url)
        return shard

    def _fetch(self, url: str) -> ShardFile:
        if self._ahead is not None and self._ahead[0] == url:
            (_, coming), self._ahead = self._ahead, None
            try:
                return coming.result()
            except UapDistError as error:
                logger.warning("%s; trying once more", error)
        return fetch(url)

    def _keep(self, url: str, shard: DecodedShard) -> DecodedShard:
        size = shard.images.nbytes
        if size <= self._memory_room:
            self._memory_room -= size
            self._kept[url] = shard
        elif size <= self._disk_room and disk_usage(gettempdir()).free - size >= self._left_free:
            try:
                self._kept[url] = replace(shard, images=_on_disk(shard.images))
                self._disk_room -= size
            except OSError as error:
                self._disk_room = 0
                logger.warning("decoded images are no longer kept in %s (TMPDIR): %s", gettempdir(), error)
        return shard


def _on_disk(array: np.ndarray) -> np.ndarray:
    """The same array in a temporary file without a name: it goes with the last reference, or with the process."""
    with TemporaryFile() as file:
        array.tofile(file)
        file.flush()
        return np.asarray(np.memmap(file, array.dtype, "r", shape=array.shape))
