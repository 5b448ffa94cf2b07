"""The output folder of a job: made late, written safely, copied to storage."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from safetensors import SafetensorError

from uap_dist.data.locations import copy_folder, is_url, join, make_own_folder, try_to_write
from uap_dist.errors import ConfigError, OutputError
from uap_dist.foreign_text import first_line
from uap_dist.tracking.process import command

RESULT_FILE = "result.json"
RESULTS_FOLDER = "results"  # beside the checkpoints

Given = ParamSpec("Given")
Result = TypeVar("Result")


def output_folder(output: Path | None, name: str, *, may_hold_files: bool = False) -> Path:
    """The folder for a job's files, known to be writable; outputs/<name>-<time> where none is given.

    It is made with the first file, so that a job that is refused leaves none.

    Raises:
        ConfigError: a URL, a folder that holds files, or one that cannot be written to.
    """
    plain = re.sub(r"[/\\\s]+", "-", name)  # a model may be named by its path
    folder = output or Path("outputs") / f"{plain}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    if re.match(r"\w+:/", str(folder)):
        raise ConfigError(
            f"--output {output} is a URL; give a folder (the same files go to MLflow, and to --storage s3://…)"
        )
    if not may_hold_files and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; give another --output")
    folder = folder.resolve()
    try:  # now, not when hours of work are to be saved
        try_to_write(folder)
    except OSError as error:
        raise ConfigError(f"cannot write to --output {folder}: {error.strerror}") from error
    return folder


def writes_files(save: Callable[Concatenate[Path, Given], Result]) -> Callable[Concatenate[Path, Given], Result]:
    """A function that writes into the folder which it is given first; where the disk refuses, an OutputError says so."""

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


@contextmanager
def resumable(storage: str) -> Iterator[None]:
    """What was computed before results could not be written is not lost; say so."""
    try:
        yield
    except OutputError as error:
        raise OutputError(
            f"{error}; what is computed is committed: make room, then {command()} --resume {storage}"
        ) from error


def publish(folder: Path, storage: str) -> None:
    """Where a job is committed to a URL, copy its finished files below it; result.json comes last: where it is, all are.

    Raises:
        ConfigError: they cannot be written.
    """
    if is_url(storage):
        try:
            copy_folder(folder, join(storage, RESULTS_FOLDER), last=RESULT_FILE)
        except OSError as error:
            raise ConfigError(
                f"cannot write results to {error}; all is computed and lies in {folder}; go on with --resume {storage}"
            ) from error
