"""Decoding shards: the images of a WebDataset tar at a network's input size."""

import hashlib
import io
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from uap_dist.data.fetch import ShardFile, fetch
from uap_dist.data.samples import IMAGE_FORMATS, Samples
from uap_dist.data.tars import Member, Place
from uap_dist.errors import ShardError

HASH_SIZE = 16  # bytes
MAX_PIXELS = 2 * 89_478_485  # of an image, as Pillow has it when it opens one
SAMPLES_AHEAD = 2  # for each thread, read or decoded while the next one in order is not
TO_UPRIGHT = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Geometry:
    """How an image is brought to the classifier's input size: resized, then the centre `crop`×`crop` cut out.

    Attributes:
        resize: pixels; None keeps the images as they are in the shards, where all must then have one size.
        crop: pixels; None as above.
        interpolation: "bilinear", "bicubic" and so on, antialiased.
        crop_mode: as timm has it. "center" resizes the short side to `resize`; "squash" both sides, whatever the image's aspect
            ratio; "border" the long side, and fills up what is missing of `crop`×`crop`.
        fill: RGB 0..255 of such borders.
    """

    resize: int | None = None
    crop: int | None = None
    interpolation: str = "bilinear"
    crop_mode: str = "center"
    fill: tuple[int, ...] = (0, 0, 0)

    @classmethod
    def from_provenance(cls, provenance: Mapping[str, Any]) -> "Geometry | None":
        """The geometry under the keys geometry.… of a record; None if there is none."""
        values = {field.name: provenance.get(f"geometry.{field.name}") for field in fields(cls)}
        if None in (values["resize"], values["crop"], values["interpolation"]):
            return None
        known: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        return cls(**known | {"fill": tuple(known.get("fill", cls.fill))})

    @property
    def shape(self) -> tuple[int, ...] | None:
        """C×H×W of the classifier's input; None if it is that of the images in the shards."""
        return None if self.crop is None else (3, self.crop, self.crop)

    def __str__(self) -> str:
        """A description for messages."""
        mode = "" if self.crop_mode == "center" else f", {self.crop_mode}"
        return f"resize {self.resize}, crop {self.crop}, {self.interpolation}{mode}"


@dataclass(frozen=True)
class DecodedShard:
    """The examples of one shard at the classifier's input size.

    Attributes:
        images: N×3×H×W uint8, RGB.
        keys: N sample keys, in the order of the tar.
        labels: N times the content of the sample's files that may say what its image shows, by extension (cls, json); see
            `find_class`.
        bad: samples left out because they cannot be decoded, as "key: reason".
        digest: SHA-256 (hex) of the shard's file.
        hashes: N BLAKE2b hashes (16 bytes) of the images' pixels.
        unused: names of files that may be pictures but are not used: they have no extension, their names begin with a dot or
            are reserved by WebDataset (as __meta__), macOS or pax, or their sample has another picture; and of .cls files of no
            picture.
        places: offset and size of the N pictures in the shard's file, None where that is compressed.
    """

    images: np.ndarray
    keys: tuple[str, ...]
    labels: tuple[Mapping[str, bytes], ...]
    bad: tuple[str, ...]
    digest: str
    hashes: tuple[bytes, ...]
    unused: tuple[str, ...]
    places: tuple[Place | None, ...]

    @cached_property
    def rows(self) -> dict[str, int]:
        """Row of each key in `images`."""
        return {key: row for row, key in enumerate(self.keys)}

    def take(self, keys: Iterable[str]) -> np.ndarray:
        """The images of these keys, N×3×H×W uint8."""
        chosen: np.ndarray = self.images[[self.rows[key] for key in keys]]
        return chosen


def load_shard(url: str, geometry: Geometry, keys: Collection[str] | None = None) -> DecodedShard:
    """Fetch and decode a shard, see `fetch` and `decode_shard`."""
    return decode_shard(fetch(url), geometry, keys)


def decode_shard(
    file: ShardFile, geometry: Geometry, keys: Collection[str] | None = None, *, num_threads: int = 1
) -> DecodedShard:
    """Read a shard once and decode its images, or only those with the given keys. The result does not depend on the threads.

    Grey, CMYK, palette and EXIF-rotated images become the RGB that a viewer shows, transparency being shown on white.

    Args:
        file: the shard.
        geometry: what images are resized to.
        keys: of the images; None for all.
        num_threads: that decode images, beside the one that reads.

    Raises:
        ShardError: the shard is truncated, damaged or not a tar; its file names do not form samples of one picture each; or its
            images differ in size and `geometry` does not resize them.
    """
    Image.init()  # all formats, which Pillow would otherwise load at the first picture of another one, in whichever thread
    samples = Samples(file)
    wanted = (sample for sample in samples if keys is None or sample[0] in keys)
    examples: list[_Example] = []
    bad: list[str] = []
    with ThreadPoolExecutor(num_threads, "decode") as pool:
        for found in _in_order(pool, partial(_try_to_decode, geometry=geometry), wanted, SAMPLES_AHEAD * num_threads):
            if isinstance(found, str):
                bad.append(found)
                continue
            examples.append(found)
            shape, first = found.image.shape, examples[0]
            if shape != first.image.shape:
                raise ShardError(
                    f"{file.url}: {found.key} is {shape[2]}×{shape[1]} where {first.key} is {first.image.shape[2]}×{first.image.shape[1]}; "
                    "give the network an attribute `input_size`, or shards with images of one size"
                )
        bad += [reason for reason in samples.bad if keys is None]
        digest = file.digest()
        images = _stack(pool, [each.image for each in examples])
    if not examples and not bad and keys is None:
        raise ShardError(f"{file.url} is empty: no sample with an image")
    return DecodedShard(
        images=images,
        keys=tuple(each.key for each in examples),
        labels=tuple(samples.labels.get(each.key, {}) for each in examples),
        bad=tuple(bad),
        digest=digest,
        hashes=tuple(each.hash for each in examples),
        unused=tuple(samples.unused),
        places=tuple(each.place for each in examples),
    )


def decode_again(
    shard: DecodedShard, rows: Sequence[int], pictures: Sequence[bytes], geometry: Geometry, num_threads: int
) -> DecodedShard | None:
    """Some examples of a shard that was decoded before, with their images; None if a picture does not give the same pixels again.

    Args:
        shard: as it was decoded with the same geometry; its images are not needed.
        rows: of the examples.
        pictures: their bytes.
        geometry: what images are resized to.
        num_threads: that decode.
    """
    members = [(shard.keys[row], Member("", data)) for row, data in zip(rows, pictures, strict=True)]
    with ThreadPoolExecutor(num_threads, "decode") as pool:
        found = list(pool.map(partial(_try_to_decode, geometry=geometry), members))
    examples = [each for each in found if isinstance(each, _Example)]
    if [each.hash for each in examples] != [shard.hashes[row] for row in rows]:
        return None
    images, keys = np.stack([each.image for each in examples]), tuple(each.key for each in examples)
    return replace(shard, images=images, keys=keys, hashes=tuple(each.hash for each in examples))


@dataclass(frozen=True)
class _Example:
    """One row of a `DecodedShard`."""

    key: str
    image: np.ndarray
    hash: bytes
    place: Place | None


def _try_to_decode(sample: tuple[str, Member], geometry: Geometry) -> _Example | str:
    """The example, or "key: reason" if it cannot be decoded."""
    key, picture = sample
    try:
        image = _decode(picture.data, geometry)
    except MemoryError:
        raise
    except Exception as error:  # on damaged files Pillow's decoders raise errors of many types
        return f"{key}: {_reason(error)}"
    return _Example(key, image, hashlib.blake2b(image.data, digest_size=HASH_SIZE).digest(), picture.place)


def _in_order(pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], num_ahead: int) -> Iterator[R]:
    """Results of a function on threads in the order of the items, of which this many are taken ahead at most."""
    pending: deque[Future[R]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > num_ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _stack(pool: ThreadPoolExecutor, images: list[np.ndarray]) -> np.ndarray:
    """What `np.stack` returns, copied by threads: of a thousand photographs it takes as long as decoding a hundred."""
    if not images:
        return np.zeros((0, 3, 0, 0), np.uint8)
    stacked = np.empty((len(images), *images[0].shape), np.uint8)
    list(pool.map(stacked.__setitem__, range(len(images)), images))
    return stacked


def _decode(data: bytes, geometry: Geometry) -> np.ndarray:
    image = to_rgb(Image.open(io.BytesIO(data), formats=IMAGE_FORMATS))
    if geometry.resize is not None and geometry.crop is not None:
        image = _fit(image, geometry.resize, geometry.crop, geometry)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _fit(image: Image.Image, resize: int, crop: int, geometry: Geometry) -> Image.Image:
    size, found = [resize], f"it is {image.width}×{image.height}, too narrow"
    if geometry.crop_mode == "squash":
        size = [resize, resize]
    elif geometry.crop_mode == "border":
        size = [round(side / (max(image.size) / resize)) for side in (image.height, image.width)]
        if min(size) == 0:
            raise ShardError(f"{found}: resized, it would have no pixels")
    elif resize * resize * max(image.size) > MAX_PIXELS * min(image.size):
        raise ShardError(f"{found}: resized, it would have more than {MAX_PIXELS:,} pixels")
    image = F.resize(image, size, InterpolationMode(geometry.interpolation))
    if geometry.crop_mode == "border":
        missing = [max(0, crop - side) for side in image.size]
        image = F.pad(image, [m // 2 for m in missing] + [(m + 1) // 2 for m in missing], list(geometry.fill))
    return F.center_crop(image, [crop, crop])


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as a viewer shows it: upright, in RGB, transparency on white."""
    image.load()
    turn = TO_UPRIGHT.get(_orientation(image))
    if image.mode in ("F", "I"):
        kind = "floating-point numbers" if image.mode == "F" else "integers"
        raise ShardError(f"its pixels are {kind} of an unknown scale")
    if image.mode.startswith("I;16"):
        image = _to_grey(image)
    if turn is not None:
        image = image.transpose(turn)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _to_grey(image: Image.Image) -> Image.Image:
    """8-bit grey of 16-bit grey, or of 12 bits of a TIFF, which convert() would clip at 255."""
    tags = getattr(image, "tag_v2", {})
    (bits,) = tags.get(ExifTags.Base.BitsPerSample, (16,))
    levels = np.asarray(image) * np.uint32(255) // (2**bits - 1)
    is_white_zero = tags.get(ExifTags.Base.PhotometricInterpretation) == 0  # which Pillow respects in 8 bits only
    return Image.fromarray((255 - levels if is_white_zero else levels).astype(np.uint8))


def _orientation(image: Image.Image) -> Any:
    """EXIF orientation, or None. ImageOps.exif_transpose also rewrites EXIF, which fails if any other field is malformed."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # the EXIF data are damaged; the image itself may be intact
        return None


def _reason(error: Exception) -> str:
    """Why an image cannot be decoded."""
    if isinstance(error, UnidentifiedImageError):
        return f"no image in one of the formats {', '.join(IMAGE_FORMATS)}"
    text = (str(error).splitlines() or [""])[0]
    if isinstance(error, (ShardError, OSError, ValueError, SyntaxError, Image.DecompressionBombError)) and text:
        return text
    return f"it is damaged ({text})" if text else "it is damaged"
