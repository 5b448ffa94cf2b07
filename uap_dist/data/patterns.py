"""Shard patterns: expanding braces, wildcards and `::` to lists of URLs."""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from pyarrow import fs
from webdataset.shardlists import expand_urls

from uap_dist.data.locations import STORE_ERRORS, explain, is_url, locate, persist, split_query
from uap_dist.errors import ShardError

NUM_LOOKED_UP_AT_ONCE = 24  # a store answers in a tenth of a second, to 25 requests at once


def expand_patterns(patterns: str | Sequence[str]) -> list[str]:
    """URLs of the shards that match the patterns, in order.

    Patterns have {0000..0009} for ranges, `::` between alternatives, and * ? [] in file names. A local file or folder that exists
    under a name with such characters is taken literally. Local paths become absolute; symbolic links are not resolved.

    Raises:
        ShardError: a pattern matches nothing, or a shard is named twice.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    parts = [part for pattern in patterns for part in _expand_braces(pattern)]
    with ThreadPoolExecutor(NUM_LOOKED_UP_AT_ONCE) as pool:
        urls = [url for found in pool.map(_look_up, parts) for url in found]
    names: dict[str, str] = {}
    for url in urls:
        place = url if is_url(url) else os.path.realpath(url)
        if place in names:
            raise ShardError(
                f"shard {url} is named twice" + f", the first time as {names[place]}" * (names[place] != url)
            )
        names[place] = url
    if not urls:
        raise ShardError("no shards given")
    return urls


def expand_apart(train: Sequence[str], val: Sequence[str]) -> tuple[list[str], list[str]]:
    """URLs of the training and of the held-out shards.

    Raises:
        ShardError: see `expand_patterns`; or a shard is in both sets.
    """
    train_urls, val_urls = expand_patterns(train), expand_patterns(val)
    both = set(train_urls) & set(val_urls)
    if both:
        raise ShardError(f"shard {min(both)} is both a training and a held-out shard; hold out other shards")
    return train_urls, val_urls


def _expand_braces(pattern: str) -> list[str]:
    """What braces and `::` stand for; wildcards stay."""
    if pattern.lstrip().startswith("pipe:"):  # as WebDataset has it; it may hold a token, so it is not repeated
        raise ShardError(
            "a command (pipe:…) is no shard and is not run; give the URL itself, as s3://, gs://, hf:// or https://"
        )
    if _is_local_file(pattern):
        return [pattern]
    folder, slash, name = pattern.rpartition("/")
    has_own_name = not is_url(pattern) and "::" not in pattern and os.path.isdir(folder)
    try:
        return [folder + slash + each for each in _expand(name)] if has_own_name else _expand(pattern)
    except (ValueError, AssertionError) as error:  # unbalanced braces; ${…}, which WebDataset reads as a variable WDS_…
        raise ShardError(f"{pattern} is not a valid pattern of shards: {error}") from error


def _expand(pattern: str) -> list[str]:
    """What WebDataset makes of a pattern, except that a backslash that escapes no brace or comma is part of a name."""
    return list(expand_urls(re.sub(r"\\(?![{},])", r"\\\\", pattern)))


def _look_up(part: str) -> list[str]:
    """The shards under a name, which may have wildcards."""
    if not part.strip():
        raise ShardError("a shard has no name, as after a `::` too many")
    return _glob(part) if _has_wildcard(part) and not _is_local_file(part) else [_existing(part)]


def _is_local_file(location: str) -> bool:
    return not is_url(location) and os.path.isfile(location)  # which is false for a name too long, too


def _existing(url: str) -> str:
    filesystem, path = locate(url)
    has_buckets = not isinstance(filesystem, fs.PyFileSystem | fs.LocalFileSystem)  # the first is one of fsspec
    try:
        if not has_buckets:  # nor are requests repeated there
            bucket = info = persist(url, partial(filesystem.get_file_info, path), "shard")[0]
        else:
            info = filesystem.get_file_info(path)
            bucket = info if info.type == fs.FileType.File else filesystem.get_file_info(path.partition("/")[0])
    except STORE_ERRORS as error:
        said = explain(url, error) if has_buckets else str(error)
        raise ShardError(f"cannot read shard {said}") from error
    if is_url(url) and bucket is not info and bucket.type == fs.FileType.NotFound:
        raise ShardError(f"no shard {url}: there is no bucket {bucket.path}")
    if info.type != fs.FileType.File:
        reason = ""
        if not is_url(url) and Path(url).is_symlink():
            reason = f": it is a link to {os.readlink(url)}, which is no file"
        elif url.startswith("~"):
            reason = ": ~ is not expanded here; give the whole path"
        elif info.type == fs.FileType.Directory and re.search(r"\.(parquet|pq)/*$", split_query(url)[0], re.IGNORECASE):
            reason = ": it is a folder; FOLDER/*.parquet names all files in one"
        elif info.type == fs.FileType.Directory:
            reason = ": it is a folder; jobs/shard.py makes shards of a folder of images, and FOLDER/*.tar names all shards in one"
        raise ShardError(f"no shard {url}{reason}")
    return url if is_url(url) else str(Path(url).absolute())


def _has_wildcard(url: str) -> bool:
    return any(c in split_query(url)[0] for c in "*?[")


def _glob(url: str) -> list[str]:
    location, query = split_query(url)
    folder, slash, pattern = location.rpartition("/")
    if re.match("https?://", url):
        raise ShardError(
            f"{url}: web servers list no files; name the shards with braces, as in train-{{0000..0007}}.tar"
        )
    try:
        there = _names_in(folder + slash + query)
    except STORE_ERRORS as error:
        if _has_wildcard(folder):
            raise ShardError(f"{url}: wildcards may stand in the file name only") from error
        raise ShardError(f"{url} matches nothing: {explain(folder + query, error)}") from error
    seen = (name for name in there if pattern.startswith(".") or not name.startswith("."))  # as a shell has it
    names = [pattern] if pattern in there else sorted(name for name in seen if fnmatch(name, pattern))
    if not names:
        raise ShardError(f"{url} matches nothing in {folder or 'the working directory'}")
    found = [folder + slash + name + query for name in names]
    return found if is_url(url) else [_existing(each) for each in found]  # a local one may be a broken link


def _names_in(folder: str) -> list[str]:
    """Names of the files in a folder, broken symbolic links included, which pyarrow omits."""
    if not is_url(folder):
        return [path.name for path in Path(folder).iterdir() if not path.is_dir()]
    filesystem, path = locate(folder)
    infos = filesystem.get_file_info(fs.FileSelector(path))
    return [info.base_name for info in infos if info.type == fs.FileType.File]
