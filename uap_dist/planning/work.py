"""What a job has to do, counted from its schedule: rounds, blocks, solves, network evaluations and measurements."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from uap_dist.method.config import ComputeConfig
from uap_dist.method.schedule import plan_rounds
from uap_dist.method.solver import EVALUATIONS_PER_LOG_ODDS_SOLVE
from uap_dist.planning.range import Range
from uap_dist.planning.shard_sizes import ShardSizes
from uap_dist.rounds.plan import count_rounds, plan_measurements

OF_LOG_ODDS = Range.exactly(EVALUATIONS_PER_LOG_ODDS_SOLVE)


@dataclass(frozen=True)
class Work:
    """What a job has to do.

    Attributes:
        train, val: sizes of the training and the held-out shards.
        num_perturbations: number of computations, which all have the same work.
        rounds: number of rounds of one computation by their number of blocks.
        num_solves: solves of one computation.
        evaluations_per_solve: network evaluations.
        measurements: how often one computation classifies images for fooling rates, by the number of them in each shard.
        num_networks: that each perturbation is computed for.
    """

    train: ShardSizes
    val: ShardSizes
    num_perturbations: int
    rounds: Mapping[int, int]
    num_solves: int
    evaluations_per_solve: Range
    measurements: Mapping[tuple[int, ...], int]
    num_networks: int = 1

    @property
    def num_rounds(self) -> int:
        """Rounds of one computation."""
        return sum(self.rounds.values())

    @property
    def num_blocks(self) -> int:
        """Blocks of one computation."""
        return sum(num_blocks * times for num_blocks, times in self.rounds.items())

    @property
    def num_evaluations(self) -> Range:
        """Network evaluations of all computations, each with the clean labels of its training images, as runs report them."""
        of_one = self.evaluations_per_solve * self.num_solves + self.num_networks * self.train.total_images
        return of_one * self.num_perturbations

    @property
    def num_classified(self) -> int:
        """Images classified: once for clean labels, and for the measurements of each computation."""
        of_one = sum(times * sum(sizes) for sizes, times in self.measurements.items())
        return self.train.total_images + self.val.total_images + self.num_perturbations * of_one


def count_work(
    train: ShardSizes,
    val: ShardSizes,
    config: ComputeConfig,
    *,
    num_perturbations: int = 1,
    evaluations_per_solve: Range = OF_LOG_ODDS,
    num_networks: int = 1,
) -> Work:
    """Count all work that the config allows; a run that reaches its target fooling rate before does less.

    The count is exact for the log-odds rule. For the paper's rule it is as good as `evaluations_per_solve`.

    Args:
        train: training shards.
        val: held-out shards.
        config: of each computation; all are counted with the seed of the first.
        num_perturbations: number of computations.
        evaluations_per_solve: network evaluations, of all networks.
        num_networks: that each perturbation is computed for.

    Raises:
        ConfigError: the config allows no round.
    """
    num_labels, num_val = num_networks * train.total_images, val.total_images
    planned = count_rounds(train.num_images, config, num_networks)
    plan = plan_measurements(train.num_images, config, planned, num_networks)
    rounds: Counter[int] = Counter()
    num_solves = num_measurements = 0
    spent = float(num_labels)
    for round_ in plan_rounds(
        train.num_images, seed=config.seed, round_size=config.round_size, block_size=config.block_size
    ):
        rounds[len(round_.blocks)] += 1
        num_solves += round_.num_examples
        spent_before, spent = spent, num_labels + evaluations_per_solve.expected * num_solves
        is_spent = spent >= (config.max_evaluations or inf)
        if round_.number + 1 == planned or is_spent:
            break
        num_measurements += plan.is_due(round_, spent_before, spent)
    all_images = [train.num_images, val.num_images]
    during = all_images if plan.num_images is None else [_thin(val.num_images, min(plan.num_images, num_val))]
    # where one random perturbation has both norms of v
    in_the_corner = config.rule == "log-odds" and config.norm == "linf"
    # a pool measures others for its coverage
    num_random = (1 if in_the_corner else 2) * (1 if num_perturbations == 1 else 2)
    at_end = [*all_images, *[val.num_images] * num_random]
    return Work(
        train=train,
        val=val,
        num_perturbations=num_perturbations,
        rounds=rounds,
        num_solves=num_solves,
        # cheaper solves leave more of the budget for others
        evaluations_per_solve=Range.exactly(evaluations_per_solve.expected) if is_spent else evaluations_per_solve,
        measurements=Counter(during * num_measurements + at_end),
        num_networks=num_networks,
    )


def _thin(sizes: Sequence[int], num_images: int) -> tuple[int, ...]:
    """How many images of each shard are among `num_images` that are evenly spread over all, as `Dataset.thin` takes them."""
    chosen = np.arange(num_images) * sum(sizes) // num_images
    return tuple(int(n) for n in np.histogram(chosen, np.cumsum([0, *sizes]))[0])
