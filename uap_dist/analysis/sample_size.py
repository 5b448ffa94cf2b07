"""How many training images are needed: computes perturbations like a given one, from fewer images.

Source: Moosavi-Dezfooli, Fawzi, Fawzi, Frossard, "Universal adversarial perturbations", CVPR 2017, section 4, figure 6.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from uap_dist.errors import ConfigError, PerturbationError
from uap_dist.method.config import ComputeConfig
from uap_dist.method.rates import Rate
from uap_dist.perturbations.files import Perturbation
from uap_dist.rounds.concurrent import compute_concurrently, keep_last_arrays, num_concurrent
from uap_dist.rounds.loop import compute
from uap_dist.rounds.plan import count_rounds
from uap_dist.workers.dataset import Dataset
from uap_dist.workers.local import Workers


@dataclass(frozen=True)
class SampleSizePoint:
    """A perturbation computed from `num_images` images with a seed: its fooling rates on held-out and training images, and its cost.

    `images_per_round` is a mean: few images in many shards smaller than a block give smaller rounds.
    """

    num_images: int
    seed: int
    val: Rate
    train: Rate
    num_evaluations: int
    images_per_round: float

    def __str__(self) -> str:
        """One line for a log."""
        return f"{self.num_images} training images, seed {self.seed}: held-out {self.val}, training {self.train}"


@dataclass(frozen=True)
class Recipe:
    """How a perturbation was computed.

    Attributes:
        config: its own.
        num_evaluations: network evaluations for increments, without those for clean labels.
    """

    config: ComputeConfig
    num_evaluations: int

    @classmethod
    def of(cls, perturbation: Perturbation) -> "Recipe":
        """Read it from the provenance of a perturbation; PerturbationError if that lacks it."""
        said = perturbation.provenance
        if said.get("networks"):
            raise PerturbationError(
                f"{perturbation.name} was computed for several networks, and others cannot be computed likewise for one; leave images "
                "out of --analyses"
            )
        try:
            config = ComputeConfig.from_provenance(said, perturbation.name)
            return cls(config, said["num_evaluations"] - said["num_train_images"])
        except (PerturbationError, KeyError) as error:
            raise PerturbationError(
                f"{perturbation.name} does not say how it was computed, so others cannot be computed likewise; leave images "
                "out of --analyses, or give a perturbation that jobs/compute.py has written"
            ) from error


def configs_by_size(
    train: Dataset, recipe: Recipe, numbers: Sequence[int], num_seeds: int
) -> dict[tuple[int, int], ComputeConfig]:
    """Configs of the computations, by number of images and seed.

    All have the config of the recipe and as many network evaluations for increments; evaluations for clean labels come on top, so
    that fewer images do not pay for more increments. All images with the recipe's seed give the original perturbation, unless it
    had stopped at a target fooling rate.

    Args:
        train: all training images.
        recipe: its seed is the first one.
        numbers: of training images, in blocks that are evenly spread over all (see `Dataset.thin_by_blocks`).
        num_seeds: computations of each number.

    Raises:
        ConfigError: a number of images is below a round or above all images, or its increments exceed the evaluations.
    """
    config = recipe.config
    for number in numbers:
        if not config.round_size <= number <= train.num_examples:
            raise ConfigError(
                f"a perturbation of {number} training images (--numbers) cannot be compared: its rounds would have another size; "
                f"give numbers between a round, {config.round_size}, and all that there are, {train.num_examples}"
            )
    config = replace(config, max_passes=None, target_fooling_rate=1.0, evaluate_every=None)
    plan = {
        (number, config.seed + draw): replace(
            config, seed=config.seed + draw, max_evaluations=number + recipe.num_evaluations
        )
        for number in numbers
        for draw in range(num_seeds)
    }
    for (number, _), each in plan.items():
        count_rounds(train.thin_by_blocks(number, config.block_size).sizes, each)
    return plan


def default_numbers(num_train_images: int, round_size: int) -> tuple[int, ...]:
    """All training images, and a quarter of them, a sixteenth and so on to a 256th, as far as these fill a round."""
    fewer = (num_train_images // 4**k for k in range(4, 0, -1))
    return (*(n for n in fewer if n >= round_size), num_train_images)


def compute_sample_sizes(
    workers: Workers, train: Dataset, val: Dataset, plan: Mapping[tuple[int, int], ComputeConfig]
) -> Iterator[SampleSizePoint]:
    """Run the computations of a plan (see `configs_by_size`), several at a time; yields a point when one ends (figure 6 of the paper)."""
    left = {f"{number} {seed}" for number, seed in plan}
    rounds = {
        f"{number} {seed}": keep_last_arrays(
            compute(
                workers,
                train.thin_by_blocks(number, config.block_size),
                val,
                config,
                num_computations=lambda: len(left),
            )
        )
        for (number, seed), config in plan.items()
    }
    config = next(iter(plan.values()))
    for name, report in compute_concurrently(
        rounds, limit=lambda num_left: num_concurrent(workers.num_workers, num_left, config)
    ):
        if report.is_last:
            left.remove(name)
            assert report.evaluation is not None and report.evaluation.train is not None
            number, seed = map(int, name.split())
            yield SampleSizePoint(
                num_images=number,
                seed=seed,
                val=report.evaluation.val,
                train=report.evaluation.train,
                num_evaluations=report.num_evaluations,
                images_per_round=report.num_solves / report.state.num_rounds,
            )
