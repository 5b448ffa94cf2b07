import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import encode
from processes import run_job
from torchvision.datasets import ImageFolder

from uap_dist.data.decode import Geometry, load_shard
from uap_dist.data.sources.imagenet import list_folder, list_ilsvrc_train, list_ilsvrc_val, shuffled_samples
from uap_dist.data.write import write_shards
from uap_dist.errors import ShardError

JOB = Path(__file__).parents[1] / "jobs/shard.py"
WNIDS = ("n01440764", "n01443537", "n02096051")


def picture(value):
    return encode(np.full((16, 16, 3), value, np.uint8))


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


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


def values(images):
    from PIL import Image

    return {i.key: (i.label, int(np.asarray(Image.open(io.BytesIO(i.read())))[0, 0, 0])) for i in images}


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


def test_job_makes_shards_of_a_folder_and_refuses_to_mix(tmp_path):
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "images" / name / f"{i}.png").write_bytes(picture(100 * label + i))
    command = [
        str(JOB),
        "--source",
        str(tmp_path / "images"),
        "--output",
        str(tmp_path / "out"),
        "--shard-size",
        "4",
    ]
    done = run_job(command, tmp_path)
    assert "6 images of 2 classes in 2 shards" in done.stdout
    assert json.loads((tmp_path / "out/train-index.json").read_text())["shards"] == {
        "train-0000.tar": 4,
        "train-0001.tar": 2,
    }
    loaded = [load_shard(str(tmp_path / f"out/train-000{i}.tar"), Geometry()) for i in range(2)]
    for shard in loaded:
        assert [(image[0, 0, 0] >= 100) for image in shard.images] == [label["cls"] == b"1" for label in shard.labels]
    assert (tmp_path / "out/classes.txt").read_text() == "cat\ndog\n"
    again = run_job(command, tmp_path)
    assert again.returncode == 1 and "already holds train-*.tar" in again.stderr and "Traceback" not in again.stderr


def test_held_out_images_of_other_classes_are_refused_before_any_shard_is_written(tmp_path):
    for folder, names in (("train", ("ant", "bee", "cat")), ("val", ("ant", "cat"))):
        for value, name in enumerate(names):
            (tmp_path / folder / name).mkdir(parents=True)
            (tmp_path / folder / name / "0.png").write_bytes(picture(value))
    given = [str(JOB), "--output", ".", "--source"]
    assert run_job([*given, "train"], tmp_path).returncode == 0
    done = run_job([*given, "val", "--prefix", "val"], tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "classes.txt has 3 classes, these images have 2: class 1 is 'bee' there and 'cat' here" in done.stderr
    assert not list(tmp_path.glob("val-*"))


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


def test_a_job_that_ends_midway_leaves_no_shards_and_can_be_run_again(tmp_path):
    write(tmp_path, *(f"images/cat/{i}.png" for i in range(6)))
    (tmp_path / "images/cat/6.png").symlink_to("gone")
    command = [str(JOB), "--source", "images", "--output", "out", "--shard-size", "1"]
    done = run_job(command, tmp_path)
    assert done.returncode == 1 and "6.png: No such file" in done.stderr and not list((tmp_path / "out").iterdir())
    (tmp_path / "images/cat/6.png").unlink()
    assert "6 images of 1 classes in 6 shards" in run_job(command, tmp_path).stdout

    def interrupted():
        yield from shuffled_samples(list_folder(tmp_path / "images")[0], 0)
        raise KeyboardInterrupt

    before = sorted((tmp_path / "out").iterdir())
    with pytest.raises(KeyboardInterrupt):
        write_shards(interrupted(), tmp_path / "out", prefix="val", shard_size=4)
    assert sorted((tmp_path / "out").iterdir()) == before


def test_the_shard_job_reports_invalid_options_before_listing_images(tmp_path):
    (tmp_path / "labels.txt").write_text("a 0\n")
    given = [str(JOB), "--source", str(tmp_path)]
    for more, message in (
        (["--output", str(tmp_path / "out"), "--labels", str(tmp_path / "labels.txt")], "--labels belongs to a tar of"),
        (
            ["--output", str(tmp_path / "labels.txt/out")],
            f"cannot write to --output {tmp_path}/labels.txt/out: Not a dir",
        ),
        (["--output", "out", "--seed", "-1"], "seed is -1; it must not be negative"),
        (["--output", "out", "--shard-size", "0"], "shard size is 0; it must be positive"),
        (["--output", "out", "--prefix", "t[1]"], "prefix is 't[1]'; it must be the beginning of a file name"),
        (["--output", "out", "--prefix", "a/b"], "prefix is 'a/b'; it must be the beginning of a file name"),
    ):
        done = run_job([*given, *more], tmp_path)
        assert done.returncode == 1 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "cat").mkdir()
    with pytest.raises(ShardError, match="holds no CLASS/NAME.jpg"):
        list_folder(tmp_path)


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(1))


def test_hidden_files_and_folders_are_ignored_and_counted(tmp_path, caplog):
    write(tmp_path, "ants/1.png", "bees/1.png", "bees/sub/2.JPG")
    assert not caplog.text and list_folder(tmp_path)
    write(tmp_path, ".ipynb_checkpoints/0.png", "bees/.ipynb_checkpoints/1-checkpoint.png", "ants/._1.png", ".DS_Store")
    write(tmp_path, "ants/Thumbs.db", "bees/readme.txt", "bees/3.gif", "above.png")
    images, classes = list_folder(tmp_path)
    assert classes == ["ants", "bees"]
    assert [(i.key, i.label) for i in images] == [("ants_1", 0), ("bees_1", 1), ("bees_sub_2", 1)]
    assert [record.getMessage().removeprefix(f"{tmp_path}: left out ") for record in caplog.records] == [
        "4 hidden files (names or folders that begin with a dot), the first .DS_Store",
        "3 files without extension jpg, jpeg, png, webp, bmp, tif, tiff, avif, the first ants/Thumbs.db",
        "1 images that are in no class folder",
    ]


def test_the_labels_are_those_of_imagefolder(tmp_path):
    names = [f"{name}/{i}.png" for name in ("b", "B", "10", "9", "ä", "a b") for i in range(2)]
    write(tmp_path, *names)
    theirs = ImageFolder(str(tmp_path))
    images, classes = list_folder(tmp_path)
    assert classes == theirs.classes
    assert sorted((str(i.path), i.label) for i in images) == sorted(theirs.samples)


def test_a_class_folder_without_an_image_is_an_error_as_in_imagefolder(tmp_path):
    write(tmp_path, "ants/1.png", "__MACOSX/._1.png", "bees/1.png")
    with pytest.raises(
        ShardError, match="1 of 3 class folders hold no image, the first __MACOSX; each folder is a numbered class"
    ):
        list_folder(tmp_path)


def test_files_that_are_images_by_name_alone_are_left_out_with_a_warning(tmp_path, caplog):
    write(tmp_path, "a/1.png", "a/2.png")
    for name, data in {"a/2.png": b"\0\x05\x16\x07", "a/3.png": b"", "a/4.png": b"<html>"}.items():
        (tmp_path / name).write_bytes(data)
    images, _ = list_folder(tmp_path)
    assert [sample["__key__"] for sample in shuffled_samples(images, 0)] == ["a_1"]
    assert f"left out 3 files that Pillow cannot read as images, the first {tmp_path}/a/2.png" in caplog.text
    with pytest.raises(ShardError, match="none of the 3 files is an image that Pillow can read"):
        list(shuffled_samples(images[1:], 0))
    images[0].path.unlink()
    with pytest.raises(ShardError, match="cannot read .*a/1.png: No such file or directory"):
        list(shuffled_samples(images, 0))


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


def test_keys_have_no_dots_and_are_unique(tmp_path):
    for path in ("001.Albatross/a.v2.png", "001.Albatross/x/1.png", "001.Albatross/y/1.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(picture(1))
    images, _ = list_folder(tmp_path)
    assert [i.key for i in images] == ["001_Albatross_a_v2", "001_Albatross_x_1", "001_Albatross_y_1"]
    with pytest.raises(ShardError, match="1 keys belong to two or more images each, the first 001_Albatross_a_v2"):
        next(shuffled_samples([*images, images[0]], seed=0))


def test_label_lines_of_mixed_length_are_errors(val_tar, tmp_path):
    (tmp_path / "labels.txt").write_text("val_0.png 1\n2\n3\n")
    with pytest.raises(ShardError, match="labels.txt: line 2: '2' is not"):
        list_ilsvrc_val(val_tar, tmp_path / "labels.txt")
    with pytest.raises(ShardError, match="cannot read .*absent.txt"):
        list_ilsvrc_val(val_tar, tmp_path / "absent.txt")


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    write(tmp_path, "ants/1.png", "bees/1.png", "bees/more/2.png", ".Trash/more/3.png")
    (tmp_path / ".Trash").chmod(0)  # its files are left out in any case
    monkeypatch.chdir(tmp_path)  # its parents are closed to others
    tmp_path.chmod(0o755)
    for mode in (0, 0o444):
        (tmp_path / "bees/more").chmod(mode)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root reads everything
        try:
            with pytest.raises(ShardError, match="cannot read the folder bees/more: Permission denied"):
                list_folder(Path())
        finally:
            os.seteuid(user)


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path, caplog):
    write(tmp_path, "root/ants/1.png", "root/bees/1.png", "elsewhere/2.png")
    root = tmp_path / "root"
    for link, target in (("ants/self", "."), ("bees/all", ".."), ("bees/other", "../../elsewhere")):
        (root / link).symlink_to(target)
    images, _ = list_folder(root)
    assert [image.key for image in images] == ["ants_1", "bees_1", "bees_other_2"]
    left_out = sorted(record.args[0].relative_to(root).as_posix() for record in caplog.records)
    assert left_out == ["ants/self", "bees/all"] and "a link to a folder that it lies in" in caplog.text


def link(tar, name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    tar.addfile(info)


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
