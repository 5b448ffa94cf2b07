"""Make WebDataset shards from an ImageFolder tree or from the tars of ILSVRC 2012: shuffled once, with an index of counts."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.progress import track

from uap_dist.data.sources.imagenet import list_folder, list_ilsvrc_train, list_ilsvrc_val, shuffled_samples
from uap_dist.data.write import write_classes, write_shards
from uap_dist.errors import ConfigError
from uap_dist.jobs.common import PARSER, command_line, console
from uap_dist.tracking.outputs import output_folder


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """Make WebDataset shards."""

    source: Path
    """ROOT of ROOT/CLASS/NAME.jpg, ILSVRC2012_img_train.tar, or ILSVRC2012_img_val.tar (with --labels)."""
    output: Path
    """Folder for PREFIX-0000.tar …, PREFIX-index.json with the counts, and classes.txt with the classes' names."""
    prefix: str = "train"
    """First part of the shards' names."""
    labels: Path | None = None
    """For a tar of images: text file with a line `NAME LABEL` or `LABEL` for each, a WordNet id or a class index."""
    shard_size: int = 1000
    """Images in a shard."""
    seed: int = 0
    """Seed of the shuffle."""
    debug: bool = False
    """Show tracebacks of errors."""


def main() -> None:
    """List, shuffle, write."""
    with command_line():
        options = tyro.cli(ShardOptions, config=PARSER)
        if options.shard_size < 1:
            raise ConfigError(f"shard size is {options.shard_size}; it must be positive")
        if any(options.output.glob(f"{options.prefix}-*.tar")):
            raise ConfigError(
                f"{options.output} already holds {options.prefix}-*.tar; give another --output or --prefix"
            )
        if options.labels is not None and options.source.is_dir():
            raise ConfigError(
                "--labels belongs to a tar of images; the classes of a folder are its folders: leave it out"
            )
        output_folder(options.output, options.prefix, may_hold_files=True)
        if options.source.is_dir():
            images, classes = list_folder(options.source)
        elif options.labels is not None:
            images, classes = list_ilsvrc_val(options.source, options.labels)
        else:
            images, classes = list_ilsvrc_train(options.source)
        write_classes(options.output, classes)
        samples = _with_progress(shuffled_samples(images, options.seed), len(images))
        counts = write_shards(samples, options.output, prefix=options.prefix, shard_size=options.shard_size)
        console.print(
            f"{sum(counts.values())} images of {len(classes)} classes in {len(counts)} shards: {options.output}/{options.prefix}-*.tar"
        )


def _with_progress(samples: Iterable[dict[str, Any]], total: int) -> Iterator[dict[str, Any]]:
    yield from track(samples, total=total, description="writing shards", console=console)
