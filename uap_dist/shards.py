"""WebDataset tar shards: from patterns to URLs, from a tar to decoded examples, and back."""

import hashlib
import io
import json
import os
import platform
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property, partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path, PurePosixPath
from shutil import copyfileobj
from tempfile import TemporaryFile, gettempdir
from typing import Any, BinaryIO

import numpy as np
import webdataset as wds
from PIL import ExifTags, Image, UnidentifiedImageError
from pyarrow import fs
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from uap_dist.classifiers import Geometry
from uap_dist.errors import ShardError
from uap_dist.locations import NO_ROOM, explain, is_url, locate, persist, split_query
from uap_dist.tars import READ_SIZE, read_tar

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
COPY_SIZE = 8 << 20  # each is a request to the store
HEAD_SIZE = 512  # of a tar's first header
UNKNOWN_CLASS = -1
HASH_SIZE = 16
META = re.compile("__[^/]*__($|/)")  # files of WebDataset's own
TO_UPRIGHT = {  # by the orientation that EXIF says
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class DecodedShard:
    """The examples of one shard at the classifier's input size.

    Attributes:
        images: N×3×H×W uint8, RGB.
        keys: N sample keys, in the order of the tar.
        truths: N class indices of the data, UNKNOWN_CLASS where there is no .cls.
        bad: what was left out, as "key: reason".
        digest: SHA-256 (hex) of the file.
        hashes: of each image's pixels, BLAKE2b of 16 bytes.
        unused: names of files that may be pictures of which no example is made: they have no extension, their names begin
            with a dot (or are WebDataset's own, as __meta__), or their sample has another picture.
    """

    images: np.ndarray
    keys: tuple[str, ...]
    truths: np.ndarray
    bad: tuple[str, ...]
    digest: str
    hashes: tuple[bytes, ...]
    unused: tuple[str, ...]

    @cached_property
    def rows(self) -> dict[str, int]:
        """Place of each key."""
        return {key: row for row, key in enumerate(self.keys)}


def expand_patterns(patterns: Sequence[str]) -> list[str]:
    """URLs of the shards that patterns name, in order: {0000..0009}, `::` between lists, * ? [] in file names.

    A local file or folder whose own name has such characters is meant where it is there. Local paths become absolute; links
    keep their names.

    Raises:
        ShardError: a pattern that matches nothing, or a shard named twice.
    """
    urls = [url for pattern in patterns for url in _expand(pattern)]
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
    """URLs of training and held-out shards.

    Raises:
        ShardError: as `expand_patterns`, or a shard that is among both.
    """
    train_urls, val_urls = expand_patterns(train), expand_patterns(val)
    both = set(train_urls) & set(val_urls)
    if both:
        raise ShardError(f"shard {min(both)} is among both the training and the held-out ones")
    return train_urls, val_urls


class ShardFile:
    """A shard's bytes on this machine, read once from the start to the end; hashes, counts and times them on their way.

    Attributes:
        url: of the shard.
        num_retries: attempts at fetching it beyond the first.
        num_bytes: read so far.
        seconds: spent in reading them.
        head: the first bytes.
    """

    def __init__(self, url: str, file: BinaryIO, num_retries: int = 0) -> None:
        self.url, self.num_retries = url, num_retries
        self._file = file
        self._hash = hashlib.sha256()
        self.num_bytes, self.seconds = 0, 0.0
        self.head = file.read(HEAD_SIZE)
        file.seek(0)

    def read(self, size: int = -1) -> bytes:
        """The next bytes, as a file gives them."""
        started = time.perf_counter()
        data = self._file.read(size)
        self.seconds += time.perf_counter() - started
        self._hash.update(data)
        self.num_bytes += len(data)
        return data

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def digest(self) -> str:
        """SHA-256 (hex) of the whole file, which is read to its end and closed."""
        while self.read(READ_SIZE):  # what follows a compressed tar
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
        ShardError: the shard is cut short, damaged or no tar, its names do not make samples of one picture each, or images
            differ in size where `geometry` keeps their own.
    """
    samples = _Samples(file)
    images: list[np.ndarray] = []
    good: list[str] = []
    truths: list[int] = []
    bad: list[str] = []
    for key, files in samples:
        if keys is not None and key not in keys:
            continue
        try:
            image, truth = _decode(files, geometry), _truth(files)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's decoders raise whatever their parsers of damaged files come upon
            bad.append(f"{key}: {_reason(error)}")
            continue
        if images and image.shape != images[0].shape:
            raise ShardError(
                f"{file.url}: {key} is {image.shape[2]}×{image.shape[1]} where {good[0]} is {images[0].shape[2]}×{images[0].shape[1]}; "
                "give the network an attribute `input_size`, or shards with images of one size"
            )
        images.append(image)
        good.append(key)
        truths.append(truth)
    digest = file.digest()
    if not images and not bad and keys is None:
        raise ShardError(f"{file.url} is empty: no sample with an image")
    return DecodedShard(
        images=np.stack(images) if images else np.zeros((0, 3, 0, 0), np.uint8),
        keys=tuple(good),
        truths=np.array(truths, dtype=np.int64),
        bad=tuple(bad),
        digest=digest,
        hashes=tuple(hashlib.blake2b(image.data, digest_size=HASH_SIZE).digest() for image in images),
        unused=tuple(samples.unused),
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


def _expand(pattern: str) -> list[str]:
    if _is_local_file(pattern):
        return [_existing(pattern)]
    folder, slash, name = pattern.rpartition("/")
    has_own_name = not is_url(pattern) and "::" not in pattern and Path(folder).is_dir()
    try:
        found = [folder + slash + each for each in expand_urls(name)] if has_own_name else expand_urls(pattern)
    except (ValueError, AssertionError) as error:  # of braces, and of ${…}, which WebDataset takes for a variable WDS_…
        raise ShardError(f"{pattern} is no pattern of shards: {error}") from error
    return [
        url
        for each in found
        for url in (_glob(each) if _has_wildcard(each) and not _is_local_file(each) else [_existing(each)])
    ]


def _is_local_file(location: str) -> bool:
    return not is_url(location) and Path(location).is_file()


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
        link = not is_url(url) and Path(url).is_symlink()
        raise ShardError(
            f"no shard {url}" + (f": it is a link to {os.readlink(url)}, which is no file" if link else "")
        )
    return url if is_url(url) else str(Path(url).absolute())


def _has_wildcard(url: str) -> bool:
    return any(c in split_query(url)[0] for c in "*?[")


def _glob(url: str) -> list[str]:
    location, query = split_query(url)
    folder, slash, pattern = location.rpartition("/")
    try:
        there = _names_in(folder + slash + query)
    except OSError as error:
        if _has_wildcard(folder):
            raise ShardError(f"{url}: wildcards may stand in the file name only") from error
        raise ShardError(f"{url} matches nothing: {explain(folder + query, error)}") from error
    names = [pattern] if pattern in there else sorted(name for name in there if fnmatch(name, pattern))
    if not names:
        raise ShardError(f"{url} matches nothing in {folder or 'the working directory'}")
    return [_existing(folder + slash + name + query) for name in names]


def _names_in(folder: str) -> list[str]:
    """Names of the files in a folder, and of links that lead nowhere, which pyarrow leaves out."""
    if not is_url(folder):
        return [path.name for path in Path(folder).iterdir() if not path.is_dir()]
    filesystem, path = locate(folder)
    infos = filesystem.get_file_info(fs.FileSelector(path))
    return [info.base_name for info in infos if info.type == fs.FileType.File]


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


class _Samples:
    """Samples of a shard as WebDataset groups them: key, and files by extension; files of one key follow each other.

    Attributes:
        unused: see DecodedShard; known once all samples were gone through.
    """

    def __init__(self, file: ShardFile) -> None:
        self._file = file
        self.unused: list[str] = []

    def __iter__(self) -> Iterator[tuple[str, dict[str, bytes]]]:
        shard = f"shard {self._file.url}"
        seen: dict[str, Collection[str]] = {}
        for key, group in groupby(self._named_files(shard), key=itemgetter(0)):
            files: dict[str, bytes] = {}
            before = seen.get(key, ())
            for _, extension, data in group:
                if extension in files or extension in before:
                    raise ShardError(f"{shard} holds {key}.{extension} twice")
                files[extension] = data
            if before:
                raise ShardError(
                    f"{shard}: the files of sample {key} do not follow each other ({key}.{min(files)} stands apart from "
                    f"{key}.{min(before)}); make the tar with tar --sort=name"
                )
            self._check_pictures(shard, key, files)
            seen[key] = tuple(files)
            yield key, files

    def _named_files(self, shard: str) -> Iterator[tuple[str, str, bytes]]:
        """Key, extension and bytes of each file that belongs to a sample."""
        for member in read_tar(self._file, self._file.head, shard):
            path = PurePosixPath(member.name)
            is_hidden = any(part[0] == "." and part != ".." for part in path.parts) or META.match(member.name)
            key, extension = (None, None) if is_hidden else base_plus_ext(member.name)
            if key is None or extension is None:
                if is_picture(member.name) or not (is_hidden or path.suffix):
                    self.unused.append(member.name)
                continue
            if not member.link_to:
                yield key, extension.lower(), member.data
            elif is_picture(member.name) or extension.lower() == "cls":
                raise ShardError(
                    f"{shard}: {member.name} is a link to {member.link_to}; pack the files themselves, with tar --dereference "
                    "--hard-dereference"
                )

    def _check_pictures(self, shard: str, key: str, files: Collection[str]) -> None:
        """Note pictures beside the one that a sample is of; where dots in names have made one sample of several, refuse."""
        pictures = [extension for extension in files if is_picture(f".{extension}")]
        taken = next((extension for extension in IMAGE_EXTENSIONS if extension in files), None)
        if pictures and taken is None:
            raise ShardError(
                f"{shard}: sample {key} has no picture, but {key}.{pictures[0]}: what follows the first dot of a name is its "
                "extension; leave no other dots in names"
            )
        self.unused += [f"{key}.{extension}" for extension in pictures if extension != taken]


def is_picture(name: str) -> bool:
    """Whether a file's name ends as an image's."""
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _decode(files: Mapping[str, bytes], geometry: Geometry) -> np.ndarray:
    data = next((files[extension] for extension in IMAGE_EXTENSIONS if extension in files), None)
    if data is None:
        raise ShardError(f"no image with extension {', '.join(IMAGE_EXTENSIONS)}, only {', '.join(files)}")
    image = _to_rgb(Image.open(io.BytesIO(data)))
    if geometry.resize is not None:
        image = F.center_crop(
            F.resize(image, geometry.resize, InterpolationMode(geometry.interpolation)), geometry.crop
        )
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    turn = TO_UPRIGHT.get(_orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would cut at 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _orientation(image: Image.Image) -> Any:
    """What EXIF says of it, or None. ImageOps.exif_transpose would write EXIF anew, which fails where any field is odd."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # of damaged EXIF; the image itself may be whole
        return None


def _truth(files: Mapping[str, bytes]) -> int:
    try:
        truth = int(files.get("cls", UNKNOWN_CLASS))
    except ValueError:
        truth = None
    if truth is None or not UNKNOWN_CLASS <= truth <= np.iinfo(np.int64).max:
        raise ShardError(f"its label (cls) is {files['cls'][:20].decode(errors='replace')!r}; it must be a class index")
    return truth


def _reason(error: Exception) -> str:
    """Why an image cannot be decoded."""
    if isinstance(error, UnidentifiedImageError):
        return "no image in a format that Pillow reads"
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, (ShardError, OSError, ValueError, SyntaxError, Image.DecompressionBombError)) and text:
        return text
    return f"it is damaged ({text})" if text else "it is damaged"
