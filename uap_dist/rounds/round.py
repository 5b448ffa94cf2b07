"""One round: workers compute increments against v, and whoever runs the round sums them, updates v and projects it."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from uap_dist.method import update
from uap_dist.method.config import ComputeConfig
from uap_dist.method.norms import SYMBOLS, norms
from uap_dist.method.rates import UNTARGETED, Goal, Rate
from uap_dist.method.solver import EVALUATIONS, MEANS, LocalSteps, Solver
from uap_dist.method.state import NOTHING, Evaluation, RoundReport, State
from uap_dist.method.update import Iterate, Steps
from uap_dist.rounds.plan import RoundTasks, RunPlan
from uap_dist.workers.dataset import Dataset, classify
from uap_dist.workers.local import Workers
from uap_dist.workers.messages import Examples, Together
from uap_dist.workers.solving.graphs import Caller, Numbers, plainly, send
from uap_dist.workers.worker import Worker

Arrays = np.ndarray | Tensor


def run_round(workers: Workers, round_: RoundTasks, state: State, plan: RunPlan) -> RoundReport:
    """Solve the blocks of a round, sum their increments in block order, update v and project it.

    The bits are the same wherever it runs, on the driver or on a worker: beside the solves there are elementwise float64
    operations and sums in a fixed order.

    Args:
        workers: solve the blocks.
        round_: to be solved.
        state: before the round.
        plan: of the run.
    """
    started = time.perf_counter()
    outcome = run_rounds(workers, {0: round_}, Members.of({0: state}), plan)
    (report,) = outcome.reports(lambda: time.perf_counter() - started).values()
    return report


@dataclass(frozen=True)
class Members:
    """Perturbations that take their rounds together, each at a place of its own. Their rounds need not have the same number.

    Attributes:
        states: by place, each with the iterate of all places; empty places have none.
        iterate: of all M places: v and momentum M×C×H×W, zero where a place is empty, and scales.
    """

    states: dict[int, State]
    iterate: Iterate

    @classmethod
    def of(cls, states: Mapping[int, State], num_places: int = 1, device: torch.device | None = None) -> "Members":
        """Members with these states, one at least, on a device (that of the first state if not given)."""
        some, _, scale = next(iter(states.values())).iterate
        if num_places == 1:  # a view, which takes no time
            (place, state), *_ = states.items()
            iterate = Iterate(*(each[None].to(device or some.device) for each in state.iterate))
            return cls({place: replace(state, iterate=iterate)}, iterate)
        all_ = Iterate.zero((num_places, *some.shape), (num_places, *scale.shape))
        for place, state in states.items():
            for of_all, own in zip(all_, state.iterate, strict=True):
                of_all[place] = own
        iterate = Iterate(*(each.to(device or some.device) for each in all_))
        return cls({place: replace(state, iterate=iterate) for place, state in states.items()}, iterate)


@dataclass(frozen=True)
class Outcome:
    """What a round of several members led to. Nothing of it has been waited for on a GPU.

    Attributes:
        after: the members after it.
        rounds: of the members, by place.
        numbers: for each place the sum and the number of images for each of `Solver.names`, then the norms of v.
        sizes: of the first step, by place.
        plan: of the runs.
        solve_seconds: that solves took.
    """

    after: Members
    rounds: Mapping[int, RoundTasks]
    numbers: Numbers
    sizes: Sequence[float]
    plan: RunPlan
    solve_seconds: float

    def reports(self, seconds: Callable[[], float], *, has_arrays: bool = True) -> dict[int, RoundReport]:
        """The reports of the members, by place.

        Args:
            seconds: that the round took, asked once it is over.
            has_arrays: whether they hold arrays.
        """
        solver, found, reports = self.plan.solver, self.numbers.tolist(), {}
        names, means = solver.names, [each for mean in MEANS[solver.rule] for each in solver.goal.of_each(mean)]
        spent = seconds()
        for place, round_ in self.rounds.items():
            state, numbers = self.after.states[place], found[place]
            sums = dict(zip(names, zip(numbers[0::2], numbers[1::2], strict=False), strict=False))
            iterate = state.iterate.at(place) if has_arrays else Iterate(NOTHING, NOTHING)
            reports[place] = RoundReport(
                round_number=round_.number,
                pass_number=round_.pass_number,
                num_rounds=self.plan.num_rounds,
                rates={kind: Rate(*map(int, sums[kind])) for kind in solver.goal.kinds},
                perturbation=_deliver(iterate.v, self.plan.config) if has_arrays else NOTHING,
                state=replace(state, iterate=iterate),
                step=self.sizes[place],
                means={name: sums[name][0] / max(1, sums[name][1]) for name in means},
                norms=dict(zip(SYMBOLS, numbers[2 * len(names) :], strict=True)),
                seconds=spent,
                solve_seconds=self.solve_seconds,
                finished=time.time(),
            )
        return reports


def run_rounds(
    workers: Workers,
    rounds: Mapping[int, RoundTasks],
    members: Members,
    plan: RunPlan,
    call: Caller = plainly,
) -> Outcome:
    """A round of each of several members (see `run_round`), computed on the device of their tensors.

    Args:
        workers: solve the blocks; for several places one worker in this process.
        rounds: of each member, by place.
        members: before the rounds.
        plan: of the runs; their seeds do not matter here.
        call: calls a pure function of tensors, see `Graphs.call`.
    """
    before, config, solver = members.iterate, plan.config, plan.solver
    steps = config.steps(plan.num_rounds, tuple(before.v.shape[1:]))
    numbers = [rounds[i].number if i in rounds else 0 for i in range(len(before.v))]
    sizes = [(config.paper_gain,) if steps is None else steps.sizes(number) for number in numbers]
    local = None
    if steps is not None and config.local_steps:
        momentum = _shared(before.momentum.float())
        local = LocalSteps(momentum, sizes[0], config.block_size // config.local_steps, steps)
    tasks = _tasks(rounds, len(sizes), config)
    total, sums, solve_seconds, num_blocks = None, None, 0.0, 0
    v, scales = _shared(before.v.float()), _shared(before.scale)
    for result in workers.map(Worker.solve, tasks, v, solver, scales, local):
        total, sums = _add(total, result.total), _add(sums, result.sums)
        solve_seconds += result.seconds
        num_blocks += 1
    assert total is not None and sums is not None
    total, summed = torch.as_tensor(total), torch.as_tensor(sums)
    if local is not None:
        total = total / num_blocks
    firsts = [each[0] for each in sizes]
    given = [before.v, before.momentum, before.scale, total, summed, send(np.array(firsts), total.device)]
    seedless = replace(config, seed=0)  # so that all members share one CUDA graph
    *arrays, found = call(_update, given, seedless, solver, steps)
    iterate = Iterate(*arrays)
    after = {place: replace(state, iterate=iterate) for place, state in members.states.items()}
    for place, round_ in rounds.items():
        after[place] = _count(after[place], round_, summed[place], solver)
    return Outcome(Members(after, iterate), rounds, Numbers(found), firsts, plan, solve_seconds)


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


def _shared(values: Tensor) -> Arrays:
    """As workers take them: NumPy's arrays, which Ray need not copy, or tensors where they are on a GPU."""
    return values.numpy() if values.device.type == "cpu" else values


def _add(total: Arrays | None, values: Arrays) -> Arrays:
    """A sum in float64, where the values are."""
    if total is None:
        return values.double() if isinstance(values, Tensor) else values.astype(np.float64)
    total += values
    return total


def _update(
    v: Tensor,
    momentum: Tensor,
    scales: Tensor,
    total: Tensor,
    sums: Tensor,
    sizes: Tensor,
    config: ComputeConfig,
    solver: Solver,
    steps: Steps | None,
) -> tuple[Tensor, ...]:
    """v, momentum (M×C×H×W each) and scales after a round, and `Outcome.numbers`."""
    before = Iterate(v, momentum, scales)
    if steps is None:
        after = update.paper_update(before, total, gain=config.paper_gain, norm=config.norm, radius=config.ball_radius)
    elif config.local_steps:
        after = update.average_update(before, total, steps)
    else:
        after = update.log_odds_update(before, total, sizes.view(-1, 1, 1, 1), steps)
    if steps is not None:
        after = update.remember(after, *solver.sizes(sums, scales), most_images=config.round_size)
    numbers = [sums.flatten(1), *(norms(after.v, norm)[:, None] for norm in SYMBOLS)]
    return after.v, after.momentum, after.scale, torch.cat(numbers, dim=1)


def _deliver(v: Tensor, config: ComputeConfig) -> Tensor:
    """What a run would deliver that ended with v (C×H×W float64, pixels), in float32."""
    if config.rule == "log-odds":
        v = update.finish(v, norm=config.norm, radius=config.ball_radius)
    return v.float()


def _count(state: State, round_: RoundTasks, sums: Tensor, solver: Solver) -> State:
    """The state with the counters after a round, whose sums are looked at only where they tell how often the network was evaluated."""
    names, evaluations = solver.names, solver.evaluations_per_solve * round_.num_examples
    if EVALUATIONS in names:
        evaluations = int(sums[names.index(EVALUATIONS), 0])
    return replace(
        state,
        num_rounds=round_.number + 1,
        num_solves=state.num_solves + round_.num_examples,
        num_evaluations=state.num_evaluations + evaluations,
    )
