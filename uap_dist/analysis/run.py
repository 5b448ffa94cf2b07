"""The analyses of a job: what the data have to allow, and the measurements in their order."""

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console

from uap_dist.analysis.boundaries import (
    BoundaryCorrelation,
    analyze_boundaries,
    check_subspace,
    gather_normals,
    sum_steps,
)
from uap_dist.analysis.options import Analysis, AnalyzeOptions
from uap_dist.analysis.phase_transition import Point, phase_transition
from uap_dist.analysis.sample_size import Recipe, SampleSizePoint, configs_by_size, default_numbers
from uap_dist.errors import ConfigError
from uap_dist.method.config import ComputeConfig
from uap_dist.method.norms import paper_norm_l2
from uap_dist.perturbations.files import Perturbation
from uap_dist.workers.dataset import Dataset
from uap_dist.workers.local import Workers

Measured = TypeVar("Measured", Point, SampleSizePoint)


def check_images(
    options: AnalyzeOptions, perturbation: Perturbation, shape: tuple[int, ...] | None, num_train: int | None
) -> None:
    """Check the options against the images' shape and the number of training images; None where they are not known yet.

    Raises:
        ConfigError: the images, their number or the memory do not allow what the options ask for.
    """
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


def read_recipe(options: AnalyzeOptions, perturbation: Perturbation) -> Recipe | None:
    """How the perturbation was computed, if others are to be computed likewise.

    Raises:
        PerturbationError: it does not say that, see `Recipe.of`.
        ConfigError: nothing of the others would be verified.
    """
    if "images" not in options.analyses:
        return None
    recipe = Recipe.of(perturbation)
    at_once = recipe.config.members_at_once
    if options.fleet.verify_determinism and at_once > 1:
        raise ConfigError(
            f"--verify-determinism compares blocks that workers share, but {perturbation.name} was computed with --members-at-once "
            f"{at_once}, and so are others; leave it out"
        )
    return recipe


def plan_sample_sizes(
    options: AnalyzeOptions, perturbation: Perturbation, recipe: Recipe | None, train: Dataset
) -> dict[tuple[int, int], ComputeConfig]:
    """Check the options against the data, and plan the perturbations of fewer images (see `configs_by_size`); none without a recipe.

    Raises:
        ConfigError: the data do not allow what the options ask for.
    """
    check_images(options, perturbation, train.shape, train.num_examples)
    if recipe is None:
        return {}
    numbers = options.numbers or default_numbers(train.num_examples, recipe.config.round_size)
    return configs_by_size(train, recipe, numbers, options.num_seeds)


def measure(
    options: AnalyzeOptions,
    workers: Workers,
    train: Dataset,
    val: Dataset,
    perturbation: Perturbation,
    console: Console,
) -> tuple[list[Point], BoundaryCorrelation | None]:
    """The phase transition and the correlated boundaries, which share DeepFool's perturbations of the training images."""
    v, memory = perturbation.v, options.memory_bytes
    draws = {"num_draws": options.num_draws, "seed": options.seed}
    phase: list[Point] = []
    boundaries = None
    solved = train.thin(options.num_normals or train.num_examples)
    if "boundaries" in options.analyses:
        console.print(f"DeepFool's perturbations of {solved.num_examples} training images")
        normals = gather_normals(workers, solved, options.num_singular, memory)
        length = options.norm_l2 or paper_norm_l2(v.shape)
        boundaries = analyze_boundaries(workers, val, v, normals, norm_l2=length, memory_bytes=memory, **draws)
        show("boundaries", boundaries.points, console)
    if "phase" in options.analyses:
        total = normals.total if boundaries is not None else sum_steps(workers, solved, memory)
        scales = sorted({*options.scales, 1.0})
        phase = show("phase", phase_transition(workers, train, val, v, total, scales=scales, **draws), console)
    return phase, boundaries


def show(name: Analysis, points: Iterable[Measured], console: Console) -> list[Measured]:
    """The points; each is printed as soon as it is measured."""
    found = []
    for point in points:
        console.print(f"{name}: {point}")
        found.append(point)
    return found
