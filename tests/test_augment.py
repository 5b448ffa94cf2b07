import numpy as np
import pytest

from uap_dist.method.augment import augment

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
