"""Random views of training images, drawn for each image separately: of the images, and of the perturbed images."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from uap_dist.errors import ConfigError

Augmentation = Literal["none", "flip", "flip-shift"]
SHIFT_SHARE = 28  # shifts are at most side/28: 8 pixels at 224, 1 at 32
GREY = 127.5  # what surrounds an image that zooming made smaller


def check_augmentation(augmentation: str) -> None:
    """Raise ConfigError unless it is an `Augmentation`."""
    if augmentation not in get_args(Augmentation):
        raise ConfigError(f"augment is {augmentation!r}; it must be one of {', '.join(get_args(Augmentation))}")


@dataclass(frozen=True)
class Views:
    """Random views of N images.

    Attributes:
        flips: N, bool, which images are mirrored.
        shifts: N×2 int64, pixels by which an image is then moved down and to the right; its edge pixels are repeated.
        zooms: N×3 int64, see `zoom`; None for perturbed images as they are.
    """

    flips: np.ndarray
    shifts: np.ndarray
    zooms: np.ndarray | None = None


def draw_views(
    num_images: int, side: int, augmentation: Augmentation, rng: np.random.Generator, max_zoom: float = 0.0
) -> Views:
    """Views of images of so many pixels across.

    Each image is mirrored with probability 1/2 and, for "flip-shift", moved by up to side/28 in both directions. One draw for a
    whole batch instead would cost a tenth of the fooling rate on EfficientNet-Lite0. With `max_zoom`, the perturbed image gets a
    side between (1 − max_zoom) and (1 + max_zoom) times its own, and is placed at random where it leaves room, or else cut at random.
    """
    if augmentation == "none":
        flips, shifts = np.zeros(num_images, bool), np.zeros((num_images, 2), np.int64)
    else:
        flips = rng.random(num_images) < 0.5
        reach = max(1, side // SHIFT_SHARE) if augmentation == "flip-shift" else 0
        shifts = reach - rng.integers(0, 2 * reach + 1, size=(num_images, 2))
    if not max_zoom:
        return Views(flips, shifts)
    sides = rng.integers(round((1 - max_zoom) * side), round((1 + max_zoom) * side) + 1, size=num_images)
    room = (side - sides)[:, None]
    places = rng.integers(np.minimum(room, 0), np.maximum(room, 0) + 1, size=(num_images, 2))
    return Views(flips, shifts, np.column_stack([sides, places]))


def augment(images: np.ndarray, augmentation: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """Random views (see `draw_views`) of N×C×H×W images, with their shape and dtype."""
    if augmentation == "none":
        return images
    return show(images, draw_views(len(images), images.shape[-1], augmentation, rng))


def show(images: np.ndarray, views: Views) -> np.ndarray:
    """Views of N×C×H×W images, with their shape and dtype."""
    shown = np.empty_like(images)
    for view, image, is_flipped, (down, right) in zip(shown, images, views.flips, views.shifts.tolist(), strict=True):
        _shift(image[..., ::-1] if is_flipped else image, down, right, out=view)
    return shown


def take_views(images: Tensor, rows: Tensor, flips: Tensor, shifts: Tensor) -> Tensor:
    """What `show` makes of some of many images, in one operation on their device.

    Args:
        images: C×H×W each.
        rows: N, indices of the images.
        flips: N, as in `Views`.
        shifts: N×2, likewise.
    """
    (channels, height, width), device = images.shape[1:], images.device
    down = (torch.arange(height, device=device) - shifts[:, :1]).clamp(0, height - 1)
    right = (torch.arange(width, device=device) - shifts[:, 1:]).clamp(0, width - 1)
    right = torch.where(flips[:, None], width - 1 - right, right)
    channel = torch.arange(channels, device=device).view(-1, 1, 1)
    return images[rows.view(-1, 1, 1, 1), channel, down[:, None, :, None], right[:, None, None, :]]


def zoom(pixels: Tensor, zooms: Tensor) -> Tensor:
    """Images at other sizes, in frames of the old size: bilinear and antialiased, and differentiable. Around smaller ones is GREY.

    Args:
        pixels: N×C×H×W, 0..255.
        zooms: N×3 int64: an image's new width, and the row and column of the frame where its upper left corner comes to lie; they are
            negative where it is cut.
    """
    height, width = pixels.shape[-2:]
    widths, down, right = zooms.to(pixels.dtype).unbind(1)
    scales = widths / width
    rows, columns = _resampling(height, scales, down), _resampling(width, scales, right)
    # two products instead of `interpolate`, whose backward pass is not deterministic on GPUs
    with torch.autocast(pixels.device.type, enabled=False):
        return rows @ (pixels - GREY) @ columns.mT + GREY


def _resampling(length: int, scales: Tensor, starts: Tensor) -> Tensor:
    """N×1×length×length matrices that scale a line of pixels and move it; places that it does not reach get zero."""
    pixel = torch.arange(length, device=scales.device)
    source = (pixel + 0.5 - starts[:, None]) / scales[:, None] - 0.5
    reach = (1 / scales).clamp_min(1)[:, None, None]  # antialiased: all pixels that fall into one
    weights = (1 - (source[..., None] - pixel).abs() / reach).clamp_min(0)
    is_inside = (source >= -0.5) & (source <= length - 0.5)
    return (weights / weights.sum(-1, keepdim=True)).where(is_inside[..., None], 0)[:, None]


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
