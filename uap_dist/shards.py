"""WebDataset tar shards: from patterns to URLs, from a tar to decoded examples, and back."""

import hashlib
import io
import json
import platform
import tarfile
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property, partial
from pathlib import Path
from shutil import copyfileobj
from tempfile import TemporaryFile, gettempdir
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
from uap_dist.locations import NO_ROOM, explain, is_url, locate, persist, split_query

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
READ_SIZE = 1 << 20
COPY_SIZE = 8 << 20  # each is a request to the store
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

    @cached_property
    def rows(self) -> dict[str, int]:
        """Place of each key."""
        return {key: row for row, key in enumerate(self.keys)}


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


class ShardFile:
    """A shard's bytes on this machine, read once from the start to the end; hashes, counts and times them on their way.

    Attributes:
        url: of the shard.
        num_retries: attempts at fetching it beyond the first.
        num_bytes: read so far.
        seconds: spent in reading them.
    """

    def __init__(self, url: str, file: BinaryIO, num_retries: int = 0) -> None:
        self.url, self.num_retries = url, num_retries
        self._file = file
        self._hash = hashlib.sha256()
        self._tail = b""
        self.num_bytes, self.seconds = 0, 0.0

    @property
    def ends_with_mark(self) -> bool:
        """Whether the last bytes are two blocks of zeros: tarfile takes a file that is cut inside a header for whole."""
        return self._tail == bytes(END_MARK_SIZE)

    def read(self, size: int = -1) -> bytes:
        """The next bytes, as a file gives them."""
        started = time.perf_counter()
        data = self._file.read(size)
        self.seconds += time.perf_counter() - started
        self._hash.update(data)
        self._tail = (self._tail + data[-END_MARK_SIZE:])[-END_MARK_SIZE:]
        self.num_bytes += len(data)
        return data

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def digest(self) -> str:
        """SHA-256 (hex) of the whole file, which is read to its end and closed."""
        while self.read(READ_SIZE):  # tarfile stops at the end mark
            pass
        self.close()
        return self._hash.hexdigest()


def fetch(url: str) -> ShardFile:
    """A local shard, opened; or a copy of one that lies elsewhere, in a temporary file without a name, which no kill leaves behind.

    Decoding never meets the network so: what a store does wrong is done again here, and a tar that is cut short is one.

    Raises:
        ShardError: there is none, the store refuses or fails again and again, or this machine has no room.
    """
    if not is_url(url):
        try:
            return ShardFile(url, open(url, "rb", READ_SIZE))
        except FileNotFoundError as error:
            raise ShardError(
                f"no shard {url} on {platform.node()}; every node must see it: give a path that all of them share, or s3://, gs://"
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


def load_shard(url: str, geometry: Geometry, keys: Collection[str] | None = None) -> DecodedShard:
    """`fetch` a shard and `decode_shard` it."""
    return decode_shard(fetch(url), geometry, keys)


def decode_shard(file: ShardFile, geometry: Geometry, keys: Collection[str] | None = None) -> DecodedShard:
    """Read a shard once and decode its images, or only those with the given keys.

    Grey, CMYK, palette and EXIF-rotated images come out as the RGB that a viewer shows (transparency on white).

    Raises:
        ShardError: the shard is cut short or no tar, or images differ in size where `geometry` keeps their own.
    """
    url = file.url
    images: list[np.ndarray] = []
    good: list[str] = []
    seen: set[str] = set()
    truths: list[int] = []
    bad: list[str] = []
    for sample in _samples(file):
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
    digest = file.digest()
    if file.num_bytes and split_query(url)[0].endswith(".tar") and not file.ends_with_mark:
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


def _existing(url: str) -> str:
    filesystem, path = locate(url)
    try:
        info = filesystem.get_file_info(path)
        bucket = info if info.type == fs.FileType.File else filesystem.get_file_info(path.partition("/")[0])
    except OSError as error:
        raise ShardError(f"cannot read shard {explain(url, error)}") from error
    if is_url(url) and bucket.type == fs.FileType.NotFound:
        raise ShardError(f"no shard {url}: there is no bucket {bucket.path}")
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
        raise ShardError(f"{url} matches nothing: {explain(folder + query, error)}") from error
    names = sorted(
        info.base_name for info in infos if info.type == fs.FileType.File and fnmatch(info.base_name, pattern)
    )
    if not names:
        raise ShardError(f"{url} matches nothing in {folder or 'the working directory'}")
    return [_existing(f"{folder}/{name}{query}" if folder else name) for name in names]


def _copy(url: str) -> BinaryIO:
    """What a store holds, in a temporary file that is open at its start; OSError where it comes in part, or as parts of two objects."""
    filesystem, path = locate(url)
    with ExitStack() as failing:
        file = failing.enter_context(TemporaryFile())
        with filesystem.open_input_file(path) as stream:
            size, before = stream.size(), stream.metadata()
            copyfileobj(stream, file, COPY_SIZE)
        if file.tell() != size:
            raise OSError(f"{file.tell()} of {size} bytes came")
        with filesystem.open_input_file(path) as stream:
            if stream.metadata() != before:
                raise OSError("it was replaced while it was read")
        file.seek(0)
        failing.pop_all()
    return file


def _samples(file: ShardFile) -> Iterator[dict[str, Any]]:
    url = file.url
    try:
        yield from group_by_keys(tar_file_expander([{"url": url, "stream": file}]))
    except (tarfile.TarError, EOFError, OSError) as error:
        if file.num_bytes == 0:
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
