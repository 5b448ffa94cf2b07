"""A worker's cache: decoded shards in memory and on disk, and the next shard being fetched in the background."""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from shutil import disk_usage
from tempfile import TemporaryFile, gettempdir
from threading import Lock

import numpy as np

from uap_dist.data.decode import DecodedShard, Geometry, decode_again, decode_shard
from uap_dist.data.fetch import ShardFile, fetch, read_parts
from uap_dist.data.locations import is_url
from uap_dist.errors import UapDistError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Traffic:
    """Counters of what a worker has read; they can be added and subtracted.

    Attributes:
        bytes_read: of shards, from stores and local files.
        seconds_reading: that the worker waited for these bytes.
        shards_read: number of reads of a shard, whole or for some of its images.
        cache_hits: tasks whose images were in the cache.
        cache_misses: shards read again because their decoded images had fitted neither into memory nor on disk.
        retries: attempts at fetching a shard beyond the first.
    """

    bytes_read: int = 0
    seconds_reading: float = 0.0
    shards_read: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    retries: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __sub__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a - b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


class ShardCache:
    """Decoded shards, all of the same geometry; none is ever evicted.

    Attributes:
        geometry: that images are decoded to.
        traffic: what was read so far.
    """

    def __init__(self, geometry: Geometry, *, memory_bytes: int, disk_bytes: int, num_threads: int) -> None:
        """Create an empty cache.

        Args:
            geometry: that images are decoded to.
            memory_bytes: decoded images kept in memory at most.
            disk_bytes: decoded images kept at most in the folder for temporary files once memory is full; half of the space that
                is free there now stays free.
            num_threads: that decode.
        """
        self.geometry, self.traffic, self._num_threads = geometry, Traffic(), num_threads
        self._memory_bytes, self._disk_bytes = self._memory_room, self._disk_room = memory_bytes, disk_bytes
        self._left_free = disk_usage(gettempdir()).free // 2
        self._kept: dict[str, DecodedShard] = {}
        self._seen: set[str] = set()
        self._not_kept: dict[str, DecodedShard] = {}  # without their images
        # of the counters, the room and the prefetch, because one thread may read shards while another one uses them
        self._lock = Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: tuple[str, Future[ShardFile]] | None = None

    def at(self, geometry: Geometry) -> "ShardCache":
        """The cache itself, emptied of decoded images if they have another geometry; its counters and its prefetch are kept."""
        if geometry != self.geometry:
            self.geometry, self._kept, self._not_kept, self._seen = geometry, {}, {}, set()
            self._memory_room, self._disk_room = self._memory_bytes, self._disk_bytes
        return self

    @property
    def memory_bytes(self) -> int:
        """Size of the decoded images in memory."""
        return self._memory_bytes - self._memory_room

    def whole(self, url: str) -> DecodedShard:
        """A whole decoded shard; kept if there is room.

        Raises:
            ShardError: see `fetch` and `decode_shard`.
        """
        return self._find(url) or self._keep(url, self._read(url))

    def some(self, url: str, keys: set[str]) -> DecodedShard:
        """A decoded shard with at least the images of these keys; with all images if it is cached or read for the first time.

        Of a tar that is neither, and not compressed, only these pictures are read. Their pixels are compared with those of the
        first time; if any differs, the whole shard is read, and its digest tells what has changed.

        Raises:
            ShardError: see `fetch` and `decode_shard`.
        """
        if url not in self._seen:
            return self.whole(url)
        return self._find(url) or self._read_pictures(url, keys) or self._read(url, keys)

    def prefetch(self, url: str) -> None:
        """Fetch a shard that will soon be needed in a background thread, one at a time; local files need no fetching.

        A failure is ignored until the shard is requested, and fetching is then tried again.
        """
        with self._lock:
            if is_url(url) and url not in self._kept and (self._ahead is None or self._ahead[0] != url):
                if self._ahead is not None:
                    self._ahead[1].cancel()  # unless it has begun
                self._ahead = url, self._thread.submit(fetch, url)

    def _find(self, url: str) -> DecodedShard | None:
        shard = self._kept.get(url)
        self._count(Traffic(cache_hits=int(shard is not None)))
        return shard

    def _count(self, traffic: Traffic) -> None:
        with self._lock:
            self.traffic += traffic

    def _read(self, url: str, keys: set[str] | None = None) -> DecodedShard:
        started = time.perf_counter()
        file = self._fetch(url)
        waited = time.perf_counter() - started
        shard = decode_shard(file, self.geometry, keys, num_threads=self._num_threads)
        self._count(
            Traffic(
                bytes_read=file.num_bytes,
                seconds_reading=waited + file.seconds,
                shards_read=1,
                cache_misses=int(url in self._seen),
                retries=file.num_retries,
            )
        )
        self._seen.add(url)
        return shard

    def _read_pictures(self, url: str, keys: set[str]) -> DecodedShard | None:
        """The images of these keys, found by their places; None if these are not known, or hold something else now."""
        shard = self._not_kept.get(url)
        if shard is None:
            return None
        rows = sorted(shard.rows[key] for key in keys if key in shard.rows)
        places = [place for row in rows if (place := shard.places[row]) is not None]
        if not rows or len(places) < len(rows):
            return None
        started = time.perf_counter()
        try:
            pictures, num_bytes, num_retries = read_parts(url, places)
        except OSError as error:
            logger.warning("%s; reading the whole shard", error)
            return None
        seconds = time.perf_counter() - started
        self._count(Traffic(num_bytes, seconds, shards_read=1, cache_misses=1, retries=num_retries))
        return decode_again(shard, rows, pictures, self.geometry, self._num_threads)

    def _fetch(self, url: str) -> ShardFile:
        coming = self._take_ahead(url)
        if coming is not None:
            try:
                return coming.result()
            except UapDistError as error:
                logger.warning("%s; trying once more", error)
        return fetch(url)

    def _take_ahead(self, url: str) -> "Future[ShardFile] | None":
        """The prefetch of a shard, for one thread."""
        with self._lock:
            if self._ahead is None or self._ahead[0] != url:
                return None
            (_, coming), self._ahead = self._ahead, None
            return coming

    def _keep(self, url: str, shard: DecodedShard) -> DecodedShard:
        size = shard.images.nbytes
        with self._lock:
            is_in_memory = size <= self._memory_room
            self._memory_room -= size * is_in_memory
            is_on_disk = not is_in_memory and size <= self._disk_room
            self._disk_room -= size * is_on_disk
        if is_in_memory:
            self._kept[url] = shard
        elif not (is_on_disk and self._keep_on_disk(url, shard)):
            self._not_kept[url] = replace(shard, images=shard.images[:0].copy(), labels=(), unused=(), bad=())
        return shard

    def _keep_on_disk(self, url: str, shard: DecodedShard) -> bool:
        """Whether there is room; without the lock, because writing takes long."""
        size = shard.images.nbytes
        if disk_usage(gettempdir()).free - size < self._left_free:
            with self._lock:
                self._disk_room += size
            return False
        try:
            self._kept[url] = replace(shard, images=_on_disk(shard.images))
        except OSError as error:
            with self._lock:
                self._disk_room = 0
            logger.warning("decoded images are no longer kept in %s (TMPDIR): %s", gettempdir(), error)
            return False
        return True


def _on_disk(array: np.ndarray) -> np.ndarray:
    """The array in a memory-mapped temporary file without a name, which disappears with its last reference or the process."""
    with TemporaryFile() as file:
        array.tofile(file)
        file.flush()
        return np.asarray(np.memmap(file, array.dtype, "r", shape=array.shape))
