"""Tars as other tools write them: GNU tar, bsdtar of macOS, img2dataset, cat; their layouts, and members that no sample has."""

import gzip
import io
import os
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
from conftest import encode, random_samples
from PIL import Image, features

from uap_dist.data.decode import Geometry, load_shard
from uap_dist.data.write import write_shards
from uap_dist.errors import ShardError

AS_IS = Geometry()
needs_tar = pytest.mark.skipif(shutil.which("tar") is None, reason="needs the program tar")


def picture(value, kind="PNG", **options):
    return encode(np.full((16, 16, 3), value, np.uint8), kind, **options)


def pack(path, *files):
    """A tar of (name, bytes) in this order."""
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def read(url):
    """Value of the first pixel, and label, by key."""
    shard = load_shard(url, AS_IS)
    return {
        key: (int(image[0, 0, 0]), label.get("cls"))
        for key, image, label in zip(shard.keys, shard.images, shard.labels, strict=True)
    }, shard


def gnu_tar(folder, *arguments):
    subprocess.run(["tar", *arguments], cwd=folder, check=True)


@pytest.fixture
def folder(tmp_path):
    """A folder of three pictures with labels."""
    root = tmp_path / "images"
    (root / "dir.v2").mkdir(parents=True)
    for value, name in enumerate(("b", "a", "dir.v2/c")):
        (root / f"{name}.png").write_bytes(picture(value))
        (root / f"{name}.cls").write_text(str(value))
    return root


@needs_tar
def test_pictures_first_and_labels_after_are_put_together(folder):
    gnu_tar(folder, "-cf", "t.tar", "b.png", "a.png", "dir.v2/c.png", "a.cls", "dir.v2/c.cls", "b.cls")
    assert read(str(folder / "t.tar"))[0] == {"b": (0, b"0"), "a": (1, b"1"), "dir.v2/c": (2, b"2")}
    gnu_tar(folder, "-cf", "u.tar", "a.cls", "dir.v2/c.cls", "b.cls", "b.png", "a.png", "dir.v2/c.png")
    assert read(str(folder / "u.tar"))[0] == read(str(folder / "t.tar"))[0]


@needs_tar
@pytest.mark.parametrize("layout", ["v7", "ustar", "oldgnu", "gnu", "posix"])
def test_every_layout_of_gnu_tar_is_read(folder, layout):
    long = folder / ("x" * 80)
    if layout != "v7":
        (long / ("y" * 60)).mkdir(parents=True)
        (long / ("y" * 60) / "é.JPEG").write_bytes(picture(9, "JPEG"))
    gnu_tar(folder, f"--format={layout}", "--sort=name", "--exclude=t.tar", "-cf", "t.tar", ".")
    found, shard = read(str(folder / "t.tar"))
    assert {key.removeprefix("./"): value for key, value in found.items() if "é" not in key} == {
        "a": (1, b"1"),
        "b": (0, b"0"),
        "dir.v2/c": (2, b"2"),
    }
    assert not shard.bad and not shard.unused and len(found) == 3 + (layout != "v7")


@needs_tar
@pytest.mark.parametrize("compress", [None, gzip.compress], ids=["plain", "gzip"])
def test_joined_tars_are_read_to_their_end(tmp_path, compress):
    write_shards(random_samples(6, seed=1), tmp_path, prefix="t", shard_size=3)
    parts = [(tmp_path / f"t-000{i}.tar").read_bytes() for i in range(2)]
    joined = tmp_path / "joined.tar"
    joined.write_bytes(b"".join(compress(part) if compress else part for part in parts))
    keys = [key for i in range(2) for key in load_shard(str(tmp_path / f"t-000{i}.tar"), AS_IS).keys]
    assert list(load_shard(str(joined), AS_IS).keys) == keys
    if compress is None:
        gnu_tar(tmp_path, "-Af", "t-0000.tar", "t-0001.tar")
        assert list(load_shard(str(tmp_path / "t-0000.tar"), AS_IS).keys) == keys


def test_joined_tars_that_are_cut_or_name_a_file_twice_are_errors(tmp_path):
    write_shards(random_samples(3, seed=1), tmp_path, prefix="t", shard_size=3)
    whole, path = (tmp_path / "t-0000.tar").read_bytes(), tmp_path / "joined.tar"
    with tarfile.open(tmp_path / "t-0000.tar") as tar:
        member, end = tar.getmembers()[1], tar.offset
    for size in (100, member.offset, member.offset + 100, member.offset_data + 10, end, end + 512):
        path.write_bytes(whole + whole[:size].replace(b"s1-", b"s2-"))
        with pytest.raises(ShardError, match="joined.tar is (cut short|damaged)"):
            load_shard(str(path), AS_IS)
    path.write_bytes(whole + whole)
    with pytest.raises(ShardError, match="holds s1-000.* twice; where tars are joined, their names must differ"):
        load_shard(str(path), AS_IS)


@needs_tar
def test_links_to_files_before_them_are_followed(folder):
    os.link(folder / "b.png", folder / "h.png")
    os.link(folder / "b.cls", folder / "h.cls")
    (folder / "dir.v2/s.png").symlink_to("../a.png")
    os.link(folder / "h.png", folder / "dir.v2/h.png")
    names = ["b.png", "b.cls", "a.png", "h.png", "h.cls", "./dir.v2/h.png", "dir.v2/s.png"]
    gnu_tar(folder, "-cf", "t.tar", *names)
    assert read(str(folder / "t.tar"))[0] == {
        "b": (0, b"0"),
        "a": (1, None),
        "h": (0, b"0"),
        "./dir.v2/h": (0, None),
        "dir.v2/s": (1, None),
    }
    digest = load_shard(str(folder / "t.tar"), AS_IS).digest
    part = load_shard(str(folder / "t.tar"), AS_IS, {"h"})
    assert part.keys == ("h",) and part.digest == digest
    gnu_tar(folder, "-czf", "t.tar.gz", *names)
    with pytest.raises(
        ShardError, match="h.png is a link to b.png, links in a compressed tar are not followed; decomp"
    ):
        load_shard(str(folder / "t.tar.gz"), AS_IS)
    gnu_tar(folder, "-cf", "u.tar", "dir.v2/s.png", "a.png")
    with pytest.raises(
        ShardError, match="s.png is a link to ../a.png, which is no file before it in this tar; pack the"
    ):
        load_shard(str(folder / "u.tar"), AS_IS)


def test_members_of_macos_and_pax_are_left_out_and_counted(tmp_path):
    url = pack(
        tmp_path / "t.tar",
        ("./._a.jpg", b"\0\5\x16\7"),
        ("./a.jpg", picture(1)),
        ("__MACOSX/._a.jpg", b"\0\5\x16\7"),
        ("images/__MACOSX/b.jpg", b"\0\5\x16\7"),
        ("./PaxHeaders.1234/a.jpg", b"30 mtime=1352812432.123456789\n"),
        ("PaxHeader/b.jpg", b"30 mtime=1352812432.123456789\n"),
        ("./.DS_Store", b"x"),
    )
    found, shard = read(url)
    assert found == {"./a": (1, None)} and not shard.bad
    assert shard.unused == (
        "./._a.jpg",
        "__MACOSX/._a.jpg",
        "images/__MACOSX/b.jpg",
        "./PaxHeaders.1234/a.jpg",
        "PaxHeader/b.jpg",
    )


def test_names_with_dots_are_samples_of_their_own(tmp_path):
    names = ("trip.2021.00", "trip.2021.01", "0.5_a", "photo.final", "x.v2/plain")
    files = [(f"{name}.JPEG", picture(value, "PNG")) for value, name in enumerate(names)]
    files += [(f"{name}.cls", str(value).encode()) for value, name in enumerate(names)]
    expected = {name: (value, str(value).encode()) for value, name in enumerate(names)}
    assert read(pack(tmp_path / "t.tar", *files))[0] == expected
    adjacent = sorted(files, key=lambda file: file[0])
    assert read(pack(tmp_path / "u.tar", *adjacent))[0] == expected


def test_labels_are_named_after_the_picture_or_its_sample(tmp_path):
    files = {
        "a.image.png": 1,
        "a.cls": 1,
        "b.jpg": 2,
        "b.jpg.cls": 2,
        "c.1.png": 3,
        "c.1.cls": 3,
        "c.cls": 9,
        "d.png": 4,
    }
    files |= {"e.0.png": 5, "e.1.png": 6, "e.cls": 9, "e.1.png.cls": 6, "f..png": 7, "f..cls": 7}
    files = [(name, picture(value, "PNG") if name[-1] == "g" else b"%d" % value) for name, value in files.items()]
    for order in (files, files[::-1]):
        found, shard = read(pack(tmp_path / "t.tar", *order))
        labels = {
            "a.image": (1, b"1"),
            "b": (2, b"2"),
            "c.1": (3, b"3"),
            "d": (4, None),
            "e.0": (5, None),
            "e.1": (6, b"6"),
        }
        assert found == labels | {"f.": (7, b"7")}
        assert sorted(shard.unused) == ["c.cls", "e.cls"]


@pytest.mark.parametrize("apart", [False, True])
def test_several_pictures_of_a_sample_are_not_taken_for_samples(tmp_path, apart):
    files = [(f"{key}.{kind}.png", picture(1)) for key in "ab" for kind in ("image", "mask")]
    if apart:
        files.sort(key=lambda file: file[0][2:])
    with pytest.raises(ShardError, match="a.image.png and a.mask.png may be two pictures of one sample, a, because"):
        load_shard(pack(tmp_path / "t.tar", *files), AS_IS)
    files += [(f"{key}.png", picture(3)) for key in "ab"]
    if not apart:
        found, shard = read(pack(tmp_path / "t.tar", *sorted(files)))
        assert found == {"a": (3, None), "b": (3, None)}
        assert shard.unused == ("a.image.png", "a.mask.png", "b.image.png", "b.mask.png")


def test_pictures_of_another_kind_after_all_others_are_left_out_and_counted(tmp_path):
    files = [(f"{key}.{kind}", picture(value)) for value, kind in enumerate(("jpg", "png")) for key in "ab"]
    found, shard = read(pack(tmp_path / "t.tar", *files))
    assert found == {"a": (0, None), "b": (0, None)} and shard.unused == ("a.png", "b.png")


def test_a_sample_without_a_picture_says_what_it_has(tmp_path):
    _, shard = read(pack(tmp_path / "t.tar", ("a.gif", b"x"), ("b.png", picture(1)), ("a.cls", b"1"), ("c.txt", b"x")))
    assert [line.partition(" only ")[::2] for line in shard.bad] == [
        ("a: no image with extension jpg, jpeg, png, webp, bmp, tif, tiff, avif,", "cls, gif"),
        ("c: no image with extension jpg, jpeg, png, webp, bmp, tif, tiff, avif,", "txt"),
    ]


@pytest.mark.parametrize(
    ("extension", "kind"), [("bmp", "BMP"), ("tif", "TIFF"), ("TIFF", "TIFF"), ("avif", "AVIF"), ("webp", "WEBP")]
)
def test_other_formats_that_pillow_reads(tmp_path, extension, kind):
    if not features.check("avif") and kind == "AVIF":
        pytest.skip("this Pillow has no AVIF")
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "AVIF" else {}
    found, shard = read(pack(tmp_path / "t.tar", (f"a.{extension}", picture(100, kind, **options))))
    assert abs(found["a"][0] - 100) <= 1 and not shard.bad


def test_floating_point_tiffs_are_refused_for_that_reason(tmp_path):
    data = io.BytesIO()
    Image.fromarray(np.ones((16, 16), np.float32)).save(data, "TIFF")
    _, shard = read(pack(tmp_path / "t.tar", ("a.tif", data.getvalue()), ("b.png", picture(1))))
    assert shard.bad == ("a: its pixels are floating-point numbers of an unknown scale",)


def test_the_layout_of_img2dataset(tmp_path):
    """jpg, txt and json with caption and url, written here by hand in the order in which its writer puts them."""
    files = [
        (f"00000000{i}.{kind}", data)
        for i in range(3)
        for kind, data in (
            ("jpg", picture(10 * i, "JPEG")),
            ("json", b'{"caption": "a cat", "url": "https://example.org/x.jpg", "status": "success", "exif": "{}"}'),
            ("txt", b"a cat"),
        )
    ]
    found, shard = read(pack(tmp_path / "00000.tar", *files))
    assert list(found) == [f"00000000{i}" for i in range(3)] and not shard.bad and not shard.unused
    assert all(set(label) == {"json"} for label in shard.labels)
