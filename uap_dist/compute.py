"""The loop over rounds: increments against v on any workers, one reduce, one update, one report."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import ceil, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uap_dist import update
from uap_dist.config import ComputeConfig
from uap_dist.dataset import Dataset, Workers, classify, fooling_rate
from uap_dist.errors import ConfigError
from uap_dist.fooling import Rate
from uap_dist.norms import measure, random_perturbation
from uap_dist.schedule import Round, plan_rounds
from uap_dist.update import Iterate, StepRule
from uap_dist.worker import LOG_ODDS_SIZE, LocalSteps, Predictions, add_sums

DEFAULT_PASSES = 10
EVALUATIONS_PER_LOG_ODDS_SOLVE = 2
GLANCE_SHARE = 0.02  # of the network evaluations of the solves: what measurements before the end may cost
GLANCE_IMAGES = 100  # held-out ones that are worth a measurement


@dataclass(frozen=True)
class Evaluation:
    """Fooling rates of the perturbation as it would be delivered now, and what the network says of held-out images under it.

    `train` is None where only some of the held-out images were looked at.
    """

    train: Rate | None
    val: Rate
    val_predictions: Predictions


@dataclass(frozen=True)
class RoundReport:
    """One committed round.

    Attributes:
        round_number, pass_number: of this round, from 0.
        num_rounds: planned; None where the paper's rule is bounded by evaluations alone.
        fooling: on the round's images, before it, under the iterate that they were solved against.
        perturbation: C×H×W float32, pixels: what would be delivered now.
        state: what the next round starts from.
        step: step size in pixels, or the paper's gain.
        means: log-odds rule: of the log-odds of the round's clean labels, and of their absolute values. Paper's rule: of ‖Δ‖2 in
            pixels over the images that got an increment (0 where none did), and the share of the images that are fooled after theirs.
        seconds: this round took, without evaluation.
        evaluation: at the end, of all images, and after passes (see `ComputeConfig.evaluate_every`).
        is_last: whether the run ends with it.
    """

    round_number: int
    pass_number: int
    num_rounds: int | None
    fooling: Rate
    perturbation: Tensor
    state: "State"
    step: float
    means: dict[str, float]
    seconds: float
    evaluation: Evaluation | None = None
    is_last: bool = False

    @property
    def num_solves(self) -> int:
        """Since the start."""
        return self.state.num_solves

    @property
    def num_evaluations(self) -> int:
        """Since the start, clean labels of the training images included."""
        return self.state.num_evaluations

    def without_arrays(self) -> "RoundReport":
        """What a person is shown of the round: neither perturbation nor iterate nor predictions, which take 3 MB at 224×224."""
        nothing = torch.empty(0)
        state = replace(self.state, iterate=replace(self.state.iterate, v=nothing, momentum=nothing))
        evaluation = self.evaluation
        if evaluation is not None:
            evaluation = replace(
                evaluation, val_predictions=Predictions(np.empty(0, np.int64), np.empty(0, np.float32))
            )
        return replace(self, perturbation=nothing, state=state, evaluation=evaluation)

    def metrics(self) -> dict[str, float]:
        """The round in numbers, under the names that MLflow and the curve use."""
        metrics = {
            "fooling_rate/round": self.fooling.rate,
            "round/step": self.step,
            **{f"round/{name}": value for name, value in self.means.items()},
            "round/seconds": self.seconds,
            "round/images_per_second": self.fooling.num_examples / self.seconds,
            "iterate/norm_l2": measure(self.state.iterate.v, "l2"),
            "iterate/norm_linf": measure(self.state.iterate.v, "linf"),
            "total/solves": float(self.num_solves),
            "total/evaluations": float(self.num_evaluations),
        }
        if self.evaluation is not None:
            metrics |= self.evaluation.val.metrics("val")
            if self.evaluation.train is not None:
                metrics |= self.evaluation.train.metrics("train")
        return metrics


@dataclass(frozen=True)
class State:
    """All that one round hands to the next."""

    iterate: Iterate
    num_rounds: int = 0
    num_solves: int = 0
    num_evaluations: int = 0

    @classmethod
    def start(cls, train: Dataset, config: ComputeConfig) -> "State":
        """Before the first round; the clean labels are paid for."""
        iterate = Iterate.zero(train.shape)
        if config.random_start:
            radius = config.random_start * config.ball_radius
            noise = random_perturbation(train.shape, norm=config.norm, radius=radius, seed=config.seed)
            iterate = replace(iterate, v=noise.double())
        return cls(iterate, num_evaluations=train.num_examples)


def compute(
    workers: Workers, train: Dataset, val: Dataset, config: ComputeConfig, state: State | None = None
) -> Iterator[RoundReport]:
    """Rounds until the target, the passes or the evaluations are reached; the last report carries an evaluation.

    The result depends on data, network, config and seed only, not on the workers, nor on whether the rounds before
    `state` (of an earlier report that was not the last) were computed here or elsewhere. Each report holds v, the
    momentum and what is delivered (3 MB at 224×224): keep the last one, not all.

    Raises:
        ConfigError: fewer training images than a block, a budget below one round, or datasets of different shapes.
    """
    if train.shape != val.shape:
        raise ConfigError(f"training images have shape {train.shape}, held-out ones {val.shape}; they must have one")
    planned = count_rounds(train.sizes, config)
    if planned is None:
        check_budget(train.num_examples, config)
    state = state or State.start(train, config)
    every, num_glanced = plan_measurements(train.num_examples, val.num_examples, config)
    some = None if num_glanced is None else val.thin(num_glanced)
    for round_ in islice(_plan(train.sizes, config), state.num_rounds, None):
        state, report = run_round(workers, train, round_, state, config, planned)
        ends = state.num_rounds == planned or _is_spent(state, config)
        if ends or (some is None and is_due(round_, every)):
            report = replace(report, evaluation=evaluate(workers, train, val, report.perturbation))
        elif some is not None and is_due(round_, every):
            report = replace(report, evaluation=evaluate(workers, None, some, report.perturbation))
        train_rate = report.evaluation.train if report.evaluation is not None else None
        reached = train_rate is not None and train_rate.rate >= config.target_fooling_rate
        yield replace(report, is_last=ends or reached)
        if ends or reached:
            return


def check_budget(num_images: int, config: ComputeConfig) -> None:
    """Raise ConfigError where the evaluations are spent on the clean labels of so many training images."""
    if config.max_evaluations is not None and num_images >= config.max_evaluations:
        raise ConfigError(
            f"{config.max_evaluations} evaluations (--max-evaluations) do not pay for more than the clean labels of "
            f"{num_images} training images"
        )


def run_round(
    workers: Workers, train: Dataset, round_: Round, state: State, config: ComputeConfig, planned: int | None
) -> tuple[State, RoundReport]:
    """Solve the round's blocks against the state's v, reduce in block order, update, project."""
    started = time.perf_counter()
    tasks = [
        train.examples(block.shard, block.examples, seed=(config.seed, round_.number, number))
        for number, block in enumerate(round_.blocks)
    ]
    sizes = () if config.rule == "paper" else step_sizes(round_.number, planned, train.shape, config)
    rule = config.step_rule(planned or 0)  # rounds of the paper's rule, which has none, may not be planned
    v, momentum = (field.float().numpy() for field in (state.iterate.v, state.iterate.momentum))
    shared: tuple[Any, ...] = (v, replace(config.solver, scale=state.iterate.scale))
    if config.local_steps:
        shared += (LocalSteps(momentum, sizes, config.block_size // config.local_steps, rule),)
    total, results = np.zeros((2, *train.shape) if config.local_steps else train.shape), []
    for result in workers.map("solve", tasks, *shared):
        total += result.total
        # without its array: a round may have more blocks than the driver has memory for
        results.append(replace(result, total=np.empty(0)))
    sums = add_sums(results)
    iterate = _update(state.iterate, torch.from_numpy(total), len(results), sizes, config, rule)
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
    """Fooling rates of v (C×H×W, pixels) on training images, if any, and held-out ones."""
    v = perturbation.numpy()
    train_rate = None if train is None else fooling_rate(train, classify(workers, train, v))
    predictions = classify(workers, val, v)
    return Evaluation(train_rate, fooling_rate(val, predictions), predictions)


def plan_measurements(num_train: int, num_val: int, config: ComputeConfig) -> tuple[int, int | None]:
    """After how many passes the fooling rates are measured each time, and on how many held-out images; None: on all images."""
    if config.evaluate_every is not None or config.target_fooling_rate < 1:
        return config.evaluate_every or 1, None
    affordable = GLANCE_SHARE * EVALUATIONS_PER_LOG_ODDS_SOLVE * num_train  # in a pass
    every = ceil(min(GLANCE_IMAGES, num_val) / affordable)
    return every, min(num_val, int(every * affordable))


def is_due(round_: Round, every: int) -> bool:
    """Whether the round is followed by a measurement, unless it is the last one."""
    return round_.ends_pass and (round_.pass_number + 1) % every == 0


def count_rounds(shard_sizes: Sequence[int], config: ComputeConfig) -> int | None:
    """Rounds that passes and evaluations allow; None where the paper's rule is bounded by evaluations alone.

    Raises:
        ConfigError: no round at all.
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


def step_sizes(
    round_number: int, num_rounds: int | None, shape: tuple[int, ...], config: ComputeConfig
) -> tuple[float, ...]:
    """Of the log-odds rule in a round, in pixels (root mean square for ℓ2): one, or one for each local step."""
    assert num_rounds is not None
    in_round = config.local_steps or 1
    num_steps = in_round * num_rounds
    default = update.default_step_size(
        norm=config.norm, radius=config.ball_radius, num_values=prod(shape), num_steps=num_steps
    )
    is_averaged = config.local_steps and config.round_size > config.block_size
    start = config.step_size or default * (update.AVERAGED if is_averaged else 1.0)
    return tuple(update.cosine(start, in_round * round_number + step, num_steps) for step in range(in_round))


def describe_steps(num_rounds: int | None, shape: tuple[int, ...], config: ComputeConfig) -> dict[str, float]:
    """What follows from the length of a run, for its record: period and first step, in pixels. The paper's rule has neither."""
    if config.rule == "paper":
        return {}
    assert num_rounds is not None
    return {
        "steps.period": config.step_rule(num_rounds).period,
        "steps.first_size": step_sizes(0, num_rounds, shape, config)[0],
    }


def _update(
    iterate: Iterate, total: Tensor, num_blocks: int, sizes: tuple[float, ...], config: ComputeConfig, rule: StepRule
) -> Iterate:
    if config.rule == "paper":
        return update.paper_update(iterate, total, gain=config.paper_gain, norm=config.norm, radius=config.ball_radius)
    if config.local_steps:
        return update.average_update(iterate, total / num_blocks, rule)
    return update.log_odds_update(iterate, total, sizes[0], rule)


def _deliver(iterate: Iterate, config: ComputeConfig) -> Tensor:
    v = iterate.v if config.rule == "paper" else update.finish(iterate.v, norm=config.norm, radius=config.ball_radius)
    return v.float()
