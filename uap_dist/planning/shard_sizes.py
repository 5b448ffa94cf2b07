"""How large shards are, in bytes and in images, without reading them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from pyarrow import fs

from uap_dist.data.locations import STORE_ERRORS, locate, persist, split_query
from uap_dist.errors import ConfigError, ShardError


@dataclass(frozen=True)
class ShardSizes:
    """Sizes of the shards that take part in a run, in their order.

    Attributes:
        num_images: images that take part, by shard.
        num_held: images that the shard holds, all of which a worker decodes.
        num_bytes: size of the shard.
        is_estimated: whether some images were not counted, but estimated from the bytes.
    """

    num_images: tuple[int, ...]
    num_held: tuple[int, ...]
    num_bytes: tuple[int, ...]
    is_estimated: bool = False

    @property
    def total_images(self) -> int:
        """Images of all shards that take part."""
        return sum(self.num_images)


def size_shards(
    urls: Sequence[str], num_images: int | None, counted: Sequence[int], images_per_byte: float
) -> ShardSizes:
    """Sizes of as many shards as hold the first `num_images` images (None for all of them).

    Args:
        urls: all shards.
        num_images: images that take part.
        counted: images of the first shards, as found by reading them. Those of the others are taken from an index beside
            them, or else estimated from their bytes.
        images_per_byte: for the estimate.

    Raises:
        ConfigError: the shards are known to hold fewer images.
        ShardError: a shard does not exist, or its store refuses or keeps failing.
    """
    num_bytes, indexed = count_bytes(urls), read_indexes(urls)
    known = [*counted, *(indexed.get(url) for url in urls[len(counted) :])]
    held = [
        max(1, round(images_per_byte * size)) if count is None else count
        for count, size in zip(known, num_bytes, strict=True)
    ]
    if num_images is None:
        return ShardSizes(tuple(held), tuple(held), tuple(num_bytes), is_estimated=None in known)
    starts = list(accumulate(held, initial=0))
    if starts[-1] < num_images and None not in known:
        raise ConfigError(f"asked for {num_images} images, but the {len(urls)} shards from {urls[0]} hold {starts[-1]}")
    taken = [min(size, num_images - start) for start, size in zip(starts, held, strict=False) if start < num_images]
    count = len(taken)
    return ShardSizes(tuple(taken), tuple(held[:count]), tuple(num_bytes[:count]), is_estimated=None in known[:count])


def count_bytes(urls: Sequence[str]) -> list[int]:
    """Sizes of shards in bytes, as their file system lists them.

    Raises:
        ShardError: a shard does not exist, or its store refuses or keeps failing.
    """
    by_folder: dict[str, list[int]] = {}
    for number, url in enumerate(urls):
        by_folder.setdefault(_split(url)[0], []).append(number)
    sizes = [0] * len(urls)
    for folder, numbers in by_folder.items():
        filesystem, _ = locate(folder)
        paths = [locate(urls[number])[1] for number in numbers]
        try:
            infos, _ = persist(folder, partial(filesystem.get_file_info, paths), "shards in")
        except OSError as error:
            raise ShardError(f"cannot read the sizes of shards in {error}") from error
        for number, info in zip(numbers, infos, strict=True):
            if info.type != fs.FileType.File:
                raise ShardError(f"no shard {urls[number]}")
            if info.size is None:
                raise ShardError(f"the server does not say how large {urls[number]} is; a plan needs that")
            sizes[number] = info.size
    return sizes


def read_indexes(urls: Sequence[str]) -> dict[str, int]:
    """Number of examples by URL, for the shards that are listed in an index beside them, as `write_shards` writes it."""
    counts: dict[str, int] = {}
    places = {url: _split(url) for url in urls}
    indexes = {place: _read_index(*place) for place in {(f, _prefix(name)) for f, name in places.values()}}
    for url, (folder, name) in places.items():
        listed = indexes[folder, _prefix(name)]
        if name in listed:
            counts[url] = listed[name]
    return counts


def _read_index(folder: str, prefix: str) -> dict[str, int]:
    filesystem, path = locate(folder)
    try:
        with filesystem.open_input_stream(f"{path.rstrip('/')}/{prefix}-index.json", compression=None) as stream:
            return {str(name): int(count) for name, count in json.loads(stream.read())["shards"].items()}
    except (*STORE_ERRORS, ValueError, LookupError, TypeError, AttributeError):  # no index, or another program's
        return {}


def _split(url: str) -> tuple[str, str]:
    """The folder of a shard, with the options of its URL, and the shard's name."""
    location, query = split_query(url)
    folder, _, name = location.rpartition("/")
    return folder + query, name


def _prefix(name: str) -> str:
    """The prefix that `write_shards` made the name from."""
    return name.rpartition("-")[0]
