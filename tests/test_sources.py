import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import encode
from processes import run_job
from torchvision.datasets import ImageFolder

from uap_dist.data.decode import Geometry, load_shard
from uap_dist.data.sources.imagenet import list_folder, shuffled_samples
from uap_dist.data.write import write_shards
from uap_dist.errors import ShardError

JOB = Path(__file__).parents[1] / "jobs/shard.py"
WNIDS = ("n01440764", "n01443537", "n02096051")


def picture(value):
    return encode(np.full((16, 16, 3), value, np.uint8))


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


def test_a_job_that_ends_midway_leaves_no_shards_and_can_be_run_again(tmp_path):
    write(tmp_path, *(f"images/cat/{i}.png" for i in range(6)))
    (tmp_path / "images/cat/6.png").symlink_to("gone")
    command = [str(JOB), "--source", "images", "--output", "out", "--shard-size", "1"]
    done = run_job(command, tmp_path)
    assert done.returncode == 1 and "6.png: No such file" in done.stderr and not (tmp_path / "out").exists()
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
        (["--output", "out", "--seed", "-1"], "--seed is -1; it must not be negative"),
        (["--output", "out", "--shard-size", "0"], "--shard-size is 0; it must be positive"),
        (["--output", "out", "--prefix", "t[1]"], "--prefix is 't[1]'; it must be the beginning of a file name"),
        (["--output", "out", "--prefix", "a/b"], "--prefix is 'a/b'; it must be the beginning of a file name"),
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


def test_keys_have_no_dots_and_are_unique(tmp_path):
    for path in ("001.Albatross/a.v2.png", "001.Albatross/x/1.png", "001.Albatross/y/1.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(picture(1))
    images, _ = list_folder(tmp_path)
    assert [i.key for i in images] == ["001_Albatross_a_v2", "001_Albatross_x_1", "001_Albatross_y_1"]
    with pytest.raises(ShardError, match="1 keys belong to two or more images each, the first 001_Albatross_a_v2"):
        next(shuffled_samples([*images, images[0]], seed=0))


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
