"""Perturbations as vectors: norms, projection onto a ball, random baselines, and adding one to images.

All of them are in pixels, the unit in which images have values of 0..255.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from uap_dist.errors import ConfigError

Norm = Literal["linf", "l2"]
SYMBOLS: dict[Norm, str] = {"linf": "ℓ∞", "l2": "ℓ2"}
IN_THE_CORNER = 0.99  # share of the largest ℓ2 norm within its ℓ∞ ball at which v counts as being in a corner
TINY = 1e-300  # in place of a norm of zero that is divided by
PAPER_NORM_L2, PAPER_NUM_VALUES = 2000.0, 3 * 224 * 224


def check_ball(norm: str, radius: float) -> None:
    """Raise ConfigError unless `norm` is a `Norm` and `radius` (pixels) is positive and finite."""
    if norm not in get_args(Norm):
        raise ConfigError(f"norm is {norm!r}; it must be one of {', '.join(get_args(Norm))}")
    if not 0 < radius < float("inf"):
        raise ConfigError(f"radius is {radius}; it must be a positive number of pixels (0..255)")


def add_perturbation(pixels: Tensor, perturbation: Tensor) -> Tensor:
    """clip(x + v, 0, 255): what the classifier is shown of images x (N×C×H×W) perturbed by v (C×H×W)."""
    return (pixels + perturbation).clamp_(0, 255)


def measure(v: Tensor, norm: Norm) -> float:
    """‖v‖ over all entries, computed in float64; the same bits on every device."""
    return float(norms(v.reshape(1, 1, -1), norm))


def norms(v: Tensor, norm: Norm) -> Tensor:
    """‖v‖ of one perturbation or of each of several (…×C×H×W, pixels), computed in float64; the same bits on every device."""
    values = v.detach().double().flatten(-3)
    return values.abs().amax(-1) if norm == "linf" else add_up(values.square()).sqrt()


def root_mean_square(v: Tensor) -> Tensor:
    """√(mean of v²) of each perturbation in …×C×H×W, computed in float64; the same bits on every device."""
    values = v.detach().double().flatten(-3)
    return (add_up(values.square()) / values.shape[-1]).sqrt()


def add_up(values: Tensor) -> Tensor:
    """Sums over the last dimension, with the same bits on every device and for any number of threads.

    The second half is added to the first one until one value is left, because the order in which `Tensor.sum` adds is torch's affair.
    """
    left: Any = values.numpy() if values.device.type == "cpu" else values  # NumPy's calls are shorter
    while (count := left.shape[-1]) > 1:
        half = (count + 1) // 2
        first, second = left[..., :half], left[..., half:]
        if count % 2:
            left = first + 0.0  # a copy
            left[..., : half - 1] += second
        else:
            left = first + second
    return torch.as_tensor(left[..., 0])


def project(v: Tensor, *, norm: Norm, radius: float) -> Tensor:
    """The point of the ball ‖·‖_p ≤ ξ that is nearest to v in ℓ2: P_{p,ξ}(v).

    Args:
        v: one perturbation or several, …×C×H×W, pixels.
        norm: p; "linf" clips each entry, "l2" scales the whole perturbation.
        radius: ξ, pixels.

    Raises:
        ConfigError: see `check_ball`.

    Source: Moosavi-Dezfooli et al., "Universal adversarial perturbations", CVPR 2017, section 3.
    """
    check_ball(norm, radius)
    if norm == "linf":
        return v.clamp(-radius, radius)
    factors = (radius / norms(v, "l2").clamp_min(TINY)).clamp_max(1.0)
    return v * factors[..., None, None, None].to(v.dtype)


def spread(norm: Norm, radius: float, num_values: int) -> float:
    """Root mean square, in pixels, of a perturbation of `num_values` entries that fills the ball; step sizes are multiples of it."""
    return radius if norm == "linf" else radius / num_values**0.5


def paper_norm_l2(shape: Sequence[int]) -> float:
    """ℓ2 norm (pixels) for images of a shape (C×H×W) with the same root mean square as the paper's 2000 on 3×224×224."""
    return PAPER_NORM_L2 * float(np.sqrt(np.prod(shape) / PAPER_NUM_VALUES))


def random_perturbation(shape: tuple[int, ...], *, norm: Norm, radius: float, seed: int) -> Tensor:
    """Random noise on the surface of a ball: entries ±radius for ℓ∞, a Gaussian direction for ℓ2; float32, pixels.

    Raises:
        ConfigError: see `check_ball`.
    """
    check_ball(norm, radius)
    generator = torch.Generator().manual_seed(seed)
    if norm == "linf":
        return radius * (2.0 * torch.randint(0, 2, shape, generator=generator) - 1)
    direction = torch.randn(shape, generator=generator)
    return direction * (radius / measure(direction, "l2"))


def random_of_same_norms(v: Tensor, *, seed: int) -> dict[Norm, Tensor]:
    """The random baselines of v: for each norm, noise that is as large as v in that norm; float32, pixels.

    If v is in a corner of its ℓ∞ ball, random signs have both its norms and serve as both baselines. Otherwise random signs are
    longer than v in ℓ2, and the ℓ2 baseline is a Gaussian direction of v's length.

    Args:
        v: C×H×W, pixels.
        seed: of the noise.
    """
    if not v.any():
        return {"linf": v, "l2": v}
    signs = random_perturbation(tuple(v.shape), norm="linf", radius=measure(v, "linf"), seed=seed)
    length = measure(v, "l2")
    if length >= IN_THE_CORNER * measure(signs, "l2"):
        return {"linf": signs, "l2": signs}
    return {"linf": signs, "l2": random_perturbation(tuple(v.shape), norm="l2", radius=length, seed=seed)}
