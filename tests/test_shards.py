import io
import tarfile

import numpy as np
import pytest
from conftest import encode, random_samples
from PIL import Image

from uap_dist.classifiers import Geometry
from uap_dist.errors import ShardError, UapDistError
from uap_dist.locations import locate
from uap_dist.shards import UNKNOWN_CLASS, expand_patterns, load_shard, write_shards

AS_IS = Geometry()


def one_image(tmp_path, data, extension="png"):
    write_shards([{"__key__": "x", extension: data}], tmp_path, prefix="one", shard_size=1)
    shard = load_shard(str(tmp_path / "one-0000.tar"), AS_IS)
    assert shard.bad == ()
    return shard.images[0]


def test_shards_come_back_as_written_and_bytes_repeat(tmp_path):
    for name in ("a", "b"):
        counts = write_shards(random_samples(25, seed=5), tmp_path / name, prefix="t", shard_size=10)
    assert list(counts.values()) == [10, 10, 5]
    assert (tmp_path / "a/t-0001.tar").read_bytes() == (tmp_path / "b/t-0001.tar").read_bytes()
    shard = load_shard(str(tmp_path / "a/t-0001.tar"), AS_IS)
    samples = list(random_samples(25, seed=5))[10:20]
    assert shard.keys == tuple(s["__key__"] for s in samples)
    assert shard.truths.tolist() == [s["cls"] for s in samples]
    expected = [np.asarray(Image.open(io.BytesIO(s["png"]))).transpose(2, 0, 1) for s in samples]
    assert np.array_equal(shard.images, np.stack(expected))


def test_only_the_wanted_keys_are_decoded(shards):
    whole = load_shard(str(shards / "train-0000.tar"), AS_IS)
    part = load_shard(str(shards / "train-0000.tar"), AS_IS, keys=set(whole.keys[3:5]))
    assert part.keys == whole.keys[3:5] and np.array_equal(part.images, whole.images[3:5])
    assert part.digest == whole.digest


def test_grey_and_sixteen_bit_grey_become_three_equal_channels(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(one_image(tmp_path, encode(grey)), np.stack([grey] * 3))
    assert np.array_equal(one_image(tmp_path, encode(grey.astype(np.uint16) * 257)), np.stack([grey] * 3))


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
    assert shard.truths.tolist() == [UNKNOWN_CLASS]


def test_patterns_as_webdataset_users_write_them(shards, monkeypatch):
    names = [f"train-{i:04d}.tar" for i in range(3)]
    whole = [str((shards / name).resolve()) for name in names]
    assert expand_patterns([f"{shards}/train-{{0000..0002}}.tar"]) == whole
    assert expand_patterns([f"{shards}/train-*.tar"]) == whole
    assert expand_patterns([f"{shards}/{names[2]}::{shards}/{names[0]}"]) == [whole[2], whole[0]]
    monkeypatch.chdir(shards)
    assert expand_patterns(names) == expand_patterns(["train-*.tar"]) == whole


def test_original_photographs_all_decode(shared):
    shard = load_shard(str(shared / "data/imagenet-original/original-0000.tar"), Geometry(256, 224))
    assert shard.images.shape == (62, 3, 224, 224) and not shard.bad


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("absent-{0..1}.tar", "no shard absent-0.tar"),
        ("absent-*.tar", "matches nothing in the working directory"),
        ("*/a.tar", "wildcards may stand in the file name only"),
        ("nowhere://bucket/a.tar", "cannot reach nowhere://bucket/a.tar"),
    ],
)
def test_patterns_that_name_nothing(pattern, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UapDistError, match=message):
        expand_patterns([pattern])


def test_a_shard_named_twice_is_refused(shards):
    with pytest.raises(ShardError, match="named twice"):
        expand_patterns([str(shards / "train-*.tar"), str(shards / "train-0000.tar")])


def test_empty_cut_and_foreign_files_are_told_apart(shards, tmp_path):
    whole = (shards / "train-0000.tar").read_bytes()
    for name, data in {"empty": b"", "cut": whole[: len(whole) // 2 + 100], "text": b"no tar at all" * 100}.items():
        (tmp_path / f"{name}.tar").write_bytes(data)
    with tarfile.open(tmp_path / "nothing.tar", "w"):
        pass
    for name, message in {
        "empty": "is empty",
        "cut": "is cut short",
        "text": "or no tar",
        "nothing": "is empty: no sample",
    }.items():
        with pytest.raises(ShardError, match=message):
            load_shard(str(tmp_path / f"{name}.tar"), AS_IS)


def test_what_is_no_image_is_listed_and_left_out(tmp_path):
    samples = list(random_samples(3, seed=0))
    samples[1]["png"] = b"not an image"
    samples[2] = {"__key__": "text", "txt": b"no image at all"}
    write_shards(samples, tmp_path, prefix="t", shard_size=9)
    shard = load_shard(str(tmp_path / "t-0000.tar"), AS_IS)
    assert len(shard.keys) == 1
    assert shard.bad[0].startswith("s0-001: no image in a format") and shard.bad[1].startswith(
        "text: no image with extension"
    )


def test_images_of_two_sizes_need_an_input_size(tmp_path):
    write_shards([*random_samples(1, 0), *random_samples(1, 1, side=8)], tmp_path, prefix="t", shard_size=9)
    with pytest.raises(ShardError, match="s1-000 is 8×8 where s0-000 is 16×16"):
        load_shard(str(tmp_path / "t-0000.tar"), AS_IS)


def test_shards_on_s3_are_the_same_shards(s3, shards):
    filesystem, path = locate(f"s3://bucket/test-shards/t.tar?{s3}")
    with filesystem.open_output_stream(path) as out:
        out.write((shards / "train-0000.tar").read_bytes())
    remote, local = (
        load_shard(url, AS_IS) for url in (f"s3://bucket/test-shards/t.tar?{s3}", str(shards / "train-0000.tar"))
    )
    assert remote.digest == local.digest and np.array_equal(remote.images, local.images)
    assert expand_patterns([f"s3://bucket/test-shards/*.tar?{s3}"]) == [f"s3://bucket/test-shards/t.tar?{s3}"]
    with pytest.raises(ShardError, match="no shard s3://bucket/test-shards/absent.tar"):
        expand_patterns([f"s3://bucket/test-shards/absent.tar?{s3}"])
