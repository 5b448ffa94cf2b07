"""A torchvision transform (v2) that adds a random perturbation of a pool."""

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from uap_dist.errors import PerturbationError
from uap_dist.perturbations.pool import PerturbationPool


class AddUniversalPerturbation(v2.Transform):
    """Adds a random member v of a pool to images with some probability: clip(x + v, 0, largest value).

    It takes images (C×H×W) or batches (N×C×H×W), in which each image draws for itself; labels, boxes and masks pass through, as in
    other v2 transforms. It draws from torch's default generator, which DataLoader seeds in each of its workers. uint8 images are
    rounded; float images have values of 0..`float_range`. If the pool has another size than the images, its members are resized
    (see `Perturbation.resized`).
    """

    def __init__(self, pool: PerturbationPool, probability: float = 0.5, *, float_range: float = 255.0) -> None:
        """Create the transform.

        Args:
            pool: perturbations to draw from, all equally likely.
            probability: of an image being perturbed.
            float_range: largest value of float images: 255 as in this package, or 1 as in torchvision.

        Raises:
            PerturbationError: the probability is outside [0, 1], or the range is neither 1 nor 255.
        """
        super().__init__()
        if not 0 <= probability <= 1:
            raise PerturbationError(f"probability is {probability}; it must lie in [0, 1]")
        if float_range not in (1, 255):
            raise PerturbationError(f"float range is {float_range}; it must be 1 or 255")
        self._pool, self.perturbations = pool, pool.perturbations
        self._by_shape: dict[tuple[int, ...], Tensor] = {}
        self.probability = probability
        self.float_range = float(float_range)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Perturb images; see v2.Transform.

        Raises:
            PerturbationError: images are not tensors, not C×H×W with the pool's C, or integers other than uint8.
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
        chosen = torch.randint(len(self.perturbations), (len(images),))
        is_perturbed = torch.rand(len(images)) < self.probability
        added = self._at_size(tuple(images.shape[-3:]))[chosen].to(images.device)
        unit = 1.0 if inpt.dtype == torch.uint8 else self.float_range / 255
        largest = 255.0 if inpt.dtype == torch.uint8 else self.float_range
        shown = (images.float() + unit * added).clamp(0, largest)
        if inpt.dtype == torch.uint8:
            shown = shown.round()
        mask = is_perturbed.view(-1, 1, 1, 1).to(images.device)
        result = torch.where(mask, shown.to(inpt.dtype), images).reshape(inpt.shape)
        return tv_tensors.wrap(result, like=inpt) if isinstance(inpt, tv_tensors.TVTensor) else result

    def _at_size(self, shape: tuple[int, ...]) -> Tensor:
        if shape not in self._by_shape:
            self._by_shape[shape] = self._pool.resized(shape)
        return self._by_shape[shape]
