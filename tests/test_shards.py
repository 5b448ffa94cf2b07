import bz2
import gzip
import io
import lzma
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import encode, random_samples
from PIL import Image

from uap_dist.data.decode import Geometry, decode_shard, load_shard
from uap_dist.data.fetch import fetch
from uap_dist.data.locations import locate, set_name
from uap_dist.data.patterns import expand_patterns
from uap_dist.data.write import write_shards
from uap_dist.errors import ShardError, UapDistError

AS_IS = Geometry()


def one_image(tmp_path, data, extension="png"):
    write_shards([{"__key__": "x", extension: data}], tmp_path, prefix="one", shard_size=1)
    shard = load_shard(str(tmp_path / "one-0000.tar"), AS_IS)
    assert shard.bad == ()
    return shard.images[0]


def pack(path, files):
    """A tar of (name, bytes), or (name, target of a link)."""
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            if isinstance(data, str):
                info.type, info.linkname = tarfile.LNKTYPE, data
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def pictures(*names):
    return [(name, encode(np.full((16, 16, 3), value, np.uint8))) for value, name in enumerate(names)]


def test_shards_come_back_as_written_and_bytes_repeat(tmp_path):
    for name in ("a", "b"):
        counts = write_shards(random_samples(25, seed=5), tmp_path / name, prefix="t", shard_size=10)
    assert list(counts.values()) == [10, 10, 5]
    assert (tmp_path / "a/t-0001.tar").read_bytes() == (tmp_path / "b/t-0001.tar").read_bytes()
    shard = load_shard(str(tmp_path / "a/t-0001.tar"), AS_IS)
    samples = list(random_samples(25, seed=5))[10:20]
    assert shard.keys == tuple(s["__key__"] for s in samples)
    assert [int(label["cls"]) for label in shard.labels] == [s["cls"] for s in samples]
    expected = [np.asarray(Image.open(io.BytesIO(s["png"]))).transpose(2, 0, 1) for s in samples]
    assert np.array_equal(shard.images, np.stack(expected))


def test_samples_that_fail_at_once_leave_no_shard(tmp_path):
    def fail():
        raise ShardError("no samples")
        yield

    with pytest.raises(ShardError, match="no samples"):
        write_shards(fail(), tmp_path / "out", prefix="t", shard_size=10)
    assert not list((tmp_path / "out").iterdir())


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


def test_patterns_as_webdataset_users_write_them(shards, monkeypatch):
    names = [f"train-{i:04d}.tar" for i in range(3)]
    whole = [str((shards / name).resolve()) for name in names]
    assert expand_patterns([f"{shards}/train-{{0000..0002}}.tar"]) == whole
    assert expand_patterns([f"{shards}/train-*.tar"]) == whole
    assert expand_patterns([f"{shards}/{names[2]}::{shards}/{names[0]}"]) == [whole[2], whole[0]]
    monkeypatch.chdir(shards)
    assert expand_patterns(names) == expand_patterns(["train-*.tar"]) == whole


def test_links_keep_the_names_that_were_given(shards, tmp_path):
    names = [str(tmp_path / f"train-{i:04d}.tar") for i in range(2)]
    for i, name in enumerate(names):
        Path(name).symlink_to(shards / f"train-{2 - i:04d}.tar")
    assert (
        expand_patterns([f"{tmp_path}/train-*.tar"])
        == expand_patterns([f"{tmp_path}/train-{{0000..0001}}.tar"])
        == names
    )
    with pytest.raises(ShardError, match="train-0001.tar is named twice, the first time as .*/train-0001.tar"):
        expand_patterns([str(shards / "train-0001.tar"), names[1]])
    (tmp_path / "train-0002.tar").symlink_to("gone")
    with pytest.raises(
        ShardError, match="no shard .*: it is a folder; jobs/shard.py makes shards of a folder of images"
    ):
        expand_patterns([str(tmp_path)])
    with pytest.raises(ShardError, match="no shard .*train-0002.tar: it is a link to gone, which is no file"):
        expand_patterns([f"{tmp_path}/train-*.tar"])


def test_existing_files_with_pattern_characters_are_taken_literally(tmp_path):
    for folder in ("[old]", "{a,b}", "x?"):
        (tmp_path / folder).mkdir()
        for name in ("t-0.tar", "t-1.tar", "t[0].tar", "u-{0..1}.tar"):
            (tmp_path / folder / name).touch()
        for pattern, names in {
            "t-0.tar": ["t-0.tar"],
            "t-{0..1}.tar": ["t-0.tar", "t-1.tar"],
            "t-*.tar": ["t-0.tar", "t-1.tar"],
            "t[0].tar": ["t[0].tar"],
            "u-{0..1}.tar": ["u-{0..1}.tar"],
        }.items():
            assert expand_patterns([f"{tmp_path}/{folder}/{pattern}"]) == [
                f"{tmp_path}/{folder}/{name}" for name in names
            ]


def test_original_photographs_all_decode(shared):
    shard = load_shard(str(shared / "data/imagenet-original/original-0000.tar"), Geometry(256, 224))
    assert shard.images.shape == (62, 3, 224, 224) and not shard.bad


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("absent-{0..1}.tar", "no shard absent-0.tar"),
        ("absent-*.tar", "matches nothing in the working directory"),
        ("*/a.tar", "wildcards may stand in the file name only"),
        ("a-{0..1.tar", "a-{0..1.tar is not a valid pattern of shards: Unbalanced braces"),
        ("${SCRATCH}/a.tar", "is not a valid pattern of shards: missing environment variable"),
        ("nowhere://bucket/a.tar", "cannot reach nowhere://bucket/a.tar"),
    ],
)
def test_patterns_without_a_match_are_errors(pattern, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UapDistError, match=message):
        expand_patterns([pattern])


@pytest.mark.parametrize(
    "pattern",
    [
        "val.tar",
        "s3://b/val.tar?region=eu-west-1",
        "data/val-{0000..0003}.tar",
        "/data/[old]/val-000?.tar",
        "gs://b/val-*.tar?anonymous=true",
        "val_0000.tar.gz",
        "val-00000-of-00005.tar::train-00000.tar",
        "s3://b/val/*.tar?region=eu-west-1",
        "val/{000..123}.tar",
    ],
)
def test_a_set_is_named_after_what_its_shards_have_in_common(pattern):
    assert set_name(pattern) == "val"
    assert set_name(pattern.replace("val", "imagenet-val")) == "imagenet-val"


def test_a_shard_named_twice_is_refused(shards):
    with pytest.raises(ShardError, match="named twice"):
        expand_patterns([str(shards / "train-*.tar"), str(shards / "train-0000.tar")])


def test_empty_truncated_and_foreign_files_have_different_errors(shards, tmp_path):
    whole = (shards / "train-0000.tar").read_bytes()
    for name, data in {"empty": b"", "cut": whole[: len(whole) // 2 + 100], "text": b"no tar at all" * 100}.items():
        (tmp_path / f"{name}.tar").write_bytes(data)
    with tarfile.open(tmp_path / "nothing.tar", "w"):
        pass
    for name, message in {
        "empty": "is empty",
        "cut": "is cut short",
        "text": "is not a tar, nor one compressed with gzip, bzip2 or xz: it begins with b'no tar at all",
        "nothing": "is empty: no sample",
    }.items():
        with pytest.raises(ShardError, match=message):
            load_shard(str(tmp_path / f"{name}.tar"), AS_IS)


def test_undecodable_images_are_listed_and_left_out(tmp_path):
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
    with filesystem.open_output_stream(path.replace("t.tar", "[old]/t[1].tar")) as out:
        out.write(b"x")
    for name in ("[old]/t[1].tar", "[old]/*.tar"):
        found = expand_patterns([f"s3://bucket/test-shards/{name}?{s3}"])
        assert found == [f"s3://bucket/test-shards/[old]/t[1].tar?{s3}"]
    with pytest.raises(ShardError, match="no shard s3://bucket/test-shards/absent.tar"):
        expand_patterns([f"s3://bucket/test-shards/absent.tar?{s3}"])


COMPRESSIONS = {"as it is": bytes, "gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("compress", COMPRESSIONS.values(), ids=COMPRESSIONS)
def test_a_truncated_tar_is_detected_whatever_its_name(shards, tmp_path, compress):
    """Between members, in a header, in an image, before and in the end mark; and the compressed file itself."""
    path = shards / "train-0000.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        member, end = tar.getmembers()[20], tar.offset
    blob = tmp_path / "0fe3a1"
    for size in (member.offset, member.offset + 100, member.offset_data + 100, end, end + 512):
        blob.write_bytes(compress(whole[:size]))
        with pytest.raises(ShardError, match="0fe3a1 is cut short"):
            load_shard(str(blob), AS_IS)
    blob.write_bytes(compress(whole))
    shard = load_shard(str(blob), AS_IS)
    assert np.array_equal(shard.images, load_shard(str(path), AS_IS).images)
    if compress is not bytes:
        blob.write_bytes(compress(whole)[:-1000])
        with pytest.raises(ShardError, match="0fe3a1 is cut short"):
            load_shard(str(blob), AS_IS)


def test_data_after_a_tar_or_a_damaged_header_are_errors(shards, tmp_path):
    first = (shards / "train-0000.tar").read_bytes()
    with tarfile.open(shards / "train-0000.tar") as tar:
        place = tar.getmembers()[10].offset
    for name, data, message in (
        ("garbage", first + b"#" * 700, "garbage.tar is damaged: what follows its end mark is no tar"),
        (
            "damaged",
            first[:place] + b"#" * 512 + first[place + 512 :],
            "damaged.tar is damaged: invalid header",
        ),
        ("page", b"<!DOCTYPE html><p>log in" * 50, "is not a tar, nor .*: it begins with b'<!DOCTYPE html>"),
        ("gzip", gzip.compress(first)[:900] + b"#" * 100 + gzip.compress(first)[1000:], "gzip.tar is damaged"),
    ):
        (tmp_path / f"{name}.tar").write_bytes(data)
        with pytest.raises(ShardError, match=message):
            load_shard(str(tmp_path / f"{name}.tar"), AS_IS)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (pictures("a.png", "b.png", "a.png"), "holds a.png twice"),
        (pictures("a.png", "a.PNG"), "holds a.png twice"),
        ([("b.png", "a.png"), *pictures("a.png")], "b.png is a link to a.png, which is no file before it in this tar"),
    ],
)
def test_file_names_that_do_not_form_samples_of_one_picture_are_errors(tmp_path, files, message):
    with pytest.raises(ShardError, match=message):
        load_shard(pack(tmp_path / "t.tar", pictures("zero.png") + files), AS_IS)


def test_names_as_cameras_and_operating_systems_make_them(tmp_path):
    names = (
        "./a.JPEG",
        "./dir.v2/b.PNG",
        "./dir.v2/c.mask.png",
        "./dir.v2/c.png",
        "./d.png",
        "./d.jpg",
        "./e",
        "caf\udce9.png",
    )
    hidden = [
        ("./._a.JPEG", b"x"),
        ("./.DS_Store", b"x"),
        ("./.ipynb_checkpoints/b.png", b"x"),
        ("__meta__/f.png", b"x"),
        ("__meta__/g.json", b"x"),
        ("old.v1", "dir.v1"),
    ]
    shard = load_shard(pack(tmp_path / "t.tar", hidden[:1] + pictures(*names) + hidden[1:]), AS_IS)
    assert shard.keys == ("./a", "./dir.v2/b", "./dir.v2/c", "./d", "caf\\xe9") and not shard.bad
    assert shard.images[:, 0, 0, 0].tolist() == [0, 1, 3, 5, 7]
    hidden_pictures = {"./._a.JPEG", "./.ipynb_checkpoints/b.png", "__meta__/f.png"}
    assert set(shard.unused) == hidden_pictures | {"./dir.v2/c.mask.png", "./d.png", "./e"}
