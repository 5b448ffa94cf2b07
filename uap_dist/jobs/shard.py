"""Make WebDataset shards from an ImageFolder tree, Parquet files or the tars of ILSVRC 2012: shuffled once, with an index of counts."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from rich.progress import track

from uap_dist.data.patterns import expand_patterns
from uap_dist.data.sources.imagenet import (
    SourceImage,
    list_folder,
    list_ilsvrc_train,
    list_ilsvrc_val,
    shuffled_samples,
)
from uap_dist.data.sources.options import ShardOptions, check_source
from uap_dist.data.sources.parquet import is_parquet, list_parquet
from uap_dist.data.write import check_classes, write_classes, write_shards
from uap_dist.errors import ConfigError
from uap_dist.jobs.common import command_line, console
from uap_dist.jobs.parsing import parse
from uap_dist.tracking.outputs import output_folder


def main() -> None:
    """List, shuffle, write."""
    with command_line():
        options = parse(ShardOptions)
        if any(options.output.glob(f"{options.prefix}-*.tar")):
            raise ConfigError(
                f"{options.output} already holds {options.prefix}-*.tar; give another --output or --prefix"
            )
        check_source(options)
        output_folder(options.output, may_hold_files=True)
        # the copy is one of the images in Parquet files, where there is room for the shards
        with _made(options.output), TemporaryFile(dir=options.output) as copy:
            images, classes = _list_images(options, copy)
            check_classes(options.output, classes)
            samples = _with_progress(shuffled_samples(images, options.seed), len(images))
            counts = write_shards(samples, options.output, prefix=options.prefix, shard_size=options.shard_size)
            write_classes(options.output, classes)
        console.print(
            f"{sum(counts.values())} images of {len(classes)} classes in {len(counts)} shards: {options.output}/{options.prefix}-*.tar"
        )


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder, which is made if it does not exist, and then removed after an error that leaves it empty."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
        raise


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
