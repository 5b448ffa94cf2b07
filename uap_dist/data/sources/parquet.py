"""Source of labelled images: Parquet files with the bytes of images, as most image data sets on the Hugging Face hub are."""

import io
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from uap_dist.data.locations import locate, persist, split_query
from uap_dist.data.samples import IMAGE_FORMATS
from uap_dist.data.sources.imagenet import SourceImage
from uap_dist.data.sources.labels import number_labels
from uap_dist.errors import ShardError

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif", "AVIF": "avif"}
BATCH_ROWS = 64

logger = logging.getLogger(__name__)


def is_parquet(source: str) -> bool:
    """Whether a path, URL or pattern names Parquet files, or a folder of them, as Spark writes it."""
    return split_query(source)[0].rstrip("/").lower().endswith((".parquet", ".pq"))


def list_parquet(
    urls: Sequence[str], copy: BinaryIO, label_column: str | None = None
) -> tuple[list[SourceImage], list[str]]:
    """Images of Parquet files, and the names of their classes.

    The column of images is a struct with `bytes` and `path`, as the library `datasets` writes it, or binary. That of labels has
    integers, which are class indices, or strings, see `number_labels`. Names of the classes stand in the schema, where `datasets`
    keeps them.

    Args:
        urls: of the files, as `expand_patterns` returns them.
        copy: a file in the file system, open for writing; the images' bytes are put one after another there, to be read in any order.
        label_column: None takes the only one that `datasets` calls labels, or that is named `label`; without one, no image has a label.

    Raises:
        ShardError: a file cannot be read, is no Parquet, has not one column of images and at most one of labels, or labels of two kinds.
    """
    rows: list[tuple[SourceImage, Any]] = []
    known: dict[tuple[str, ...], str] = {}
    for url in urls:
        read = partial(_read, url, copy, copy.tell(), label_column)
        try:
            (found, classes), _ = persist(url, read, "file")
        except OSError as error:
            raise ShardError(f"cannot read {error}") from error
        rows += found
        known.setdefault(classes, url)
    if len(known) > 1:
        first, second, *_ = known.values()
        raise ShardError(f"{second} has other classes than {first}; give files of one data set")
    copy.flush()
    if not rows:
        raise ShardError(f"{urls[0]} holds no image that Pillow can read")
    names = list(next(iter(known)))
    labels = [label for _, label in rows]
    if not names or any(isinstance(label, str) for label in labels):
        labels, names = number_labels([_label(label) for label in labels], [image.place for image, _ in rows])
    labels = [None if label is None or label < 0 else label for label in labels]
    beyond = next((i for i, label in enumerate(labels) if label is not None and label >= len(names)), None)
    if beyond is not None:
        raise ShardError(
            f"{rows[beyond][0].place} has label {labels[beyond]}, but the file names {len(names)} classes, from 0"
        )
    if unknown := labels.count(None):
        hint = (
            "; if a column holds labels, name it with --label-key"
            if unknown == len(labels) and not label_column
            else ""
        )
        logger.warning("%d of %d images have no label%s", unknown, len(labels), hint)
    return [image.labelled(label) for (image, _), label in zip(rows, labels, strict=True)], names


def _read(
    url: str, copy: BinaryIO, start: int, label_column: str | None
) -> tuple[list[tuple[SourceImage, Any]], tuple[str, ...]]:
    """Images of one file with their labels as they stand there, and class names; the copy is overwritten from a place on."""
    copy.seek(start)
    filesystem, path = locate(url)
    stem = PurePosixPath(split_query(url)[0]).stem.replace(".", "_")
    found: list[tuple[SourceImage, Any]] = []
    lost: list[int] = []
    with filesystem.open_input_file(path) as stream:
        try:
            file = pq.ParquetFile(stream)
        except pa.ArrowInvalid as error:
            raise ShardError(f"{url} is not a Parquet file, or cut short: {str(error).splitlines()[0]}") from error
        image_column, label_column, names = _columns(url, file.schema_arrow, label_column)
        wanted = [image_column] if label_column is None else [image_column, label_column]
        number = 0
        for batch in file.iter_batches(BATCH_ROWS, columns=wanted):
            labels = [None] * len(batch) if label_column is None else batch.column(label_column).to_pylist()
            for value, label in zip(batch.column(image_column).to_pylist(), labels, strict=True):
                data = (value.get("bytes") if isinstance(value, Mapping) else value) or b""
                extension = _extension(data)
                if extension is None:
                    lost.append(number)
                else:
                    place = Path(f"/proc/self/fd/{copy.fileno()}")
                    image = SourceImage(
                        f"{stem}_{number:06d}", extension, None, place, copy.tell(), len(data), f"{url}, row {number}"
                    )
                    copy.write(data)
                    found.append((image, label))
                number += 1
    if lost:
        logger.warning(
            "%s: left out %d of %d rows without the bytes of an image in one of the formats %s, the first row %d",
            url, len(lost), number, ", ".join(sorted(set(EXTENSIONS.values()))), lost[0],
        )  # fmt: skip
    return found, names


def _label(value: str | int | None) -> str | None:
    """A label of a column as one of a label file; empty strings and negative numbers stand for no class."""
    if isinstance(value, int):
        return str(value) if value >= 0 else None
    return None if value is None else value.strip() or None


def _columns(url: str, schema: pa.Schema, label_column: str | None) -> tuple[str, str | None, tuple[str, ...]]:
    """Names of the column of images and of that of labels, and names of the classes."""
    twice = [name for name, count in Counter(schema.names).items() if count > 1]
    if twice:
        raise ShardError(f"{url} has several columns named {twice[0]!r}; rename them")
    features = _features(schema)
    images = [field.name for field in schema if _is_image(field, features)]
    image = _choose(url, images, ("image", "img"), "of images (a struct with bytes and path, or binary)")
    if image is None:
        raise ShardError(
            f"{url} has no column of images (a struct with bytes and path, or binary), only {', '.join(schema.names)}"
        )
    if label_column is None:
        labels = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
        others = [name for name in ("label", "labels") if name in schema.names]
        label_column = _choose(url, labels or others[:1], ("label",), "of labels; name one with --label-key")
    elif label_column not in schema.names:
        raise ShardError(f"{url} has no column {label_column!r} (--label-key), only {', '.join(schema.names)}")
    if label_column is None:
        return image, None, ()
    kind = schema.field(label_column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ShardError(f"{url}: column {label_column!r} is of {kind}; labels are integers or strings (--label-key)")
    return image, label_column, tuple(features.get(label_column, {}).get("names") or ())


def _features(schema: pa.Schema) -> Mapping[str, Mapping[str, Any]]:
    """Kinds of the columns by name, as `datasets` writes them into the schema; none where another program wrote it."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: kind for name, kind in features.items() if isinstance(kind, Mapping)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _is_image(field: pa.Field, features: Mapping[str, Mapping[str, Any]]) -> bool:
    if field.name in features:
        return features[field.name].get("_type") == "Image"
    if pa.types.is_struct(field.type):
        index = field.type.get_field_index("bytes")
        return index >= 0 and _is_binary(field.type.field(index).type)
    return _is_binary(field.type)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _choose(url: str, names: Sequence[str], preferred: Sequence[str], what: str) -> str | None:
    """The only name, or the preferred one of several; None of none."""
    chosen = [name for name in preferred if name in names] if len(names) > 1 else names
    if len(names) > 1 and not chosen:
        raise ShardError(f"{url} has several columns {what}: {', '.join(names)}")
    return chosen[0] if chosen else None


def _extension(data: bytes) -> str | None:
    """Extension of an image's format; None for what Pillow does not recognise, or shards do not hold."""
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            return EXTENSIONS.get(image.format or "")
    except Exception:  # on damaged files Pillow's parsers raise errors of many types
        return None
