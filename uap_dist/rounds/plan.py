"""How long a run is, in which rounds, and when its fooling rates are measured: functions of its config and its data alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, takewhile
from math import ceil, inf, sqrt

from uap_dist.errors import ConfigError
from uap_dist.method.config import ComputeConfig
from uap_dist.method.schedule import Round, plan_rounds
from uap_dist.method.solver import EVALUATIONS_PER_LOG_ODDS_SOLVE, Solver
from uap_dist.method.state import State
from uap_dist.workers.dataset import Dataset
from uap_dist.workers.messages import Examples

DEFAULT_PASSES = 10
NUM_PLACES = 12  # points of the held-out curve, the end of the run among them
MEASURED_SHARE = 0.02  # of the run's network evaluations, which the points before the end may cost
MIN_MEASURED_IMAGES = 50  # of a point, also in short runs, where this costs more than that share


@dataclass(frozen=True)
class RoundTasks:
    """A round of the schedule with its blocks as tasks for workers; `number`, `pass_number` and `ends_pass` as in `Round`."""

    number: int
    pass_number: int
    ends_pass: bool
    blocks: tuple[Examples, ...]

    @classmethod
    def of(cls, round_: Round, train: Dataset, seed: int) -> "RoundTasks":
        """The tasks for the training images of a round; `seed` is that of the computation."""
        blocks = (
            train.examples(block.shard, block.examples, seed=(seed, round_.number, number))
            for number, block in enumerate(round_.blocks)
        )
        return cls(round_.number, round_.pass_number, round_.ends_pass, tuple(blocks))

    @property
    def num_examples(self) -> int:
        """Number of examples in all blocks."""
        return sum(block.num_examples for block in self.blocks)


@dataclass(frozen=True)
class MeasurementPlan:
    """When fooling rates are measured before the end of a run, and on which images. The perturbation does not depend on it.

    Attributes:
        every_passes: passes between two measurements of all images; None if some held-out images are measured instead, at
            NUM_PLACES places over the run.
        num_images: number of held-out images measured at each place, if there are as many; None for all training and held-out images.
        num_rounds: rounds of the run; None if unknown.
        num_labels: network evaluations for the clean labels of the training images.
        budget: network evaluations for solves after which the run ends; None for no limit.
    """

    every_passes: int | None
    num_images: int | None
    num_rounds: int | None
    num_labels: int
    budget: int | None

    def is_due(self, round_: Round | RoundTasks, spent_before: float, spent: float) -> bool:
        """Whether a measurement follows a round that is not the last one.

        Args:
            round_: the round.
            spent_before: network evaluations before the round, clean labels included.
            spent: network evaluations after it.
        """
        if self.every_passes is not None:
            return round_.ends_pass and (round_.pass_number + 1) % self.every_passes == 0
        return self._places_passed(round_.number, spent_before) < self._places_passed(round_.number + 1, spent)

    def choose(self, train: Dataset, val: Dataset) -> tuple[Dataset | None, Dataset]:
        """The training images, if any, and the held-out images that are measured before the end."""
        if self.num_images is None:
            return train, val
        return None, val.thin(min(self.num_images, val.num_examples))

    def _places_passed(self, num_rounds: int, spent: float) -> int:
        """Places lie at k²/NUM_PLACES² of the run: dense at first, where the rate climbs fastest."""
        of_rounds = num_rounds / self.num_rounds if self.num_rounds else 0.0
        of_budget = (spent - self.num_labels) / self.budget if self.budget else 0.0
        return int(NUM_PLACES * sqrt(max(of_rounds, of_budget)))


@dataclass(frozen=True)
class RunPlan:
    """What is known of a run before it begins.

    Attributes:
        config: of the computation.
        num_rounds: planned; None if unknown, see `count_rounds`.
        measurements: when fooling rates are measured.
        solver: what workers need, with the names of several networks.
    """

    config: ComputeConfig
    num_rounds: int | None
    measurements: MeasurementPlan
    solver: Solver

    def ends_with(self, state: State) -> bool:
        """Whether the run ends with the round that led to this state, whatever its fooling rate is."""
        most = self.config.max_evaluations
        return state.num_rounds == self.num_rounds or (most is not None and state.num_evaluations >= most)

    def is_due(self, round_: RoundTasks, before: State, after: State) -> bool:
        """Whether a measurement follows a round that led from one state to another and is not the last one."""
        return self.measurements.is_due(round_, before.num_evaluations, after.num_evaluations)


def plan_run(train_sizes: Sequence[int], config: ComputeConfig, networks: tuple[str, ...] = ()) -> RunPlan:
    """The plan of a run on training shards with so many images each, for these networks if they are several.

    Raises:
        ConfigError: the network evaluations do not allow one round.
    """
    goal = config.goal.of_networks(networks)
    num_rounds = count_rounds(train_sizes, config, goal.num_networks)
    if num_rounds is None:
        check_budget(sum(train_sizes), config, goal.num_networks)
    measurements = plan_measurements(train_sizes, config, num_rounds, goal.num_networks)
    return RunPlan(config, num_rounds, measurements, replace(config.solver, goal=goal))


def plan_measurements(
    train_sizes: Sequence[int], config: ComputeConfig, num_rounds: int | None, num_networks: int = 1
) -> MeasurementPlan:
    """When and on what a run measures its fooling rates: a function of config and sizes alone, so that resumed runs agree.

    Args:
        train_sizes: training images of each shard.
        config: of the run.
        num_rounds: what `count_rounds` gives.
        num_networks: that v is computed for.
    """
    num_labels = num_networks * sum(train_sizes)
    # the log-odds rule's budget is already in its number of rounds
    budget = max(1, config.max_evaluations - num_labels) if config.rule == "paper" and config.max_evaluations else None
    if config.evaluate_every is not None or config.target_fooling_rate < 1:
        return MeasurementPlan(config.evaluate_every or 1, None, num_rounds, num_labels, budget)
    evaluations = inf if budget is None else float(budget)
    if num_rounds is not None:
        blocks_per_pass = sum(ceil(size / config.block_size) for size in train_sizes)
        num_passes = num_rounds / ceil(blocks_per_pass * config.block_size / config.round_size)
        evaluations = min(evaluations, EVALUATIONS_PER_LOG_ODDS_SOLVE * num_passes * num_labels)
    affordable = int(MEASURED_SHARE * evaluations / NUM_PLACES / num_networks)
    return MeasurementPlan(None, max(MIN_MEASURED_IMAGES, affordable), num_rounds, num_labels, budget)


def count_rounds(shard_sizes: Sequence[int], config: ComputeConfig, num_networks: int = 1) -> int | None:
    """Number of rounds of a run; None if it is not known beforehand: the paper's rule, limited by network evaluations alone.

    Args:
        shard_sizes: training images of each shard.
        config: of the run.
        num_networks: that v is computed for, each of which is evaluated for every image.

    Raises:
        ConfigError: the network evaluations do not allow one round.
    """
    passes = config.max_passes or (None if config.max_evaluations else DEFAULT_PASSES)
    budget = config.max_evaluations if config.rule == "log-odds" else None
    if passes is None and budget is None:
        return None
    spent, rounds = num_networks * sum(shard_sizes), 0
    for pass_number, num_examples in _sizes_of_rounds(shard_sizes, config):
        spent += EVALUATIONS_PER_LOG_ODDS_SOLVE * num_networks * num_examples
        if pass_number == passes or (budget is not None and spent > budget):
            break
        rounds += 1
    if rounds == 0:
        raise ConfigError(
            f"{budget} evaluations (--max-evaluations) do not pay for the clean labels of {sum(shard_sizes)} training "
            f"images{_by(num_networks)} and one round; give at least {spent}"
        )
    return rounds


def _sizes_of_rounds(shard_sizes: Sequence[int], config: ComputeConfig) -> Iterator[tuple[int, int]]:
    """Pass and number of examples of each round, without end.

    Members of one batch take their steps together and need the same number of rounds, so it must not depend on the seed: for them each
    pass begins with the largest blocks, and no order of the blocks has had more examples after any of its rounds.
    """
    rounds = schedule_rounds(shard_sizes, config)
    if config.members_at_once == 1:
        return ((round_.pass_number, round_.num_examples) for round_ in rounds)
    first_pass = takewhile(lambda round_: round_.pass_number == 0, rounds)
    sizes = sorted((len(block.examples) for round_ in first_pass for block in round_.blocks), reverse=True)
    per_round = config.round_size // config.block_size
    most = [sum(sizes[start : start + per_round]) for start in range(0, len(sizes), per_round)]
    return ((number, num_examples) for number in count() for num_examples in most)


def schedule_rounds(shard_sizes: Sequence[int], config: ComputeConfig) -> Iterator[Round]:
    """All rounds, without end; see `plan_rounds`."""
    return plan_rounds(shard_sizes, seed=config.seed, round_size=config.round_size, block_size=config.block_size)


def check_budget(num_images: int, config: ComputeConfig, num_networks: int = 1) -> None:
    """Raise ConfigError if the clean labels of the training images alone take all network evaluations."""
    if config.max_evaluations is not None and num_networks * num_images >= config.max_evaluations:
        raise ConfigError(
            f"{config.max_evaluations} evaluations (--max-evaluations) do not pay for more than the clean labels of "
            f"{num_images} training images{_by(num_networks)}"
        )


def _by(num_networks: int) -> str:
    return f" by {num_networks} networks" if num_networks > 1 else ""


def describe_steps(num_rounds: int | None, shape: tuple[int, ...], config: ComputeConfig) -> dict[str, float]:
    """Period and first step size (pixels) of the log-odds rule, which depend on the length of a run; empty for the paper's rule."""
    steps = config.steps(num_rounds, shape)
    return {} if steps is None else {"steps.period": steps.period, "steps.first_size": steps.first_size}
