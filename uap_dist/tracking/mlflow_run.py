"""The run in MLflow: parameters, metrics, datasets, artifacts, and how it ended. The only module that imports MLflow."""

import logging
import os
import re
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

# MLflow's own patience with a server that does not answer is four minutes
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "8")

import mlflow
import mlflow.pytorch
import numpy as np
import torch
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from uap_dist.errors import ResumeError, TrackingError, UapDistError, is_mistake
from uap_dist.foreign_text import HIDDEN, first_line, hide_credentials, in_one_line, printable, redact
from uap_dist.models.classifier import Classifier
from uap_dist.tracking.history import RoundRecord
from uap_dist.tracking.outbox import Outbox
from uap_dist.tracking.sqlite_store import prepare_store, sqlite_path
from uap_dist.workers.dataset import Dataset

CHECKPOINTS_TAG, JOB_TAG = "checkpoints", "job"
PARENT_TAG = "mlflow.parentRunId"
MAX_TRIES_WHEN_BUSY = 3
FAULTS = {  # by what stands in an error, with what it means
    "No space left|is full|[Qq]uota exceeded": "no space is left on the disk",
    "Permission denied|readonly database|Read-only file": "it must not be written to",
    "database is locked": "other processes write to it all the time",
}
EXPERIMENT_KIND = {"mlflow.experimentKind": "custom_model_development"}  # else shown as a chat application

Given = ParamSpec("Given")
Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


class _BusyError(TrackingError):
    """Other processes write to the sqlite file all the time."""


def _patient(ask: Callable[Concatenate["Tracker", Given], Answer]) -> Callable[Concatenate["Tracker", Given], Answer]:
    """A method that asks again where other jobs write to the same sqlite file, for their turns have no order; MLflow waits 20 s a time."""

    @wraps(ask)
    def ask_again(self: "Tracker", /, *args: Given.args, **kwargs: Given.kwargs) -> Answer:
        for _ in range(MAX_TRIES_WHEN_BUSY - 1):
            with suppress(_BusyError):
                return ask(self, *args, **kwargs)
        return ask(self, *args, **kwargs)

    return ask_again


class Tracker:
    """One MLflow run; a context manager. Metrics of rounds reach it through an outbox, so that a server may be away meanwhile."""

    def __init__(
        self,
        *,
        run_name: str,
        job: str = "",
        experiment: str = "",
        run_id: str | None = None,
        parent: "Tracker | None" = None,
    ) -> None:
        """Start a run where MLFLOW_TRACKING_URI says, else in mlflow.db of the working directory; or go on with `run_id`.

        Args:
            run_name: of a new run.
            job: which one starts it, as compute; a run with a parent is of the parent's.
            experiment: its name; a run with a parent is in the parent's.
            run_id: of the run to go on with.
            parent: run that the new one belongs to; system metrics are the parent's.

        Raises:
            TrackingError: the server does not answer, or its sqlite file cannot be used.
            ResumeError: the run to go on with is finished, or not there.
        """
        self.uri = _connect()
        self.job: str = job if parent is None else parent.job
        self._is_child, self._is_ended = parent is not None, False
        with _answering(self.uri):
            self._client = mlflow.MlflowClient()
            tags = {"command": shlex.join(map(redact, sys.argv)), JOB_TAG: self.job}
            if run_id is not None:
                run = _reopen(run_id, self.uri) if parent is None else _reopen_child(self._client, run_id)
            elif parent is not None:
                run = _find_child(self._client, parent, run_name) or self._client.create_run(
                    parent.experiment_id,
                    run_name=run_name,
                    tags=tags | {PARENT_TAG: parent.run_id},
                )
            else:
                mlflow.set_experiment(experiment_id=_find_experiment(self._client, experiment, self.uri))
                run = mlflow.start_run(run_name=run_name, tags=tags, log_system_metrics=True)
            steps = self._client.get_metric_history(run.info.run_id, "total/evaluations")
            self._delivered = {metric.step for metric in steps}
        self.run_id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self._outbox = Outbox(self._send)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the run as its block ended: KILLED when interrupted, FAILED with the error in tag `reason`."""
        if self._is_ended:
            return
        self._outbox.close(0.5 if error else 0)
        if error is None:
            self.finish()
        elif isinstance(error, Exception):
            self._end("FAILED", in_one_line(error))
        else:
            self._end("KILLED", type(error).__name__)

    @_patient
    def finish(self) -> None:
        """End the run as FINISHED, before the block ends; TrackingError where the server does not answer."""
        with _answering(self.uri):
            self._end("FINISHED", None)
        self._is_ended = True

    @_patient
    def log_params(self, params: Mapping[str, Any]) -> None:
        """Parameters; None is written as "none"."""
        texts = {key: "none" if value is None else redact(str(value)) for key, value in params.items()}
        with _answering(self.uri):
            self._client.log_batch(self.run_id, params=[Param(key, text) for key, text in texts.items()])

    @_patient
    def log_dataset(self, dataset: Dataset, context: str) -> None:
        """A dataset by its first shard's URL, its digest and its size."""
        with warnings.catch_warnings():  # MLflow finds two names for a local file, both right
            warnings.simplefilter("ignore", UserWarning)
            source = resolve_dataset_source(dataset.shards[0].url)
        entry = MetaDataset(  # type: ignore[abstract]  # MLflow's own class, whose abstract method nobody needs
            source, name=f"{context}-{dataset.num_examples}", digest=dataset.digest[:32]
        )
        tags = {"num_examples": str(dataset.num_examples), "num_shards": str(len(dataset.shards))}
        with _answering(self.uri):
            mlflow.log_input(entry, context=context, tags=tags)

    def log_round(self, record: RoundRecord) -> None:
        """All metrics of a round, unless the run has them already; returns at once."""
        if record.step not in self._delivered:
            self._outbox.put(record)

    @_patient
    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Metrics that belong to no round."""
        now = time.time_ns() // 1_000_000
        with _answering(self.uri):
            self._client.log_batch(self.run_id, metrics=[Metric(key, value, now, 0) for key, value in metrics.items()])

    def wait_for_delivery(self, timeout_s: float) -> None:
        """Return when every round's metrics have arrived.

        Raises:
            TrackingError: the server does not take them in time.
        """
        left = self._outbox.close(timeout_s)
        if left:
            failure = self._outbox.failure or TimeoutError("it takes them too slowly")
            if is_mistake(failure):
                raise failure
            raise TrackingError(
                f"metrics of {left} rounds are not delivered: {_explain(self.uri, failure)}"
            ) from failure

    @_patient
    def complete(
        self,
        *,
        tags: Mapping[str, Any],
        metrics: Mapping[str, float],
        step: int,
        markdown: str,
        folder: Path,
        leave_out: Sequence[str] = (),
    ) -> None:
        """What is known only at the end. May be said again: a metric that the run has already is left as it is.

        Args:
            tags: of the run.
            metrics: measured after `step` rounds.
            step: rounds.
            markdown: what the run's page says at its top.
            folder: every file and folder in it becomes an artifact,
            leave_out: but for those of these names.

        Raises:
            TrackingError: the server does not answer.
        """
        now = time.time_ns() // 1_000_000
        with _answering(self.uri):
            known = self._client.get_run(self.run_id).data.metrics
            self._client.log_batch(
                self.run_id,
                metrics=[Metric(key, value, now, step) for key, value in metrics.items() if key not in known],
                tags=[RunTag(key, redact(str(value))) for key, value in tags.items()],
            )
            self.describe(markdown)
            for path in sorted(folder.iterdir()):
                if path.name not in leave_out:
                    self._client.log_artifact(self.run_id, str(path))

    @_patient
    def has_finished(self, run_name: str) -> bool:
        """Whether a run of that name below this one has ended as FINISHED."""
        with _answering(self.uri):
            found = _search_children(self._client, self, run_name)
        return bool(found) and found[0].info.status == "FINISHED"

    def log_classifier(self, classifier: Classifier, shape: Sequence[int]) -> None:
        """A classifier as a model of MLflow, unless the run has one: pixels (N×C×H×W float32, `shape` is C×H×W) to logits (N×K).

        It is exported as a graph, so that whoever loads it needs none of the network's code. A network that cannot be exported is
        left out, with a warning.

        Raises:
            TrackingError: the server does not answer.
        """
        pixels = np.full((2, *shape), 128, np.float32)
        with torch.no_grad():
            logits = classifier(torch.tensor(pixels)).numpy()
        takes, gives = (Schema([TensorSpec(array.dtype, (-1, *array.shape[1:]))]) for array in (pixels, logits))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the export, about its own insides
            try:  # before MLflow does it, which would leave half a model behind
                torch.export.export(classifier, (torch.tensor(pixels),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
            except Exception as error:  # whatever torch says of a network that it cannot export
                reason = first_line(error)
                logger.warning(
                    "%s is not logged as a model, because torch cannot export it: %s", classifier.name, reason
                )
                return
            with _answering(self.uri):
                outputs = self._client.get_run(self.run_id).outputs
                if outputs is None or not outputs.model_outputs:
                    mlflow.pytorch.log_model(
                        classifier,
                        name="model",
                        signature=ModelSignature(takes, gives),
                        input_example=pixels,
                        serialization_format="pt2",
                        pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}"],
                    )

    @_patient
    def set_tag(self, key: str, value: str) -> None:
        """A tag of the run."""
        with _answering(self.uri):
            self._client.set_tag(self.run_id, key, value)

    def describe(self, markdown: str) -> None:
        """What the run's page says at its top."""
        self.set_tag("mlflow.note.content", markdown)

    @_patient
    def register(self, artifact: str, name: str) -> str:
        """Make an artifact (file or folder) a version of a model in MLflow's registry, unless it is one; its address there."""
        with _answering(self.uri):
            if not self._client.search_registered_models(f"name = '{name}'"):
                self._client.create_registered_model(name)
            found = self._client.search_model_versions(f"name = '{name}' and run_id = '{self.run_id}'")
            version = (
                found[0]
                if found
                else self._client.create_model_version(name, f"runs:/{self.run_id}/{artifact}", run_id=self.run_id)
            )
        return f"models:/{name}/{version.version}"

    def _send(self, records: Sequence[RoundRecord]) -> None:
        metrics = [
            Metric(key, value, record.timestamp_ms, record.step)
            for record in records
            for key, value in record.metrics.items()
        ]
        self._client.log_batch(self.run_id, metrics=metrics)

    def _end(self, status: Literal["FINISHED", "FAILED", "KILLED"], reason: str | None) -> None:
        try:
            if reason is not None:
                self.set_tag("reason", printable(redact(reason))[:5000])
            if self._is_child:
                self._client.set_terminated(self.run_id, status)
            else:
                mlflow.end_run(status)
        except Exception as error:  # as in _answering
            if status == "FINISHED":
                raise
            logger.warning("the run could not be marked %s at %s: %s", status, self.uri, error)

    def how_to_open(self) -> str:
        """Command or address that shows the run."""
        if self.uri.startswith("sqlite:"):
            return f"mlflow ui --backend-store-uri {self.uri}, then http://127.0.0.1:5000/{self._page()}"
        uri = hide_credentials(self.uri).replace(f"{HIDDEN}@", "")  # a browser asks for them
        return f"{uri.rstrip('/')}/{self._page()}" if uri.startswith("http") else uri

    def _page(self) -> str:
        # without the option MLflow shows its pages for language models
        return f"#/experiments/{self.experiment_id}/runs/{self.run_id}?workflowType=machine_learning"


@dataclass(frozen=True)
class RunFacts:
    """What MLflow says of a run.

    Attributes:
        name: of the run.
        job: which job of uap_dist started it; empty where none did.
        parent: run that it belongs to, if it does.
        checkpoints: where it is committed, if it is.
        status: RUNNING, FINISHED, FAILED, KILLED or SCHEDULED.
        is_deleted: whether it lies in MLflow's bin.
    """

    name: str
    job: str
    parent: str | None
    checkpoints: str | None
    status: str
    is_deleted: bool


def look_up(run_id: str) -> RunFacts:
    """A run of any program.

    Raises:
        TrackingError: the server does not answer.
        ResumeError: there is no such run.
    """
    uri = _connect(creates=False)
    with _answering(uri):
        run = _get_run(run_id, uri)
    tags, info = run.data.tags, run.info
    return RunFacts(
        name=info.run_name,
        job=tags.get(JOB_TAG, ""),
        parent=tags.get(PARENT_TAG),
        checkpoints=tags.get(CHECKPOINTS_TAG),
        status=info.status,
        is_deleted=info.lifecycle_stage == "deleted",
    )


def _get_run(run_id: str, uri: str) -> Run:
    try:
        return mlflow.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise ResumeError(f"no run {run_id} at {redact(uri)} (MLFLOW_TRACKING_URI)") from error
        raise


def is_finished(run_id: str) -> bool:
    """Whether a run has ended as FINISHED."""
    with _answering(mlflow.get_tracking_uri()):
        return bool(mlflow.get_run(run_id).info.status == "FINISHED")


def fetch(address: str) -> str:
    """Local path of an artifact that MLflow names as runs:/RUN/PATH or models:/NAME/VERSION.

    Raises:
        TrackingError: there is none, or the server does not answer.
    """
    uri = _connect(creates=False)
    try:
        return str(mlflow.artifacts.download_artifacts(address))
    except Exception as error:  # MLflow's, and those of whatever store its artifacts are in
        if is_mistake(error):
            raise
        reason = first_line(error)
        raise TrackingError(redact(f"cannot fetch {address} from {uri} (MLFLOW_TRACKING_URI): {reason}")) from error


def _tracking_uri() -> str:
    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{Path.cwd() / 'mlflow.db'}")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # with tracebacks of what it raises anyway
    return mlflow.get_tracking_uri()


def _connect(*, creates: bool = True) -> str:
    """Tracking URI, once its sqlite file, where it is one, is there and of this MLflow; whoever only reads does not create one."""
    uri = _tracking_uri()
    path = sqlite_path(uri)
    if path is not None:
        if not creates and not path.exists():
            raise TrackingError(f"there is no {path}, which runs are kept in (MLFLOW_TRACKING_URI says where)")
        _prepare_once(path)
    return uri


@cache
def _prepare_once(path: Path) -> None:
    prepare_store(path, lambda uri: mlflow.MlflowClient(uri).search_experiments(max_results=1))


@contextmanager
def _answering(uri: str) -> Iterator[None]:
    """Say in one line what MLflow, its server or the store of its artifacts refuse; mistakes of ours stay what they are."""
    try:
        yield
    except UapDistError:
        raise
    except Exception as error:
        if is_mistake(error):
            raise
        kind = _BusyError if "database is locked" in str(error) else TrackingError
        raise kind(_explain(uri, error)) from error


def _explain(uri: str, error: Exception) -> str:
    """What cannot be used, and why."""
    text = first_line(error)
    path = sqlite_path(uri)
    where = f"MLflow's file {path} or its artifacts" if path else f"the tracking server at {uri} (MLFLOW_TRACKING_URI)"
    meaning = next((meaning for words, meaning in FAULTS.items() if re.search(words, text)), None)
    if meaning is not None:
        return redact(f"{where}: {meaning} ({text})")
    if path is not None:
        return redact(f"{where} cannot be used: {text}")
    is_refusal = isinstance(error, MlflowException) and "failed with exception" not in text
    return redact(f"{where} {'refuses' if is_refusal else 'does not answer as it should'}: {text}")


def _find_experiment(client: mlflow.MlflowClient, name: str, uri: str) -> str:
    """Id of the experiment of that name, made where there is none, perhaps by another job at this moment."""
    found = client.get_experiment_by_name(name)
    if found is None:
        path = sqlite_path(uri)
        # beside the database, not in a working directory that may be Ray's copy of ours
        artifacts = (path.resolve().parent / "mlruns").as_uri() if path else None
        try:
            return str(client.create_experiment(name, artifacts, tags=EXPERIMENT_KIND))
        except MlflowException as error:
            found = client.get_experiment_by_name(name)
            if found is None or error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    for key, value in EXPERIMENT_KIND.items() if not EXPERIMENT_KIND.items() <= found.tags.items() else ():
        client.set_experiment_tag(found.experiment_id, key, value)
    return str(found.experiment_id)


def _reopen(run_id: str, uri: str) -> Run:
    info = _get_run(run_id, uri).info
    if info.status == "FINISHED":
        raise ResumeError(f"run {run_id} is finished; there is nothing to resume")
    if info.lifecycle_stage == "deleted":
        raise ResumeError(f"run {run_id} was deleted; `mlflow.MlflowClient().restore_run` brings it back")
    mlflow.set_experiment(experiment_id=info.experiment_id)
    return mlflow.start_run(run_id=run_id, log_system_metrics=True)


def _find_child(client: mlflow.MlflowClient, parent: Tracker, run_name: str) -> Run | None:
    """The parent's run of that name, which a job made that was killed before its first commit."""
    found = _search_children(client, parent, run_name)
    return _reopen_child(client, found[0].info.run_id) if found else None


def _search_children(client: mlflow.MlflowClient, parent: Tracker, run_name: str) -> list[Run]:
    tags = f"tags.`{PARENT_TAG}` = '{parent.run_id}' and tags.`mlflow.runName` = '{run_name}'"
    return client.search_runs([parent.experiment_id], tags, max_results=1)


def _reopen_child(client: mlflow.MlflowClient, run_id: str) -> Run:
    client.update_run(run_id, status="RUNNING")
    return client.get_run(run_id)
