"""The sqlite file in which MLflow keeps runs if no server is given: created completely or not at all, by one process at a time."""

import fcntl
import logging
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import IO

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from uap_dist.errors import TrackingError
from uap_dist.foreign_text import redact

logger = logging.getLogger(__name__)


def sqlite_path(uri: str) -> Path | None:
    """The file that a tracking URI names; None for the URI of a server or of a database in memory.

    Raises:
        TrackingError: it begins like one of a file, and is none.
    """
    if not uri.startswith("sqlite"):
        return None
    try:
        name = make_url(uri).database
    except ArgumentError as error:
        raise TrackingError(
            f"MLFLOW_TRACKING_URI is {redact(uri)}; give sqlite:///PATH or the URL of a server"
        ) from error
    return None if not name or name.startswith((":memory:", "file:")) else Path(name).absolute()


def prepare_store(path: Path, open_store: Callable[[str], object]) -> None:
    """Create the file if it does not exist, or migrate its tables, while other processes wait.

    A new file is created under another name and then renamed, so a process that is killed meanwhile leaves nothing incomplete.

    Args:
        path: of the file.
        open_store: opens a sqlite URI with MLflow, which creates and migrates tables.

    Raises:
        TrackingError: the file cannot be created or used; the message says what to do.
    """
    draft = path.with_name(f"{path.name}.unfinished")
    with _lock(path):
        try:
            if not path.exists() or path.stat().st_size == 0:
                draft.unlink(missing_ok=True)
                open_store(f"sqlite:///{draft}")
                draft.replace(path)
            open_store(f"sqlite:///{path}")
        except Exception as error:
            raise TrackingError(_explain(path, str(error))) from error


def _lock(path: Path) -> IO[bytes]:
    """An open file that holds an exclusive lock on the store until it is closed, or its process dies."""
    name = f"{path}.lock"
    try:
        if not path.parent.exists():
            logger.warning("making the folder %s, which MLFLOW_TRACKING_URI names", path.parent)
            path.parent.mkdir(parents=True, exist_ok=True)
        file = open(name, "ab")  # noqa: SIM115  # closed by the caller
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another job that is opening %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        raise TrackingError(
            f"cannot lock {name}: {error.strerror}; set MLFLOW_TRACKING_URI to a file in a folder that can be written to and locked, "
            "or to a server"
        ) from error
    return file


def _explain(path: Path, reason: str) -> str:
    """One line that says why MLflow cannot open the file, and what to do."""
    reason = (reason.splitlines() or [""])[0]
    for words, advice in (
        ("is locked", "another process is writing to it; try again"),
        ("readonly", "make the file and its folder writable, or set another MLFLOW_TRACKING_URI"),
        ("unable to open", "make the file and its folder writable, or set another MLFLOW_TRACKING_URI"),
        ("is full", "free some space on its disk"),
        ("not a database", "move it away, or set another MLFLOW_TRACKING_URI"),
        ("malformed", "restore it from a backup, or move it away"),
        ("Can't locate revision", "a newer MLflow wrote it; install that version, or set another MLFLOW_TRACKING_URI"),
    ):
        if words in reason:
            return f"MLflow cannot open {path}: {reason}; {advice}"
    num_runs = _count_runs(path)
    if not num_runs:
        advice = "it holds no runs, so delete it and start again"
    else:
        advice = f"it holds {num_runs} runs: make a backup, then try `mlflow db upgrade sqlite:///{path}`, or move it away and start again"
    return f"the tables in {path} are incomplete, or of another version of MLflow ({reason}); {advice}"


def _count_runs(path: Path) -> int:
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
            return int(connection.execute("SELECT count(*) FROM runs").fetchone()[0])
    except sqlite3.OperationalError:
        return 0  # the file or the table does not exist
