"""Measure perturbations on classifiers and images: fooling rates, top-1, transfer between networks, beside random baselines."""

import os
import signal

if __name__ == "__main__":  # Ctrl-C is quiet while the imports below take their seconds
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path

import tyro
from rich.console import Console

from uap_dist.data.patterns import expand_patterns
from uap_dist.errors import ConfigError
from uap_dist.evaluation.evaluate import NOTHING, Measurement, baselines, measure_perturbations
from uap_dist.evaluation.report import save_evaluation, summary
from uap_dist.fleet.config import FleetConfig
from uap_dist.fleet.fleet import Fleet
from uap_dist.fleet.ray_cluster import connect
from uap_dist.models.loading import load_usable_classifier
from uap_dist.perturbations.files import Perturbation, load_perturbations, split_name
from uap_dist.perturbations.names import ModelChoice, name_models, name_sets, plain_key
from uap_dist.perturbations.pool import load_members
from uap_dist.tracking.console import one_line_errors, set_up_logging
from uap_dist.tracking.mlflow_run import Tracker
from uap_dist.tracking.outputs import output_folder
from uap_dist.tracking.process import raise_on_sigterm, refuse_credentials
from uap_dist.versions import describe_code
from uap_dist.workers.accuracy import check_accuracy
from uap_dist.workers.dataset import check_limits, load_dataset

console = Console(soft_wrap=True, highlight=False, markup=False)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure perturbations on classifiers and images."""

    perturbations: tuple[str, ...] = ()
    """Folders or files of jobs/compute.py; .npy and .mat of others with their unit, as FILE.mat:255 (pixels 0..255) or
    FILE.npy:1 (scale 0..1). NAME=FILE names one in the tables. One of another size than a network's input is resized (bilinear)."""
    pools: tuple[str, ...] = ()
    """Folders of pools; all members are measured. NAME=FOLDER puts NAME before the members' names."""
    models: tuple[str, ...] = ()
    """Classifiers as [NAME=]MODEL[=WEIGHTS]: MODEL as `--model` of jobs/compute.py has it, WEIGHTS a file, NAME for the tables,
    as in before=torchvision/resnet50 after=torchvision/resnet50=tuned.safetensors. NAME has no / \\ or :, so a path with = in it
    begins with ./ or /. Without names, networks and their weights are told apart by as much of their paths as it takes."""
    shards: tuple[str, ...] = ()
    """Sets of images: each value is one, NAME=PATTERN or PATTERN; `::` joins patterns within one."""
    num_images: int | None = None
    """Images of each set, the first of its shards. Default: all."""
    scales: tuple[float, ...] = (1.0,)
    """What each perturbation and baseline is multiplied with; several give fooling rate against norm."""
    quantize: bool = False
    """Round perturbed images to whole pixel values, as saving them does."""
    seed: int = 0
    """Of the random baselines."""
    max_bad_fraction: float = 0.01
    """Share of images (0..1) that may fail to decode before the job fails."""
    output: Path | None = None
    """Folder for the results. Default: outputs/evaluation-<time>."""
    experiment: str = "uap_dist"
    """MLflow experiment; the server is taken from MLFLOW_TRACKING_URI, else mlflow.db in the working directory."""
    debug: bool = False
    """Show tracebacks of errors."""
    fleet: FleetConfig = field(default_factory=FleetConfig)

    def check(self) -> None:
        """Raise ConfigError for what cannot be."""
        for name in ("models", "shards", "scales"):
            if not getattr(self, name):
                raise ConfigError(f"no {name} given (--{name})")
        if not self.perturbations and not self.pools:
            raise ConfigError("no perturbations given (--perturbations, --pools)")
        check_limits(self.max_bad_fraction, self.num_images)
        for scale in self.scales:
            if not isfinite(scale) or self.scales.count(scale) > 1:
                raise ConfigError(f"scale {scale:g} is not finite, or given twice (--scales)")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must not be negative")


def main() -> None:
    """Parse, then measure inside an MLflow run that ends as the job does."""
    with one_line_errors(debug="--debug" in sys.argv):
        raise_on_sigterm()
        set_up_logging(console, debug="--debug" in sys.argv)
        refuse_credentials(sys.argv[1:])
        options = tyro.cli(Options, config=(tyro.conf.OmitArgPrefixes,))
        with Tracker(job="evaluate", experiment=options.experiment, run_name="evaluation") as tracker:
            run(options, tracker)


def run(options: Options, tracker: Tracker) -> None:
    """Every perturbation on every classifier and set of images. The workers end with the process."""
    options.check()
    choices = [ModelChoice.parse(text) for text in options.models]
    models = {name: (c.model, c.weights) for name, c in zip(name_models(choices), choices, strict=True)}
    urls = _list_sets(options.shards)
    perturbations = load_perturbations(options.perturbations, taken=[NOTHING])
    perturbations += load_members(options.pools, taken=[NOTHING, *(each.name for each in perturbations)])
    output = output_folder(options.output, "evaluation")
    classifiers = {name: load_usable_classifier(*model) for name, model in models.items()}
    settings = asdict(options) | describe_code()
    tracker.log_params(
        settings
        | {f"weights_digest.{plain_key(name)}": c.weights_digest for name, c in classifiers.items()}
        | {f"geometry.{plain_key(name)}": c.geometry for name, c in classifiers.items()}
    )
    connect()
    raise_on_sigterm()  # again: ray.init installs a handler of its own
    # networks that see images alike follow each other, so that each image is decoded once for all of them
    first, *others = sorted(models, key=lambda name: repr(classifiers[name].geometry))
    digests = {name: classifier.weights_digest for name, classifier in classifiers.items()}
    fleet = Fleet(*models[first], options.fleet, tracker.run_id, weights_digest=digests[first])
    found: dict[str, list[Measurement]] = {}
    for name in (first, *others):
        if name != first:
            fleet.use(*models[name], weights_digest=digests[name])
        console.print(f"{name}: waiting for {fleet.describe_request()}")
        fleet.wait()
        found[name] = [m for each in urls.items() for m in _measure(options, fleet, name, each, perturbations, tracker)]
    measurements = [measurement for name in models for measurement in found[name]]
    save_evaluation(output, measurements)
    tracker.complete(tags=fleet.describe(), metrics={}, step=0, markdown=summary(measurements), folder=output)
    console.print(f"\nFiles: {output}\nMLflow: {tracker.how_to_open()}", markup=False)


def _measure(
    options: Options,
    fleet: Fleet,
    model: str,
    images: tuple[str, list[str]],
    perturbations: list[Perturbation],
    tracker: Tracker,
) -> Iterator[Measurement]:
    """All perturbations, and the baselines, on one classifier and one set of images."""
    set_name, urls = images
    dataset = load_dataset(fleet, urls, num_images=options.num_images, max_bad_fraction=options.max_bad_fraction)
    check_accuracy(fleet, dataset, model)
    tracker.log_dataset(dataset, set_name)
    everything = [*perturbations, *baselines(perturbations, dataset.shape, options.seed)]
    for measurement in measure_perturbations(
        fleet, model, set_name, dataset, everything, scales=options.scales, quantize=options.quantize
    ):
        console.print(f"{model}, {set_name}, {measurement.perturbation} × {measurement.scale:g}: {measurement.fooling}")
        yield measurement


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
