"""Norms of a perturbation and the projection onto their balls; the only module that tells ℓ2 from ℓ∞."""

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from uap_dist.errors import ConfigError

Norm = Literal["linf", "l2"]
SYMBOLS: dict[Norm, str] = {"linf": "ℓ∞", "l2": "ℓ2"}
IN_THE_CORNER = 0.99  # of the ℓ2 norm that the corner of the ℓ∞ ball has: v is taken to be there


def check_ball(norm: str, radius: float) -> None:
    """Raise ConfigError unless `norm` is one of Norm and `radius` (pixels) is positive and finite."""
    if norm not in get_args(Norm):
        raise ConfigError(f"norm is {norm!r}; it must be one of {', '.join(get_args(Norm))}")
    if not 0 < radius < float("inf"):
        raise ConfigError(f"radius is {radius}; it must be a positive number of pixels (0..255)")


def measure(v: Tensor, norm: Norm) -> float:
    """‖v‖ of the whole tensor in pixels, in float64; the same bits for any number of threads."""
    values = _values(v)
    return float(np.abs(values).max() if norm == "linf" else np.sqrt(np.square(values).sum()))


def root_mean_square(v: Tensor) -> float:
    """√(mean of v²) over all entries, in float64; the same bits for any number of threads."""
    return float(np.sqrt(np.square(_values(v)).mean()))


def project(v: Tensor, *, norm: Norm, radius: float) -> Tensor:
    """The point of the ball ‖·‖ ≤ radius that is nearest to v in ℓ2.

    Args:
        v: any shape, pixels.
        norm: "linf" clips each entry, "l2" scales the whole.
        radius: ξ, pixels.

    Source: P_{p,ξ} of Moosavi-Dezfooli et al., "Universal adversarial perturbations", CVPR 2017, section 3.
    """
    check_ball(norm, radius)
    if norm == "linf":
        return v.clamp(-radius, radius)
    return v * min(1.0, radius / max(measure(v, "l2"), 1e-300))


def spread(norm: Norm, radius: float, num_values: int) -> float:
    """Root mean square in pixels of a perturbation that fills the ball: the yardstick for steps."""
    return radius if norm == "linf" else radius / num_values**0.5


def random_perturbation(shape: tuple[int, ...], *, norm: Norm, radius: float, seed: int) -> Tensor:
    """The baseline: ±radius at random for ℓ∞, a Gaussian direction of length radius for ℓ2; float32, pixels."""
    check_ball(norm, radius)
    generator = torch.Generator().manual_seed(seed)
    if norm == "linf":
        return radius * (2.0 * torch.randint(0, 2, shape, generator=generator) - 1)
    direction = torch.randn(shape, generator=generator)
    return direction * (radius / measure(direction, "l2"))


def random_of_same_norms(v: Tensor, *, seed: int) -> dict[Norm, Tensor]:
    """What v has to be better than: for each norm a random perturbation that is as large as v in it; float32, pixels.

    Where v lies in a corner of its ℓ∞ ball, random signs of its ℓ∞ norm have its ℓ2 norm too and stand for both. Elsewhere they are
    longer, and a Gaussian direction has v's ℓ2 norm.

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


def _values(v: Tensor) -> np.ndarray:
    """For sums by numpy, which unlike torch's do not depend on the number of threads."""
    return v.detach().cpu().double().numpy()
