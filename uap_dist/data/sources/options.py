"""Options of jobs/shard.py."""

import re
from dataclasses import dataclass
from pathlib import Path

from uap_dist.data.locations import is_url
from uap_dist.data.sources.parquet import is_parquet
from uap_dist.errors import ConfigError
from uap_dist.foreign_text import redact


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


def check_source(options: ShardOptions) -> None:
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
    elif not Path(options.source).exists():
        raise ConfigError(f"--source {options.source}: there is no such file or folder")
