"""Shards decoded: the images of a WebDataset tar at a network's input size."""

import hashlib
import io
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F
from webdataset.tariterators import base_plus_ext

from uap_dist.data.fetch import ShardFile, fetch
from uap_dist.data.tars import read_tar
from uap_dist.errors import ShardError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Geometry:
    """How a photograph becomes the classifier's pixels: short side to `resize`, then the centre `crop`×`crop`.

    Attributes:
        resize: pixels; None leaves images as the shards hold them (then all must have one size).
        crop: pixels; None as above.
        interpolation: "bilinear" or "bicubic", antialiased.
    """

    resize: int | None = None
    crop: int | None = None
    interpolation: str = "bilinear"

    @property
    def shape(self) -> tuple[int, ...] | None:
        """C×H×W of the classifier's input; None where the shards decide it."""
        return None if self.crop is None else (3, self.crop, self.crop)

    def __str__(self) -> str:
        """In words, for messages."""
        return f"resize {self.resize}, crop {self.crop}, {self.interpolation}"


IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
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
