"""What all jobs share: parse, run inside an MLflow run, start the workers, load the images."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from uap_dist.data.locations import absolute, join
from uap_dist.errors import ConfigError
from uap_dist.fleet.config import FleetConfig
from uap_dist.fleet.fleet import Fleet
from uap_dist.fleet.ray_cluster import connect
from uap_dist.job_options import JobOptions, RecordOptions, ResumableRecordOptions
from uap_dist.jobs.parsing import parse
from uap_dist.models.classifier import Classifier
from uap_dist.tracking.console import one_line_errors, replace_unknown_characters, set_up_logging
from uap_dist.tracking.mlflow_run import Tracker
from uap_dist.tracking.process import raise_on_sigterm, refuse_credentials, refuse_empty, value_of
from uap_dist.tracking.resume import Resumed, find_resumed

console = Console(soft_wrap=True, highlight=False, markup=False)

Options = TypeVar("Options", bound=JobOptions)


@contextmanager
def command_line() -> Iterator[None]:
    """A command that ends with one line for an error, obeys signals, logs to the console, and was given no credentials or empty values."""
    replace_unknown_characters()
    with one_line_errors(debug="--debug" in sys.argv):
        raise_on_sigterm()
        set_up_logging(console, debug="--debug" in sys.argv)
        refuse_credentials(sys.argv[1:])
        refuse_empty(sys.argv[1:])
        yield


def run_job(
    job: str,
    options_type: type[Options],
    run: Callable[[Options, Tracker, Resumed | None], None],
    *,
    can_resume: bool = False,
) -> None:
    """Parse the command line, then run inside an MLflow run that ends as the job does.

    Args:
        job: kind of job.
        options_type: dataclass of its options.
        run: the job.
        can_resume: whether it goes on with a run that --resume names.
    """
    with command_line():
        resumed = find_resumed(job) if can_resume else None
        run_id = resumed.checkpoint.job.run_id if resumed else None
        try:
            options = parse(options_type, resumed.options(options_type) if resumed else None)
        except ConfigError as error:  # whoever watches scheduled jobs expects a run that failed
            experiment = value_of("--experiment") or RecordOptions.experiment
            with Tracker(job=job, experiment=experiment, run_name=job, run_id=run_id):
                raise error
        experiment = options.record.experiment
        with Tracker(job=options.job, experiment=experiment, run_name=options.name, run_id=run_id) as tracker:
            run(options, tracker, resumed)


def storage_of(record: ResumableRecordOptions, output: Path, tracker: Tracker, resumed: Resumed | None) -> str:
    """Where the job is committed.

    Raises:
        ConfigError: a resumed job is given another one.
    """
    if resumed is not None:
        if record.storage != resumed.checkpoint.job.options["record"]["storage"]:
            raise ConfigError(f"a resumed run is committed where it was, in {resumed.storage}; leave out --storage")
        return resumed.storage
    return join(absolute(record.storage or str(output.parent / "checkpoints")), tracker.run_id)


def connect_to_ray() -> None:
    """Join the cluster of RAY_ADDRESS, or start a Ray of the job's own."""
    connect()
    raise_on_sigterm()  # again: ray.init installs a handler of its own


def start_fleet(classifier: Classifier, weights: str | None, config: FleetConfig, tracker: Tracker) -> Fleet:
    """Workers with that network, as many as the job begins with."""
    connect_to_ray()
    fleet = Fleet(classifier.given, weights, config, tracker.run_id, weights_digest=classifier.weights_digest)
    console.print(f"MLflow run {tracker.run_id}; waiting for {fleet.describe_request()}")
    fleet.wait()
    return fleet
