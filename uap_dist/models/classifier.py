"""Classifiers: pixels in, logits out; resizing, cropping and normalising belong to them and come with the weights."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from uap_dist.data.decode import Geometry
from uap_dist.models.weights import digest_weights

logger = logging.getLogger(__name__)


class Classifier(nn.Module):
    """Pixels (N×3×H×W, RGB 0..255) to logits (N×K); no parameter requires a gradient.

    Attributes:
        name: as given to `load_classifier`.
        geometry: how images are brought to the input size.
        class_names: K names, or none where they are not known.
        weights_digest: SHA-256 over the names, shapes and bytes of parameters and buffers, as they were loaded.
        trainable: names of the network's parameters that whoever made it left trainable.
        first_layer: name of the convolution through which alone the network sees the pixels, where `accelerate` found it.
    """

    mean: Tensor
    std: Tensor
    first_layer: str | None = None

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        geometry: Geometry,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1 / 255, 1 / 255, 1 / 255),
        class_names: Sequence[str] = (),
    ) -> None:
        """Wrap a network whose input is (pixels / 255 − mean) / std, by default the pixels themselves."""
        super().__init__()
        self.trainable = frozenset(name for name, parameter in network.named_parameters() if parameter.requires_grad)
        self.network = network.eval().requires_grad_(False)
        self.name = name
        self.geometry = geometry
        self.class_names = tuple(class_names)
        self.weights_digest = digest_weights(network)
        self.register_buffer("mean", 255 * torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std, dtype=torch.float32).view(3, 1, 1))
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits, N×K, of N×3×H×W pixels."""
        return self.network(self.normalise(pixels))

    def normalise(self, pixels: Tensor) -> Tensor:
        """What the network itself takes."""
        return (pixels - self.mean) / self.std

    def linearise(self, pixels: Tensor) -> tuple[Tensor, Sequence[Tensor] | Sequence[GradientEdge]]:
        """Logits, N×K, and where to take gradients (a list of one) whose sum over images `pull_back` brings to the pixels.

        This is behind the first layer where that is known, whose backward is linear: it need not be done for each image.
        """
        x = pixels.detach().requires_grad_()
        if self.first_layer is None:
            return self(x), [x]
        edges: list[GradientEdge] = []
        layer = self.get_submodule(self.first_layer)
        hook = layer.register_forward_hook(lambda _, __, output: edges.append(get_gradient_edge(output)))
        try:
            return self(x), edges
        finally:
            hook.remove()

    def pull_back(self, slope: Tensor, shape: Sequence[int]) -> Tensor:
        """The gradient to the pixels, C×H×W, of one where `linearise` takes it (1×…), for an input of C×H×W = `shape`."""
        if self.first_layer is None:
            return slope[0]
        x = torch.zeros(1, *shape, device=slope.device, requires_grad=True)
        with torch.enable_grad():
            output = self.get_submodule(self.first_layer)(self.normalise(x))
        return torch.autograd.grad(output, x, slope)[0][0]
