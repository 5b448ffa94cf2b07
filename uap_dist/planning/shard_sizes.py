"""How large shards are, in bytes and in images, without reading them."""

import json
from collections.abc import Sequence

from pyarrow import fs

from uap_dist.data.locations import locate, split_query
from uap_dist.errors import ShardError


def count_bytes(urls: Sequence[str]) -> list[int]:
    """Sizes of shards, from what their file system says of them.

    Raises:
        ShardError: one is not there.
    """
    folders: dict[str, list[int]] = {}
    for number, url in enumerate(urls):
        folders.setdefault(_split(url)[0], []).append(number)
    sizes = [0] * len(urls)
    for folder, numbers in folders.items():
        filesystem, path = locate(folder)
        infos = filesystem.get_file_info([f"{path.rstrip('/')}/{_split(urls[number])[1]}" for number in numbers])
        for number, info in zip(numbers, infos, strict=True):
            if info.type != fs.FileType.File:
                raise ShardError(f"no shard {urls[number]}")
            sizes[number] = info.size
    return sizes


def read_indexes(urls: Sequence[str]) -> dict[str, int]:
    """Examples in each of the shards that an index beside them knows, as `write_shards` leaves it."""
    counts: dict[str, int] = {}
    places = {url: _split(url) for url in urls}
    indexes = {place: _read_index(*place) for place in {(f, _prefix(name)) for f, name in places.values()}}
    for url, (folder, name) in places.items():
        known = indexes[folder, _prefix(name)]
        if name in known:
            counts[url] = known[name]
    return counts


def _read_index(folder: str, prefix: str) -> dict[str, int]:
    filesystem, path = locate(folder)
    try:
        with filesystem.open_input_stream(f"{path.rstrip('/')}/{prefix}-index.json", compression=None) as stream:
            return {str(name): int(count) for name, count in json.loads(stream.read())["shards"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # none, or a file of somebody else's
        return {}


def _split(url: str) -> tuple[str, str]:
    """The folder of a shard, its URL's options kept, and its name there."""
    location, query = split_query(url)
    folder, _, name = location.rpartition("/")
    return folder + query, name


def _prefix(name: str) -> str:
    """What `write_shards` was given to make that name."""
    return name.rpartition("-")[0]
