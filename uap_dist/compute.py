"""The loop over rounds: increments against v on any workers, one reduce, one update, one report."""

import time
from bisect import bisect_right
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
from uap_dist.starts import JUDGES, START_ROUNDS, Course
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
        course: all rounds that are planned.
        fooling: on the round's images, before it, under the iterate that they were solved against.
        perturbation: C×H×W float32, pixels: what would be delivered now.
        state: what the next round starts from.
        step: step size in pixels, or the paper's gain.
        means: log-odds rule: of the log-odds of the round's clean labels, and of their absolute values. Paper's rule: of ‖Δ‖2 in
            pixels over the images that got an increment (0 where none did), and the share of the images that are fooled after theirs.
        seconds: this round took, without evaluation.
        start: at the end of a start (see `Course`), how many of the images that judge it are fooled.
        evaluation: at the end, of all images, and after passes (see `ComputeConfig.evaluate_every`).
        is_last: whether the run ends with it.
    """

    round_number: int
    pass_number: int
    course: Course
    fooling: Rate
    perturbation: Tensor
    state: "State"
    step: float
    means: dict[str, float]
    seconds: float
    start: Rate | None = None
    evaluation: Evaluation | None = None
    is_last: bool = False

    @property
    def num_rounds(self) -> int | None:
        """Planned; None where the paper's rule is bounded by evaluations alone."""
        return self.course.num_rounds

    @property
    def num_solves(self) -> int:
        """Since the start."""
        return self.state.num_solves

    @property
    def num_evaluations(self) -> int:
        """Since the start, clean labels of the training images included."""
        return self.state.num_evaluations

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
        if self.start is not None:
            metrics |= self.start.metrics("start")
        if self.evaluation is not None:
            metrics |= self.evaluation.val.metrics("val")
            if self.evaluation.train is not None:
                metrics |= self.evaluation.train.metrics("train")
        return metrics


@dataclass(frozen=True)
class State:
    """All that one round hands to the next.

    Attributes:
        iterate: what it starts from.
        num_rounds, num_solves, num_evaluations: spent.
        best: the best start so far, while there are more to come.
        best_rate: share of the judges that it fools.
    """

    iterate: Iterate
    num_rounds: int = 0
    num_solves: int = 0
    num_evaluations: int = 0
    best: Iterate | None = None
    best_rate: float = 0.0

    @classmethod
    def start(cls, train: Dataset, config: ComputeConfig) -> "State":
        """Before the first round; the clean labels are paid for."""
        return cls(_first_iterate(train.shape, config), num_evaluations=train.num_examples)


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
    course = plan_course(train.sizes, config)
    if course.num_rounds is None and train.num_examples >= (config.max_evaluations or 0):
        raise ConfigError(
            f"{config.max_evaluations} evaluations (--max-evaluations) do not pay for more than the clean labels of "
            f"{train.num_examples} training images"
        )
    state = state or State.start(train, config)
    every, num_glanced = plan_measurements(train.num_examples, val.num_examples, config)
    some = None if num_glanced is None else val.thin(num_glanced)
    for round_ in islice(_plan(train.sizes, config), state.num_rounds, None):
        state, report = run_round(workers, train, round_, state, config, course)
        if course.ends_start(round_.number):
            state, report = judge_start(workers, train, state, report, config)
        ends = state.num_rounds == course.num_rounds or _is_spent(state, config)
        if ends or (some is None and is_due(round_, every)):
            report = replace(report, evaluation=evaluate(workers, train, val, report.perturbation))
        elif some is not None and is_due(round_, every):
            report = replace(report, evaluation=evaluate(workers, None, some, report.perturbation))
        train_rate = report.evaluation.train if report.evaluation is not None else None
        reached = train_rate is not None and train_rate.rate >= config.target_fooling_rate
        yield replace(report, is_last=ends or reached)
        if ends or reached:
            return


def run_round(
    workers: Workers, train: Dataset, round_: Round, state: State, config: ComputeConfig, course: Course
) -> tuple[State, RoundReport]:
    """Solve the round's blocks against the state's v, reduce in block order, update, project."""
    started = time.perf_counter()
    tasks = [
        train.examples(block.shard, block.examples, seed=(config.seed, round_.number, number))
        for number, block in enumerate(round_.blocks)
    ]
    sizes = () if config.rule == "paper" else step_sizes(course, round_.number, train.shape, config)
    rule = config.step_rule(course.num_rounds or 0)  # rounds of the paper's rule, which has none, may not be planned
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
    state = replace(
        state,
        iterate=iterate,
        num_rounds=round_.number + 1,
        num_solves=state.num_solves + round_.num_examples,
        num_evaluations=state.num_evaluations + sum(result.num_evaluations for result in results),
    )
    return state, RoundReport(
        round_number=round_.number,
        pass_number=round_.pass_number,
        course=course,
        fooling=Rate(sum(result.num_fooled for result in results), round_.num_examples),
        perturbation=_deliver(iterate, config),
        state=state,
        step=sizes[0] if sizes else config.paper_gain,
        means={name: total / max(1, count) for name, (total, count) in sums.items()},
        seconds=time.perf_counter() - started,
    )


def judge_start(
    workers: Workers, train: Dataset, state: State, report: RoundReport, config: ComputeConfig
) -> tuple[State, RoundReport]:
    """Measure the start that a round has ended on some training images; the next one begins, or after the last the best goes on."""
    judges = train.thin(min(JUDGES, train.num_examples))
    fooled = fooling_rate(judges, classify(workers, judges, report.perturbation.numpy()))
    if state.best is None or fooled.rate > state.best_rate:
        state = replace(state, best=state.iterate, best_rate=fooled.rate)
    state = replace(state, num_evaluations=state.num_evaluations + judges.num_examples)
    if state.num_rounds < report.course.goes_on_at:
        state = replace(state, iterate=_first_iterate(train.shape, config))
    else:
        assert state.best is not None
        state = replace(state, iterate=state.best, best=None, best_rate=0.0)
        report = replace(report, perturbation=_deliver(state.iterate, config))
    return state, replace(report, state=state, start=fooled)


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


def plan_course(shard_sizes: Sequence[int], config: ComputeConfig) -> Course:
    """Rounds that passes and evaluations allow, and how many starts they begin with.

    Raises:
        ConfigError: no round at all, or not more than the starts take.
    """
    num_train = sum(shard_sizes)
    passes = config.max_passes or (None if config.max_evaluations else DEFAULT_PASSES)
    budget = config.max_evaluations if config.rule == "log-odds" else None
    if passes is None and budget is None:
        return Course(None)
    spent = [num_train]  # after so many rounds
    for round_ in _plan(shard_sizes, config):
        cost = EVALUATIONS_PER_LOG_ODDS_SOLVE * round_.num_examples
        if round_.pass_number == passes or (budget is not None and spent[-1] + cost > budget):
            break
        spent.append(spent[-1] + cost)
    num_rounds = len(spent) - 1
    if num_rounds == 0:
        raise ConfigError(
            f"{budget} evaluations (--max-evaluations) do not pay for the clean labels of {num_train} training "
            f"images and one round; give at least {num_train + cost}"
        )
    if config.rule == "paper":
        return Course(num_rounds)
    course = Course(num_rounds, config.num_starts(num_rounds))
    if budget is not None:
        affordable = bisect_right(spent, budget - course.judge_evaluations(num_train)) - 1
        course = replace(course, num_rounds=affordable)
    if course.num_starts > 1 and course.num_places <= START_ROUNDS:
        raise ConfigError(
            f"{course.num_starts} starts (--starts) are {course.goes_on_at} rounds, of {max(0, course.num_rounds or 0)} that "
            "the passes and evaluations allow; give fewer starts, or more of these"
        )
    return course


def _plan(shard_sizes: Sequence[int], config: ComputeConfig) -> Iterator[Round]:
    return plan_rounds(shard_sizes, seed=config.seed, round_size=config.round_size, block_size=config.block_size)


def _is_spent(state: State, config: ComputeConfig) -> bool:
    return config.max_evaluations is not None and state.num_evaluations >= config.max_evaluations


def step_sizes(course: Course, round_number: int, shape: tuple[int, ...], config: ComputeConfig) -> tuple[float, ...]:
    """Of the log-odds rule in a round, in pixels (root mean square for ℓ2): one, or one for each local step."""
    in_round = config.local_steps or 1
    num_steps = in_round * course.num_places
    default = update.default_step_size(
        norm=config.norm, radius=config.ball_radius, num_values=prod(shape), num_steps=num_steps
    )
    is_averaged = config.local_steps and config.round_size > config.block_size
    start = config.step_size or default * (update.AVERAGED if is_averaged else 1.0)
    place = course.place(round_number)
    return tuple(update.cosine(start, in_round * place + step, num_steps) for step in range(in_round))


def describe_steps(course: Course, shape: tuple[int, ...], config: ComputeConfig) -> dict[str, float]:
    """What follows from the length of a run, for its record: starts, period and first step, in pixels. The paper's rule has none."""
    if config.rule == "paper":
        return {}
    return {
        "steps.starts": course.num_starts,
        "steps.period": config.step_rule(course.num_rounds or 0).period,
        "steps.first_size": step_sizes(course, 0, shape, config)[0],
    }


def _first_iterate(shape: tuple[int, ...], config: ComputeConfig) -> Iterate:
    iterate = Iterate.zero(shape)
    if config.random_start:
        radius = config.random_start * config.ball_radius
        noise = random_perturbation(shape, norm=config.norm, radius=radius, seed=config.seed)
        iterate = replace(iterate, v=noise.double())
    return iterate


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
