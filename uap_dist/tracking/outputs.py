"""What a job leaves: its output folder, which is created with its first file and copied to storage, and the tables in it."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from shlex import quote
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from safetensors import SafetensorError
from tabulate import tabulate

from uap_dist.data.locations import absolute, copy_folder, is_url, join, make_own_folder, try_to_write
from uap_dist.errors import ConfigError, OutputError, TrackingError
from uap_dist.foreign_text import first_line
from uap_dist.tracking.process import command

RESULT_FILE = "result.json"
RESULTS_FOLDER = "results"  # beside the checkpoints
MAX_NAME, NUM_DIGITS = 100, 6  # of the default folder: characters of the name, and digits of the run id

Given = ParamSpec("Given")
Result = TypeVar("Result")


def default_folder(name: str, run_id: str) -> Path:
    """The folder for the files of a job without --output: named after its MLflow run, whose id no other job has."""
    plain = re.sub(r"[/\\\s]+", "-", name)[:MAX_NAME]  # a model may be named by its path
    return Path("outputs") / f"{plain}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{run_id[:NUM_DIGITS]}"


def output_folder(folder: Path, *, may_hold_files: bool = False, besides: Collection[str] = ()) -> Path:
    """The folder for a job's files, checked to be writable but not created: a job that is refused leaves none.

    Args:
        folder: of the command line, or the default.
        may_hold_files: whether it may hold files already, as that of a resumed job does.
        besides: names of files that it may hold in any case.

    Raises:
        ConfigError: it is a URL, begins with ~, holds files, or cannot be written to.
    """
    if re.match(r"\w+:/", str(folder)):
        raise ConfigError(
            f"--output {folder} is a URL; give a local folder (its files are also copied to MLflow, and to --storage s3://…)"
        )
    folder = Path(absolute(str(folder)))
    try:  # now rather than after hours of work
        if not may_hold_files and folder.is_dir() and any(path.name not in besides for path in folder.iterdir()):
            raise ConfigError(f"{folder} is not empty; give another --output")
        try_to_write(folder)
    except OSError as error:
        raise ConfigError(f"cannot write to --output {folder}: {error.strerror}") from error
    return folder


def writes_files(save: Callable[Concatenate[Path, Given], Result]) -> Callable[Concatenate[Path, Given], Result]:
    """Decorate a function that writes into the folder given first: the folder is created, and OutputError says why it cannot be written."""

    @wraps(save)
    def save_or_say_why(folder: Path, /, *args: Given.args, **kwargs: Given.kwargs) -> Result:
        try:
            make_own_folder(folder)
            return save(folder, *args, **kwargs)
        except (OSError, SafetensorError) as error:
            is_full = "No space left" in str(error) or "quota exceeded" in str(error)
            reason = "no space is left on its disk" if is_full else first_line(error)
            raise OutputError(f"cannot write results to {folder}: {reason}") from error

    return save_or_say_why


def save_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, which all have the same columns, as PATH.parquet and PATH.csv."""
    table = pa.Table.from_pylist(list(rows))
    pq.write_table(table, path.with_suffix(".parquet"))
    pyarrow.csv.write_csv(table, path.with_suffix(".csv"))


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of cells that are Markdown already (see `escape_markdown`), without padding: MLflow limits descriptions."""
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True, stralign=None)


@contextmanager
def resumable(storage: str) -> Iterator[None]:
    """Add to an OutputError of the block how to resume from `storage`, where everything computed so far is committed."""
    try:
        yield
    except OutputError as error:
        raise OutputError(
            f"{error}; everything computed is committed: mend that, then run {command()} --resume {quote(storage)}"
        ) from error


@contextmanager
def deliverable(output: Path, storage: str) -> Iterator[None]:
    """Add to a TrackingError of the block where the results are, and how to deliver them later."""
    try:
        yield
    except TrackingError as error:
        raise TrackingError(
            f"{error}; everything computed is saved in {output}; when the server answers again, run: {command()} --resume {quote(storage)}"
        ) from error


def publish(folder: Path, storage: str) -> None:
    """Copy the finished files below `storage` if that is a URL. result.json is copied last: if it is there, everything is.

    Raises:
        ConfigError: they cannot be written.
    """
    if is_url(storage):
        try:
            copy_folder(folder, join(storage, RESULTS_FOLDER), last=RESULT_FILE)
        except OSError as error:
            raise ConfigError(
                f"cannot write results to {error}; they are complete in {folder}; copy them with --resume {quote(storage)}"
            ) from error
