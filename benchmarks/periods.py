"""The period for so many evaluations: the rule as it is, on held-in photographs. See benchmarks/rules_tried.md, "The period".

    python benchmarks/periods.py --network squeezenet --budgets 1000    # on the GPU where there is one; on one core 20 s a run
    python benchmarks/periods.py --table

Images, order, views and steps are those of `ours` in rules.py, but all seeds and periods go through the network together: rounds of 6
images do not fill a GPU, whose convolutions are in TF32 here. What is in the output already is not repeated. Nothing here looks at the
held-out shards.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rules import MAX_LABEL_SHARE, RADII, Bench, interval, spread, stamp
from torch import Tensor
from torch.nn import functional as F

from uap_dist.augment import SHIFT_SHARE
from uap_dist.compute import count_rounds, step_sizes
from uap_dist.config import ComputeConfig
from uap_dist.dataset import Dataset
from uap_dist.deepfool import add_perturbation, log_odds
from uap_dist.norms import Norm
from uap_dist.schedule import Round, plan_rounds
from uap_dist.update import MOMENTUM, PERIOD, REMEMBERED, finish, weigh
from uap_dist.worker import Examples


@dataclass(frozen=True, kw_only=True)
class Options:
    """Try periods, or print what has been tried."""

    network: Literal["squeezenet", "lite0"] = "squeezenet"
    norms: tuple[Norm, ...] = ("linf", "l2")
    budgets: tuple[int, ...] = (4_000, 16_000)
    """Network evaluations, clean labels included."""
    periods: tuple[int, ...] = (32, 64, 112, 224)
    """Pixels; 224 is no repetition."""
    seeds: tuple[int, ...] = tuple(range(10))
    """Of the training images, their order and views."""
    table: bool = False
    """Print what has been tried."""
    data: Path = Path("../shared")
    output: Path = Path(__file__).with_name("periods.jsonl")


def main() -> None:
    """Run what is missing, or print the table."""
    options = tyro.cli(Options)
    if options.table:
        print_table(read(options.output))
    else:
        run(options)


def run(options: Options) -> None:
    """A line for each norm, budget, seed and period."""
    bench = Bench(options.network, options.data)
    pictures = Pictures(bench)
    for budget in options.budgets:
        for norm in options.norms:
            done = read(options.output)
            wanted = {
                seed: [p for p in options.periods if (options.network, norm, budget, p, seed) not in done]
                for seed in options.seeds
            }
            seeds, periods = [seed for seed, some in wanted.items() if some], options.periods
            if not seeds:
                continue
            started = time.perf_counter()
            configs = [
                ComputeConfig(norm=norm, radius=RADII["imagenet"][norm], max_evaluations=budget, seed=seed)
                for seed in seeds
            ]
            together = Together(bench, pictures, configs, periods)
            for line in together.measure(together.compute()):
                if line["period"] in wanted[line["seed"]]:
                    with options.output.open("a") as file:
                        file.write(json.dumps({"network": options.network} | line) + "\n")
            print(options.network, norm, f"{budget:,}", f"{time.perf_counter() - started:.0f} s", flush=True)


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


class Together:
    """Runs of S configs that differ by their seed, with P periods each: v, momentum and sums are S×P×C×H×W."""

    def __init__(
        self, bench: Bench, pictures: Pictures, configs: list[ComputeConfig], periods: tuple[int, ...]
    ) -> None:
        self.pictures, self.configs, self.periods = pictures, configs, periods
        self.norm, self.radius = configs[0].norm, configs[0].ball_radius
        most = (configs[0].max_evaluations or 0) // MAX_LABEL_SHARE
        splits = [bench.split(config.seed) for config in configs]
        self.train = [train.thin(min(train.num_examples, most)) for train, _ in splits]
        self.held_in = [held_in for _, held_in in splits]
        self.device, self.classifier = bench.worker.device, bench.worker.classifier
        self.classifier.first_layer = None  # the gradient of more than one sum is wanted
        if self.device.type == "cuda":
            torch.use_deterministic_algorithms(False)
            torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True

    def compute(self) -> Tensor:
        """All v as they are delivered."""
        shape = self.train[0].shape
        runs = list(zip(self.train, self.configs, strict=True))
        counts = [count_rounds(train.sizes, config) or 0 for train, config in runs]
        plans = [
            plan_rounds(train.sizes, seed=config.seed, round_size=config.round_size, block_size=config.block_size)
            for train, config in runs
        ]
        v = torch.zeros(len(runs), len(self.periods), *shape, dtype=torch.float64, device=self.device)
        momentum = torch.zeros_like(v)
        scale = torch.full(v.shape[:2], inf, device=self.device)
        for number in range(max(counts)):
            sizes = [  # a seed's rounds may be one fewer than another's
                step_sizes(number, count, shape, config)[0] if number < count else 0.0
                for count, config in zip(counts, self.configs, strict=True)
            ]
            x, labels, is_there = self.batch([next(plan) for plan in plans])
            total, scale = self.solve(x, labels, is_there, v, scale)
            momentum = MOMENTUM * momentum + torch.stack(
                [repeat_mean(total[:, i], period) for i, period in enumerate(self.periods)], 1
            )
            direction = momentum.sign() if self.norm == "linf" else momentum / root_mean_squares(momentum)
            v = v + torch.tensor(sizes, device=self.device).view(-1, 1, 1, 1, 1) * direction
            if self.norm == "linf":
                v = v.clamp(-self.radius, self.radius)
            else:
                v = v * (self.radius / (root_mean_squares(v) * v[0, 0].numel() ** 0.5)).clamp(max=1)
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
            weights = weigh(gaps.detach(), scale[:, :, None]) * is_there[:, None]
            (slopes,) = torch.autograd.grad((weights * gaps).sum(), leaf)
        counts = is_there.sum(1)[:, None]
        size = (gaps.detach().abs() * is_there[:, None]).sum(2) / counts
        scale = torch.where(scale.isinf(), size, size + torch.exp(-counts / REMEMBERED) * (scale - size))
        return -slopes.unflatten(0, lead).sum(2).double(), scale

    def measure(self, v: Tensor) -> Iterator[dict[str, Any]]:
        """Fooling rates on held-in images and on those that v was computed from."""
        for some, config, train, held_in in zip(v.float(), self.configs, self.train, self.held_in, strict=True):
            for one, period in zip(some, self.periods, strict=True):
                fooled, answers = self.fooled(held_in, one)
                yield {
                    "norm": config.norm,
                    "budget": config.max_evaluations,
                    "period": period,
                    "seed": config.seed,
                    "rate": fooled,
                    "train_rate": self.fooled(train, one)[0],
                    "most_frequent_share": round(float(answers.bincount().max()) / len(answers), 4),
                } | stamp()

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


def read(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Lines by network, norm, budget, period and seed."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {tuple(line[name] for name in ("network", "norm", "budget", "period", "seed")): line for line in lines}


def print_table(lines: dict[tuple[Any, ...], dict[str, Any]]) -> None:
    """A line for each period: means, and the paired difference to the rule's period in held-in and training rate."""
    print(
        "| network, norm, evaluations | period | held-in rate, mean ± sd | to 32, paired | training | to 32, paired | one label | seeds |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for network, norm, budget, period in sorted({names[:4] for names in lines}):
        runs = {names[4]: line for names, line in lines.items() if names[:4] == (network, norm, budget, period)}
        base = {seed: lines.get((network, norm, budget, PERIOD, seed)) for seed in runs}
        held_in, train = (
            interval([run[name] - other[name] for seed, run in runs.items() if (other := base[seed])])
            for name in ("rate", "train_rate")
        )
        print(
            f"| {network}, {norm}, {budget:,} | {period} | {spread([run['rate'] for run in runs.values()])} "
            f"| {'' if period == PERIOD else held_in} | {mean(run['train_rate'] for run in runs.values()):.3f} "
            f"| {'' if period == PERIOD else train} | {mean(run['most_frequent_share'] for run in runs.values()):.2f} | {len(runs)} |"
        )


if __name__ == "__main__":
    main()
