"""The images of a training worker: read ahead, cached, cropped at random from whole pictures."""

import io
import threading
import time

import numpy as np
import pytest
from conftest import encode, pack
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from uap_dist.data import crops
from uap_dist.data.crops import AREA, RATIO, random_box, random_resized_crop, read_pictures
from uap_dist.data.decode import Geometry
from uap_dist.finetuning.batches import ImageReader, WorkerImages, ahead
from uap_dist.fleet.config import FleetConfig
from uap_dist.workers.dataset import load_dataset

VIEW = {"size": (20, 30), "interpolation": "bilinear"}


@given(width=st.integers(1, 900), height=st.integers(1, 900), seed=st.integers(0, 2**32))
def test_boxes_lie_in_the_picture_and_have_the_shares_and_ratios_of_the_paper(width, height, seed):
    top, left, down, across = random_box(width, height, np.random.default_rng(seed))
    assert 0 <= top <= top + down <= height and 0 <= left <= left + across <= width and down > 0 < across
    if min(width, height) > 50 and max(width, height) <= 4 / 3 * min(width, height):  # else the fallback may be outside
        assert AREA[0] * 0.95 <= down * across / (width * height) <= 1
        assert RATIO[0] * 0.95 <= across / down <= RATIO[1] * 1.05


@pytest.mark.parametrize(("size", "expected"), [((100, 1000), (433, 0, 133, 100)), ((1000, 100), (0, 433, 100, 133))])
def test_of_a_picture_that_is_too_long_it_is_the_centre(size, expected):
    box = random_box(*size, np.random.default_rng(0))
    trials = [random_box(*size, np.random.default_rng(seed)) for seed in range(50)]
    assert expected in trials and len({box, *trials}) > 1


def test_boxes_are_spread_over_the_whole_picture():
    boxes = [random_box(200, 200, np.random.default_rng(seed)) for seed in range(400)]
    shares = np.array([down * across / 200**2 for _, _, down, across in boxes])
    assert shares.mean() == pytest.approx(sum(AREA) / 2, abs=0.1) and shares.min() < 0.15 < 0.9 < shares.max()


def test_a_view_is_that_part_of_the_picture_upright_or_mirrored(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    monkeypatch.setattr(crops, "random_box", lambda *_: (10, 20, 20, 30))  # as large as the view: nothing is resized
    part = pixels[10:30, 20:50].transpose(2, 0, 1)
    views = [random_resized_crop(encode(pixels), seed, **VIEW) for seed in range(20)]
    assert {view.tobytes() for view in views} == {part.tobytes(), part[..., ::-1].tobytes()}


def test_a_view_has_all_of_the_original_resolution():
    """Fine stripes, which are grey in an image resized first, are there in small crops."""
    stripes = np.zeros((400, 400, 3), np.uint8)
    stripes[:, ::2] = 255
    views = [
        random_resized_crop(encode(stripes), seed, size=(200, 200), interpolation="bilinear") for seed in range(30)
    ]
    small = np.asarray(Image.open(io.BytesIO(encode(stripes))).resize((200, 200), Image.Resampling.BILINEAR))
    assert small.std() < 10 and max(view.std() for view in views) > 60


def test_pictures_of_a_shard_are_those_that_were_packed(tmp_path):
    files = {key: encode(np.full((5, 7, 3), i, np.uint8)) for i, key in enumerate("abc")}
    url = pack(tmp_path / "x.tar", [(f"{key}.png", data) for key, data in files.items()])
    found, digest = read_pictures(url)
    assert found == files and len(digest) == 64


def test_items_come_in_order_and_some_are_made_while_one_is_used():
    made = []

    def items():
        for number in range(10):
            made.append((number, threading.current_thread().name))
            yield number

    coming = ahead(items(), 3)
    assert next(coming) == 0
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert [number for number, _ in made] == [0, 1, 2, 3]
    assert list(coming) == list(range(1, 10))
    assert all(name.startswith("ahead") for _, name in made)


def test_an_error_reaches_who_uses_the_items_after_those_before_it():
    def items():
        yield 1
        raise ValueError("broken")

    coming = ahead(items(), 5)
    assert next(coming) == 1
    with pytest.raises(ValueError, match="broken"):
        next(coming)


@pytest.mark.parametrize("augmentation", ["flip", "random-resized-crop"])
def test_views_do_not_depend_on_threads_or_caches(tiny_data, augmentation):
    train, _ = tiny_data

    def views(**options):
        images = WorkerImages(train, ImageReader(Geometry(), FleetConfig(**options)), num_shards=2)
        return [list(images.views(np.random.default_rng(epoch), 4, augmentation)) for epoch in range(2)]

    first = views(decode_threads=1)
    for other in (views(decode_threads=4), views(cache_gib=1e-9, disk_cache_gib=0.0)):
        for epoch, again in zip(first, other, strict=True):
            assert all(
                np.array_equal(a, b) for pair in zip(epoch, again, strict=True) for a, b in zip(*pair, strict=True)
            )
    assert not np.array_equal(first[0][0][0], first[1][0][0])


@pytest.mark.parametrize("augmentation", ["none", "random-resized-crop"])
def test_what_fits_is_read_once(tmp_path, local_workers, augmentation):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3)).astype(np.uint8)
    path = tmp_path / "x.tar"
    files = [
        (f"{i}.{kind}", data)
        for i, image in enumerate(pixels)
        for kind, data in (("png", encode(image)), ("cls", b"1"))
    ]
    dataset = load_dataset(local_workers, [pack(path, files)])
    kept, not_kept = (
        WorkerImages(dataset, ImageReader(Geometry(), FleetConfig(cache_gib=gib, disk_cache_gib=0.0)), 1)
        for gib in (1.0, 1e-9)
    )
    for images in (kept, not_kept):
        list(images.views(np.random.default_rng(0), 3, augmentation))
    path.unlink()
    assert len(list(kept.views(np.random.default_rng(1), 3, augmentation))) == 2
    with pytest.raises(Exception, match="no shard"):
        list(not_kept.views(np.random.default_rng(1), 3, augmentation))
