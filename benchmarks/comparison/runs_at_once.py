"""Runs of the rule that go through the network together, each with changes of its own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from comparison.bench import stamp
from comparison.pictures import Pictures
from uap_dist.method.config import ComputeConfig
from uap_dist.method.log_odds import log_odds_sum
from uap_dist.method.norms import TINY, project, root_mean_square
from uap_dist.method.schedule import plan_rounds
from uap_dist.method.update import MOMENTUM, REMEMBERED, WIDTH, Steps, finish, repeat_mean, weigh
from uap_dist.models.classifier import Classifier
from uap_dist.rounds.plan import count_rounds
from uap_dist.workers.dataset import Dataset

ROUNDS_SENT = 64


@dataclass(frozen=True, kw_only=True)
class Change:
    """What differs from the rule."""

    period: int = 0
    """Pixels; 0: the rule's, 224: no repetition of photographs."""
    step: float = 1.0
    """Factor on the first step."""
    width: float = WIDTH
    """Of the boundary, in units of the mean size of log-odds."""
    momentum: float = MOMENTUM
    """Share of it that stays with each step."""
    starts: int = 1
    """Short runs, of which the one that fools most goes on."""
    start_rounds: int = 32
    """Of each."""
    judges: int = 100
    """Training images that starts are compared on."""


Best = dict[tuple[int, int], tuple[float, Tensor, Tensor, Tensor]]  # by seed and change: rate, v, momentum, scale


class Together:
    """Runs of S configs of one ball and period, with P changes each: v, momentum and sums are S×P×C×H×W.

    Attributes:
        num_evaluations: of each of the S runs, once it has been computed.
    """

    def __init__(
        self,
        classifier: Classifier,
        pictures: Pictures,
        train: Sequence[Dataset],
        configs: Sequence[ComputeConfig],
        changes: Sequence[Change] = (Change(),),
    ) -> None:
        """All runs on S data sets, whose images are among the pictures; the classifier is an accelerated one."""
        self.classifier, self.pictures, self.device = classifier, pictures, pictures.device
        self.train, self.configs, self.changes = train, configs, changes
        self.norm, self.radius = configs[0].norm, configs[0].ball_radius
        self.num_evaluations = [each.num_examples for each in train]
        self.momenta, self.widths = (
            torch.tensor([getattr(change, name) for change in changes], device=self.device)
            for name in ("momentum", "width")
        )

    def compute(self) -> Tensor:
        """All v as they are delivered."""
        runs = list(zip(self.train, self.configs, strict=True))
        counts = [count_rounds(train.sizes, config) or 0 for train, config in runs]
        v = torch.zeros(len(runs), len(self.changes), *self.train[0].shape, dtype=torch.float64, device=self.device)
        momentum = torch.zeros_like(v)
        scale = torch.full(v.shape[:2], inf, device=self.device)
        best: Best = {}
        lengths, final = torch.tensor(counts, device=self.device), torch.empty_like(v)
        runs_left = torch.arange(len(counts), device=self.device)
        for number, plan in enumerate(self.rounds(counts)):
            if number in counts:
                final[runs_left] = v
                goes_on = lengths[runs_left] > number
                runs_left, v, momentum, scale = (each[goes_on] for each in (runs_left, v, momentum, scale))
            rows, flips, shifts, is_there, sizes = (of_all[runs_left] for of_all in plan)
            x, labels = self.pictures.views(rows, flips, shifts), self.pictures.labels[rows]
            total, scale = self.solve(x, labels, is_there, v, scale)
            periodic = [
                repeat_mean(total[:, i], self.period(change, counts[0])) for i, change in enumerate(self.changes)
            ]
            momentum = self.momenta.view(-1, 1, 1, 1) * momentum + torch.stack(periodic, 1)
            if self.norm == "linf":
                direction = momentum.sign()
            else:
                direction = momentum / root_mean_square(momentum).clamp_min(TINY)[..., None, None, None]
            v = project(v + sizes[..., None, None, None] * direction, norm=self.norm, radius=self.radius)
            for j, change in enumerate(self.changes):
                num_done, is_between = divmod(number + 1, change.start_rounds)
                if change.starts > 1 and not is_between and num_done <= change.starts:
                    self.judge(j, num_done == change.starts, v, momentum, scale, best)
        final[runs_left] = v
        return self.deliver(final)

    def rounds(self, counts: Sequence[int]) -> Iterator[tuple[Tensor, ...]]:
        """Rows, flips, shifts, presence (S×B) and sizes of the steps (S×P) in each round, on the device.

        Many rounds are sent there together, so that it need not wait for the next one.
        """
        runs = list(zip(self.train, self.configs, strict=True))
        plans = [
            plan_rounds(train.sizes, seed=config.seed, round_size=config.round_size, block_size=config.block_size)
            for train, config in runs
        ]
        for first in range(0, max(counts), ROUNDS_SENT):
            numbers = range(first, min(first + ROUNDS_SENT, max(counts)))
            found = [
                self.pictures.plan_views(
                    train, list(islice(plan, len(numbers))), seed=config.seed, size=config.round_size
                )
                for plan, (train, config) in zip(plans, runs, strict=True)
            ]
            for i, (views, count) in enumerate(zip(found, counts, strict=True)):
                self.num_evaluations[i] += 2 * int(views.is_there[: max(0, count - first)].sum())
            sizes = [
                [[self.size(number, count, change) for change in self.changes] for count in counts]
                for number in numbers
            ]
            parts = [np.stack(each, 1) for each in zip(*(vars(views).values() for views in found), strict=True)]
            parts.append(np.array(sizes, np.float32))
            sent = [torch.from_numpy(part).to(self.device, non_blocking=True) for part in parts]
            yield from zip(*sent, strict=True)

    def judge(self, j: int, is_last: bool, v: Tensor, momentum: Tensor, scale: Tensor, best: Best) -> None:
        """At the end of a start of the change j, in place: all seeds begin at zero again or, after the last, go on from their best."""
        for i in range(len(self.configs)):
            judges = self.judges(i, self.changes[j])
            rate, _ = self.pictures.fooled(self.classifier, judges, self.deliver(v[i, j]).float())
            if (i, j) not in best or rate > best[i, j][0]:
                best[i, j] = rate, v[i, j].clone(), momentum[i, j].clone(), scale[i, j].clone()
            _, v[i, j], momentum[i, j], scale[i, j] = best[i, j] if is_last else (0, 0, 0, inf)

    def size(self, number: int, count: int, change: Change) -> float:
        """Of the step in a round, in pixels: that of a run of as many rounds as the best start and what follows are."""
        num_rounds, others = count, (change.starts - 1) * change.start_rounds
        if others:
            judging = change.starts * self.judges(0, change).num_examples // (2 * self.configs[0].round_size)
            num_rounds -= others + judging
        place = number % change.start_rounds if number < others else number - others
        if place >= num_rounds:
            return 0.0
        return change.step * self.steps(num_rounds).sizes(place)[0]

    def period(self, change: Change, count: int) -> int:
        """Pixels, in a run of so many rounds."""
        return change.period or self.steps(count).period

    def steps(self, num_rounds: int) -> Steps:
        """The rule's, in a run of so many rounds."""
        steps = self.configs[0].steps(num_rounds, self.train[0].shape)
        assert steps is not None
        return steps

    def judges(self, i: int, change: Change) -> Dataset:
        """Training images that starts are compared on."""
        return self.train[i].thin(min(change.judges, self.train[i].num_examples))

    def deliver(self, v: Tensor) -> Tensor:
        """As the rule delivers it."""
        return finish(v, norm=self.norm, radius=self.radius)

    def solve(self, x: Tensor, labels: Tensor, is_there: Tensor, v: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted sums of increments (S×P×C×H×W float64), and the scales with these images in them."""
        lead = (*v.shape[:2], x.shape[1])
        widths = (self.widths / WIDTH * scale)[..., None]
        found = log_odds_sum(
            self.classifier,
            x[:, None].expand(*lead, *x.shape[2:]).flatten(0, 2),
            v.flatten(0, 1).float(),
            labels[:, None].expand(lead).flatten(),
            weigh=lambda gaps: (weigh(gaps.view(lead), widths) * is_there[:, None]).flatten(),
        )
        counts = is_there.sum(1)[:, None]
        size = (found.log_odds.abs().view(lead) * is_there[:, None]).sum(2) / counts
        scale = torch.where(scale.isinf(), size, size + torch.exp(-counts / REMEMBERED) * (scale - size))
        return found.total.view_as(v).double(), scale

    def measure(self, v: Tensor, held_in: Sequence[Dataset]) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
        """By seed and change: fooling rates on held-in images and on those that v was computed from."""
        for i, j in product(range(len(self.configs)), range(len(self.changes))):
            rate, share = self.pictures.fooled(self.classifier, held_in[i], v[i, j].float())
            train_rate, _ = self.pictures.fooled(self.classifier, self.train[i], v[i, j].float())
            yield (i, j), {"rate": rate, "train_rate": train_rate, "most_frequent_share": share} | stamp()
