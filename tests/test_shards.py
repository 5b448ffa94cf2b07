import bz2
import gzip
import io
import lzma
import tarfile

import numpy as np
import pytest
from conftest import encode, pack, random_samples
from PIL import Image

from uap_dist.data.decode import Geometry, load_shard
from uap_dist.data.locations import locate
from uap_dist.data.patterns import expand_patterns
from uap_dist.data.write import write_shards
from uap_dist.errors import ShardError

AS_IS = Geometry()


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


def test_empty_truncated_and_foreign_files_have_different_errors(shards, tmp_path):
    whole = (shards / "train-0000.tar").read_bytes()
    for name, data in {"empty": b"", "cut": whole[: len(whole) // 2 + 100], "text": b"no tar at all" * 100}.items():
        (tmp_path / f"{name}.tar").write_bytes(data)
    (tmp_path / "pointer.tar").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (tmp_path / "zip.tar").write_bytes(b"PK\x03\x04" + bytes(60))
    with tarfile.open(tmp_path / "nothing.tar", "w"):
        pass
    for name, message in {
        "empty": "is empty",
        "cut": "is cut short",
        "text": "is not a tar, nor one compressed with gzip, bzip2 or xz: it begins with b'no tar at all",
        "nothing": "is empty: no sample",
        "pointer": "is a Git LFS pointer, not the tar itself",
        "zip": "is a zip file; pack its files into a tar",
    }.items():
        with pytest.raises(ShardError, match=message):
            load_shard(str(tmp_path / f"{name}.tar"), AS_IS)


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
        (
            "page",
            b"<!DOCTYPE html><p>log in" * 50,
            "page.tar is no tar but a page of a web server, .*: it begins with b'<!DOCTYPE html>",
        ),
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
