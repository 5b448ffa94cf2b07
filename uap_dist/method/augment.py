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
    reach = max(1, images.shape[-1] // SHIFT_SHARE) if augmentation == "flip-shift" else 0
    shifts = reach - rng.integers(0, 2 * reach + 1, size=(len(images), 2))
    views = np.empty_like(images)
    for view, image, is_flipped, (down, right) in zip(views, images, flips, shifts.tolist(), strict=True):
        _shift(image[..., ::-1] if is_flipped else image, down, right, out=view)
    return views


def _shift(image: np.ndarray, down: int, right: int, out: np.ndarray) -> None:
    """Write an image (C×H×W), moved by so many pixels, to `out`; edge pixels are repeated."""
    (to_rows, rows), (to_columns, columns) = (_overlap(shift) for shift in (down, right))
    out[:, to_rows, to_columns] = image[:, rows, columns]
    if right > 0:
        out[:, to_rows, :right] = out[:, to_rows, right : right + 1]
    elif right < 0:
        out[:, to_rows, right:] = out[:, to_rows, right - 1 : right]
    if down > 0:
        out[:, :down] = out[:, down : down + 1]
    elif down < 0:
        out[:, down:] = out[:, down - 1 : down]


def _overlap(shift: int) -> tuple[slice, slice]:
    """Where pixels go along an axis that is shifted, and where they come from."""
    return (slice(shift, None), slice(None, -shift)) if shift > 0 else (slice(None, shift or None), slice(-shift, None))
