"""Options that several jobs share, and any job's options as plain values for its checkpoints."""

import re
from dataclasses import dataclass, fields, is_dataclass
from math import inf
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_origin, get_type_hints

from cattrs.preconf.json import make_converter

from uap_dist.errors import ConfigError

GIB = 2**30  # bytes


def option(name: str) -> str:
    """The option of a field, such as --batch-size for batch_size."""
    return "--" + name.replace("_", "-")


Options = TypeVar("Options")

_converter = make_converter(forbid_extra_keys=True, detailed_validation=False)
_converter.register_unstructure_hook(Path, str)
_converter.register_structure_hook(Path, lambda value, _: Path(value))


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Images to compute from, and held-out images."""

    train_shards: tuple[str, ...] = ()
    """WebDataset tars to compute from: paths or s3://, gs://, hf://, https:// URLs, with {0000..0009}, * and `::`."""
    val_shards: tuple[str, ...] = ()
    """Held-out tars, on which fooling rates are measured; none of them may be among the training ones."""
    num_train_images: int | None = None
    """How many images to compute from, the first of the shards; if not given, all."""
    num_val_images: int | None = None
    """How many held-out images, the first of the shards; if not given, all."""
    max_bad_fraction: float = 0.01
    """Share of images (0..1) that may be left out: damaged ones, and held-out ones that are training images too."""
    label_key: str | None = None
    """Key of the labels in the images' .json; if not given, they are in .cls. Only top-1 and fine-tuning need them."""

    def __post_init__(self) -> None:
        """Validate the options."""
        check_limits(self.max_bad_fraction, num_train_images=self.num_train_images, num_val_images=self.num_val_images)

    def require(self) -> None:
        """Raise ConfigError where training or held-out shards are missing."""
        for name, shards in (("train", self.train_shards), ("val", self.val_shards)):
            if not shards:
                raise ConfigError(f"no {name} shards given (--{name}-shards)")


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """Where results go."""

    output: Path | None = None
    """Folder for the results; if not given, outputs/<name of the run>-<time>-<run id>."""
    experiment: str = "uap_dist"
    """MLflow experiment, at MLFLOW_TRACKING_URI or else in mlflow.db of the working directory."""
    debug: bool = False
    """Show tracebacks of errors."""


@dataclass(frozen=True, kw_only=True)
class ResumableRecordOptions(RecordOptions):
    """Where results and checkpoints go."""

    storage: str | None = None
    """Folder that all nodes see, or URL, for checkpoints and a copy of the results; if not given, beside the output folder."""
    commit_every_s: float = 10.0
    """Seconds between two checkpoints: what a killed job loses at most, once the held-out images are read."""
    resume: str | None = None
    """MLflow run, or its folder of commits, to go on with. All other options are those of that run."""

    def __post_init__(self) -> None:
        """Validate the options."""
        if not 0 <= self.commit_every_s < inf:
            raise ConfigError(f"--commit-every-s is {self.commit_every_s}; it must not be negative, and must be finite")
        if re.match("(https?|ftp)://", self.storage or ""):
            raise ConfigError(
                "--storage is a URL that cannot be written to; give a folder, s3://BUCKET/PATH or gs://BUCKET/PATH"
            )


class JobOptions(Protocol):
    """Options of a job that MLflow records; they are validated when they are made."""

    @property
    def record(self) -> RecordOptions:
        """Where results go."""
        ...

    @property
    def job(self) -> str:
        """Kind of job, which the MLflow run is tagged with."""
        ...

    @property
    def name(self) -> str:
        """Name of the MLflow run."""
        ...


def to_json(options: Any) -> dict[str, Any]:
    """A job's options as plain values."""
    plain: dict[str, Any] = _converter.unstructure(options)
    return plain


def from_json(kind: type[Options], values: Any) -> Options:
    """The options that `to_json` was given.

    Raises:
        Exception: the values are not those of such options, as those of another version.
    """
    return _converter.structure(values, kind)


def list_options(kind: Any) -> set[str]:
    """Names of the options that take several values: fields of a dataclass of options, or of those in it, that are tuples."""
    found, hints = set[str](), get_type_hints(kind)
    for name, hint in ((field.name, hints[field.name]) for field in fields(kind)):
        if is_dataclass(hint):
            found |= list_options(hint)
        elif get_origin(hint) is tuple:
            found.add(name)
    return found


def check_limits(max_bad_fraction: float, **numbers: int | None) -> None:
    """Raise ConfigError for options of a data set that cannot be; of numbers of images, by their options, None takes all."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ConfigError(f"{option(name)} is {number}; it must be positive")
    if not 0 <= max_bad_fraction <= 1:
        raise ConfigError(f"--max-bad-fraction is {max_bad_fraction}; it must lie in [0, 1]")
