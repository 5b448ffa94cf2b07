"""Images on the device, with an edge around them for views, and what holds while many of them go through a network there."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from uap_dist.method.augment import draw_views, take_views
from uap_dist.method.norms import add_perturbation
from uap_dist.method.schedule import Round
from uap_dist.workers.dataset import Dataset
from uap_dist.workers.reproducible import Settings
from uap_dist.workers.worker import Worker

Precision = Literal["tf32", "bfloat16"]


@dataclass(frozen=True)
class Shown:
    """What is shown of which images in R rounds of B images at most.

    Attributes:
        rows: R×B, of `Pictures`.
        flips, shifts: R×B and R×B×2, as in `Views`.
        is_there: R×B; rounds at a pass's end have fewer than B images.
    """

    rows: np.ndarray
    flips: np.ndarray
    shifts: np.ndarray
    is_there: np.ndarray


class Pictures:
    """The images of some data sets on the worker's device, each with its clean label.

    Attributes:
        labels: of all images.
    """

    def __init__(self, worker: Worker, parts: Sequence[Dataset]) -> None:
        self.device = worker.device
        self._rows: dict[tuple[str, str], int] = {}
        blocks = [block for part in parts for block in part.blocks(part.num_examples)]
        for block in blocks:
            self._rows |= {(block.shard, k): len(self._rows) + i for i, k in enumerate(block.keys)}
        self._images = torch.tensor(np.concatenate([worker.pixels(block) for block in blocks])).to(self.device)
        self.labels = torch.tensor([label for block in blocks for label in block.labels], device=self.device)

    def rows(self, images: Dataset) -> np.ndarray:
        """Of a data set's images, in their order."""
        return np.array([self._rows[shard.url, key] for shard in images.shards for key in shard.keys])

    def whole(self, rows: np.ndarray) -> Tensor:
        """N×C×H×W float32 of images as they are."""
        return self._images[torch.as_tensor(rows, device=self.device)].float()

    def plan_views(self, images: Dataset, rounds: Sequence[Round], *, seed: int, size: int) -> Shown:
        """Of the rounds of a run on these images, of at most `size` each, as the rule's augmentation shows them."""
        own, shape = self.rows(images), (len(rounds), size)
        shown = Shown(np.zeros(shape, int), np.zeros(shape, bool), np.zeros((*shape, 2), int), np.zeros(shape, bool))
        for place, round_ in enumerate(rounds):
            end = 0
            for number, block in enumerate(round_.blocks):
                start, end = end, end + len(block.examples)
                rng, where = np.random.default_rng((seed, round_.number, number)), (place, slice(start, end))
                views = draw_views(end - start, self._images.shape[-1], "flip-shift", rng)
                shown.rows[where] = own[images.starts[block.shard] + np.array(block.examples)]
                shown.flips[where], shown.shifts[where] = views.flips, views.shifts
            shown.is_there[place, :end] = True
        return shown

    def views(self, rows: Tensor, flips: Tensor, shifts: Tensor) -> Tensor:
        """S×B×C×H×W float32 views of S×B images; all on the device."""
        found = take_views(self._images, rows.flatten(), flips.flatten(), shifts.flatten(0, 1))
        return found.unflatten(0, rows.shape).float()

    def fooled(self, classifier: nn.Module, images: Dataset, v: Tensor) -> tuple[float, float]:
        """The share of the images that v (C×H×W) fools, and the share of them that get the most frequent answer."""
        rows = self.rows(images)
        with torch.no_grad():
            shown = add_perturbation(self.whole(rows), v.to(self.device))
            answers = torch.cat([classifier(some).argmax(1) for some in shown.split(100)]).cpu()
        is_fooled = answers != self.labels.cpu()[rows]
        return round(float(is_fooled.double().mean()), 4), round(float(answers.bincount().max()) / len(answers), 4)


@contextmanager
def fast(device: torch.device, precision: Precision = "tf32") -> Iterator[None]:
    """Within this context a GPU convolves in TF32 with kernels that it has tried; with bfloat16 forward and backward are autocast to it."""
    before = Settings.now()
    quick = ("tf32",) * 3 + before.precisions[3:]  # those of the GPU come first
    replace(before, is_deterministic=False, tries_kernels=True, precisions=quick, old_precisions=("high", True)).apply()
    # without a cache of weights, which DM-UAP moves
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)
    try:
        with autocast:
            yield
    finally:
        before.apply()
