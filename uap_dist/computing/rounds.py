"""The loop over rounds: workers compute increments against v, and the driver reduces, updates v and reports."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil, inf, sqrt

import numpy as np
import torch
from torch import Tensor

from uap_dist.errors import ConfigError
from uap_dist.method import update
from uap_dist.method.config import ComputeConfig
from uap_dist.method.rates import Rate
from uap_dist.method.schedule import Round, plan_rounds
from uap_dist.method.solver import LOG_ODDS_SIZE, LocalSteps, add_sums
from uap_dist.method.state import Evaluation, RoundReport, State
from uap_dist.method.update import Iterate, Steps
from uap_dist.workers.behind import known
from uap_dist.workers.dataset import Dataset, classify, fooling_rate
from uap_dist.workers.disjoint import check_shapes
from uap_dist.workers.local import Workers
from uap_dist.workers.worker import Worker

DEFAULT_PASSES = 10
EVALUATIONS_PER_LOG_ODDS_SOLVE = 2
NUM_PLACES = 12  # points of the held-out curve, the end of the run among them
MEASURED_SHARE = 0.02  # of the run's network evaluations, which the points before the end may cost
MIN_MEASURED_IMAGES = 50  # of a point, also in short runs, where this costs more than that share


def compute(
    workers: Workers,
    train: Dataset,
    val: Dataset | Future[Dataset],
    config: ComputeConfig,
    state: State | None = None,
) -> Iterator[RoundReport]:
    """Compute a perturbation, round by round, until the target fooling rate or the limit of passes or network evaluations is reached.

    The result depends only on data, network, config and seed, not on the workers or on where a run was resumed.

    Args:
        workers: compute the increments and the fooling rates.
        train: training images with their clean predictions.
        val: held-out images with their clean predictions. If they are still to come, the first measurement waits for them, and
            what goes wrong with them ends the computation before its next round.
        config: options of the computation.
        state: to resume, the `state` of the report after which to go on, which must not have been the last one.

    Yields:
        A report for each round; that of the last round has an evaluation on all images. Each holds v, the momentum and the
        perturbation, together 3 MB at 224×224, so keep only the last one.

    Raises:
        ConfigError: there are fewer training images than in a block, the evaluations do not allow one round, or the images of
            both datasets differ in shape.
    """
    held_out = val if isinstance(val, Future) else known(val)
    planned = count_rounds(train.sizes, config)
    if planned is None:
        check_budget(train.num_examples, config)
    state = state or State.start(train.shape, train.num_examples, config)
    plan = plan_measurements(train.sizes, config, planned)
    for round_ in islice(_plan(train.sizes, config), state.num_rounds, None):
        if held_out.done():
            check_shapes(train, held_out.result())
        spent_before = state.num_evaluations
        state, report = run_round(workers, train, round_, state, config, planned)
        ends = state.num_rounds == planned or _is_spent(state, config)
        is_due = plan.is_due(round_, spent_before, state.num_evaluations)
        if ends or is_due:
            check_shapes(train, held_out.result())
            images = (train, held_out.result()) if ends else plan.choose(train, held_out.result())
            report = replace(report, evaluation=evaluate(workers, *images, report.perturbation))
        train_rate = report.evaluation.train if report.evaluation is not None else None
        reached = train_rate is not None and train_rate.rate >= config.target_fooling_rate
        yield replace(report, is_last=ends or reached)
        if ends or reached:
            return


def check_budget(num_images: int, config: ComputeConfig) -> None:
    """Raise ConfigError if the clean labels of the training images alone take all network evaluations."""
    if config.max_evaluations is not None and num_images >= config.max_evaluations:
        raise ConfigError(
            f"{config.max_evaluations} evaluations (--max-evaluations) do not pay for more than the clean labels of "
            f"{num_images} training images"
        )


def run_round(
    workers: Workers, train: Dataset, round_: Round, state: State, config: ComputeConfig, planned: int | None
) -> tuple[State, RoundReport]:
    """Solve the blocks of a round, sum their increments in block order, update v and project it.

    Args:
        workers: solve the blocks.
        train: training images.
        round_: blocks of the round.
        state: state before the round.
        config: of the computation.
        planned: number of rounds of the run (see `count_rounds`).
    """
    started = time.perf_counter()
    tasks = [
        train.examples(block.shard, block.examples, seed=(config.seed, round_.number, number))
        for number, block in enumerate(round_.blocks)
    ]
    steps = config.steps(planned, train.shape)
    sizes = steps.sizes(round_.number) if steps is not None else ()
    v, momentum = (field.float().numpy() for field in (state.iterate.v, state.iterate.momentum))
    solver, local = replace(config.solver, scale=state.iterate.scale), None
    if steps is not None and config.local_steps:
        local = LocalSteps(momentum, sizes, config.block_size // config.local_steps, steps)
    total, results = np.zeros((2, *train.shape) if config.local_steps else train.shape), []
    for result in workers.map(Worker.solve, tasks, v, solver, local):
        total += result.total
        # without its array: a round may have more blocks than the driver has memory for
        results.append(replace(result, total=np.empty(0)))
    sums = add_sums(results)
    iterate = _update(state.iterate, torch.from_numpy(total), len(results), round_.number, config, steps)
    if config.rule == "log-odds":
        iterate = update.remember(iterate, *sums[LOG_ODDS_SIZE])
    state = State(
        iterate,
        num_rounds=round_.number + 1,
        num_solves=state.num_solves + round_.num_examples,
        num_evaluations=state.num_evaluations + sum(result.num_evaluations for result in results),
    )
    return state, RoundReport(
        round_number=round_.number,
        pass_number=round_.pass_number,
        num_rounds=planned,
        fooling=Rate(sum(result.num_fooled for result in results), round_.num_examples),
        perturbation=_deliver(iterate, config),
        state=state,
        step=sizes[0] if sizes else config.paper_gain,
        means={name: total / max(1, count) for name, (total, count) in sums.items()},
        seconds=time.perf_counter() - started,
    )


def evaluate(workers: Workers, train: Dataset | None, val: Dataset, perturbation: Tensor) -> Evaluation:
    """Fooling rates of v (C×H×W, pixels) on held-out images and, if given, on training images."""
    v = perturbation.numpy()
    train_rate = None if train is None else fooling_rate(train, classify(workers, train, v))
    predictions = classify(workers, val, v)
    return Evaluation(train_rate, fooling_rate(val, predictions), predictions)


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

    def is_due(self, round_: Round, spent_before: float, spent: float) -> bool:
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


def plan_measurements(train_sizes: Sequence[int], config: ComputeConfig, num_rounds: int | None) -> MeasurementPlan:
    """When and on what a run measures its fooling rates: a function of config and sizes alone, so that resumed runs agree.

    Args:
        train_sizes: training images of each shard.
        config: of the run.
        num_rounds: what `count_rounds` gives.
    """
    num_train = sum(train_sizes)
    # the log-odds rule's budget is already in its number of rounds
    budget = max(1, config.max_evaluations - num_train) if config.rule == "paper" and config.max_evaluations else None
    if config.evaluate_every is not None or config.target_fooling_rate < 1:
        return MeasurementPlan(config.evaluate_every or 1, None, num_rounds, num_train, budget)
    evaluations = inf if budget is None else float(budget)
    if num_rounds is not None:
        blocks_per_pass = sum(ceil(size / config.block_size) for size in train_sizes)
        num_passes = num_rounds / ceil(blocks_per_pass * config.block_size / config.round_size)
        evaluations = min(evaluations, EVALUATIONS_PER_LOG_ODDS_SOLVE * num_passes * num_train)
    affordable = int(MEASURED_SHARE * evaluations / NUM_PLACES)
    return MeasurementPlan(None, max(MIN_MEASURED_IMAGES, affordable), num_rounds, num_train, budget)


def count_rounds(shard_sizes: Sequence[int], config: ComputeConfig) -> int | None:
    """Number of rounds of a run; None if it is not known beforehand: the paper's rule, limited by network evaluations alone.

    Args:
        shard_sizes: training images of each shard.
        config: of the run.

    Raises:
        ConfigError: the network evaluations do not allow one round.
    """
    passes = config.max_passes or (None if config.max_evaluations else DEFAULT_PASSES)
    budget = config.max_evaluations if config.rule == "log-odds" else None
    if passes is None and budget is None:
        return None
    spent, rounds = sum(shard_sizes), 0
    for round_ in _plan(shard_sizes, config):
        spent += EVALUATIONS_PER_LOG_ODDS_SOLVE * round_.num_examples
        if round_.pass_number == passes or (budget is not None and spent > budget):
            break
        rounds += 1
    if rounds == 0:
        raise ConfigError(
            f"{budget} evaluations (--max-evaluations) do not pay for the clean labels of {sum(shard_sizes)} training "
            f"images and one round; give at least {spent}"
        )
    return rounds


def _plan(shard_sizes: Sequence[int], config: ComputeConfig) -> Iterator[Round]:
    return plan_rounds(shard_sizes, seed=config.seed, round_size=config.round_size, block_size=config.block_size)


def _is_spent(state: State, config: ComputeConfig) -> bool:
    return config.max_evaluations is not None and state.num_evaluations >= config.max_evaluations


def describe_steps(num_rounds: int | None, shape: tuple[int, ...], config: ComputeConfig) -> dict[str, float]:
    """Period and first step size (pixels) of the log-odds rule, which depend on the length of a run; empty for the paper's rule."""
    steps = config.steps(num_rounds, shape)
    return {} if steps is None else {"steps.period": steps.period, "steps.first_size": steps.first_size}


def _update(
    iterate: Iterate, total: Tensor, num_blocks: int, round_number: int, config: ComputeConfig, steps: Steps | None
) -> Iterate:
    if steps is None:
        return update.paper_update(iterate, total, gain=config.paper_gain, norm=config.norm, radius=config.ball_radius)
    if config.local_steps:
        return update.average_update(iterate, total / num_blocks, steps)
    (size,) = steps.sizes(round_number)
    return update.log_odds_update(iterate, total, size, steps)


def _deliver(iterate: Iterate, config: ComputeConfig) -> Tensor:
    v = iterate.v if config.rule == "paper" else update.finish(iterate.v, norm=config.norm, radius=config.ball_radius)
    return v.float()
