"""Runs of the rule that go through the network together, each with changes of its own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from comparison.bench import Bench, stamp
from comparison.rows import MAX_LABEL_SHARE
from uap_dist.method.augment import SHIFT_SHARE
from uap_dist.method.config import ComputeConfig
from uap_dist.method.log_odds import log_odds
from uap_dist.method.norms import add_perturbation
from uap_dist.method.schedule import Round, plan_rounds
from uap_dist.method.update import MOMENTUM, REMEMBERED, WIDTH, Steps, finish, weigh
from uap_dist.rounds.plan import count_rounds
from uap_dist.workers.dataset import Dataset
from uap_dist.workers.messages import Examples


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


class Pictures:
    """The training images on the device, with an edge around them for views."""

    def __init__(self, bench: Bench) -> None:
        self.device = bench.worker.device
        self.rows: dict[tuple[str, str], int] = {}
        blocks = [block for part in bench.shards for block in part.blocks(part.num_examples)]
        for block in blocks:
            self.rows |= {(block.shard, k): len(self.rows) + i for i, k in enumerate(block.keys)}
        pixels = torch.tensor(np.concatenate([bench.worker.pixels(block) for block in blocks]))
        self.side = pixels.shape[-1]
        self.edge = max(1, self.side // SHIFT_SHARE)
        self.padded = F.pad(pixels.float(), [self.edge] * 4, mode="replicate").byte().to(self.device)

    def views(self, tasks: Sequence[Examples]) -> Tensor:
        """N×C×H×W float32 of all tasks' images, as `augment` shows them."""
        rows, flips, corners = [], [], []
        for task in tasks:
            rng = np.random.default_rng(task.seed)
            rows += [self.rows[task.shard, k] for k in task.keys]
            flips.append(rng.random(len(task.keys)) < 0.5)
            corners.append(rng.integers(0, 2 * self.edge + 1, size=(len(task.keys), 2)))
        y, x = np.concatenate(corners).T[..., None] + np.arange(self.side)
        x = np.where(np.concatenate(flips)[:, None], self.side + 2 * self.edge - 1 - x, x)
        return self._cut(rows, y, x)

    def whole(self, tasks: Sequence[Examples]) -> Tensor:
        """As they are."""
        rows = [self.rows[task.shard, k] for task in tasks for k in task.keys]
        middle = np.tile(self.edge + np.arange(self.side), (len(rows), 1))
        return self._cut(rows, middle, middle)

    def _cut(self, rows: list[int], y: np.ndarray, x: np.ndarray) -> Tensor:
        chosen, y_, x_ = (torch.as_tensor(array, device=self.device) for array in (rows, y, x))
        colours = torch.arange(self.padded.shape[1], device=self.device)[:, None, None]
        return self.padded[chosen[:, None, None, None], colours, y_[:, None, :, None], x_[:, None, None, :]].float()


Best = dict[tuple[int, int], tuple[float, Tensor, Tensor, Tensor]]  # by seed and change: rate, v, momentum, scale


class Together:
    """Runs of S configs that differ by their seed, with P changes each: v, momentum and sums are S×P×C×H×W."""

    def __init__(
        self, bench: Bench, pictures: Pictures, configs: list[ComputeConfig], changes: Sequence[Change]
    ) -> None:
        self.pictures, self.configs, self.changes = pictures, configs, changes
        self.norm, self.radius = configs[0].norm, configs[0].ball_radius
        most = (configs[0].max_evaluations or 0) // MAX_LABEL_SHARE
        splits = [bench.split(config.seed) for config in configs]
        self.train = [train.thin(min(train.num_examples, most)) for train, _ in splits]
        self.held_in = [held_in for _, held_in in splits]
        self.device, self.classifier = bench.worker.device, bench.worker.classifier
        self.classifier.first_layer = None  # the gradient of more than one sum is wanted
        self.momenta, self.widths = (
            torch.tensor([getattr(change, name) for change in changes], device=self.device)
            for name in ("momentum", "width")
        )
        if self.device.type == "cuda":
            torch.use_deterministic_algorithms(False)
            torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True

    def compute(self) -> Tensor:
        """All v as they are delivered."""
        runs = list(zip(self.train, self.configs, strict=True))
        counts = [count_rounds(train.sizes, config) or 0 for train, config in runs]
        plans = [
            plan_rounds(train.sizes, seed=config.seed, round_size=config.round_size, block_size=config.block_size)
            for train, config in runs
        ]
        v = torch.zeros(len(runs), len(self.changes), *self.train[0].shape, dtype=torch.float64, device=self.device)
        momentum = torch.zeros_like(v)
        scale = torch.full(v.shape[:2], inf, device=self.device)
        best: Best = {}
        for number in range(max(counts)):
            sizes = torch.tensor(
                [[self.size(number, count, change) for change in self.changes] for count in counts], device=self.device
            )[..., None, None, None]
            x, labels, is_there = self.batch([next(plan) for plan in plans])
            total, scale = self.solve(x, labels, is_there, v, scale)
            periodic = [
                repeat_mean(total[:, i], self.period(change, counts[0])) for i, change in enumerate(self.changes)
            ]
            momentum = self.momenta.view(-1, 1, 1, 1) * momentum + torch.stack(periodic, 1)
            direction = momentum.sign() if self.norm == "linf" else momentum / root_mean_squares(momentum)
            v = v + sizes * direction
            if self.norm == "linf":
                v = v.clamp(-self.radius, self.radius)
            else:
                v = v * (self.radius / (root_mean_squares(v) * v[0, 0].numel() ** 0.5)).clamp(max=1)
            for j, change in enumerate(self.changes):
                num_done, is_between = divmod(number + 1, change.start_rounds)
                if change.starts > 1 and not is_between and num_done <= change.starts:
                    self.judge(j, num_done == change.starts, v, momentum, scale, best)
        return self.deliver(v)

    def judge(self, j: int, is_last: bool, v: Tensor, momentum: Tensor, scale: Tensor, best: Best) -> None:
        """At the end of a start of the change j, in place: all seeds begin at zero again or, after the last, go on from their best."""
        for i in range(len(self.configs)):
            rate, _ = self.fooled(self.judges(i, self.changes[j]), self.deliver(v[i, j]).float())
            if (i, j) not in best or rate > best[i, j][0]:
                best[i, j] = rate, v[i, j].clone(), momentum[i, j].clone(), scale[i, j].clone()
            _, v[i, j], momentum[i, j], scale[i, j] = best[i, j] if is_last else (0, 0, 0, inf)

    def size(self, number: int, count: int, change: Change) -> float:
        """Of the step in a round, in pixels: that of a run of as many rounds as the best start and what follows are."""
        others = (change.starts - 1) * change.start_rounds
        judging = change.starts * self.judges(0, change).num_examples // (2 * self.configs[0].round_size)
        num_rounds = count - others - (judging if others else 0)
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

    def batch(self, rounds: list[Round]) -> tuple[Tensor, Tensor, Tensor]:
        """Views (S×B×C×H×W), their labels, and which are there (S×B): rounds at a pass's end have fewer than B images."""
        most = self.configs[0].round_size
        tasks = [
            train.examples(block.shard, block.examples, seed=(config.seed, round_.number, number))
            for train, config, round_ in zip(self.train, self.configs, rounds, strict=True)
            for number, block in enumerate(round_.blocks)
        ]
        is_there = torch.arange(most) < torch.tensor([round_.num_examples for round_ in rounds])[:, None]
        is_there = is_there.to(self.device)
        found = self.pictures.views(tasks)
        x = torch.zeros(*is_there.shape, *found.shape[1:], device=self.device)
        labels = torch.zeros(is_there.shape, dtype=torch.int64, device=self.device)
        x[is_there] = found
        labels[is_there] = torch.tensor([label for task in tasks for label in task.labels], device=self.device)
        return x, labels, is_there

    def solve(self, x: Tensor, labels: Tensor, is_there: Tensor, v: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted sums of increments (S×P×C×H×W float64), and the scales with these images in them."""
        shown = add_perturbation(x[:, None], v[:, :, None].float())
        lead = shown.shape[:3]
        with torch.enable_grad():
            logits, leaf = self.classifier.linearise(shown.flatten(0, 2))
            gaps = log_odds(logits, labels[:, None].expand(lead).flatten()).unflatten(0, lead)
            weights = weigh(gaps.detach(), (self.widths / WIDTH * scale)[..., None]) * is_there[:, None]
            (slopes,) = torch.autograd.grad((weights * gaps).sum(), leaf)
        counts = is_there.sum(1)[:, None]
        size = (gaps.detach().abs() * is_there[:, None]).sum(2) / counts
        scale = torch.where(scale.isinf(), size, size + torch.exp(-counts / REMEMBERED) * (scale - size))
        return -slopes.unflatten(0, lead).sum(2).double(), scale

    def measure(self, v: Tensor) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
        """By seed and change: fooling rates on held-in images and on those that v was computed from."""
        for i, j in product(range(len(self.configs)), range(len(self.changes))):
            rate, answers = self.fooled(self.held_in[i], v[i, j].float())
            train_rate, _ = self.fooled(self.train[i], v[i, j].float())
            share = round(float(answers.bincount().max()) / len(answers), 4)
            yield (i, j), {"rate": rate, "train_rate": train_rate, "most_frequent_share": share} | stamp()

    def fooled(self, images: Dataset, v: Tensor) -> tuple[float, Tensor]:
        """Share of the images, and what the classifier says of all."""
        with torch.no_grad():
            shown = add_perturbation(self.pictures.whole(images.blocks(images.num_examples)), v)
            answers = torch.cat([self.classifier(some).argmax(1) for some in shown.split(100)]).cpu()
        return round(float((answers != torch.tensor(images.clean.labels)).double().mean()), 4), answers


def repeat_mean(totals: Tensor, period: int) -> Tensor:
    """As update.py's, of S×C×H×W at once and on their device."""
    height, width = totals.shape[2:]
    if period >= max(height, width):
        return totals
    rows, columns = -(-height // period), -(-width // period)

    def fold(values: Tensor) -> Tensor:
        whole = F.pad(values, (0, -width % period, 0, -height % period))
        return whole.unflatten(3, (columns, period)).unflatten(2, (rows, period)).sum((2, 4))

    tile = fold(totals) / fold(torch.ones_like(totals[:1, :1])).clamp(min=1)
    return tile.tile(rows, columns)[..., :height, :width]


def root_mean_squares(values: Tensor) -> Tensor:
    """S×P×1×1×1, of S×P×C×H×W."""
    return values.square().mean((2, 3, 4), keepdim=True).sqrt().clamp(min=1e-300)
