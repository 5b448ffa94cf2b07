import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from uap_dist.method.augment import GREY, augment, draw_views, zoom

IMAGES = np.random.default_rng(0).integers(0, 256, size=(64, 3, 56, 56), dtype=np.uint8)


def views(augmentation, seed=0):
    return augment(IMAGES, augmentation, np.random.default_rng(seed))


def test_flips_are_drawn_per_image():
    flipped = [np.array_equal(view, image[..., ::-1]) for view, image in zip(views("flip"), IMAGES, strict=True)]
    same = [np.array_equal(view, image) for view, image in zip(views("flip"), IMAGES, strict=True)]
    assert all(f != s for f, s in zip(flipped, same, strict=True)) and 16 < sum(flipped) < 48


def test_shifts_keep_shape_dtype_and_reach():
    shifted = views("flip-shift")
    assert shifted.shape == IMAGES.shape and shifted.dtype == np.uint8
    for view, image in zip(shifted, IMAGES, strict=True):
        inner = view[:, 2:-2, 2:-2]  # 56/28 = 2 pixels at most
        assert any(
            np.array_equal(inner, candidate[:, y : y + 52, x : x + 52])
            for candidate in (image, image[..., ::-1])
            for y in range(5)
            for x in range(5)
        )


@pytest.mark.parametrize("augmentation", ["none", "flip", "flip-shift"])
def test_views_depend_on_the_seed_only(augmentation):
    assert np.array_equal(views(augmentation), views(augmentation))
    assert (augmentation == "none") == np.array_equal(views(augmentation, 0), views(augmentation, 1))


@pytest.mark.parametrize(("side", "down", "right"), [(56, 0, 0), (40, 3, 16), (50, 0, 6), (70, -14, -2), (57, 0, -1)])
def test_zooming_is_interpolation_into_a_frame(side, down, right):
    pixels = torch.tensor(IMAGES[:2]).double().requires_grad_()
    found = zoom(pixels, torch.tensor([[side, down, right]] * 2))
    scaled = interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
    if side < 56:
        expected = torch.full_like(pixels, GREY)
        expected[..., down : down + side, right : right + side] = scaled
    else:
        expected = scaled[..., -down : 56 - down, -right : 56 - right]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    slopes = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = [torch.autograd.grad(values, pixels, slopes)[0] for values in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=0)


@pytest.mark.parametrize("augmentation", ["none", "flip-shift"])
def test_zooms_are_drawn_beside_the_other_views(augmentation):
    with_zoom, without = (draw_views(500, 56, augmentation, np.random.default_rng(3), most) for most in (0.25, 0.0))
    assert np.array_equal(with_zoom.flips, without.flips) and np.array_equal(with_zoom.shifts, without.shifts)
    sides, places = with_zoom.zooms[:, 0], with_zoom.zooms[:, 1:]
    assert without.zooms is None and (sides.min(), sides.max()) == (42, 70)
    room = 56 - sides[:, None]
    assert (
        (places >= np.minimum(room, 0)).all() and (places <= np.maximum(room, 0)).all() and len(np.unique(places)) > 20
    )
