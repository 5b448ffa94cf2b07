"""Analyse a universal perturbation as section 4 of the paper does: phase transition, correlated boundaries, number of images."""

from dataclasses import asdict
from typing import Any

from uap_dist.analysis.options import AnalyzeOptions
from uap_dist.analysis.report import FinishedAnalysis, save_analysis
from uap_dist.analysis.run import check_images, measure, plan_sample_sizes, read_recipe, show
from uap_dist.analysis.sample_size import compute_sample_sizes
from uap_dist.computing.provenance import describe_setup
from uap_dist.data.patterns import expand_apart
from uap_dist.errors import ConfigError
from uap_dist.jobs.common import console, run_job, start_fleet
from uap_dist.jobs.images import classify_images, list_images
from uap_dist.models.classifier import Classifier
from uap_dist.models.loading import load_usable_classifier
from uap_dist.perturbations.files import Perturbation, digest_values, load_perturbations
from uap_dist.tracking.mlflow_run import Tracker
from uap_dist.tracking.outputs import default_folder, output_folder


def main() -> None:
    """The command."""
    run_job("analyze", AnalyzeOptions, lambda options, tracker, _: run(options, tracker))


def run(options: AnalyzeOptions, tracker: Tracker) -> None:
    """The whole job: connect, load, check, measure, save. The workers end with the process."""
    perturbation, *others = load_perturbations([options.perturbation])
    if others:
        raise ConfigError(
            f"--perturbation {options.perturbation} holds {1 + len(others)} perturbations; give one, as FILE#KEY:UNIT, or save it alone"
        )
    recipe = read_recipe(options, perturbation)
    classifier = load_usable_classifier(options.model, options.weights)
    check_images(options, perturbation, classifier.geometry.shape, options.data.num_train_images)
    urls = expand_apart(options.data.train_shards, options.data.val_shards)
    output = output_folder(options.record.output or default_folder(f"analysis-{perturbation.name}", tracker.run_id))
    provenance = _describe(options, perturbation, classifier)
    tracker.log_params(provenance)
    fleet = start_fleet(classifier, options.weights, options.fleet, tracker)
    train, val = list_images(fleet, options.data, *urls)
    plan = plan_sample_sizes(options, perturbation, recipe, train)
    train = classify_images(fleet, options.model, train, "training")
    val = classify_images(fleet, options.model, val, "held-out")
    data = {"train_digest": train.digest, "val_digest": val.digest}
    tracker.log_params(data)
    tracker.log_dataset(train, "training")
    tracker.log_dataset(val, "held-out")
    console.print(f"{options.model}, {train.num_examples} training and {val.num_examples} held-out images")
    phase, boundaries = measure(options, fleet, train, val, perturbation, console)
    numbers = show("images", compute_sample_sizes(fleet, train, val, plan), console) if plan else []
    numbers.sort(key=lambda point: (point.num_images, point.seed))  # they end in any order
    counts = {"num_train_images": train.num_examples, "num_val_images": val.num_examples}
    finished = FinishedAnalysis(
        perturbation=perturbation,
        phase=phase,
        boundaries=boundaries,
        numbers=numbers,
        num_train_images=train.num_examples,
        num_solved=options.num_normals or train.num_examples,
        provenance=provenance | data | counts | fleet.describe(),
        mlflow_run_id=tracker.run_id,
    )
    save_analysis(output, finished)
    text = finished.summary()
    tracker.complete(tags=fleet.describe(), metrics=finished.metrics(), step=0, markdown=text, folder=output)
    console.print(f"\n{text}\n\nFiles: {output}\nMLflow: {tracker.how_to_open()}")


def _describe(options: AnalyzeOptions, perturbation: Perturbation, classifier: Classifier) -> dict[str, Any]:
    """Parameters of the run, and what the report says of where it comes from."""
    settings = {key: value for key, value in asdict(options).items() if key not in ("data", "fleet", "record")}
    digest = digest_values(perturbation.v)
    setup = describe_setup(classifier, options.weights, options.fleet)
    return settings | asdict(options.data) | setup | {"perturbation_sha256": digest}


if __name__ == "__main__":
    main()
