"""The life of one MLflow run: its parameters, metrics, datasets, models and artifacts, and how it ended."""

import logging
import shlex
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import mlflow
import mlflow.pytorch
import numpy as np
import torch
from mlflow.data.dataset_source import DatasetSource
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.http_dataset_source import HTTPDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from uap_dist.errors import TrackingError, is_mistake
from uap_dist.foreign_text import HIDDEN, first_line, hide_credentials, in_one_line, printable, redact
from uap_dist.models.classifier import Classifier
from uap_dist.rounds.record import RoundRecord
from uap_dist.tracking.mlflow_server import (
    CHECKPOINTS_TAG,
    JOB_TAG,
    PARENT_TAG,
    calls_mlflow,
    connect,
    end_run,
    explain,
    open_run,
    tracking_errors,
)
from uap_dist.tracking.outbox import Outbox
from uap_dist.tracking.process import finishing_first
from uap_dist.workers.dataset import Dataset

MAX_REASON_LENGTH = 5000  # characters; MLflow refuses longer tags

LAST_DELIVERY_TIMEOUT_S = 20.0  # for a server that does not answer at the end of a run

logger = logging.getLogger(__name__)


class Tracker:
    """One MLflow run, as a context manager.

    Metrics of rounds are delivered by an outbox in the background, so a server that is down for a while delays nothing.

    Attributes:
        uri: of the tracking server or sqlite file.
        job: job that started the run, such as compute; of a child run, that of its parent.
        run_id, experiment_id: MLflow's IDs.
    """

    def __init__(
        self,
        *,
        run_name: str,
        job: str = "",
        experiment: str = "",
        run_id: str | None = None,
        parent: "Tracker | None" = None,
    ) -> None:
        """Start a run where MLFLOW_TRACKING_URI says, by default in mlflow.db of the working directory, or continue `run_id`.

        Args:
            run_name: display name of a new run.
            job: job that starts it, such as compute; ignored with a parent.
            experiment: name of its experiment; ignored with a parent.
            run_id: run to continue.
            parent: makes the run a child of this one. System metrics are logged to the parent only.

        Raises:
            TrackingError: the server does not answer, or its sqlite file cannot be used.
            ResumeError: the run to continue is finished, deleted or does not exist.
        """
        self.uri = connect()
        self.job: str = job if parent is None else parent.job
        self._is_ended = False
        with ExitStack() as unless_ready:
            with tracking_errors(self.uri):
                self._client = mlflow.MlflowClient()
                tags = {"command": shlex.join(map(redact, sys.argv)), JOB_TAG: self.job}
                if parent is not None:
                    run = _open_child(parent, run_name, run_id, tags)
                else:
                    run = open_run(self.uri, experiment, run_name, run_id, tags)
                self.run_id: str = run.info.run_id
                self.experiment_id: str = run.info.experiment_id
                self._outbox = Outbox(self._send)
                unless_ready.push(self)
                steps = self._client.get_metric_history(self.run_id, "total/evaluations")
                self._delivered = {metric.step for metric in steps}
            unless_ready.pop_all()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the run as its block ended: FINISHED, FAILED with the error in the tag `reason`, or KILLED when interrupted."""
        if self._is_ended:
            return
        with finishing_first():
            left = self._outbox.close(0.5 if error else LAST_DELIVERY_TIMEOUT_S)
            if error is None:
                if left:
                    logger.warning("metrics of %d rounds could not be delivered to %s", left, self.uri)
                self.finish()
            elif isinstance(error, Exception):
                self._give_up("FAILED", in_one_line(error))
            else:
                self._give_up("KILLED", type(error).__name__)

    def finish(self) -> None:
        """End the run as FINISHED before its block ends; TrackingError if the server does not answer."""
        self._end("FINISHED")
        self._is_ended = True

    def _give_up(self, status: Literal["FAILED", "KILLED"], reason: str) -> None:
        try:
            self._end(status)
            self.set_tag("reason", printable(redact(reason))[:MAX_REASON_LENGTH])
            _mark_useless(self.run_id, status)
        except Exception as error:  # of MLflow, its server or its store
            logger.warning("that the run is %s could not be recorded at %s: %s", status, self.uri, error)

    @calls_mlflow
    def _end(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        end_run(self.run_id, status)

    @calls_mlflow
    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters; None is logged as "none"."""
        texts = {key: "none" if value is None else redact(str(value)) for key, value in params.items()}
        self._client.log_batch(self.run_id, params=[Param(key, text) for key, text in texts.items()])

    @calls_mlflow
    def log_dataset(self, dataset: Dataset, context: str) -> None:
        """Log a dataset input: URL of the first shard, digest and size; `context` is its role, such as training."""
        source = _dataset_source(redact(dataset.shards[0].url))
        entry = MetaDataset(  # type: ignore[abstract]  # a class of MLflow that leaves an unused method abstract
            source, name=f"{context}-{dataset.num_examples}", digest=dataset.digest[:32]
        )
        tags = {"num_examples": str(dataset.num_examples), "num_shards": str(len(dataset.shards))}
        mlflow.log_input(entry, context=context, tags=tags)

    def log_round(self, record: RoundRecord) -> None:
        """Queue the metrics of a round for delivery, unless the run already has them; returns at once."""
        if record.step not in self._delivered:
            self._outbox.put(record)

    def _send(self, records: Sequence[RoundRecord]) -> None:
        metrics = [
            Metric(key, value, record.timestamp_ms, record.step)
            for record in records
            for key, value in record.metrics.items()
        ]
        self._client.log_batch(self.run_id, metrics=metrics)

    @calls_mlflow
    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Log metrics that belong to no round, at step 0."""
        now = time.time_ns() // 1_000_000
        self._client.log_batch(self.run_id, metrics=[Metric(key, value, now, 0) for key, value in metrics.items()])

    def wait_for_delivery(self, timeout_s: float) -> None:
        """Return once the metrics of every round have arrived.

        Raises:
            TrackingError: the server did not accept them in time.
        """
        left = self._outbox.close(timeout_s)
        if left:
            failure = self._outbox.failure or TimeoutError("it accepts them too slowly")
            if is_mistake(failure):
                raise failure
            raise TrackingError(
                f"metrics of {left} rounds are not delivered: {explain(self.uri, failure)}"
            ) from failure

    @calls_mlflow
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
        """Log what is known only at the end. It can be called again: metrics that the run already has are not logged twice.

        Args:
            tags: of the run.
            metrics: measured after `step` rounds.
            step: number of rounds.
            markdown: description at the top of the run's page.
            folder: whose files and folders become artifacts.
            leave_out: names in it that do not.

        Raises:
            TrackingError: the server does not answer.
        """
        now = time.time_ns() // 1_000_000
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

    @calls_mlflow
    def has_finished(self, run_name: str) -> bool:
        """Whether this run has a child of that name whose status is FINISHED."""
        found = _search_children(self, run_name)
        return bool(found) and found[0].info.status == "FINISHED"

    @calls_mlflow
    def set_tag(self, key: str, value: str) -> None:
        """Set a tag of the run."""
        self._client.set_tag(self.run_id, key, value)

    def describe(self, markdown: str) -> None:
        """Set the description at the top of the run's page."""
        self.set_tag("mlflow.note.content", markdown)

    def how_to_open(self) -> str:
        """The command or address that shows the run in a browser."""
        # without the option MLflow shows its pages for language models
        page = f"#/experiments/{self.experiment_id}/runs/{self.run_id}?workflowType=machine_learning"
        if self.uri.startswith("sqlite:"):
            return f"mlflow ui --backend-store-uri {shlex.quote(self.uri)}, then http://127.0.0.1:5000/{page}"
        uri = hide_credentials(self.uri).replace(f"{HIDDEN}@", "")  # the browser asks for them
        return f"{uri.rstrip('/')}/{page}" if uri.startswith("http") else uri


def log_classifier(tracker: Tracker, classifier: Classifier, shape: Sequence[int]) -> None:
    """Log a classifier as an MLflow model that maps pixels (N×C×H×W float32, 0..255) to logits (N×K), unless the run has one.

    It is exported as a graph, so loading it needs none of the network's code. A network that torch cannot export is
    skipped with a warning.

    Args:
        tracker: of the run, which must be MLflow's active run, not a child.
        classifier: to be logged.
        shape: C×H×W of one image.

    Raises:
        TrackingError: the server does not answer.
    """
    pixels = np.full((2, *shape), 128, np.float32)
    with torch.no_grad():
        logits = classifier(torch.tensor(pixels)).numpy()
    takes, gives = (Schema([TensorSpec(array.dtype, (-1, *array.shape[1:]))]) for array in (pixels, logits))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the export, about its own internals
        try:  # before MLflow does, which would leave half a model behind
            torch.export.export(classifier, (torch.tensor(pixels),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        except Exception as error:  # whatever torch raises for a network that it cannot export
            logger.warning(
                "%s is not logged as a model, because torch cannot export it: %s", classifier.name, first_line(error)
            )
            return
        with tracking_errors(tracker.uri):
            outputs = mlflow.get_run(tracker.run_id).outputs
            if outputs is None or not outputs.model_outputs:
                mlflow.pytorch.log_model(
                    classifier,
                    name="model",
                    signature=ModelSignature(takes, gives),
                    input_example=pixels,
                    serialization_format="pt2",
                    pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}"],
                )


@calls_mlflow
def register(tracker: Tracker, artifact: str, name: str) -> str:
    """Register an artifact (file or folder) of a run as a version of a model, once; returns its address, models:/NAME/VERSION."""
    client = mlflow.MlflowClient()
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    found = client.search_model_versions(f"name = '{name}' and run_id = '{tracker.run_id}'")
    source = f"runs:/{tracker.run_id}/{artifact}"
    version = found[0] if found else client.create_model_version(name, source, run_id=tracker.run_id)
    return f"models:/{name}/{version.version}"


def _mark_useless(run_id: str, status: str) -> None:
    """Add how the run ended to its name if it holds no commits, from which it could be resumed, and is no child, found by its name."""
    run = mlflow.get_run(run_id)
    if not {CHECKPOINTS_TAG, PARENT_TAG} & set(run.data.tags):
        mlflow.MlflowClient().update_run(run_id, name=f"{run.info.run_name} ({status.lower()})")


def _open_child(parent: Tracker, run_name: str, run_id: str | None, tags: Mapping[str, str]) -> Run:
    """The child run with that ID or, left by a job that was killed before its first commit, that name; otherwise a new one."""
    client = mlflow.MlflowClient()
    if run_id is None:
        found = _search_children(parent, run_name)
        if not found:
            own = {**tags, PARENT_TAG: parent.run_id}
            return client.create_run(parent.experiment_id, run_name=run_name, tags=own)
        run_id = found[0].info.run_id
    client.update_run(run_id, status="RUNNING")
    return client.get_run(run_id)


def _search_children(parent: Tracker, run_name: str) -> list[Run]:
    query = f"tags.`{PARENT_TAG}` = '{parent.run_id}' and tags.`mlflow.runName` = '{run_name}'"
    return mlflow.MlflowClient().search_runs([parent.experiment_id], query, max_results=1)


def _dataset_source(url: str) -> DatasetSource:
    with warnings.catch_warnings():  # MLflow warns that two of its sources fit a local file; both are right
        warnings.simplefilter("ignore", UserWarning)
        try:
            return resolve_dataset_source(url)
        except MlflowException:  # it knows no URLs of this kind, as hf://
            return HTTPDatasetSource(url)
