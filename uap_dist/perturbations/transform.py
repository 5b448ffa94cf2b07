"""A torchvision-style transform that adds a random perturbation of a pool."""

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from uap_dist.errors import PerturbationError
from uap_dist.perturbations.files import Perturbation
from uap_dist.perturbations.pool import PerturbationPool


class AddUniversalPerturbation(v2.Transform):
    """Add a random member of a pool to an image with some probability: clip(x + v, 0, largest value).

    For any DataLoader: images C×H×W or batches N×C×H×W, where each image draws for itself; labels and other things beside the
    image pass through, as with every v2 transform. Draws come from torch's generator, which DataLoader seeds for each worker.
    uint8 images are rounded; float images are in 0..`float_range`. A pool of another size than the images is resized
    (bilinear, antialiased), pixel values staying as large as they are.
    """

    def __init__(self, pool: PerturbationPool, probability: float = 0.5, *, float_range: float = 255.0) -> None:
        """Of a pool.

        Args:
            pool: perturbations to draw from, all equally likely.
            probability: that an image is perturbed.
            float_range: largest value of float images: 255 for pixels as in this package, 1 as in torchvision.

        Raises:
            PerturbationError: a probability outside [0, 1] or a range that is neither 1 nor 255.
        """
        super().__init__()
        if not 0 <= probability <= 1:
            raise PerturbationError(f"probability is {probability}; it must lie in [0, 1]")
        if float_range not in (1, 255):
            raise PerturbationError(f"float range is {float_range}; it must be 1 or 255")
        self.perturbations = pool.perturbations
        self._by_shape: dict[tuple[int, ...], Tensor] = {}
        self.probability = probability
        self.float_range = float(float_range)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """See v2.Transform.

        Raises:
            PerturbationError: images that are no tensors, not 3×H×W, or integers that are not uint8.
        """
        if isinstance(inpt, tv_tensors.TVTensor) and not isinstance(inpt, tv_tensors.Image | tv_tensors.Video):
            return inpt  # boxes, masks
        if not isinstance(inpt, Tensor):
            raise PerturbationError(f"images are {type(inpt).__name__}; put v2.PILToTensor() before this transform")
        if inpt.ndim < 3 or inpt.shape[-3] != self.perturbations.shape[1]:
            raise PerturbationError(f"images of shape {tuple(inpt.shape)} are not {self.perturbations.shape[1]}×H×W")
        if not (inpt.is_floating_point() or inpt.dtype == torch.uint8):
            raise PerturbationError(f"images are {inpt.dtype}; give uint8, or floats in 0..{self.float_range:g}")
        images = inpt.reshape(-1, *inpt.shape[-3:])
        added, is_perturbed = self.draw(len(images), tuple(images.shape[-3:]))
        added = added.to(images.device)
        unit = 1.0 if inpt.dtype == torch.uint8 else self.float_range / 255
        largest = 255.0 if inpt.dtype == torch.uint8 else self.float_range
        shown = (images.float() + unit * added).clamp(0, largest)
        if inpt.dtype == torch.uint8:
            shown = shown.round()
        mask = is_perturbed.view(-1, 1, 1, 1).to(images.device)
        result = torch.where(mask, shown.to(inpt.dtype), images).reshape(inpt.shape)
        return tv_tensors.wrap(result, like=inpt) if isinstance(inpt, tv_tensors.TVTensor) else result

    def draw(self, num_images: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """For each image of C×H×W = `shape` a random member at that size (N×C×H×W, pixels), and whether it is to be added (N)."""
        chosen = torch.randint(len(self.perturbations), (num_images,))
        is_perturbed = torch.rand(num_images) < self.probability
        return self._at_size(shape)[chosen], is_perturbed

    def _at_size(self, shape: tuple[int, ...]) -> Tensor:
        if shape not in self._by_shape:
            self._by_shape[shape] = torch.stack([Perturbation("", v).resized(shape) for v in self.perturbations])
        return self._by_shape[shape]
