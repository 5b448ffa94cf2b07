"""Classifiers: networks together with the preprocessing that their weights were trained with. Pixels in, logits out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import and_
from reprlib import repr as shortened
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from uap_dist.data.decode import Geometry
from uap_dist.errors import ClassifierError
from uap_dist.models.weights import digest_weights

ClassNames = Sequence[str] | Mapping[Any, str]  # in the order of the labels, or by label as id2label of transformers


class Classifier(nn.Module):
    """Maps pixels (N×3×H×W, RGB 0..255) to logits (N×K). It is in evaluation mode, and no parameter requires a gradient.

    Attributes:
        name: as given to `load_classifier`.
        geometry: how images are brought to the input size.
        class_names: K names; empty if they are not known.
        weights_digest: of the network as it was loaded, see `digest_weights`.
        trainable: names of the parameters that required a gradient when the network was passed in.
        networks: names of its networks, where it has several (see `Several`); empty otherwise.
        first_layer: name of the convolution through which alone the network sees the pixels; None unless `accelerate` found one.
    """

    mean: Tensor
    std: Tensor
    first_layer: str | None = None
    networks: tuple[str, ...] = ()

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        geometry: Geometry,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1 / 255, 1 / 255, 1 / 255),
        class_names: ClassNames | None = None,
    ) -> None:
        """Wrap a network whose input is (pixels / 255 − mean) / std; with the defaults this is the pixels themselves.

        Raises:
            ClassifierError: the names are neither a list or tuple of str nor a dict of them by label.
        """
        super().__init__()
        self.trainable = frozenset(name for name, parameter in network.named_parameters() if parameter.requires_grad)
        self.network = network.eval().requires_grad_(False)
        self.name = name
        self.geometry = geometry
        self.class_names = _by_label(class_names, name)
        self.weights_digest = digest_weights(network)
        self.register_buffer("mean", 255 * torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std, dtype=torch.float32).view(3, 1, 1))
        self.eval()

    @property
    def members(self) -> "Sequence[Classifier]":
        """The classifiers that it consists of: itself alone, unless it has several networks."""
        return (self,)

    @property
    def given(self) -> "str | tuple[str, ...]":
        """What `load_classifier` was given to load it."""
        return self.name

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (N×K) of pixels (N×3×H×W); under torch.autocast they are float32 all the same.

        Raises:
            ClassifierError: the network returns several tensors, and it is not clear which are the logits.
        """
        output = self.network(self.normalise(pixels))
        logits = output if isinstance(output, Tensor) else _find_logits(output, len(pixels), self.name)
        return logits.float() if torch.is_autocast_enabled(pixels.device.type) else logits

    def count_labels(self, shape: Sequence[int]) -> int:
        """K, the number of logits for an image of that shape (C×H×W)."""
        with torch.no_grad():
            return self(torch.zeros(1, *shape, device=self.mean.device)).shape[-1]

    def normalise(self, pixels: Tensor) -> Tensor:
        """The network's own input: (pixels / 255 − mean) / std."""
        return (pixels - self.mean) / self.std

    def linearise(self, pixels: Tensor) -> tuple[Tensor, Sequence[Tensor] | Sequence[GradientEdge]]:
        """A forward pass for gradients that are summed over images.

        The gradient of a sum over images, with respect to a perturbation that all of them share, is the sum of the images'
        gradients. Since the backward pass of a convolution is linear, gradients can be summed at the output of the first layer,
        and that layer passed backward once by `pull_back` instead of once per image.

        Returns:
            Logits (N×K), and a list with the one input to give to `torch.autograd.grad`, which is the output of the first layer
            if that is known, and otherwise the pixels.
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

    def pull_back(self, slopes: Tensor, shape: Sequence[int]) -> Tensor:
        """Gradients with respect to the pixels (M×C×H×W) from M sums of gradients at the place that `linearise` returned.

        Args:
            slopes: M×…, each the sum over some images.
            shape: C×H×W of an image.
        """
        if self.first_layer is None:
            return slopes
        x = torch.zeros(len(slopes), *shape, device=slopes.device, requires_grad=True)
        with torch.enable_grad():
            output = self.get_submodule(self.first_layer)(self.normalise(x))
        return torch.autograd.grad(output, x, slopes.to(output.dtype))[0]


@dataclass(frozen=True)
class Predictions:
    """What the classifier says of N images.

    Attributes:
        labels: N, int64, the classes with the largest logits; of several networks N×S.
        confidences: their softmax probabilities, float32, in the same shape.
        networks: S names, if they are several.
    """

    labels: np.ndarray
    confidences: np.ndarray
    networks: tuple[str, ...] = ()

    @classmethod
    def unknown(cls, num_images: int) -> "Predictions":
        """In place of those that are still to be made."""
        return cls(np.full(num_images, -1), np.zeros(num_images, np.float32))

    def each(self) -> Iterator[tuple[str, "Predictions"]]:
        """Those of each network, with its name; of one network themselves, without a name."""
        if not self.networks:
            yield "", self
        for number, name in enumerate(self.networks):
            yield name, Predictions(self.labels[:, number], self.confidences[:, number])

    def differ_from(self, others: "Predictions") -> np.ndarray:
        """Mask of the images (N, bool) whose labels are other ones, of several networks those of each."""
        differ = self.labels != others.labels
        return reduce(and_, differ.T) if self.networks else differ


def _by_label(given: Any, name: str) -> tuple[str, ...]:
    """Names of the classes in the order of their labels; none for None.

    Raises:
        ClassifierError: they are neither a list or tuple of str nor a dict with a str for each label.
    """
    names = () if given is None else given
    if isinstance(given, Mapping):
        of_label = {str(label): each for label, each in given.items()}  # labels are strings in JSON
        names = [of_label.get(str(label)) for label in range(len(given))]
    if isinstance(names, list | tuple) and all(isinstance(each, str) for each in names):
        return tuple(names)
    raise ClassifierError(
        f"{name} has class_names {shortened(given)}; they must be a list of str in the order of the logits, or a dict of them by "
        "label (0, 1, …)"
    )


def _find_logits(output: Any, num_images: int, name: str) -> Tensor:
    """What is named logits in an output that is no tensor, or the only matrix with a row for each image in it.

    Raises:
        ClassifierError: there is none, or more than one.
    """
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    is_named = isinstance(output, Mapping)
    values = output.values() if is_named else output if isinstance(output, tuple | list) else ()
    tensors = [value for value in values if isinstance(value, Tensor)]
    found = [value for value in tensors if value.dim() == 2 and len(value) == num_images]
    if len(found) == 1:
        return found[0]
    shapes = ", ".join("×".join(map(str, value.shape)) for value in tensors)
    keys = f" under {', '.join(map(repr, output))}" if is_named else ""
    raise ClassifierError(
        f"{name} returns {type(output).__name__} with {f'tensors of {shapes}' if tensors else 'no tensor'}{keys}; its logits are not "
        "recognisable in it: return them alone, or under the name logits"
    )
