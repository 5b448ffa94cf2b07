"""The network of benchmarks/chaos.py: it takes its time over each block, so that faults strike in the middle of one."""

import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

FLAGS = "UAP_DIST_CHAOS_FLAGS"  # names a folder; a file in it makes one worker do what its name says, once
PAUSE = "pause"  # as long as this file is there, no block is computed
BUG = "a bug in the network"
SECONDS_PER_BLOCK = 0.15


class Victim(nn.Module):
    """A small network on 16×16 images of four classes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8 * 64, 4)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits, after doing what a flag says."""
        if torch.is_grad_enabled():  # a solve
            time.sleep(SECONDS_PER_BLOCK)
            if FLAGS in os.environ:
                _obey(Path(os.environ[FLAGS]))
        return self.head(torch.tanh(self.conv(pixels / 64 - 2)).flatten(1))


def _obey(flags: Path) -> None:
    while (flags / PAUSE).exists():
        time.sleep(0.01)
    if _take(flags / "exit"):
        os._exit(1)
    if _take(flags / "raise"):
        raise RuntimeError(BUG)
    if _take(flags / "fill-memory"):
        hoard = []
        while True:
            hoard.append(np.ones(1 << 26))  # 512 MiB
            time.sleep(0.2)


def _take(flag: Path) -> bool:
    """Whether the flag was there; only one worker gets it."""
    try:
        flag.unlink()
    except FileNotFoundError:
        return False
    return True
