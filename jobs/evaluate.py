"""Measure perturbations on classifiers and images: fooling rates, top-1, transfer between networks, beside random baselines."""

import re
import sys
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tyro
from rich.console import Console

from uap_dist.classifiers import load_classifier
from uap_dist.cluster import connect
from uap_dist.dataset import load_dataset
from uap_dist.errors import ConfigError
from uap_dist.evaluate import Measurement, baselines, measure_perturbations
from uap_dist.fleet import Fleet, FleetConfig
from uap_dist.perturbations import Perturbation, load_perturbations, split_name
from uap_dist.pool import PerturbationPool
from uap_dist.provenance import describe_code
from uap_dist.report import output_folder
from uap_dist.review import save_evaluation, summary
from uap_dist.shards import expand_patterns
from uap_dist.terminal import one_line_errors, raise_on_sigterm, refuse_credentials, set_up_logging
from uap_dist.tracking import Tracker

console = Console(soft_wrap=True, highlight=False, markup=False)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure perturbations on classifiers and images."""

    perturbations: tuple[str, ...] = ()
    """Folders or files of jobs/compute.py; .npy and .mat of others with their unit, as FILE.mat:255 (pixels 0..255) or
    FILE.npy:1 (scale 0..1). NAME=FILE names one in the tables. One of another size than a network's input is resized (bilinear)."""
    pools: tuple[str, ...] = ()
    """Folders of pools; all members are measured."""
    models: tuple[str, ...] = ()
    """Classifiers, as `--model` of jobs/compute.py has them; with a weights file as MODEL=FILE."""
    shards: tuple[str, ...] = ()
    """Sets of images: each value is one, NAME=PATTERN or PATTERN; `::` joins patterns within one."""
    num_images: int | None = None
    """Images of each set, the first of its shards. Default: all."""
    radius: float = 10.0
    """Of the random baselines, pixels (0..255)."""
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


def main() -> None:
    """Parse, then measure inside an MLflow run that ends as the job does."""
    with one_line_errors(debug="--debug" in sys.argv):
        raise_on_sigterm()
        set_up_logging(console, debug="--debug" in sys.argv)
        refuse_credentials(sys.argv[1:])
        options = tyro.cli(Options, config=(tyro.conf.OmitArgPrefixes,))
        with Tracker(experiment=options.experiment, run_name="evaluation") as tracker:
            run(options, tracker)


def run(options: Options, tracker: Tracker) -> None:
    """Every perturbation on every classifier and set of images. The workers end with the process."""
    for name in ("models", "shards"):
        if not getattr(options, name):
            raise ConfigError(f"no {name} given (--{name})")
    if not options.perturbations and not options.pools:
        raise ConfigError("no perturbations given (--perturbations, --pools)")
    perturbations = load_perturbations(options.perturbations)
    perturbations += [member for pool in options.pools for member in PerturbationPool.load(pool).to_perturbations()]
    pairs = [(model, weights or None) for model, _, weights in (text.partition("=") for text in options.models)]
    models = {_short(model): (model, weights) for model, weights in pairs}
    sets = {name or Path(pattern).name.split("-")[0]: pattern for name, pattern in map(split_name, options.shards)}
    _refuse_twins("models", len(options.models), models)
    _refuse_twins("perturbations", len(perturbations), [perturbation.name for perturbation in perturbations])
    _refuse_twins("sets of images", len(options.shards), sets)
    urls = {name: expand_patterns([pattern]) for name, pattern in sets.items()}
    output = output_folder(options.output, "evaluation")
    classifiers = {name: load_classifier(*model) for name, model in models.items()}
    settings = asdict(options) | describe_code()
    tracker.log_params(settings | {f"weights_digest.{name}": c.weights_digest for name, c in classifiers.items()})
    connect()
    raise_on_sigterm()  # again: ray.init installs a handler of its own
    # networks that see images alike follow each other, so that each image is decoded once for all of them
    first, *others = sorted(models, key=lambda name: repr(classifiers[name].geometry))
    fleet = Fleet(*models[first], options.fleet, tracker.run_id)
    found: dict[str, list[Measurement]] = {}
    for name in (first, *others):
        if name != first:
            fleet.use(*models[name])
        console.print(f"{name}: waiting for {fleet.describe_wish()}")
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
    tracker.log_dataset(dataset, set_name)
    everything = [*perturbations, *baselines(dataset.shape, options.radius, options.seed)]
    for measurement in measure_perturbations(
        fleet, model, set_name, dataset, everything, scales=options.scales, quantize=options.quantize
    ):
        console.print(f"{model}, {set_name}, {measurement.perturbation} × {measurement.scale:g}: {measurement.fooling}")
        yield measurement


def _refuse_twins(what: str, count: int, names: Collection[str]) -> None:
    if len(set(names)) < count:
        raise ConfigError(f"two {what} have one name: {', '.join(names)}")


def _short(model: str) -> str:
    """Its name in tables: what follows the last / or :."""
    return re.split("[/:]", model)[-1]


if __name__ == "__main__":
    main()
