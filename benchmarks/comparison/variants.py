"""Variants of the rule, in a loop that is short enough to change."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uap_dist.method.augment import Augmentation, augment
from uap_dist.method.log_odds import log_odds
from uap_dist.method.norms import Norm, add_perturbation, project, root_mean_square
from uap_dist.method.update import FULL_STEPS, cosine, default_step_size, finish, repeat_mean
from uap_dist.workers.worker import Worker

RADIUS = {"linf": (10.0, 10.0), "l2": (2000.0, 285.7)}  # of 224×224 images, of 32×32 ones: alike per pixel


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The rule, in rounds of 24 and without repetition unless it says so."""

    weight: str = "even"
    """Of an image's gradient of the log-odds f: even (margin 500), sigmoid σ((f + offset)/width), bell (that sigmoid's slope),
    entropy (the cross-entropy's, clamped)."""
    offset: float = 10.0
    width: float = 5.0
    clamp: float = 12.0
    relative: bool = False
    """Offset and width are in units of a mean |f|, not of logits: the batch's, or with a memory that of earlier steps."""
    memory: float = 0.0
    """Of that mean: the share that stays with each step."""
    raw: bool = False
    """Sums enter the momentum as they are, not at mean absolute value 1."""
    late: bool = False
    """Weights go over from even to the named ones during the run."""
    momentum: float = 0.9
    nesterov: bool = False
    direction: str = "sign"
    """sign, adam (divided by the root of a running mean square), soft (m/(|m| + mean |m|)); for l2 plain."""
    power: float = 1.0
    """For l2, of the momentum's values: 0 is their sign."""
    spectral: float = 1.0
    """For l2, of the size of the momentum's frequencies."""
    narrow: float = 1.0
    """Factor on the width at the end of the run, reached exponentially."""
    step: float = 1.0
    """Factor on the first step of few steps, 0.8 of the radius (ℓ2: 1.2 of what fills the ball)."""
    decay: float = 1.0
    """Beyond 125 steps the first one falls as so high a power of 1/steps."""
    average: float = 0.0
    """Share of the last rounds whose iterates are averaged."""
    drop: float = 0.0
    """Share of the pixels where v is left out, drawn per image."""
    period: int = 0
    """Pixels after which steps repeat themselves; 0: they do not."""
    fades: bool = False
    """The share of the repeated in a step falls to nothing during the run."""
    until: float = 1.0
    """Progress from which on steps do not repeat themselves."""
    mirror: bool = False
    """Steps are mirror images of themselves."""
    augment: Augmentation = "flip-shift"
    round_size: int = 24
    """Of a batch."""
    local_steps: int = 1
    """Batches of a block, each a step on the block's own copy of v and momentum."""
    num_blocks: int = 1
    """Blocks of a round, whose ends are averaged."""
    num_images: int = 0
    """That increments are computed from, if need be of more shards; 0: the shards that tune.py computes from."""
    skip_dominant: float = 1.0
    """Images whose clean label is that of so large a share of the network's answers get no weight."""
    aim: int = -1
    """A label that all images are sent to: f is then z_y − z_aim, and its own images get no weight."""
    through: float = 0.0
    """Progress from which on increments are computed at P(4 v), what is delivered, and applied to v."""
    bf16: bool = False
    """Convolutions in bfloat16: less time on CPUs that have it (SqueezeNet), for exploring."""
    target_bias: float = 0.0
    """Of log popularity (labels under v so far) added to the other logits: above 0 the most frequent ends attract more."""


@dataclass(frozen=True)
class State:
    """What a step starts from; the last two serve variants only: running mean of squares, labels' share of the answers."""

    v: Tensor
    momentum: Tensor
    square: Tensor
    popularity: Tensor
    unit: Tensor = torch.tensor(torch.inf)


class Trial:
    """One run."""

    def __init__(self, worker: Worker, images: np.ndarray, labels: np.ndarray, variant: Variant, norm: Norm):
        self.classifier, self.device, self.variant, self.norm = worker.classifier, worker.device, variant, norm
        count = min(variant.num_images or len(images), len(images))
        self.images, self.labels = images[:count], labels[:count]
        self.radius = RADIUS[norm][images.shape[-1] <= 32]

    def compute(self, seed: int, budget: int) -> Tensor:
        """V as it is delivered."""
        variant = self.variant
        cost = 2 * variant.round_size * variant.num_blocks * variant.local_steps
        num_rounds = (budget - len(self.images)) // cost
        num_steps = num_rounds * variant.local_steps
        start = variant.step * default_step_size(
            norm=self.norm, radius=self.radius, num_values=self.images[0].size, num_steps=1
        )
        start *= min(1.0, FULL_STEPS / num_steps) ** variant.decay
        rng = np.random.default_rng(seed)
        batches = self.batches(rng)
        zero = torch.zeros(self.images.shape[1:], dtype=torch.float64)
        with torch.no_grad():
            num_classes = self.classifier(torch.tensor(self.images[:1], device=self.device).float()).shape[1]
        state = State(zero, zero, zero, torch.full((num_classes,), 1 / num_classes))
        mean_v = zero
        for number in range(num_rounds):
            ends = []
            for _ in range(variant.num_blocks):
                end = state
                for step in range(number * variant.local_steps, (number + 1) * variant.local_steps):
                    end = self.step(end, next(batches), cosine(start, step, num_steps), step / num_steps, rng)
                ends.append(end)
            state = State(
                *(sum(field) / len(ends) for field in zip(*(vars(end).values() for end in ends), strict=True))
            )
            if number >= (1 - variant.average) * num_rounds:
                mean_v = mean_v + state.v
        v = state.v
        if variant.average:
            v = mean_v / mean_v.abs().max() * self.radius if self.norm == "linf" else mean_v
        return finish(project(v, norm=self.norm, radius=self.radius), norm=self.norm, radius=self.radius)

    def batches(self, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Rows, every image once a pass."""
        order = np.empty(0, int)
        while True:
            while len(order) < self.variant.round_size:
                order = np.concatenate([order, rng.permutation(len(self.images))])
            yield order[: self.variant.round_size]
            order = order[self.variant.round_size :]

    def step(self, state: State, rows: np.ndarray, size: float, progress: float, rng: np.random.Generator) -> State:
        """One batch's."""
        variant = self.variant
        x = torch.tensor(augment(self.images[rows], variant.augment, rng), device=self.device).float()
        shown = state.v
        if variant.through and progress >= variant.through - 1e-9:
            shown = finish(shown, norm=self.norm, radius=self.radius)
        shown = shown.float().to(self.device).expand_as(x)
        if variant.drop:
            shown = shown * torch.tensor(rng.random((len(x), 1, *x.shape[2:])) >= variant.drop, device=self.device)
        labels = torch.tensor(self.labels[rows], device=self.device)
        total, answers, unit = self.solve(x, shown, labels, progress, state)
        total = total if variant.raw else total / total.abs().mean().clamp(min=1e-300)
        momentum = variant.momentum * state.momentum + total
        square = 0.99 * state.square + 0.01 * total.square()
        ahead = total + variant.momentum * momentum if variant.nesterov else momentum
        if variant.mirror:
            ahead = (ahead + ahead.flip(-1)) / 2
        if variant.period:
            share = 1 - progress if variant.fades else float(progress < variant.until)
            ahead = (1 - share) * ahead + share * repeat_mean(ahead, variant.period)
        if self.norm == "l2":
            if variant.spectral != 1:
                waves = torch.fft.rfft2(ahead)
                ahead = torch.fft.irfft2(waves * waves.abs() ** (variant.spectral - 1), s=ahead.shape[1:])
            direction = ahead.sign() * ahead.abs() ** variant.power
            direction = direction / root_mean_square(direction)
        elif variant.direction == "sign":
            direction = ahead.sign()
        elif variant.direction == "adam":
            direction = ahead / square.sqrt().clamp(min=1e-9)
            direction = direction / direction.abs().mean()
        else:
            direction = ahead / (ahead.abs() + ahead.abs().mean())
        v = project(state.v + size * direction, norm=self.norm, radius=self.radius)
        if state.unit.isfinite():
            unit = variant.memory * state.unit + (1 - variant.memory) * unit
        return State(v, momentum, square, 0.9 * state.popularity + 0.1 * answers, unit)

    def solve(
        self, x: Tensor, shown: Tensor, labels: Tensor, progress: float, state: State
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted sum of the gradients (C×H×W float64), each label's share of the answers, the mean |f|."""
        popularity = state.popularity.to(self.device)
        with torch.enable_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.variant.bf16):
            logits, leaf = self.classifier.linearise(add_perturbation(x, shown))
            logits = logits.float()
            bias = self.variant.target_bias * (popularity * logits.shape[1]).clamp(min=1e-3).log()
            gaps = log_odds(logits + bias, labels)
            is_dominant = popularity[labels] > self.variant.skip_dominant
            if self.variant.aim >= 0:
                gaps = logits.gather(1, labels[:, None])[:, 0] - logits[:, self.variant.aim]
                is_dominant = labels == self.variant.aim
            weights = torch.where(is_dominant, 0.0, weigh(gaps.detach(), progress, self.variant, state.unit))
            (slopes,) = torch.autograd.grad((weights * gaps).sum(), leaf)
        total = -self.classifier.pull_back(slopes.sum(0, keepdim=True), x.shape[1:])[0].double()
        answers = logits.detach().softmax(1).mean(0)
        return total.cpu(), answers.cpu(), gaps.detach().abs().mean().cpu()


def weigh(gaps: Tensor, progress: float, variant: Variant, known: Tensor) -> Tensor:
    """N weights of log-odds, whose mean size is known from earlier steps."""
    even = torch.ones_like(gaps)
    unit = (known if variant.memory else gaps.abs().mean()) if variant.relative else torch.tensor(1.0)
    share = torch.sigmoid((gaps / unit + variant.offset) / (variant.width * variant.narrow**progress))
    named = {
        "even": even,
        "sigmoid": share,
        "bell": 4 * share * (1 - share),
        "entropy": torch.where(gaps > -variant.clamp, torch.sigmoid(-gaps), 0.0),
    }[variant.weight]
    return (1 - progress) * even + progress * named if variant.late else named
