"""Random views of training images, drawn for each image separately."""

from typing import Literal, get_args

import numpy as np

from uap_dist.errors import ConfigError

Augmentation = Literal["none", "flip", "flip-shift"]
SHIFT_SHARE = 28  # shifts are at most side/28: 8 pixels at 224, 1 at 32


def check_augmentation(augmentation: str) -> None:
    """Raise ConfigError unless it is an `Augmentation`."""
    if augmentation not in get_args(Augmentation):
        raise ConfigError(f"augment is {augmentation!r}; it must be one of {', '.join(get_args(Augmentation))}")


def augment(images: np.ndarray, augmentation: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """Random views of N×C×H×W images, with their shape and dtype.

    Each image is mirrored with probability 1/2 and, for "flip-shift", moved by up to side/28 in both directions, its edge
    pixels repeated. One draw for a whole batch instead would cost a tenth of the fooling rate on EfficientNet-Lite0.
    """
    if augmentation == "none":
        return images
    flips = rng.random(len(images)) < 0.5
    views = np.where(flips[:, None, None, None], images[..., ::-1], images)
    if augmentation == "flip":
        return views
    reach = max(1, images.shape[-1] // SHIFT_SHARE)
    height, width = images.shape[2:]
    padded = np.pad(views, ((0, 0), (0, 0), (reach, reach), (reach, reach)), mode="edge")
    corners = rng.integers(0, 2 * reach + 1, size=(len(images), 2))
    return np.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, corners, strict=True)])
