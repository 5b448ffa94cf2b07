"""One round: workers compute increments against v, and whoever runs the round sums them, updates v and projects it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import zip_longest
from math import inf

import numpy as np
import torch
from torch import Tensor

from uap_dist.method import update
from uap_dist.method.config import ComputeConfig
from uap_dist.method.log_odds import UNTARGETED
from uap_dist.method.norms import SYMBOLS, norms
from uap_dist.method.rates import Goal, Rate
from uap_dist.method.schedule import Round
from uap_dist.method.solver import EVALUATIONS, LOG_ODDS_SIZE, MEANS, LocalSteps
from uap_dist.method.state import Evaluation, RoundReport, State
from uap_dist.method.update import Iterate, Steps
from uap_dist.workers.dataset import Dataset, classify
from uap_dist.workers.local import Workers
from uap_dist.workers.messages import Examples, Together
from uap_dist.workers.solving.graphs import Caller, plainly
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
    operations and sums in a fixed order.

    Args:
        workers: solve the blocks.
        round_: to be solved.
        state: before the round.
        config: of the computation.
        num_rounds: of the run (see `count_rounds`).
    """
    return next(iter(run_rounds(workers, {0: round_}, Members.of({0: state}), config, num_rounds)[0].values()))


@dataclass(frozen=True)
class Members:
    """Perturbations that take their rounds together, each at a place of its own. Their rounds need not have the same number.

    Attributes:
        states: by place; empty places have none.
        iterate: v and momentum of all M places, M×C×H×W, zero where a place is empty. Its scale means nothing.
    """

    states: dict[int, State]
    iterate: Iterate

    @classmethod
    def of(cls, states: Mapping[int, State], num_places: int = 1, device: torch.device | None = None) -> "Members":
        """Members with these states, one at least, on a device (that of the first state if not given)."""
        some = next(iter(states.values())).iterate
        v, momentum = (
            torch.zeros(num_places, *some.v.shape, dtype=torch.float64, device=device or some.v.device)
            for _ in range(2)
        )
        for place, state in states.items():
            v[place], momentum[place] = state.iterate.v, state.iterate.momentum
        return cls(dict(states), replace(some, v=v, momentum=momentum))

    @property
    def scales(self) -> tuple[float, ...]:
        """Scale of the iterate at each place."""
        return tuple(self.states[i].iterate.scale if i in self.states else inf for i in range(len(self.iterate.v)))


def run_rounds(
    workers: Workers,
    rounds: Mapping[int, RoundTasks],
    members: Members,
    config: ComputeConfig,
    num_rounds: int | None,
    call: Caller = plainly,
) -> tuple[dict[int, RoundReport], Members]:
    """A round of each of several members (see `run_round`), computed on the device of their tensors; and the members after it.

    Args:
        workers: solve the blocks; for several places one worker in this process.
        rounds: of each member, by place.
        members: before the rounds.
        config: of the computations; their seeds do not matter here.
        num_rounds: of each run.
        call: calls a pure function of tensors, see `Graphs.call`.
    """
    started, before = time.perf_counter(), members.iterate
    steps = config.steps(num_rounds, tuple(before.v.shape[1:]))
    numbers = [rounds[i].number if i in rounds else 0 for i in range(len(before.v))]
    sizes = [(config.paper_gain,) if steps is None else steps.sizes(number) for number in numbers]
    local = None
    if steps is not None and config.local_steps:
        momentum = _shared(before.momentum)
        local = LocalSteps(momentum, sizes[0], config.block_size // config.local_steps, steps)
    solver = replace(config.solver, scales=members.scales)
    total, sums, solve_seconds = torch.zeros((), dtype=torch.float64, device=before.v.device), [], 0.0
    for result in workers.map(Worker.solve, _tasks(rounds, len(sizes), config), _shared(before.v), solver, local):
        total = total + _double(result.total)
        sums.append(_double(result.sums))
        solve_seconds += result.seconds
    if local is not None:
        total = total / len(sums)
    first_sizes = torch.tensor([each[0] for each in sizes], dtype=torch.float64, device=total.device).view(-1, 1, 1, 1)
    v, momentum, delivered, lengths = call(_update, [before.v, before.momentum, total, first_sizes], config, steps)
    counts = torch.cat([reduce(torch.add, sums).flatten(1), lengths], dim=1).tolist()  # the only wait for a GPU
    reports = {}
    for place, round_ in rounds.items():
        before_it = members.states[place]
        iterate = Iterate(v[place], momentum[place], before_it.iterate.scale)
        reports[place] = _report(
            round_,
            replace(before_it, iterate=iterate),
            counts[place],
            config,
            num_rounds=num_rounds,
            perturbation=delivered[place],
            step=sizes[place][0],
            seconds=time.perf_counter() - started,
            solve_seconds=solve_seconds,
        )
    states = members.states | {place: report.state for place, report in reports.items()}
    return reports, Members(states, replace(before, v=v, momentum=momentum))


def evaluate(
    workers: Workers, train: Dataset | None, val: Dataset, perturbation: Tensor, goal: Goal = UNTARGETED
) -> Evaluation:
    """Rates of v (C×H×W, pixels) on held-out images and, if given, on training images."""
    v = perturbation.numpy()
    train_rates = None if train is None else goal.rates(train.clean.labels, classify(workers, train, v).labels)
    predictions = classify(workers, val, v)
    return Evaluation(train_rates, goal.rates(val.clean.labels, predictions.labels), predictions)


def _tasks(rounds: Mapping[int, RoundTasks], num_places: int, config: ComputeConfig) -> Sequence[Examples | Together]:
    """The blocks of a round, or of the rounds at all places, block by block."""
    if num_places == 1:
        return rounds[0].blocks
    blocks = [rounds[place].blocks if place in rounds else () for place in range(num_places)]
    return [Together(each, config.block_size) for each in zip_longest(*blocks)]


def _shared(arrays: Tensor) -> np.ndarray | Tensor:
    """In float32 as workers take them: NumPy's arrays, which Ray need not copy, or tensors where they are on a GPU."""
    values = arrays.float()
    return values.numpy() if values.device.type == "cpu" else values


def _double(values: np.ndarray | Tensor) -> Tensor:
    """In float64, where they are."""
    return values.double() if isinstance(values, Tensor) else torch.from_numpy(values.astype(np.float64))


def _update(
    v: Tensor, momentum: Tensor, total: Tensor, size: Tensor, config: ComputeConfig, steps: Steps | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """v, momentum and what would be delivered after a round (M×C×H×W each), and the norms of v (M×2)."""
    before = Iterate(v, momentum)
    if steps is None:
        after = update.paper_update(before, total, gain=config.paper_gain, norm=config.norm, radius=config.ball_radius)
    elif config.local_steps:
        after = update.average_update(before, total, steps)
    else:
        after = update.log_odds_update(before, total, size, steps)
    delivered = after.v if steps is None else update.finish(after.v, norm=config.norm, radius=config.ball_radius)
    lengths = torch.stack([norms(after.v, norm) for norm in SYMBOLS], dim=1)
    return after.v, after.momentum, delivered.float(), lengths


def _report(
    round_: RoundTasks,
    state: State,
    counts: Sequence[float],
    config: ComputeConfig,
    *,
    num_rounds: int | None,
    perturbation: Tensor,
    step: float,
    seconds: float,
    solve_seconds: float,
) -> RoundReport:
    """The report of a round.

    Args:
        round_: that was solved.
        state: before it, but for v and momentum.
        counts: sum and number for each of `Solver.names`, then the norms of v.
        config: of the computation.
        num_rounds: see `RoundReport`, and so for the others.
        perturbation: likewise.
        step: likewise.
        seconds: likewise.
        solve_seconds: likewise.
    """
    names = config.solver.names
    sums = dict(zip(names, zip(counts[0::2], counts[1::2], strict=False), strict=False))
    iterate = state.iterate
    if config.rule == "log-odds":
        size, count = sums[LOG_ODDS_SIZE]
        iterate = update.remember(iterate, size, int(count))
    return RoundReport(
        round_number=round_.number,
        pass_number=round_.pass_number,
        num_rounds=num_rounds,
        rates={kind: Rate(*map(int, sums[kind])) for kind in config.goal.kinds},
        perturbation=perturbation,
        state=State(
            iterate,
            num_rounds=round_.number + 1,
            num_solves=state.num_solves + round_.num_examples,
            num_evaluations=state.num_evaluations + int(sums[EVALUATIONS][0]),
        ),
        step=step,
        means={name: sums[name][0] / max(1, sums[name][1]) for name in MEANS[config.rule]},
        norms=dict(zip(SYMBOLS, counts[2 * len(names) :], strict=True)),
        seconds=seconds,
        solve_seconds=solve_seconds,
        finished=time.time(),
    )
