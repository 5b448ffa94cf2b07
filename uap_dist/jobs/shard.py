"""Make WebDataset shards from an ImageFolder tree, Parquet files or the tars of ILSVRC 2012: shuffled once, with an index of counts."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from rich.progress import track

from uap_dist.data.locations import is_url
from uap_dist.data.patterns import expand_patterns
from uap_dist.data.sources.imagenet import (
    SourceImage,
    list_folder,
    list_ilsvrc_train,
    list_ilsvrc_val,
    shuffled_samples,
)
from uap_dist.data.sources.parquet import is_parquet, list_parquet
from uap_dist.data.write import check_classes, write_classes, write_shards
from uap_dist.errors import ConfigError
from uap_dist.foreign_text import redact
from uap_dist.jobs.common import command_line, console, parse
from uap_dist.tracking.outputs import output_folder


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """Make WebDataset shards."""

    source: str
    """ROOT of ROOT/CLASS/NAME.jpg, Parquet files, ILSVRC2012_img_train.tar, or …_val.tar with --labels."""
    output: Path
    """Folder for PREFIX-0000.tar …, PREFIX-index.json with the counts, and classes.txt with the classes' names."""
    prefix: str = "train"
    """First part of the shards' names."""
    labels: Path | None = None
    """For a tar of images: text file with a line `NAME LABEL` or `LABEL` for each, a WordNet id or a class index."""
    label_key: str | None = None
    """For Parquet files: column of the labels; if not given, the only one."""
    shard_size: int = 1000
    """Images in a shard."""
    seed: int = 0
    """Seed of the shuffle."""
    debug: bool = False
    """Show tracebacks of errors."""

    def __post_init__(self) -> None:
        """Validate the options."""
        if self.shard_size < 1:
            raise ConfigError(f"--shard-size is {self.shard_size}; it must be positive")
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}; it must not be negative")
        if not re.fullmatch(r"[\w=-][\w.=-]{0,99}", self.prefix):
            raise ConfigError(
                f"--prefix is {self.prefix!r}; it must be the beginning of a file name, of at most 100 letters, digits and _ . = -"
            )


def main() -> None:
    """List, shuffle, write."""
    with command_line():
        options = parse(ShardOptions)
        if any(options.output.glob(f"{options.prefix}-*.tar")):
            raise ConfigError(
                f"{options.output} already holds {options.prefix}-*.tar; give another --output or --prefix"
            )
        _check_source(options)
        output_folder(options.output, may_hold_files=True)
        options.output.mkdir(parents=True, exist_ok=True)
        # the copy is one of the images in Parquet files, where there is room for the shards
        with TemporaryFile(dir=options.output) as copy:
            images, classes = _list_images(options, copy)
            check_classes(options.output, classes)
            samples = _with_progress(shuffled_samples(images, options.seed), len(images))
            counts = write_shards(samples, options.output, prefix=options.prefix, shard_size=options.shard_size)
            write_classes(options.output, classes)
        console.print(
            f"{sum(counts.values())} images of {len(classes)} classes in {len(counts)} shards: {options.output}/{options.prefix}-*.tar"
        )


def _check_source(options: ShardOptions) -> None:
    """Raise ConfigError for a source that other options do not fit."""
    if options.labels is not None and Path(options.source).is_dir():
        raise ConfigError("--labels belongs to a tar of images; the classes of a folder are its folders: leave it out")
    if is_parquet(options.source):
        if options.labels is not None:
            raise ConfigError(
                "--labels belongs to a tar of images; labels of Parquet files are a column: --label-key names it"
            )
    elif options.label_key is not None:
        raise ConfigError("--label-key belongs to Parquet files (NAME.parquet); leave it out")
    elif is_url(options.source):
        raise ConfigError(
            f"{redact(options.source)}: of URLs only Parquet files are read (NAME.parquet); tars of images can be used as they are: "
            "--train-shards"
        )


def _list_images(options: ShardOptions, copy: BinaryIO) -> tuple[list[SourceImage], list[str]]:
    """Images and names of classes of the source."""
    if is_parquet(options.source):
        return list_parquet(expand_patterns([options.source]), copy, options.label_key)
    source = Path(options.source)
    if source.is_dir():
        return list_folder(source)
    if options.labels is not None:
        return list_ilsvrc_val(source, options.labels)
    return list_ilsvrc_train(source)


def _with_progress(samples: Iterable[dict[str, Any]], total: int) -> Iterator[dict[str, Any]]:
    yield from track(samples, total=total, description="writing shards", console=console)


if __name__ == "__main__":
    main()
