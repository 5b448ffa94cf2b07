"""Measure perturbations on classifiers and images: fooling rates, top-1, transfer between networks, beside random baselines."""

from collections.abc import Sequence
from dataclasses import asdict

from uap_dist.data.patterns import expand_patterns
from uap_dist.errors import ConfigError
from uap_dist.evaluation.coverage import PoolCoverage, cover_pools
from uap_dist.evaluation.evaluate import ZERO, Measurement, aim, baselines, measure_perturbations
from uap_dist.evaluation.options import EvaluateOptions
from uap_dist.evaluation.report import save_evaluation, summary
from uap_dist.fleet.fleet import Fleet
from uap_dist.jobs.common import console, run_job, start_fleet
from uap_dist.models.classifier import Classifier
from uap_dist.models.loading import load_usable_classifier
from uap_dist.models.names import ModelChoice, name_models, name_sets, plain_key
from uap_dist.perturbations.files import Perturbation, load_perturbations, split_name
from uap_dist.perturbations.pool import load_members
from uap_dist.tracking.mlflow_run import Tracker
from uap_dist.tracking.outputs import default_folder, output_folder
from uap_dist.versions import describe_code
from uap_dist.workers.accuracy import check_accuracy, name_labels, warn_of_other_classes
from uap_dist.workers.dataset import load_dataset


def main() -> None:
    """The command."""
    run_job("evaluate", EvaluateOptions, lambda options, tracker, _: run(options, tracker))


def run(options: EvaluateOptions, tracker: Tracker) -> None:
    """Measure every perturbation on every classifier and set of images. The workers end with the process."""
    choices = [ModelChoice.parse(text) for text in options.models]
    models = {name: (c.model, c.weights) for name, c in zip(name_models(choices), choices, strict=True)}
    urls = _list_sets(options.shards)
    perturbations = load_perturbations(options.perturbations, taken=[ZERO])
    perturbations += load_members(options.pools, taken=[ZERO, *(each.name for each in perturbations)])
    output = output_folder(options.record.output or default_folder(options.name, tracker.run_id))
    classifiers = {name: load_usable_classifier(*model) for name, model in models.items()}
    for classifier in classifiers.values():
        if classifier.class_names:  # now, because a class that is none need not wait for the images
            options.goal(classifier, classifier.class_names, len(classifier.class_names))
    settings = {key: value for key, value in asdict(options).items() if key not in ("fleet", "record")}
    for name, classifier in classifiers.items():
        settings[f"weights_digest.{plain_key(name)}"] = classifier.weights_digest
        settings[f"geometry.{plain_key(name)}"] = classifier.geometry
    tracker.log_params(settings | {"fleet": options.fleet} | describe_code())
    # networks that see images alike follow each other, so that each image is decoded once for all of them
    first, *others = sorted(models, key=lambda name: repr(classifiers[name].geometry))
    fleet = start_fleet(classifiers[first], models[first][1], options.fleet, tracker)
    found: dict[str, list[tuple[list[Measurement], list[PoolCoverage]]]] = {}
    for name in (first, *others):
        if name != first:
            fleet.use(*models[name], weights_digest=classifiers[name].weights_digest)
            fleet.wait()
        own = (options, fleet, name, classifiers[name])
        found[name] = [_measure(*own, each, perturbations, tracker) for each in urls.items()]
    measurements = [measurement for name in models for some, _ in found[name] for measurement in some]
    covered = [each for name in models for _, some in found[name] for each in some]
    save_evaluation(output, measurements, covered)
    text = summary(measurements, covered)
    metrics = {name: value for each in covered for name, value in each.metrics().items()}
    tracker.complete(tags=fleet.describe(), metrics=metrics, step=0, markdown=text, folder=output)
    console.print(f"\nFiles: {output}\nMLflow: {tracker.how_to_open()}")


def _measure(
    options: EvaluateOptions,
    fleet: Fleet,
    model: str,
    classifier: Classifier,
    images: tuple[str, list[str]],
    perturbations: list[Perturbation],
    tracker: Tracker,
) -> tuple[list[Measurement], list[PoolCoverage]]:
    """All perturbations, the baselines and what the pools cover, on one classifier and one set of images."""
    set_name, urls = images
    num, bad = options.num_images, options.max_bad_fraction
    dataset = load_dataset(fleet, urls, num_images=num, max_bad_fraction=bad, label_key=options.label_key)
    warn_of_other_classes(classifier, dataset, model)
    if check_accuracy(fleet, dataset, model)[""] is None:
        console.print(f"{model}, {set_name}: top-1 is not measured, {dataset.lack_of_labels}")
    tracker.log_dataset(dataset, set_name)
    class_names, num_labels = name_labels(classifier, dataset)
    goal = options.goal(classifier, class_names, num_labels)
    perturbations = aim(perturbations, goal, classifier.name, num_labels)
    everything = [*perturbations, *baselines(perturbations, dataset.shape, options.seed)]
    measurements = []
    for measurement in measure_perturbations(
        fleet,
        model,
        set_name,
        dataset,
        everything,
        scales=options.scales,
        quantize=options.quantize,
        class_names=class_names,
        weights_digest=classifier.weights_digest,
    ):
        name, rates = f"{measurement.perturbation} × {measurement.scale:g}", "; ".join(measurement.rates_in_words())
        console.print(f"{model}, {set_name}, {name}: {rates}")
        measurements.append(measurement)
    covered = cover_pools(fleet, dataset, perturbations, measurements, quantize=options.quantize, seed=options.seed)
    return measurements, covered


def _list_sets(specifications: Sequence[str]) -> dict[str, list[str]]:
    """URLs of the shards of each set of images."""
    given, patterns = zip(*map(split_name, specifications), strict=True)
    urls = [expand_patterns([pattern]) for pattern in patterns]
    for number, own in enumerate(urls):
        if own in urls[:number]:
            raise ConfigError(f"--shards has the same images twice: {patterns[urls.index(own)]} and {patterns[number]}")
    return dict(zip(name_sets(given, patterns), urls, strict=True))


if __name__ == "__main__":
    main()
