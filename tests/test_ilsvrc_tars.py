"""Shards of the tars of ILSVRC 2012, as ImageNet is given out."""

import io
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import encode
from processes import run_job

from uap_dist.data.decode import Geometry, load_shard
from uap_dist.data.sources.imagenet import list_ilsvrc_train, list_ilsvrc_val, shuffled_samples
from uap_dist.errors import ShardError

JOB = Path(__file__).parents[1] / "jobs/shard.py"
WNIDS = ("n01440764", "n01443537", "n02096051")


def picture(value):
    return encode(np.full((16, 16, 3), value, np.uint8))


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def link(tar, name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    tar.addfile(info)


def values(images):
    from PIL import Image

    return {i.key: (i.label, int(np.asarray(Image.open(io.BytesIO(i.read())))[0, 0, 0])) for i in images}


@pytest.fixture
def train_tar(tmp_path):
    path = tmp_path / "train.tar"
    with tarfile.open(path, "w") as outer:
        for label, wnid in reversed(list(enumerate(WNIDS))):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for i in range(4):
                    add(tar, f"{wnid}_{i}.png", picture(10 * label + i))
            add(outer, f"{wnid}.tar", inner.getvalue())
    return path


@pytest.fixture
def val_tar(tmp_path):
    path = tmp_path / "val.tar"
    with tarfile.open(path, "w") as tar:
        for i in (2, 0, 1):
            add(tar, f"val_{i}.png", picture(10 * i))
    return path


def test_train_tar_of_tars_numbers_sorted_wordnet_ids(train_tar):
    images, classes = list_ilsvrc_train(train_tar)
    assert classes == list(WNIDS)
    assert values(images) == {
        f"{wnid}_{i}": (label, 10 * label + i) for label, wnid in enumerate(WNIDS) for i in range(4)
    }


@pytest.mark.parametrize(
    "lines", [("0", "2", "1"), ("val_2.png 1", "val_0.png 0", "val_1.png 2"), (WNIDS[0], WNIDS[2], WNIDS[1])]
)
def test_val_tar_takes_its_labels_from_a_file(val_tar, tmp_path, lines):
    (tmp_path / "labels.txt").write_text("\n".join(lines) + "\n")
    images, _ = list_ilsvrc_val(val_tar, tmp_path / "labels.txt")
    assert values(images) == {"val_0": (0, 0), "val_1": (2, 10), "val_2": (1, 20)}


def test_labels_that_do_not_match_the_images_are_errors(val_tar, tmp_path):
    labels = tmp_path / "labels.txt"
    for text, message in {
        "0\n1\n": "has 2 labels for the 3 images",
        "a 1\nval_0.png 1\nval_1.png 1\n": "no label for val_2.png",
    }.items():
        labels.write_text(text)
        with pytest.raises(ShardError, match=message):
            list_ilsvrc_val(val_tar, labels)


def test_the_class_numbers_of_the_devkit_are_rejected(tmp_path):
    with tarfile.open(tmp_path / "v.tar", "w") as tar:
        for i in range(1000):
            add(tar, f"{i:04d}.png", b"x")
    (tmp_path / "l.txt").write_text("\n".join(str(i + 1) for i in range(1000)))
    with pytest.raises(ShardError, match="counts classes from 1"):
        list_ilsvrc_val(tmp_path / "v.tar", tmp_path / "l.txt")


def test_shuffle_is_a_function_of_the_seed(train_tar):
    images, _ = list_ilsvrc_train(train_tar)
    orders = [[sample["__key__"] for sample in shuffled_samples(images, seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])


def test_job_makes_shards_of_the_tars_of_ilsvrc(train_tar, val_tar, tmp_path):
    (tmp_path / "val.txt").write_text("".join(f"val_{i}.png {wnid}\n" for i, wnid in enumerate(WNIDS)))
    done = run_job([str(JOB), "--source", str(train_tar), "--output", "shards"], tmp_path)
    assert "12 images of 3 classes in 1 shards" in done.stdout, done.stderr
    labelled = ("--labels", "val.txt", "--output", "shards", "--prefix", "val")
    done = run_job([str(JOB), "--source", str(val_tar), *labelled], tmp_path)
    assert "3 images of 3 classes in 1 shards" in done.stdout, done.stderr
    shard = load_shard(str(tmp_path / "shards/val-0000.tar"), Geometry())
    assert [
        image[0, 0, 0] == 10 * int(label["cls"]) for image, label in zip(shard.images, shard.labels, strict=True)
    ] == [True] * 3


def test_truncated_tars_of_ilsvrc_are_errors(train_tar, val_tar, tmp_path):
    (tmp_path / "labels.txt").write_text("0\n0\n0\n")
    whole = val_tar.read_bytes()
    for size in (1024, 512 * 5, 100):
        val_tar.write_bytes(whole[:size])
        with pytest.raises(ShardError, match="val.tar is (cut short|not a tar)"):
            list_ilsvrc_val(val_tar, tmp_path / "labels.txt")
    with tarfile.open(train_tar) as tar:
        first, second = tar.getmembers()[:2]
        data = tar.extractfile(first).read()
    cut = data[: data.index(f"{WNIDS[2]}_3.png".encode())]
    with tarfile.open(train_tar, "w") as tar:
        add(tar, f"{WNIDS[2]}.tar", cut)
        add(tar, f"{WNIDS[1]}.tar", data)
    with pytest.raises(ShardError, match=f"train.tar: {WNIDS[2]}.tar is cut short"):
        list_ilsvrc_train(train_tar)


def test_tars_of_ilsvrc_that_would_shift_the_classes_are_errors(train_tar, tmp_path):
    with tarfile.open(train_tar, "a") as outer:
        add(outer, "empty.tar", bytes(10_240))
    with pytest.raises(ShardError, match=f"1 of {len(WNIDS) + 1} class tars hold no image, the first empty"):
        list_ilsvrc_train(train_tar)
    with tarfile.open(train_tar, "a") as outer:
        add(outer, f"more/{WNIDS[0]}.tar", bytes(10_240))
    with pytest.raises(ShardError, match=f"holds {WNIDS[0]}.tar more than once"):
        list_ilsvrc_train(train_tar)


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_sparse_files_in_tars_are_refused(tmp_path, kind):
    with (tmp_path / "hole.bmp").open("wb") as file:
        file.write(encode(np.zeros((300, 300, 3), np.uint8), "BMP")[:100])
        file.truncate(270_054)
    subprocess.run(["tar", "-cSf", "val.tar", f"--format={kind}", "hole.bmp"], cwd=tmp_path, check=True)
    (tmp_path / "labels.txt").write_text("0\n")
    with pytest.raises(ShardError, match="hole.bmp is stored without its holes; pack without tar --sparse"):
        list_ilsvrc_val(tmp_path / "val.tar", tmp_path / "labels.txt")


def test_hidden_files_in_tars_of_ilsvrc_are_left_out_and_counted(val_tar, tmp_path, caplog):
    with tarfile.open(val_tar, "a") as tar:
        add(tar, "._val_0.png", b"x")
        add(tar, "LICENSE", b"x")
    (tmp_path / "labels.txt").write_text("0\n1\n2\n")
    images, _ = list_ilsvrc_val(val_tar, tmp_path / "labels.txt")
    assert [i.key for i in images] == ["val_0", "val_1", "val_2"]
    assert "left out 1 hidden files" in caplog.text and "left out 1 files without extension jpg" in caplog.text


def test_label_lines_of_mixed_length_are_errors(val_tar, tmp_path):
    (tmp_path / "labels.txt").write_text("val_0.png 1\n2\n3\n")
    with pytest.raises(ShardError, match="labels.txt: line 2: '2' is not"):
        list_ilsvrc_val(val_tar, tmp_path / "labels.txt")
    with pytest.raises(ShardError, match="cannot read .*absent.txt"):
        list_ilsvrc_val(val_tar, tmp_path / "absent.txt")


def test_links_in_tars_of_ilsvrc_are_followed(tmp_path):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        add(tar, "sub/a.png", picture(7))
        link(tar, "b.png", "sub/a.png", tarfile.LNKTYPE)
        link(tar, "sub/c.png", "a.png", tarfile.SYMTYPE)
        link(tar, "README", "gone", tarfile.SYMTYPE)
    with tarfile.open(tmp_path / "train.tar", "w") as outer:
        add(outer, "n01.tar", inner.getvalue())
        link(outer, "n02.tar", "n01.tar", tarfile.LNKTYPE)
    images, _ = list_ilsvrc_train(tmp_path / "train.tar")
    assert [(image.key, image.label) for image in images] == [(key, label) for label in (0, 1) for key in "abc"]
    assert {image.read() for image in images} == {picture(7)}
    with tarfile.open(tmp_path / "train.tar", "a") as outer:
        link(outer, "n03.tar", "n04.tar", tarfile.LNKTYPE)
    with pytest.raises(
        ShardError, match="train.tar: n03.tar is a link to n04.tar, which is no file before it in this tar"
    ):
        list_ilsvrc_train(tmp_path / "train.tar")
