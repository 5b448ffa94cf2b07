"""Compute universal adversarial perturbations of a classifier from WebDataset shards, on Ray, logged to MLflow: one, or a pool.

Without arguments: EfficientNet-Lite0 on the photographs that packages of the `demo` extra carry.
"""

from dataclasses import replace
from pathlib import Path

from uap_dist.computing.options import ComputeOptions
from uap_dist.computing.pool_run import compute_all
from uap_dist.computing.provenance import (
    Setting,
    check_resumed,
    describe_config,
    describe_goal,
    describe_setup,
    describe_training,
    job_record,
)
from uap_dist.errors import TrackingError
from uap_dist.job_options import to_json
from uap_dist.jobs.common import console, run_job, start_fleet, storage_of
from uap_dist.jobs.demo import check_demo, list_shards
from uap_dist.jobs.images import classify_images, list_training, read_held_out, say_what_is_seen, say_who_takes_part
from uap_dist.jobs.plan import plan, what_was_planned
from uap_dist.method.config import warn_of_default_radius
from uap_dist.method.state import State
from uap_dist.models.loading import load_usable_classifier
from uap_dist.planning.comparison import PLAN_FILE, Spent
from uap_dist.rounds.concurrent import describe_idle
from uap_dist.tracking.checkpoint import Checkpoint
from uap_dist.tracking.checkpoint_store import CheckpointStore
from uap_dist.tracking.mlflow_run import Tracker
from uap_dist.tracking.outputs import default_folder, output_folder
from uap_dist.tracking.resume import Resumed
from uap_dist.versions import seconds_since_start
from uap_dist.workers.accuracy import name_labels
from uap_dist.workers.behind import behind


def main() -> None:
    """The command."""
    run_job("compute", ComputeOptions, run, can_resume=True)


def run(options: ComputeOptions, tracker: Tracker, resumed: Resumed | None) -> None:
    """The whole job, or a plan of it. Its workers end with its process."""
    folder = options.record.output or default_folder(options.name, tracker.run_id)
    output = output_folder(folder, may_hold_files=resumed is not None, besides=(PLAN_FILE,))
    if options.plan:
        plan(options, tracker, output)
    else:
        compute(options, tracker, resumed, output)


def compute(options: ComputeOptions, tracker: Tracker, resumed: Resumed | None, output: Path) -> None:
    """Connect, load, compute, save, and say what came of it."""
    storage = storage_of(options.record, output, tracker, resumed)
    planned = what_was_planned(options, tracker, resumed)
    options = replace(options, record=replace(options.record, output=output))
    setting, checkpoint, options = _set_up(options, storage, tracker, resumed, output)
    text, results = compute_all(setting, options, checkpoint, tracker, output, storage)
    # how long the earlier processes of a resumed run took is not known
    seconds = None if resumed else seconds_since_start()
    spent = Spent.of(results, setting.fleet.num_workers, seconds)
    summary = f"{text}\n\n{spent.beside(planned)}".rstrip()
    try:
        tracker.log_metrics(spent.metrics())
        tracker.describe(summary)
    except TrackingError as error:  # all else is delivered, and the run is finished
        console.print(f"what the run took is not in MLflow: {error}")
    console.print(f"\n{summary}\n\nFiles: {output}\nMLflow: {tracker.how_to_open()}")


def _set_up(
    options: ComputeOptions, storage: str, tracker: Tracker, resumed: Resumed | None, output: Path
) -> tuple[Setting, Checkpoint, ComputeOptions]:
    """Network, fleet and data, recorded by the run, what the computation goes on from, and the options with labels as numbers."""
    classifier = load_usable_classifier(options.given, options.weights)
    if classifier.class_names:  # now, because a target that is none need not wait for the images
        options = options.with_labels(classifier.class_names, len(classifier.class_names))
    settings = describe_setup(classifier, options.weights, options.fleet) | describe_config(options.config)
    settings |= {"demo": options.is_demo, "num_perturbations": options.num_perturbations}
    if resumed is None:
        tracker.log_params(settings)
    urls = list_shards(options, output)
    CheckpointStore(storage).prepare()  # before any work is done
    fleet = start_fleet(classifier, options.weights, options.fleet, tracker)
    if classifier.networks:
        console.print(say_what_is_seen(classifier))
    if idle := describe_idle(fleet.num_asked, options.num_perturbations, options.config):
        console.print(idle)
    check_demo(options, urls[0], fleet.need)
    train_urls, val_urls = urls
    console.print(
        f"decoding {len(train_urls)} training shards; {len(val_urls)} held-out ones follow behind the first rounds"
    )
    train = list_training(fleet, options.data, train_urls)
    warn_of_default_radius(options.config, train.shape)
    class_names, num_labels = name_labels(classifier, train)
    options = options.with_labels(class_names, num_labels)
    train = classify_images(fleet, classifier.name, train, "training")
    say_who_takes_part(options.config.goal, train)
    data = describe_training(train) | describe_goal(options.config, class_names, train)
    held_out = behind(lambda: read_held_out(fleet, options.data, val_urls, train, classifier.name))
    setting = Setting(classifier, fleet, train, held_out, settings | data, console, options.record.commit_every_s)
    record = job_record("compute", setting, run_id=tracker.run_id, options=to_json(options))
    if resumed is not None:
        check_resumed(resumed.checkpoint.job, record)
        return setting, resumed.checkpoint, options
    tracker.log_params(data)
    tracker.log_dataset(train, "training")
    return setting, Checkpoint(record, State.start(train.shape, train.clean.labels, options.config), ()), options


if __name__ == "__main__":
    main()
