"""What jobs/compute.py does with --plan: time a little of the job, and say what all of it costs."""

from pathlib import Path

from uap_dist.computing.options import ComputeOptions
from uap_dist.computing.provenance import describe_config, describe_setup
from uap_dist.errors import ConfigError
from uap_dist.fleet.config import need_of
from uap_dist.jobs.common import connect_to_ray, console, storage_of
from uap_dist.jobs.demo import check_demo, list_shards
from uap_dist.models.loading import load_usable_classifier
from uap_dist.planning.comparison import read_plan, save_plan
from uap_dist.planning.estimate import Profiler, make_plan
from uap_dist.tracking.mlflow_run import Tracker
from uap_dist.tracking.resume import Resumed
from uap_dist.versions import describe_code


def plan(options: ComputeOptions, tracker: Tracker, output: Path) -> None:
    """Time a little of the job, and say what all of it costs."""
    classifier = load_usable_classifier(options.given, options.weights)
    if classifier.class_names:
        options = options.with_labels(classifier.class_names, len(classifier.class_names))
    settings = describe_setup(classifier, options.weights, options.fleet) | describe_config(options.config)
    tracker.log_params(settings)
    train_urls, val_urls = list_shards(options, output)
    connect_to_ray()
    check_demo(options, train_urls, need_of(options.fleet))
    storage = storage_of(options.record, output, tracker, None)
    made = make_plan(Profiler(options, classifier, train_urls, storage, tracker, console), val_urls)
    save_plan(output, made.result() | {"code": describe_code()})
    tracker.complete(tags={}, metrics=made.metrics(), step=0, markdown=made.summary(), folder=output)
    console.print(f"\n{made.summary()}\n\nFiles: {output}\nMLflow: {tracker.how_to_open()}")


def what_was_planned(options: ComputeOptions, tracker: Tracker, resumed: Resumed | None) -> dict[str, float]:
    """The metrics of the plan that --planned names, which MLflow gets; none without it, and none for a run that is resumed.

    Raises:
        ConfigError: it is no plan, or one of another run, or a resumed run is given one.
    """
    if resumed is not None and options.planned != resumed.checkpoint.job.options["planned"]:
        raise ConfigError(
            "--planned belongs to the beginning of a run: how long its earlier processes took is not known"
        )
    if options.planned is None or resumed is not None:
        return {}
    planned = read_plan(Path(options.planned), options.costs())
    tracker.log_metrics(planned)
    return planned
