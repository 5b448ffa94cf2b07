"""One round: workers compute increments against v, and whoever runs the round sums them, updates v and projects it."""

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from uap_dist.method import update
from uap_dist.method.config import ComputeConfig
from uap_dist.method.norms import SYMBOLS, measure
from uap_dist.method.rates import FOOLING, UNTARGETED, Goal, Rate
from uap_dist.method.schedule import Round
from uap_dist.method.solver import LOG_ODDS_SIZE, LocalSteps, add_sums
from uap_dist.method.state import Evaluation, RoundReport, State
from uap_dist.method.update import Iterate, Steps
from uap_dist.workers.dataset import Dataset, classify
from uap_dist.workers.local import Workers
from uap_dist.workers.messages import Examples
from uap_dist.workers.worker import Worker


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


def run_round(
    workers: Workers, round_: RoundTasks, state: State, config: ComputeConfig, num_rounds: int | None
) -> RoundReport:
    """Solve the blocks of a round, sum their increments in block order, update v and project it.

    The bits are the same wherever it runs, on the driver or on a worker: beside the solves there are elementwise float64
    operations and NumPy's sums, whose order is fixed.

    Args:
        workers: solve the blocks.
        round_: to be solved.
        state: before the round.
        config: of the computation.
        num_rounds: of the run (see `count_rounds`).
    """
    started = time.perf_counter()
    shape = tuple(state.iterate.v.shape)
    steps = config.steps(num_rounds, shape)
    sizes = steps.sizes(round_.number) if steps is not None else ()
    v, solver, local = state.iterate.v.float().numpy(), replace(config.solver, scale=state.iterate.scale), None
    if steps is not None and config.local_steps:
        local = LocalSteps(
            state.iterate.momentum.float().numpy(), sizes, config.block_size // config.local_steps, steps
        )
    total, results = np.zeros((2, *shape) if config.local_steps else shape), []
    for result in workers.map(Worker.solve, round_.blocks, v, solver, local):
        total += result.total
        # without its array: a round may have more blocks than the driver has memory for
        results.append(replace(result, total=np.empty(0)))
    sums = add_sums(results)
    rates = {FOOLING: Rate(sum(result.num_fooled for result in results), round_.num_examples)}
    rates |= {kind: Rate(*map(int, sums.pop(kind))) for kind in config.goal.kinds if kind != FOOLING}
    iterate = _update(state.iterate, torch.from_numpy(total), len(results), round_.number, config, steps)
    if config.rule == "log-odds":
        iterate = update.remember(iterate, *sums[LOG_ODDS_SIZE])
    return RoundReport(
        round_number=round_.number,
        pass_number=round_.pass_number,
        num_rounds=num_rounds,
        rates=rates,
        perturbation=_deliver(iterate, config),
        state=State(
            iterate,
            num_rounds=round_.number + 1,
            num_solves=state.num_solves + round_.num_examples,
            num_evaluations=state.num_evaluations + sum(result.num_evaluations for result in results),
        ),
        step=sizes[0] if sizes else config.paper_gain,
        means={name: total / max(1, count) for name, (total, count) in sums.items()},
        norms={norm: measure(iterate.v, norm) for norm in SYMBOLS},
        seconds=time.perf_counter() - started,
        solve_seconds=sum(result.seconds for result in results),
        finished=time.time(),
    )


def evaluate(
    workers: Workers, train: Dataset | None, val: Dataset, perturbation: Tensor, goal: Goal = UNTARGETED
) -> Evaluation:
    """Rates of v (C×H×W, pixels) on held-out images and, if given, on training images."""
    v = perturbation.numpy()
    train_rates = None if train is None else goal.rates(train.clean.labels, classify(workers, train, v).labels)
    predictions = classify(workers, val, v)
    return Evaluation(train_rates, goal.rates(val.clean.labels, predictions.labels), predictions)


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
