"""WebDataset tar shards: from patterns to URLs, from a tar to decoded examples, and back."""

import hashlib
import io
import json
import tarfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import webdataset as wds
from PIL import Image, ImageOps, UnidentifiedImageError
from pyarrow import fs
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys, tar_file_expander

from uap_dist.classifiers import Geometry
from uap_dist.errors import ShardError
from uap_dist.locations import is_url, locate, split_query

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
READ_SIZE = 1 << 20  # without a buffer pyarrow sends one request to S3 for each read of a few hundred bytes
END_MARK_SIZE = 1024
UNKNOWN_CLASS = -1


@dataclass(frozen=True)
class DecodedShard:
    """The examples of one shard at the classifier's input size.

    Attributes:
        images: N×3×H×W uint8, RGB.
        keys: N sample keys, in the order of the tar.
        truths: N class indices of the data, UNKNOWN_CLASS where there is no .cls.
        bad: what was left out, as "key: reason".
        digest: SHA-256 (hex) of the file.
    """

    images: np.ndarray
    keys: tuple[str, ...]
    truths: np.ndarray
    bad: tuple[str, ...]
    digest: str


def expand_patterns(patterns: Sequence[str]) -> list[str]:
    """URLs of the shards that patterns name, in order: {0000..0009}, `::` between lists, * ? [] in file names.

    Raises:
        ShardError: a pattern that matches nothing, or a shard named twice.
    """
    urls: list[str] = []
    for pattern in patterns:
        for url in expand_urls(pattern):
            urls += _glob(url) if _has_wildcard(url) else [_existing(url)]
    twice = {url for url in urls if urls.count(url) > 1}
    if twice:
        raise ShardError(f"shard {min(twice)} is named twice")
    if not urls:
        raise ShardError("no shards given")
    return urls


def load_shard(url: str, geometry: Geometry, keys: Collection[str] | None = None) -> DecodedShard:
    """Read a shard once and decode its images, or only those with the given keys.

    Grey, CMYK, palette and EXIF-rotated images come out as the RGB that a viewer shows (transparency on white).

    Raises:
        ShardError: the shard is missing, cut short or no tar, or images differ in size where `geometry` keeps their own.
    """
    images: list[np.ndarray] = []
    good: list[str] = []
    seen: set[str] = set()
    truths: list[int] = []
    bad: list[str] = []
    stream = _HashingStream(_open(url))
    for sample in _samples(url, stream):
        key = sample["__key__"]
        if key in seen:
            raise ShardError(f"shard {url} holds the key {key} twice")
        seen.add(key)
        if keys is not None and key not in keys:
            continue
        try:
            image, truth = _decode(sample, geometry), _truth(sample)
        except UnidentifiedImageError:
            bad.append(f"{key}: no image in a format that Pillow reads")
            continue
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            bad.append(f"{key}: {error}")
            continue
        if images and image.shape != images[0].shape:
            raise ShardError(
                f"{url}: {key} is {image.shape[2]}×{image.shape[1]} where {good[0]} is {images[0].shape[2]}×{images[0].shape[1]}; "
                "give the network an attribute `input_size`, or shards with images of one size"
            )
        images.append(image)
        good.append(key)
        truths.append(truth)
    digest = stream.digest()
    if stream.num_bytes and split_query(url)[0].endswith(".tar") and not stream.ends_with_mark:
        raise ShardError(f"shard {url} is cut short: it does not end as a tar does")
    if not images and not bad and keys is None:
        raise ShardError(f"{url} is empty: no sample with an image")
    return DecodedShard(
        images=np.stack(images) if images else np.zeros((0, 3, 0, 0), np.uint8),
        keys=tuple(good),
        truths=np.array(truths, dtype=np.int64),
        bad=tuple(bad),
        digest=digest,
    )


def write_shards(samples: Iterable[dict[str, Any]], folder: Path, *, prefix: str, shard_size: int) -> dict[str, int]:
    """Write samples (`__key__`, `jpg` or another image extension as bytes, `cls` as int) to `folder`, and an index of counts.

    The same samples give the same bytes. Returns the examples in each shard by file name, as in `<prefix>-index.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    writer = None
    for number, sample in enumerate(samples):
        if number % shard_size == 0:
            if writer is not None:
                writer.close()
            name = f"{prefix}-{number // shard_size:04d}.tar"
            writer, counts[name] = wds.TarWriter(str(folder / name), mtime=0, user="root", group="root"), 0
        assert writer is not None
        writer.write({key: str(value).encode() if key == "cls" else value for key, value in sample.items()})
        counts[name] += 1
    if writer is not None:
        writer.close()
    index = {"num_examples": sum(counts.values()), "shards": counts}
    (folder / f"{prefix}-index.json").write_text(json.dumps(index, indent=2) + "\n")
    return counts


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


class _HashingStream:
    """What tarfile reads from: hashes and counts every byte on its way.

    Attributes:
        num_bytes: read so far.
        ends_with_mark: whether the last bytes are two blocks of zeros. tarfile takes a file that is cut inside a header for whole.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self._tail = b""
        self.num_bytes = 0

    @property
    def ends_with_mark(self) -> bool:
        return self._tail == bytes(END_MARK_SIZE)

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size) if size >= 0 else self._stream.read()
        self._hash.update(data)
        self._tail = (self._tail + data[-END_MARK_SIZE:])[-END_MARK_SIZE:]
        self.num_bytes += len(data)
        return data

    def close(self) -> None:
        self._stream.close()

    def digest(self) -> str:
        while self.read(READ_SIZE):  # tarfile stops at the end mark; the digest is of the whole file
            pass
        self.close()
        return self._hash.hexdigest()


def _existing(url: str) -> str:
    filesystem, path = locate(url)
    try:
        info = filesystem.get_file_info(path)
    except OSError as error:
        raise ShardError(f"cannot reach {url}: {error}") from error
    if info.type != fs.FileType.File:
        raise ShardError(f"no shard {url}")
    return url if is_url(url) else str(Path(url).resolve())


def _has_wildcard(url: str) -> bool:
    return any(c in split_query(url)[0] for c in "*?[")


def _glob(url: str) -> list[str]:
    location, query = split_query(url)
    folder, _, pattern = location.rpartition("/")
    if _has_wildcard(folder):
        raise ShardError(f"{url}: wildcards may stand in the file name only")
    filesystem, path = locate(folder + query or ".")
    try:
        infos = filesystem.get_file_info(fs.FileSelector(path))
    except OSError as error:
        raise ShardError(f"{url} matches nothing: {error}") from error
    names = sorted(
        info.base_name for info in infos if info.type == fs.FileType.File and fnmatch(info.base_name, pattern)
    )
    if not names:
        raise ShardError(f"{url} matches nothing in {folder or 'the working directory'}")
    return [_existing(f"{folder}/{name}{query}" if folder else name) for name in names]


def _open(url: str) -> BinaryIO:
    filesystem, path = locate(url)
    try:
        return filesystem.open_input_stream(path, compression=None, buffer_size=READ_SIZE)
    except OSError as error:
        raise ShardError(f"cannot open shard {url}: {error}") from error


def _samples(url: str, stream: _HashingStream) -> Iterator[dict[str, Any]]:
    try:
        yield from group_by_keys(tar_file_expander([{"url": url, "stream": stream}]))
    except (tarfile.TarError, EOFError, OSError) as error:
        if stream.num_bytes == 0:
            raise ShardError(f"shard {url} is empty") from error
        reason = str(error.args[0]) if error.args else type(error).__name__
        raise ShardError(f"shard {url} is cut short or no tar: {reason}") from error
    except ValueError as error:
        raise ShardError(f"shard {url}: {error}") from error


def _decode(sample: dict[str, Any], geometry: Geometry) -> np.ndarray:
    data = next((sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample), None)
    if data is None:
        raise ValueError(f"no image with extension {', '.join(IMAGE_EXTENSIONS)}")
    image = _to_rgb(Image.open(io.BytesIO(data)))
    if geometry.resize is not None:
        image = F.center_crop(
            F.resize(image, geometry.resize, InterpolationMode(geometry.interpolation)), geometry.crop
        )
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would cut at 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _truth(sample: dict[str, Any]) -> int:
    return int(sample["cls"]) if "cls" in sample else UNKNOWN_CLASS
