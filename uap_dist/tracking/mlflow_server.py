"""Reaching MLflow: where it is, its errors in one line each, patience with a locked sqlite file, and runs as it keeps them."""

import atexit
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import mlflow
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import fluent

from uap_dist.errors import ResumeError, TrackingError, UapDistError, is_mistake
from uap_dist.foreign_text import first_line, redact
from uap_dist.tracking.process import finishing_first
from uap_dist.tracking.sqlite_store import prepare_store, sqlite_path

CHECKPOINTS_TAG, JOB_TAG, PARENT_TAG = "checkpoints", "job", "mlflow.parentRunId"
# MLflow retries for four minutes where a server does not answer
MLFLOW_DEFAULTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "8"}
MAX_ATTEMPTS_WHEN_LOCKED = 3
MEANINGS = {  # of regular expressions found in an error
    "No space left|is full|[Qq]uota exceeded": "no space is left on the disk",
    "Permission denied|readonly database|Read-only file": "it must not be written to",
    "database is locked": "other processes keep it locked",
    "error code 404|<!DOCTYPE|<html": "that is no MLflow server; set it to one, or unset it for mlflow.db in this folder",
}
EXPERIMENT_KIND = {"mlflow.experimentKind": "custom_model_development"}  # otherwise shown as a chat application
# MLflow keeps saved views of the table of runs in tags of the experiment, in a format of its web page that has no API. This one
# shows the columns that matter first; the table itself shows no metrics, and orders those that are added by name.
RUNS_COLUMNS = (
    "metrics.`fooling_rate/val`",
    "metrics.`random/fooling_rate`",
    "metrics.`fooling_rate/train`",
    "metrics.`targeted_success_rate/val`",
    "metrics.`total/evaluations`",
    *(f"params.`{name}`" for name in ("model", "norm", "radius", "rule", "target_name", "seed")),
    "attributes.`Dataset`",
)
RUNS_VIEW_TAG = "mlflow.sharedViewState.uap_dist"
RUNS_VIEW = json.dumps(
    {
        "name": "Fooling rates",
        "createdAt": 0,
        "state": json.dumps({"selectedColumns": RUNS_COLUMNS, "columnOrder": RUNS_COLUMNS, "columnWidths": {}}),
    }
)

Given = ParamSpec("Given")
Answer = TypeVar("Answer")


class HasUri(Protocol):
    """Whatever calls MLflow at a tracking URI."""

    uri: str


Caller = TypeVar("Caller", bound=HasUri)


class _LockedError(TrackingError):
    """Other processes keep the sqlite file locked."""


def connect(*, create: bool = True) -> str:
    """Configure MLflow and prepare its sqlite file, if it uses one.

    Args:
        create: whether to create a sqlite file that does not exist; callers that only read should not.

    Returns:
        The tracking URI: that of MLFLOW_TRACKING_URI, or else mlflow.db in the working directory.

    Raises:
        TrackingError: the sqlite file does not exist or cannot be used.
    """
    for name, value in MLFLOW_DEFAULTS.items():
        os.environ.setdefault(name, value)
    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{Path.cwd() / 'mlflow.db'}")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # logs tracebacks of what it also raises
    uri: str = mlflow.get_tracking_uri()
    path = sqlite_path(uri)
    if path is not None:
        if not create and not path.exists():
            raise TrackingError(f"{path}, where MLflow keeps runs, does not exist; set MLFLOW_TRACKING_URI")
        _prepare_once(path)
    return uri


@cache
def _prepare_once(path: Path) -> None:
    prepare_store(path, lambda uri: mlflow.MlflowClient(uri).search_experiments(max_results=1))


@contextmanager
def tracking_errors(uri: str) -> Iterator[None]:
    """Raise a TrackingError of one line for any error of MLflow, its server or its artifact store.

    Errors of this package, and those that only a bug raises (`is_mistake`), pass unchanged.
    """
    try:
        with finishing_first():
            yield
    except UapDistError:
        raise
    except Exception as error:
        if is_mistake(error):
            raise
        kind = _LockedError if "database is locked" in str(error) else TrackingError
        raise kind(explain(uri, error)) from error


def calls_mlflow(
    method: Callable[Concatenate[Caller, Given], Answer],
) -> Callable[Concatenate[Caller, Given], Answer]:
    """Decorate a method that calls MLflow: errors become TrackingErrors, and a locked sqlite file is tried again.

    Jobs that share a sqlite file get no fair turns at it. MLflow itself waits 20 s for its lock at each attempt.
    """

    @wraps(method)
    def call(self: Caller, /, *args: Given.args, **kwargs: Given.kwargs) -> Answer:
        for _ in range(MAX_ATTEMPTS_WHEN_LOCKED - 1):
            with suppress(_LockedError), tracking_errors(self.uri):
                return method(self, *args, **kwargs)
        with tracking_errors(self.uri):
            return method(self, *args, **kwargs)

    return call


def explain(uri: str, error: Exception) -> str:
    """One line that says what cannot be used (the server, or the sqlite file and its artifacts) and why."""
    text = first_line(error)
    path = sqlite_path(uri)
    where = f"MLflow's file {path} or its artifacts" if path else f"the tracking server at {uri} (MLFLOW_TRACKING_URI)"
    meaning = next((meaning for pattern, meaning in MEANINGS.items() if re.search(pattern, text)), None)
    if meaning is not None:
        return redact(f"{where}: {meaning} ({text})")
    if path is not None:
        return redact(f"{where} cannot be used: {text}")
    is_refusal = isinstance(error, MlflowException) and "failed with exception" not in text
    return redact(f"{where} {'refuses the request' if is_refusal else 'does not answer as it should'}: {text}")


def find_experiment(name: str, uri: str) -> str:
    """ID of the experiment with that name, which is created if it does not exist; another job may do so at the same time."""
    client = mlflow.MlflowClient()
    found = client.get_experiment_by_name(name)
    if found is None:
        path = sqlite_path(uri)
        # beside the database, because the working directory may be Ray's copy of the submitter's
        artifacts = (path.resolve().parent / "mlruns").as_uri() if path else None
        try:
            return str(client.create_experiment(name, artifacts, tags=EXPERIMENT_KIND | {RUNS_VIEW_TAG: RUNS_VIEW}))
        except MlflowException as error:
            found = client.get_experiment_by_name(name)
            if found is None or error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    # a view that somebody has changed stays as it is
    for key, value in ({RUNS_VIEW_TAG: RUNS_VIEW} | found.tags | EXPERIMENT_KIND).items():
        if found.tags.get(key) != value:
            client.set_experiment_tag(found.experiment_id, key, value)
    return str(found.experiment_id)


def open_run(uri: str, experiment: str, run_name: str, run_id: str | None, tags: Mapping[str, str]) -> Run:
    """Start a run in an experiment, or go on with `run_id`, as MLflow's active run.

    Raises:
        ResumeError: the run to go on with is finished, deleted or does not exist.
    """
    atexit.unregister(fluent._safe_end_run)  # marks the active run FINISHED, even one that was broken off
    if run_id is None:
        mlflow.set_experiment(experiment_id=find_experiment(experiment, uri))
        return mlflow.start_run(run_name=run_name, tags=dict(tags), log_system_metrics=True)
    info = get_run(run_id, uri).info
    if info.status == "FINISHED":
        raise ResumeError(f"run {run_id} is finished; there is nothing to resume")
    if info.lifecycle_stage == "deleted":
        raise ResumeError(f"run {run_id} was deleted; restore it with `mlflow.MlflowClient().restore_run` first")
    mlflow.set_experiment(experiment_id=info.experiment_id)
    return mlflow.start_run(run_id=run_id, log_system_metrics=True)


def end_run(run_id: str, status: str) -> None:
    """End a run, which may be MLflow's active run; if this fails, it can be called again."""
    active = mlflow.active_run()
    if active is not None and active.info.run_id == run_id:
        mlflow.end_run(status)  # first makes it inactive, so its own second call would do nothing
    else:
        mlflow.MlflowClient().set_terminated(run_id, status)


def get_run(run_id: str, uri: str) -> Run:
    """A run by its ID; ResumeError if there is none."""
    try:
        return mlflow.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise ResumeError(f"no run {run_id} at {redact(uri)} (MLFLOW_TRACKING_URI)") from error
        raise


@dataclass(frozen=True)
class RunFacts:
    """What MLflow knows of a run.

    Attributes:
        name: display name.
        job: job of uap_dist that started it, such as compute; empty for runs of other programs.
        parent: ID of the parent run, None for a run at the top.
        checkpoints: folder or URL of its checkpoints, None if it has none.
        status: RUNNING, FINISHED, FAILED, KILLED or SCHEDULED.
    """

    name: str
    job: str
    parent: str | None
    checkpoints: str | None
    status: str


def look_up(run_id: str) -> RunFacts:
    """The facts of a run of any program.

    Raises:
        TrackingError: the server does not answer.
        ResumeError: there is no such run.
    """
    uri = connect(create=False)
    with tracking_errors(uri):
        run = get_run(run_id, uri)
    tags = run.data.tags
    return RunFacts(
        name=run.info.run_name,
        job=tags.get(JOB_TAG, ""),
        parent=tags.get(PARENT_TAG),
        checkpoints=tags.get(CHECKPOINTS_TAG),
        status=run.info.status,
    )


def fetch(address: str) -> str:
    """Download an artifact, named as runs:/RUN/PATH or models:/NAME/VERSION, and return its local path.

    Raises:
        TrackingError: there is no such artifact, or the server does not answer.
    """
    uri = connect(create=False)
    try:
        return str(mlflow.artifacts.download_artifacts(address))
    except Exception as error:  # MLflow's, and those of whatever store its artifacts are in
        if is_mistake(error):
            raise
        reason = first_line(error)
        raise TrackingError(redact(f"cannot fetch {address} from {uri} (MLFLOW_TRACKING_URI): {reason}")) from error
