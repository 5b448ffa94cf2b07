"""Analyse a universal perturbation as section 4 of the paper does: phase transition, correlated boundaries, number of images."""

import os
import signal

if __name__ == "__main__":  # Ctrl-C is quiet while the imports below take their seconds
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
from rich.console import Console

from uap_dist.analysis.boundaries import (
    Boundaries,
    analyze_boundaries,
    check_subspace,
    gather_normals,
    paper_norm_l2,
    sum_steps,
)
from uap_dist.analysis.phase_transition import Point, phase_transition
from uap_dist.analysis.report import FinishedAnalysis, save_analysis
from uap_dist.analysis.sample_size import NumberPoint, Recipe, compute_by_number, default_numbers, plan_numbers
from uap_dist.data.patterns import expand_apart
from uap_dist.errors import ConfigError
from uap_dist.fleet.config import FleetConfig
from uap_dist.fleet.fleet import Fleet
from uap_dist.fleet.ray_cluster import connect
from uap_dist.method.config import ComputeConfig
from uap_dist.models.classifier import Classifier
from uap_dist.models.loading import describe_weights, load_usable_classifier
from uap_dist.perturbations.files import Perturbation, load_perturbations
from uap_dist.tracking.console import one_line_errors, set_up_logging
from uap_dist.tracking.mlflow_run import Tracker
from uap_dist.tracking.outputs import output_folder
from uap_dist.tracking.process import raise_on_sigterm, refuse_credentials
from uap_dist.versions import describe_code
from uap_dist.workers.accuracy import check_accuracy
from uap_dist.workers.dataset import Dataset, check_disjoint, check_limits, load_dataset

console = Console(soft_wrap=True, highlight=False, markup=False)
Analysis = Literal["phase", "boundaries", "images"]
Measured = TypeVar("Measured", Point, NumberPoint)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Analyse a universal perturbation.

    Pixels are RGB values 0..255 at the classifier's input size; every norm is in these units.
    """

    model: str
    """Classifier, as `--model` of jobs/compute.py has it."""
    weights: str | None = None
    """File with its weights. Default: the published ones."""
    perturbation: str
    """Folder or file of jobs/compute.py; .npy and .mat of others with their unit, as FILE.mat:255 or FILE.npy:1 (which leaves
    `images` out, for they do not say how they were computed). NAME=FILE names it."""
    train_shards: tuple[str, ...]
    """Tars that DeepFool's perturbations, the mean image, and perturbations of fewer images come from."""
    val_shards: tuple[str, ...]
    """Held-out tars that fooling rates are measured on; none of them may be among the training ones."""
    num_train_images: int | None = None
    """The first of the training shards. Default: all."""
    num_val_images: int | None = None
    """The first of the held-out shards. Default: all."""
    analyses: tuple[Analysis, ...] = ("phase", "boundaries", "images")
    """Fooling rate against norm; singular values of the boundaries' normals, and their subspace; fooling rate against the number
    of training images."""
    num_normals: int | None = None
    """Training images, evenly spread, whose DeepFool perturbations are computed: for their sum (phase) and the matrix of
    normals (boundaries). Default: all."""
    num_draws: int = 3
    """Random vectors of each kind, and images whose DeepFool perturbation is shown to others."""
    scales: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    """phase: the grid of norms, ℓ2 and ℓ∞, in multiples of the perturbation's own; 1 is always among them."""
    num_singular: int = 100
    """boundaries: singular vectors that span the subspace."""
    norm_l2: float | None = None
    """boundaries: length of the vectors of the subspace. Default: as strong a value as the paper's 2000 for 3×224×224."""
    memory_gib: float = 2.0
    """Memory of the driver for normals, GiB. Where they do not fit, their matrix is reduced to its leading directions on the way."""
    numbers: tuple[int, ...] = ()
    """images: how many training images. Default: all, a quarter of them, a sixteenth, a 64th, a 256th, where those make a round."""
    num_seeds: int = 3
    """images: perturbations from each number, with seeds from the perturbation's own on."""
    seed: int = 0
    """Of random vectors and of images at random."""
    max_bad_fraction: float = 0.01
    """Share of images (0..1) that may fail to decode, and of held-out ones that may be training images too, before the job fails;
    both are left out."""
    output: Path | None = None
    """Folder for the results. Default: outputs/analysis-<perturbation>-<time>."""
    experiment: str = "uap_dist"
    """MLflow experiment; the server is taken from MLFLOW_TRACKING_URI, else mlflow.db in the working directory."""
    debug: bool = False
    """Show tracebacks of errors."""
    fleet: FleetConfig = field(default_factory=FleetConfig)

    @property
    def memory_bytes(self) -> int:
        """Of the driver, for normals."""
        return int(self.memory_gib * 2**30)

    def check(self) -> None:
        """Raise ConfigError for what cannot be."""
        if not self.analyses:
            raise ConfigError("no analyses given (--analyses); name some of phase, boundaries, images")
        for name in ("num_draws", "num_singular", "norm_l2", "memory_gib", "num_seeds", "num_normals"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name.replace('_', ' ')} is {value}; it must be positive")
        for scale in self.scales:
            if not 0 < scale < float("inf"):
                raise ConfigError(f"a scale is {scale}; scales must be positive")
        check_limits(self.max_bad_fraction, self.num_train_images, self.num_val_images)
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must not be negative")


Plan = dict[tuple[int, int], ComputeConfig]


def main() -> None:
    """Parse, then measure inside an MLflow run that ends as the job does."""
    with one_line_errors(debug="--debug" in sys.argv):
        raise_on_sigterm()
        set_up_logging(console, debug="--debug" in sys.argv)
        refuse_credentials(sys.argv[1:])
        options = tyro.cli(Options, config=(tyro.conf.OmitArgPrefixes,))
        with Tracker(job="analyze", experiment=options.experiment, run_name="analysis") as tracker:
            run(options, tracker)


def run(options: Options, tracker: Tracker) -> None:
    """The whole job: connect, load, refuse what cannot be, measure, save. The workers end with the process."""
    options.check()
    (perturbation,) = load_perturbations([options.perturbation])
    recipe = Recipe.of(perturbation) if "images" in options.analyses else None
    classifier = load_usable_classifier(options.model, options.weights)
    _check_sizes(options, perturbation, classifier.geometry.shape, options.num_train_images)
    train_urls, val_urls = expand_apart(options.train_shards, options.val_shards)
    output = output_folder(options.output, f"analysis-{perturbation.name}")
    provenance = _describe(options, perturbation, classifier)
    tracker.log_params(provenance)
    connect()
    raise_on_sigterm()  # again: ray.init installs a handler of its own
    fleet = Fleet(
        options.model, options.weights, options.fleet, tracker.run_id, weights_digest=classifier.weights_digest
    )
    console.print(f"MLflow run {tracker.run_id}; waiting for {fleet.describe_request()}")
    fleet.wait()
    load = {"max_bad_fraction": options.max_bad_fraction}
    train = load_dataset(fleet, train_urls, num_images=options.num_train_images, **load)
    val = load_dataset(fleet, val_urls, num_images=options.num_val_images, **load)
    val = check_disjoint(train, val, max_shared_fraction=options.max_bad_fraction)
    check_accuracy(fleet, train, options.model)
    data = {"train_digest": train.digest, "val_digest": val.digest}
    tracker.log_params(data)
    tracker.log_dataset(train, "training")
    tracker.log_dataset(val, "held-out")
    plan = _plan(options, perturbation, recipe, train)
    console.print(f"{options.model}, {train.num_examples} training and {val.num_examples} held-out images")
    phase, boundaries = _measure(options, fleet, train, val, perturbation)
    numbers = _show("images", compute_by_number(fleet, train, val, plan)) if plan else []
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
    tracker.complete(
        tags=fleet.describe(), metrics=finished.metrics(), step=0, markdown=finished.summary(), folder=output
    )
    console.print(f"\n{finished.summary()}\n\nFiles: {output}\nMLflow: {tracker.how_to_open()}", markup=False)


def _check_sizes(
    options: Options, perturbation: Perturbation, shape: tuple[int, ...] | None, num_train: int | None
) -> None:
    """Refuse what images of that shape, and so many training images, do not allow; None: not known before the data are."""
    own = tuple(perturbation.v.shape)
    if shape is not None and own != shape:
        shapes = ["×".join(map(str, each)) for each in (own, shape)]
        raise ConfigError(
            f"{perturbation.name} has shape {shapes[0]}, but images of {options.model} have {shapes[1]}; give a perturbation of that size"
        )
    num_normals = options.num_normals or num_train
    if num_train is not None and num_normals is not None and num_normals > num_train:
        raise ConfigError(f"{num_normals} normals (--num-normals) asked for, but there are {num_train} training images")
    if "boundaries" in options.analyses and num_normals is not None:
        check_subspace(options.num_singular, num_normals, own, options.memory_bytes)


def _plan(options: Options, perturbation: Perturbation, recipe: Recipe | None, train: Dataset) -> Plan:
    """Refuse what the data do not allow, before any work; what perturbations of fewer images are computed with."""
    _check_sizes(options, perturbation, train.shape, train.num_examples)
    if recipe is None:
        return {}
    numbers = options.numbers or default_numbers(train.num_examples, recipe.config.round_size)
    return plan_numbers(train, recipe, numbers, options.num_seeds)


def _measure(
    options: Options, fleet: Fleet, train: Dataset, val: Dataset, perturbation: Perturbation
) -> tuple[list[Point], Boundaries | None]:
    """Phase transition and correlated boundaries, which share DeepFool's perturbations."""
    v, memory = perturbation.v, options.memory_bytes
    draws = {"num_draws": options.num_draws, "seed": options.seed}
    phase: list[Point] = []
    boundaries = None
    solved = train.thin(options.num_normals or train.num_examples)
    if "boundaries" in options.analyses:
        console.print(f"DeepFool's perturbations of {solved.num_examples} training images")
        normals = gather_normals(fleet, solved, options.num_singular, memory)
        length = options.norm_l2 or paper_norm_l2(v.shape)
        boundaries = analyze_boundaries(fleet, val, v, normals, norm_l2=length, memory_bytes=memory, **draws)
        _show("boundaries", boundaries.points)
    if "phase" in options.analyses:
        total = normals.total if boundaries is not None else sum_steps(fleet, solved, memory)
        scales = sorted({*options.scales, 1.0})
        phase = _show("phase", phase_transition(fleet, train, val, v, total, scales=scales, **draws))
    return phase, boundaries


def _show(name: Analysis, points: Iterable[Measured]) -> list[Measured]:
    """The points, each written as a line as soon as it is there."""
    found = []
    for point in points:
        console.print(f"{name}: {point}")
        found.append(point)
    return found


def _describe(options: Options, perturbation: Perturbation, classifier: Classifier) -> dict[str, Any]:
    """What the run's parameters and the report say of where it comes from."""
    settings = {key: value for key, value in asdict(options).items() if key not in ("debug", "output", "fleet")}
    return {
        **settings,
        "weights": describe_weights(options.model, options.weights),
        "weights_digest": classifier.weights_digest,
        **{f"geometry.{key}": value for key, value in asdict(classifier.geometry).items()},
        "perturbation_sha256": sha256(perturbation.v.numpy().tobytes()).hexdigest(),
        **{f"fleet.{key}": value for key, value in asdict(options.fleet).items()},
        **describe_code(),
    }


if __name__ == "__main__":
    main()
