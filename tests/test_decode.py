"""Photographs of all kinds become pixels, and what is none is reported."""

import io
import struct

import numpy as np
import pytest
from conftest import encode, pack, random_samples
from PIL import Image, UnidentifiedImageError

from uap_dist.data.crops import random_resized_crop
from uap_dist.data.decode import Geometry, decode_shard, load_shard
from uap_dist.data.fetch import fetch
from uap_dist.data.write import write_shards
from uap_dist.errors import ShardError

AS_IS = Geometry()


def one_image(tmp_path, data, extension="png"):
    write_shards([{"__key__": "x", extension: data}], tmp_path, prefix="one", shard_size=1)
    shard = load_shard(str(tmp_path / "one-0000.tar"), AS_IS)
    assert shard.bad == ()
    return shard.images[0]


def test_grey_and_sixteen_bit_grey_become_three_equal_channels(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(one_image(tmp_path, encode(grey)), np.stack([grey] * 3))
    assert np.array_equal(one_image(tmp_path, encode(grey.astype(np.uint16) * 257)), np.stack([grey] * 3))


def tiff(pixels, *, bits, sample_format=1, white_is_zero=False):
    """A grey TIFF of one row from the bytes of its pixels, with tags that Pillow does not write."""
    fields = {
        256: len(pixels) * 8 // bits,
        257: 1,
        258: bits,
        259: 1,
        262: int(not white_is_zero),
        273: 134,
        277: 1,
        278: 1,
    }
    fields |= {279: len(pixels), 339: sample_format}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + directory + bytes(4) + pixels


def test_tiffs_of_twelve_bits_and_of_inverted_grey_are_as_bright_as_they_say(tmp_path):
    for value in (0, 1, 2047, 4095):
        pair = bytes([value >> 4, (value & 15) << 4 | value >> 8, value & 255])
        assert (one_image(tmp_path, tiff(pair * 2, bits=12), "tif") == value * 255 // 4095).all()
    for value in (0, 257, 65535):
        pixels = struct.pack("<4H", *[value] * 4)
        assert (one_image(tmp_path, tiff(pixels, bits=16), "tif") == value // 257).all()
        assert (one_image(tmp_path, tiff(pixels, bits=16, white_is_zero=True), "tif") == 255 - value // 257).all()


def test_pixels_of_an_unknown_scale_are_bad_images(tmp_path):
    files = [("signed.tif", tiff(struct.pack("<4h", *[-5] * 4), bits=16, sample_format=2))]
    for name, kind in (("whole", np.int32), ("float", np.float32)):
        files.append((f"{name}.tif", encode(np.full((4, 4), 200, kind), "TIFF")))
    shard = load_shard(pack(tmp_path / "t.tar", files), AS_IS)
    assert shard.bad == (
        "signed: its pixels are integers of an unknown scale",
        "whole: its pixels are integers of an unknown scale",
        "float: its pixels are floating-point numbers of an unknown scale",
    )


def test_pictures_too_narrow_to_resize_are_bad_images(tmp_path):
    narrow = encode(np.zeros((20_000, 1, 3), np.uint8))
    long = encode(np.zeros((2, 2000, 3), np.uint8))
    path = pack(tmp_path / "t.tar", [("narrow.png", narrow), ("long.png", long)])
    shard = load_shard(path, Geometry(256, 224))
    assert shard.keys == ("long",)
    assert shard.bad == ("narrow: it is 1×20000, too narrow: resized, it would have more than 178,956,970 pixels",)
    assert not load_shard(path, Geometry(256, 224, crop_mode="squash")).bad
    bad = load_shard(path, Geometry(256, 224, crop_mode="border")).bad
    assert bad[0] == "narrow: it is 1×20000, too narrow: resized, it would have no pixels"


def test_other_formats_are_not_opened_whatever_the_extension(tmp_path):
    pixels = np.full((16, 16, 3), 100, np.uint8)
    files = [(f"{kind}.jpg", encode(pixels, kind)) for kind in ("EPS", "PPM", "GIF", "MPO", "BMP")]
    shard = load_shard(pack(tmp_path / "t.tar", files), AS_IS)
    assert shard.keys == ("GIF", "MPO", "BMP")
    assert shard.bad[0] == "EPS: no image in one of the formats JPEG, PNG, WEBP, BMP, TIFF, AVIF, GIF"
    with pytest.raises(UnidentifiedImageError):
        random_resized_crop(files[0][1], 0, size=(8, 8), interpolation="bilinear")


def test_cmyk_comes_out_as_rgb(tmp_path):
    data = io.BytesIO()
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(data, "JPEG", quality=100)  # no cyan: red
    red, green, blue = one_image(tmp_path, data.getvalue(), "jpg").mean((1, 2))
    assert red > 240 and green < 20 and blue < 20


def test_exif_rotation_is_applied(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255  # bright above
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it by 90° clockwise: bright at the right
    image = one_image(tmp_path, encode(pixels, "JPEG", quality=100, exif=exif), "jpeg")
    assert image[:, :, 9:].mean() > 240 and image[:, :, :7].mean() < 15


@pytest.mark.parametrize(
    ("tag", "kind", "value"),
    [
        (256, 1, b"\x20"),
        (270, 5, struct.pack(">II", 5, 3)),
        (282, 1, b"\x60"),
        (270, 99, b"?"),
        (34665, 4, b"\xff" * 4),
    ],
)
def test_exif_rotation_is_applied_although_another_field_is_malformed(tmp_path, tag, kind, value):
    """Width or resolution as BYTE, a description as RATIONAL, a type that is none, a directory beyond the end."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255
    fields = sorted([(274, 3, struct.pack(">H", 6)), (tag, kind, value)])
    values = b"".join(value for *_, value in fields if len(value) > 4)
    directory = b"".join(
        struct.pack(">HHI", tag, kind, 1) + (struct.pack(">I", 38) if len(value) > 4 else value.ljust(4, b"\0"))
        for tag, kind, value in fields
    )
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(fields)) + directory + bytes(4) + values
    image = one_image(tmp_path, encode(pixels, "JPEG", quality=100, exif=exif), "jpg")
    assert image[:, :, 9:].mean() > 240 and image[:, :, :7].mean() < 15


def test_unreadable_exif_does_not_prevent_decoding(tmp_path):
    pixels = np.full((16, 16, 3), 200, np.uint8)
    assert (one_image(tmp_path, encode(pixels, exif=b"Exif\0\0MM\0*\xff\xff"), "png") == 200).all()


def test_any_decoding_error_is_reported_for_its_image_only(tmp_path):
    whole = encode(np.zeros((16, 16, 3), np.uint8), "JPEG")
    at = whole.index(b"\xff\xc0")  # the frame's header: length, bits, height, width
    damaged = {
        "cut": whole[: len(whole) // 2],
        "bits": whole[: at + 4] + b"\x63" + whole[at + 5 :],
        "huge": whole[: at + 5] + b"\xff\xff\xff\xff" + whole[at + 9 :],
        "webp": encode(np.zeros((16, 16, 3), np.uint8), "WEBP")[:30],
        "avif": encode(np.zeros((16, 16, 3), np.uint8), "AVIF").replace(b"pitm", b"none"),
        "text": b"<html>",
    }
    files = [(f"{key}.jpg", data) for key, data in damaged.items()]
    shard = load_shard(pack(tmp_path / "t.tar", [*files, ("good.jpg", whole)]), AS_IS)
    assert shard.keys == ("good",)
    assert [line.partition(":")[0] for line in shard.bad] == list(damaged)
    assert not any("Error" in line or "\n" in line or "object at" in line for line in shard.bad)
    assert "exceeds limit" in shard.bad[2]


def test_a_shard_is_the_same_for_any_number_of_threads(tmp_path):
    """Bad images and images that take longer than those after them stay where they are."""
    rng = np.random.default_rng(3)
    files = []
    for i in range(60):
        side = 600 if i % 7 == 0 else 20
        data = encode(rng.integers(0, 256, (side, side, 3), np.uint8), ("PNG", "WEBP", "JPEG")[i % 3])
        files.append((f"{i:02d}.jpg", data[: len(data) // 2] if i % 5 == 1 else data))
        files.append((f"{i:02d}.cls", b"%d" % i))
    path = pack(tmp_path / "t.tar", files)
    one, *others = (decode_shard(fetch(path), Geometry(20, 16), num_threads=n) for n in (1, 2, 4))
    assert len(one.keys) == 48 and len(one.bad) == 12 and list(one.keys) == sorted(one.keys)
    for other in others:
        assert np.array_equal(other.images, one.images) and other.labels == one.labels
        for name in ("keys", "bad", "digest", "hashes", "unused"):
            assert getattr(other, name) == getattr(one, name)


def test_transparency_is_shown_on_white_and_webp_is_read(tmp_path):
    clear = np.zeros((16, 16, 4), np.uint8)
    assert (one_image(tmp_path, encode(clear)) == 255).all()
    assert (one_image(tmp_path, encode(clear[..., :3] + 100, "WEBP", lossless=True), "webp") == 100).all()


def test_resize_and_centre_crop(tmp_path):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 200  # the centre 40×40
    write_shards([{"__key__": "x", "png": encode(pixels)}], tmp_path, prefix="t", shard_size=1)
    shard = load_shard(str(tmp_path / "t-0000.tar"), Geometry(20, 16))
    assert shard.images.shape == (1, 3, 16, 16) and (shard.images == 200).all()
    assert shard.labels == ({},)


def test_original_photographs_all_decode(shared):
    shard = load_shard(str(shared / "data/imagenet-original/original-0000.tar"), Geometry(256, 224))
    assert shard.images.shape == (62, 3, 224, 224) and not shard.bad


def test_undecodable_images_are_listed_and_left_out(tmp_path):
    samples = list(random_samples(3, seed=0))
    samples[1]["png"] = b"not an image"
    samples[2] = {"__key__": "text", "txt": b"no image at all"}
    write_shards(samples, tmp_path, prefix="t", shard_size=9)
    shard = load_shard(str(tmp_path / "t-0000.tar"), AS_IS)
    assert len(shard.keys) == 1
    assert shard.bad[0].startswith("s0-001: no image in one of the formats") and shard.bad[1].startswith(
        "text: no image with extension"
    )


def test_images_of_two_sizes_need_an_input_size(tmp_path):
    write_shards([*random_samples(1, 0), *random_samples(1, 1, side=8)], tmp_path, prefix="t", shard_size=9)
    with pytest.raises(ShardError, match="s1-000 is 8×8 where s0-000 is 16×16"):
        load_shard(str(tmp_path / "t-0000.tar"), AS_IS)
