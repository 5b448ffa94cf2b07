"""The run in MLflow: parameters, metrics, datasets, artifacts, and how it ended. The only module that imports MLflow."""

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

# MLflow's own patience with a server that does not answer is four minutes
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "8")

import mlflow
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.exceptions import MlflowException

from uap_dist.compute import RoundReport
from uap_dist.dataset import Dataset
from uap_dist.errors import TrackingError
from uap_dist.fooling import FoolingRate

SQLITE = "sqlite:///"

logger = logging.getLogger(__name__)


class Tracker:
    """One MLflow run; a context manager."""

    def __init__(self, *, experiment: str, run_name: str) -> None:
        """Start the run where MLFLOW_TRACKING_URI says, else in mlflow.db of the working directory.

        Raises:
            TrackingError: the server does not answer.
        """
        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{Path.cwd() / 'mlflow.db'}")
        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        self.uri = mlflow.get_tracking_uri()
        try:
            if self.uri.startswith(SQLITE) and mlflow.get_experiment_by_name(experiment) is None:
                # beside the database, not in a working directory that may be Ray's copy of ours
                artifacts = Path(self.uri.removeprefix(SQLITE)).resolve().parent / "mlruns"
                mlflow.create_experiment(experiment, artifact_location=artifacts.as_uri())
            mlflow.set_experiment(experiment)
            mlflow.set_experiment_tag(
                "mlflow.experimentKind", "custom_model_development"
            )  # else shown as a chat application
            run = mlflow.start_run(run_name=run_name, tags={"command": shlex.join(sys.argv)}, log_system_metrics=True)
        except (MlflowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise TrackingError(
                f"the tracking server at {self.uri} (MLFLOW_TRACKING_URI) does not answer: {reason}"
            ) from error
        self.run_id = run.info.run_id
        self.experiment_id = run.info.experiment_id

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the run as its block ended: KILLED when interrupted, FAILED with the error in tag `reason`."""
        if error is None:
            self._end("FINISHED", None)
        elif isinstance(error, Exception):
            self._end("FAILED", str(error))
        else:
            self._end("KILLED", type(error).__name__)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Parameters; None is written as "none"."""
        mlflow.log_params({key: "none" if value is None else value for key, value in params.items()})

    def log_dataset(self, dataset: Dataset, context: str) -> None:
        """A dataset by its first shard's URL, its digest and its size."""
        with warnings.catch_warnings():  # MLflow finds two names for a local file, both right
            warnings.simplefilter("ignore", UserWarning)
            source = resolve_dataset_source(dataset.shards[0].url)
        mlflow.log_input(
            MetaDataset(  # type: ignore[abstract]  # MLflow's own class, whose abstract method nobody needs
                source, name=f"{context}-{dataset.num_examples}", digest=dataset.digest[:32]
            ),
            context=context,
            tags={"num_examples": str(dataset.num_examples), "num_shards": str(len(dataset.shards))},
        )

    def log_round(self, report: RoundReport) -> None:
        """All metrics of a round; the step is the number of rounds done. A server that is away costs its metrics, not the run."""
        metrics = {
            "fooling_rate/round": report.fooling.rate,
            "round/step": report.step,
            "round/mean_increment_norm": report.mean_increment_norm,
            "round/images_per_second": report.fooling.num_examples / report.seconds,
            "iterate/norm_l2": report.iterate_l2,
            "iterate/norm_linf": report.iterate_linf,
            "total/solves": float(report.num_solves),
            "total/evaluations": float(report.num_evaluations),
        }
        if report.solved_share is not None:
            metrics["round/deepfool_success"] = report.solved_share
        if report.evaluation is not None:
            metrics |= _rate_metrics("train", report.evaluation.train) | _rate_metrics("val", report.evaluation.val)
        try:
            mlflow.log_metrics(metrics, step=report.round_number + 1)
        except MlflowException as error:
            logger.warning(
                "metrics of round %d are lost, MLflow does not take them: %s", report.round_number + 1, error
            )

    def log_rate(self, name: str, rate: FoolingRate) -> None:
        """A fooling rate with its interval, once."""
        mlflow.log_metrics(_rate_metrics(name, rate))

    def log_folder(self, folder: Path) -> None:
        """Every file of the folder as an artifact."""
        mlflow.log_artifacts(str(folder))

    def describe(self, markdown: str) -> None:
        """What the run's page says at its top."""
        mlflow.set_tag("mlflow.note.content", markdown)

    def _end(self, status: Literal["FINISHED", "FAILED", "KILLED"], reason: str | None) -> None:
        try:
            if reason is not None:
                mlflow.set_tag("reason", reason[:5000])
        finally:
            mlflow.end_run(status)

    def how_to_open(self) -> str:
        """Command or address that shows the run."""
        if self.uri.startswith("sqlite:"):
            return f"mlflow ui --backend-store-uri {self.uri}, then http://127.0.0.1:5000/{self._page()}"
        return f"{self.uri.rstrip('/')}/{self._page()}" if self.uri.startswith("http") else self.uri

    def _page(self) -> str:
        return f"#/experiments/{self.experiment_id}/runs/{self.run_id}"


def _rate_metrics(name: str, rate: FoolingRate) -> dict[str, float]:
    low, high = rate.interval
    return {
        f"fooling_rate/{name}": rate.rate,
        f"fooling_rate/{name}_low": low,
        f"fooling_rate/{name}_high": high,
        f"num_images/{name}": float(rate.num_examples),
    }
