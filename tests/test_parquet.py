"""Parquet files with the bytes of images as a source of shards. The layout is that of the library `datasets`, written here by hand."""

import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import encode
from PIL import Image
from processes import run_job

from uap_dist.data.decode import Geometry, load_shard
from uap_dist.data.locations import locate
from uap_dist.data.sources.imagenet import shuffled_samples
from uap_dist.data.sources.parquet import list_parquet
from uap_dist.errors import ShardError, UapDistError

JOB = Path(__file__).parents[1] / "jobs/shard.py"
NAMES = ["airplane", "automobile", "bird"]


def picture(value, kind="PNG"):
    return encode(np.full((16, 16, 3), value, np.uint8), kind)


def image_column(data):
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    return pa.array([{"bytes": each, "path": None} for each in data], kind)


def features(**kinds):
    return {b"huggingface": json.dumps({"info": {"features": kinds}}).encode()}


IMAGE, LABEL = {"_type": "Image"}, {"_type": "ClassLabel", "names": NAMES}


def write(path, columns, metadata=None, **options):
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, **options)
    return str(path)


@pytest.fixture
def cifar(tmp_path):
    """Two files of five images each, as data/train-0000N-of-00002.parquet of CIFAR-10 has them: columns img and label."""
    for number in range(2):
        values = range(10 * number, 10 * number + 5)
        columns = {"img": image_column(map(picture, values)), "label": pa.array([v % 3 for v in values], pa.int64())}
        path = tmp_path / f"train-0000{number}-of-00002.parquet"
        write(path, columns, features(img=IMAGE, label=LABEL), row_group_size=2)
    return [str(tmp_path / f"train-0000{number}-of-00002.parquet") for number in range(2)]


def listed(urls, label=None):
    """Label and first pixel by key, and names of the classes."""
    with tempfile.TemporaryFile() as copy:
        images, names = list_parquet(urls, copy, label)
        pixels = [np.asarray(Image.open(io.BytesIO(image.read())))[0, 0, 0] for image in images]
        return {image.key: (image.label, int(value)) for image, value in zip(images, pixels, strict=True)}, names


def test_images_labels_and_names_of_classes(cifar):
    found, names = listed(cifar)
    assert names == NAMES
    assert found == {
        f"train-0000{number}-of-00002_00000{row}": ((10 * number + row) % 3, 10 * number + row)
        for number in range(2)
        for row in range(5)
    }


def test_the_job_makes_shards_of_them(cifar, tmp_path):
    done = run_job([str(JOB), "--source", "train-*.parquet", "--output", "shards", "--shard-size", "6"], tmp_path)
    assert "10 images of 3 classes in 2 shards" in done.stdout, done.stderr
    assert (tmp_path / "shards/classes.txt").read_text().split() == NAMES
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == [
        "classes.txt",
        "train-0000.tar",
        "train-0001.tar",
        "train-index.json",
    ]
    shards = [load_shard(str(tmp_path / f"shards/train-000{i}.tar"), Geometry()) for i in range(2)]
    values = [(int(i[0, 0, 0]), int(label["cls"])) for s in shards for i, label in zip(s.images, s.labels, strict=True)]
    assert sorted(values) == [(v, v % 3) for v in (*range(5), *range(10, 15))] and values != sorted(values)


def test_they_are_read_from_a_store(cifar, s3):
    url = f"s3://bucket/data/train.parquet?{s3}"
    filesystem, path = locate(url)
    with filesystem.open_output_stream(path) as out:
        out.write(Path(cifar[0]).read_bytes())
    assert listed([url])[0] == {
        key.replace("train-00000-of-00002", "train"): value for key, value in listed(cifar[:1])[0].items()
    }


def test_labels_of_other_kinds(tmp_path):
    images = image_column(map(picture, range(4)))
    words = ["dog", "ant", None, "dog"]
    for column in (pa.array(words), pa.array(words).dictionary_encode()):
        found, names = listed([write(tmp_path / "a.parquet", {"image": images, "label": column})])
        assert [label for label, _ in found.values()] == [1, 0, None, 1] and names == ["ant", "dog"]
    found, names = listed([write(tmp_path / "b.parquet", {"image": images, "label": pa.array([3, -1, None, 0])})])
    assert [label for label, _ in found.values()] == [3, None, None, 0] and names == ["0", "1", "2", "3"]
    both = {"image": images, "fine_label": pa.array([1, 0, 2, 1]), "coarse_label": pa.array([0, 0, 1, 1])}
    metadata = features(image=IMAGE, fine_label=LABEL, coarse_label={**LABEL, "names": ["a", "b"]})
    path = write(tmp_path / "c.parquet", both, metadata)
    with pytest.raises(
        ShardError, match="several columns of labels; name one with --label-key: fine_label, coarse_lab"
    ):
        listed([path])
    found, names = listed([path], "coarse_label")
    assert [label for label, _ in found.values()] == [0, 0, 1, 1] and names == ["a", "b"]


def test_numbers_that_are_strings_are_indices_as_in_a_label_file(tmp_path):
    images = image_column(map(picture, range(4)))
    found, names = listed([write(tmp_path / "a.parquet", {"image": images, "label": ["10", "2", "-1", ""]})])
    assert [label for label, _ in found.values()] == [10, 2, None, None] and names == [str(i) for i in range(11)]
    for odd, message in (
        ("cat", "the label is 'cat', but '10' in .*row 0"),
        ("2.0", "the label is '2.0'; class indices"),
    ):
        with pytest.raises(ShardError, match=f"a.parquet, row 1: {message}"):
            listed([write(tmp_path / "a.parquet", {"image": images, "label": ["10", odd, "1", "0"]})])


def test_images_without_labels_make_shards_without_cls(tmp_path, caplog):
    path = write(tmp_path / "a.parquet", {"image": pa.array([picture(1), picture(2)], pa.binary()), "text": ["x", "y"]})
    with tempfile.TemporaryFile() as copy:
        images, names = list_parquet([path], copy)
        samples = list(shuffled_samples(images, 0))
    assert all(set(sample) == {"__key__", "png"} for sample in samples) and names == []
    assert "2 of 2 images have no label; if a column holds labels, name it with --label-key" in caplog.text


def test_rows_without_an_image_are_counted(tmp_path, caplog):
    images = image_column([picture(1), None, b"", b"<html>", picture(2, "GIF"), picture(3, "JPEG")])
    found, _ = listed([write(tmp_path / "a.parquet", {"image": images, "label": pa.array([0] * 6)})])
    assert list(found) == ["a_000000", "a_000005"]
    assert "a.parquet: left out 4 of 6 rows without the bytes of an image in one of the formats" in caplog.text
    assert "the first row 1" in caplog.text


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"text": ["a"]}, (), "a.parquet has no column of images .*, only text"),
        ({"image": image_column([b"x"]), "label": [0]}, (), "a.parquet holds no image that Pillow can read"),
        (
            {"image": image_column([b"x"]), "label": [0.5]},
            (),
            "column 'label' is of double; labels are integers or strings",
        ),
        ({"image": image_column([b"x"])}, ("y",), "has no column 'y' .--label-key., only image"),
        ({"a": image_column([b"x"]), "b": image_column([b"x"])}, (), "several columns of images .*: a, b"),
    ],
)
def test_files_of_another_kind_say_what_they_hold(tmp_path, columns, options, message):
    with pytest.raises(ShardError, match=message):
        listed([write(tmp_path / "a.parquet", columns)], *options)


def test_labels_without_a_name_and_columns_of_one_name_are_errors(tmp_path):
    columns = {"image": image_column([picture(1), picture(2)]), "label": pa.array([0, len(NAMES)], pa.int64())}
    path = write(tmp_path / "a.parquet", columns, features(image=IMAGE, label=LABEL))
    with pytest.raises(
        ShardError, match=f"a.parquet, row 1 has label {len(NAMES)}, but the file names {len(NAMES)} classes"
    ):
        listed([path])
    table = pa.table([columns["image"], columns["label"], columns["label"]], ["image", "label", "label"])
    pq.write_table(table, path)
    with pytest.raises(ShardError, match="a.parquet has several columns named 'label'; rename them"):
        listed([path])


def test_files_that_are_no_parquet_or_of_another_data_set(cifar, tmp_path):
    whole = Path(cifar[0]).read_bytes()
    for data in (b"<!DOCTYPE html>" * 90, whole[:-100], b""):
        (tmp_path / "x.parquet").write_bytes(data)
        with pytest.raises(ShardError, match="x.parquet is not a Parquet file, or cut short: "):
            listed([str(tmp_path / "x.parquet")])
    (tmp_path / "x.parquet").write_bytes(whole[:200] + bytes(400) + whole[600:])
    with pytest.raises(ShardError, match="x.parquet"):
        listed([str(tmp_path / "x.parquet")])
    columns = {"img": image_column([picture(1)]), "label": pa.array([0])}
    other = write(tmp_path / "x.parquet", columns, features(img=IMAGE, label={**LABEL, "names": ["a"]}))
    with pytest.raises(ShardError, match="x.parquet has other classes than .*train-00000-of-00002.parquet"):
        listed([*cifar, other])
    with pytest.raises(UapDistError, match="no shard .*absent.parquet|cannot read .*absent.parquet"):
        listed([str(tmp_path / "absent.parquet")])


def test_a_folder_of_them_is_refused_with_the_pattern_to_give(tmp_path):
    (tmp_path / "train.parquet").mkdir()
    done = run_job([str(JOB), "--source", "train.parquet/", "--output", "out"], tmp_path)
    assert done.stderr == "error: no shard train.parquet/: it is a folder; FOLDER/*.parquet names all files in one\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--source", "a.parquet", "--labels", "x"),
            "--labels belongs to a tar of images; labels of Parquet files are a col",
        ),
        (("--source", "a.tar", "--label-key", "x"), "--label-key belongs to Parquet files"),
        (("--source", "s3://b/a.tar"), "s3://b/a.tar: of URLs only Parquet files are read"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, message):
    done = run_job([str(JOB), *options, "--output", "out"], tmp_path)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
