"""Writing shards, and beside them the names of their classes."""

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any
from unicodedata import normalize

import webdataset as wds

from uap_dist.data.locations import exists, join, read_file, split_query
from uap_dist.errors import ConfigError
from uap_dist.foreign_text import printable, redact, to_text

CLASSES_FILE = "classes.txt"
UNFINISHED = ".unfinished"  # ending of a shard's name until all are complete


def write_shards(samples: Iterable[dict[str, Any]], folder: Path, *, prefix: str, shard_size: int) -> dict[str, int]:
    """Write samples to `<prefix>-0000.tar`, … in a folder, and the number of examples in each to `<prefix>-index.json`.

    The same samples give the same bytes. Files get their names when all are complete; if `samples` raises, none is left.

    Args:
        samples: each has `__key__`, an image as bytes under its extension (`jpg`, …) and, if known, its class as int under `cls`.
        folder: created if it does not exist.
        prefix: of the file names.
        shard_size: samples per shard.

    Returns:
        The number of examples in each shard by file name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}
    try:
        for number, group in groupby(enumerate(samples), key=lambda numbered: numbered[0] // shard_size):
            name = f"{prefix}-{number:04d}.tar"
            counts[name] = 0
            with wds.TarWriter(str(folder / f"{name}{UNFINISHED}"), mtime=0, user="root", group="root") as writer:
                for _, sample in group:
                    writer.write({key: str(value).encode() if key == "cls" else value for key, value in sample.items()})
                    counts[name] += 1
        for name in counts:
            (folder / f"{name}{UNFINISHED}").rename(folder / name)
    finally:
        for name in counts:
            (folder / f"{name}{UNFINISHED}").unlink(missing_ok=True)
    index = {"num_examples": sum(counts.values()), "shards": counts}
    (folder / f"{prefix}-index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return counts


def check_classes(folder: Path, names: Sequence[str]) -> None:
    """Raise ConfigError where a folder has other classes, so that the same number would mean two things."""
    path, names = folder / CLASSES_FILE, _lines(names)
    if names and path.exists() and (known := read_classes(str(path.absolute()))) != names:
        same = (number for number, pair in enumerate(zip(known, names, strict=False)) if pair[0] != pair[1])
        number = next(same, min(len(known), len(names)))
        before, after = (repr(each[number]) if number < len(each) else "missing" for each in (known, names))
        raise ConfigError(
            f"{path} has {len(known)} classes, these images have {len(names)}: class {number} is {before} there and {after} here; training "
            "and held-out images need the same classes. Shards of other classes need another --output"
        )


def write_classes(folder: Path, names: Sequence[str]) -> None:
    """Write the names of classes 0, 1, … to classes.txt in a folder, one a line, for all shards in it; numbers name nothing.

    Raises:
        ConfigError: see `check_classes`.
    """
    check_classes(folder, names)
    if lines := _lines(names):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CLASSES_FILE).write_text("".join(f"{name}\n" for name in lines), encoding="utf-8")


def read_classes(url: str) -> list[str]:
    """Names of the classes of a shard (absolute path or URL), which stand in classes.txt in its folder; none without that file.

    Raises:
        OSError: the file cannot be read.
        ConfigError: the file is not in UTF-8; or see `locate`.
    """
    path, query = split_query(url)
    place = join(path.rpartition("/")[0] + query, CLASSES_FILE)
    if not exists(place):
        return []
    try:
        text = to_text(read_file(place))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{redact(place)} is not in UTF-8: {error.reason}; save it as UTF-8") from error
    return [line.strip() for line in text.rstrip().splitlines()]


def _lines(names: Sequence[str]) -> list[str]:
    """The lines of classes.txt, as `read_classes` returns them; none where the names are the numbers of the classes."""
    are_numbers = list(names) == [str(number) for number in range(len(names))]
    return [] if are_numbers else [normalize("NFC", printable(name)).strip() for name in names]
