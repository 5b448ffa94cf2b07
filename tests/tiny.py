"""Networks of a user's own for the tests, on 16×16 images of four classes."""

import os
import time

import torch
from torch import nn


class Tiny(nn.Module):
    """Small, smooth and not linear, so that increments depend on where v is."""

    class_names = ("red", "green", "blue", "grey")

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8 * 64, 4)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)

    def forward(self, pixels):
        return self.head(torch.tanh(self.conv(pixels / 64 - 2)).flatten(1))


class Probabilities(Tiny):
    def forward(self, pixels):
        return super().forward(pixels).softmax(1)


class Sharper(Tiny):
    def forward(self, x):
        return 2 * super().forward(x)


class Misnamed(Tiny):
    class_names = ("one", "two", "three")


class Random(Tiny):
    def forward(self, pixels):
        return super().forward(pixels) + torch.rand(1)


class NoGradient(Tiny):
    def forward(self, pixels):
        with torch.no_grad():
            return super().forward(pixels)


class ThroughNumpy(Tiny):
    def forward(self, pixels):
        return super().forward(torch.from_numpy(pixels.detach().numpy()))


class Rounded(Tiny):
    def forward(self, pixels):
        return super().forward(pixels.round())


class Rooted(Tiny):
    def forward(self, pixels):
        return super().forward(pixels) + (0 * pixels).sqrt().sum((1, 2, 3))[:, None]


class Overflowing(Tiny):
    def forward(self, pixels):
        return super().forward(pixels) * float("inf")


class Half(Tiny):
    def forward(self, pixels):
        return super().forward(pixels).half()


class OneLogit(Tiny):
    def forward(self, pixels):
        return super().forward(pixels)[:, :1]


class Squeezed(Tiny):
    def forward(self, pixels):
        return super().forward(pixels).squeeze()


class OfBatch(Tiny):
    """Its batch norm has no running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, pixels):
        return super().forward(64 * (2 + self.norm(pixels)))


class Standardised(Tiny):
    """By the mean and deviation of all that it is given at once."""

    def forward(self, pixels):
        return super().forward(64 * (2 + (pixels - pixels.mean()) / pixels.std()))


class Lazy(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.LazyLinear(4)


class Resized(Tiny):
    input_size = 16


class SizedByShape(Tiny):
    input_size = (3, 16, 16)


class WronglyResized(Tiny):
    input_size = 20


class FreshHead(Tiny):
    """With other weights in its last layer each time that it is made."""

    def __init__(self) -> None:
        super().__init__()
        torch.seed()
        self.head = nn.Linear(8 * 64, 4)


class FreshBuffers(Tiny):
    """With random tensors that no weights file holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.seed()
        self.register_buffer("shift", torch.rand(4), persistent=False)
        self.scale = 1 + torch.rand(4)

    def forward(self, pixels):
        return super().forward(pixels) * self.scale + self.shift


class Unrepeatable(Tiny):
    """Uses a kernel that may give other bits the next time."""

    def forward(self, pixels):
        logits = super().forward(pixels)
        return logits + torch.zeros(4).put_(torch.tensor([0, 1]), torch.zeros(2))


class OwnPerProcess(Tiny):
    def forward(self, pixels):
        return super().forward(pixels) * (1 + os.getpid() * 1e-6)


class Deadly(Tiny):
    def forward(self, pixels):
        if len(pixels) == 3:
            os._exit(1)
        return super().forward(pixels)


class Sleepy(Tiny):
    """Long enough at one block of three images for its node to be killed meanwhile."""

    def forward(self, pixels):
        if len(pixels) == 3:
            time.sleep(6)
        return super().forward(pixels)


def not_a_network():
    return "a string"


class Normed(nn.Module):
    """With batch norm, a layer that its maker froze, and one that the logits do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.frozen = nn.Conv2d(3, 6, 1).requires_grad_(False)
        self.conv = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.unused = nn.Linear(2, 2)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(8 * 64, 4)

    def forward(self, pixels):
        x = torch.relu(self.norm(self.conv(self.frozen(pixels / 64 - 2))))
        return self.head(self.dropout(x.flatten(1)))


class Slow(Tiny):
    """A step takes long enough to be killed in the middle of an epoch."""

    def forward(self, pixels):
        if self.training:
            time.sleep(0.3)
        return super().forward(pixels)


class Other(Tiny):
    """With weights of its own, and logits three times as large."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)

    def forward(self, pixels):
        return 3 * super().forward(pixels)


class Renamed(Other):
    class_names = ("red", "blue", "green", "grey")


class FiveClasses(Other):
    class_names = ()

    def forward(self, pixels):
        logits = super().forward(pixels)
        return torch.cat([logits, logits.mean(1, keepdim=True)], 1)
