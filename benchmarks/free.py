"""Networks that cost nothing, so that a job around them shows all that is not network: benchmarks/free_network.py."""

import torch
from torch import nn


def at_224() -> nn.Module:
    """For photographs: a mean over each 32×32 pixels, and one linear layer."""
    return _make(224, 1000)


def at_32() -> nn.Module:
    """The same for images of 32×32 pixels."""
    return _make(32, 10)


def _make(side: int, num_classes: int) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.AvgPool2d(32), nn.Flatten(), nn.Linear(3 * (side // 32) ** 2, num_classes))
    network.input_size = side  # type: ignore[assignment]  # how own networks name it
    return network
