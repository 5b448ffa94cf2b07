"""The sqlite file that MLflow keeps runs in where no server is named: made whole or not at all, by one process at a time."""

import fcntl
import logging
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import IO

from sqlalchemy.engine import make_url

from uap_dist.errors import TrackingError

logger = logging.getLogger(__name__)


def sqlite_path(uri: str) -> Path | None:
    """The file of a tracking URI; None where it names none, as that of a server."""
    if not uri.startswith("sqlite"):
        return None
    name = make_url(uri).database
    return None if not name or name.startswith((":memory:", "file:")) else Path(name).absolute()


def prepare_store(path: Path, open_store: Callable[[str], object]) -> None:
    """Make the file where it is missing, or bring its tables up to date, and keep other processes from doing so meanwhile.

    A new one is made under another name, so that a process which is killed at that leaves nothing half made under this one.

    Args:
        path: of the file.
        open_store: what MLflow does with a sqlite URI; it makes and migrates tables.

    Raises:
        TrackingError: the file cannot be made or used; its message says what to do about it.
    """
    draft = path.with_name(f"{path.name}.unfinished")
    with _lock(path):
        if not path.exists() or path.stat().st_size == 0:
            draft.unlink(missing_ok=True)
            open_store(f"sqlite:///{draft}")
            draft.replace(path)
        try:
            open_store(f"sqlite:///{path}")
        except Exception as error:
            raise TrackingError(_explain(path, str(error))) from error


def _lock(path: Path) -> IO[bytes]:
    """An open file, whose owner is alone among the processes that use the store; the system takes it from one that dies."""
    name = f"{path}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(name, "ab")  # noqa: SIM115  # closed by the caller
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another job, which opens %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        raise TrackingError(
            f"cannot lock {name}: {error.strerror}; give MLFLOW_TRACKING_URI a file in a folder that can be written to and locked, "
            "or a server"
        ) from error
    return file


def _explain(path: Path, reason: str) -> str:
    """Why MLflow cannot open the file, and what to do about it."""
    reason = (reason.splitlines() or [""])[0]
    for words, advice in (
        ("is locked", "another process is writing to it; try again"),
        ("readonly", "make the file and its folder writable, or give another MLFLOW_TRACKING_URI"),
        ("unable to open", "make the file and its folder writable, or give another MLFLOW_TRACKING_URI"),
        ("is full", "make room on its disk"),
        ("not a database", "move it away, or give another MLFLOW_TRACKING_URI"),
        ("malformed", "restore it from a copy, or move it away"),
        ("Can't locate revision", "a newer MLflow wrote it; install that one, or give another MLFLOW_TRACKING_URI"),
    ):
        if words in reason:
            return f"MLflow cannot open {path}: {reason}; {advice}"
    num_runs = _count_runs(path)
    if not num_runs:
        advice = "it holds no runs, so delete it and start again"
    else:
        advice = f"it holds {num_runs} runs: keep a copy, then try `mlflow db upgrade sqlite:///{path}`, or move it away and start again"
    return f"the tables in {path} are half made, or of another version of MLflow ({reason}); {advice}"


def _count_runs(path: Path) -> int:
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        try:
            return int(connection.execute("SELECT count(*) FROM runs").fetchone()[0])
        except sqlite3.OperationalError:
            return 0  # not even that table is there
