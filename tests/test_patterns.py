"""Patterns of shards, as webdataset's users write them."""

from pathlib import Path
from threading import Barrier

import pytest

from uap_dist.data.locations import locate, set_name
from uap_dist.data.patterns import expand_patterns
from uap_dist.errors import ShardError, UapDistError


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


def test_wildcards_do_not_stand_for_the_hidden_files_of_macos(tmp_path):
    for name in ("t-0.tar", "._t-0.tar", ".t-1.tar"):
        (tmp_path / name).touch()
    for folder in (str(tmp_path), f"file://{tmp_path}"):
        assert expand_patterns([f"{folder}/*.tar"]) == [f"{folder}/t-0.tar"]
        assert expand_patterns([f"{folder}/.t*.tar"]) == [f"{folder}/.t-1.tar"]


def test_a_backslash_is_part_of_a_name_unless_it_escapes_a_brace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (r"a\b-0.tar", r"a\b-1.tar", "{c}-0.tar"):
        (tmp_path / name).touch()
    assert expand_patterns([r"a\b-{0..1}.tar"]) == [rf"{tmp_path}/a\b-{i}.tar" for i in range(2)]
    assert expand_patterns([r"\{c\}-0.tar"]) == [f"{tmp_path}/{{c}}-0.tar"]
    with pytest.raises(ShardError, match=r"no shard gone\\b-0.tar"):
        expand_patterns([r"gone\b-0.tar"])


def test_lists_longer_than_a_file_name_can_be_and_single_patterns(tmp_path):
    names = [f"imagenet-train-{number:06d}" for number in range(20)]
    for name in names:
        (tmp_path / f"{name}.tar").touch()
    expected = [f"{tmp_path}/{name}.tar" for name in names]
    assert expand_patterns([f"{tmp_path}/{{{','.join(names)}}}.tar"]) == expected
    assert expand_patterns("::".join(expected)) == expected
    with pytest.raises(ShardError, match="cannot read shard a{300}.tar: .*File name too long"):
        expand_patterns([f"{'a' * 300}.tar"])


def test_what_is_no_file_says_what_it_is(tmp_path):
    (tmp_path / "train.parquet").mkdir()
    for slash in ("", "/"):
        with pytest.raises(ShardError, match=r"it is a folder; FOLDER/\*.parquet names all files in one"):
            expand_patterns([f"{tmp_path}/train.parquet{slash}"])
    with pytest.raises(ShardError, match=f"no shard file://{tmp_path}/nope.tar$"):
        expand_patterns([f"file://{tmp_path}/nope.tar"])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("absent-{0..1}.tar", "no shard absent-0.tar"),
        ("absent-*.tar", "matches nothing in the working directory"),
        ("~/a.tar", "no shard ~/a.tar: ~ is not expanded here; give the whole path"),
        ("", "a shard has no name, as after a `::` too many"),
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


def test_shards_are_looked_up_at_the_same_time_and_those_of_a_listing_not_again(store, put):
    urls = [put(f"many/{i}.tar", b"tar") for i in range(4)]
    all_four = Barrier(4)

    def wait(method, path):
        if method == "HEAD" and "many/" in path:
            all_four.wait(timeout=10)  # an error if they came one after another

    locate(urls[0])  # its file system is there before; pyarrow makes no other while requests are waited for
    store.fault = wait
    assert expand_patterns([urls[0].replace("0.tar", "{0..3}.tar")]) == expand_patterns(urls) == urls
    store.requests.clear()
    assert expand_patterns([urls[0].replace("0.tar", "*.tar")]) == urls
    assert store.count("HEAD") == 0
    store.fault = lambda method, path: ("wait", 0.3) if path.endswith("/8.tar") else None
    # the first one, though not the first answer
    with pytest.raises(ShardError, match="no shard s3://bucket/many/8.tar"):
        expand_patterns([urls[0].replace("0.tar", "{0,8,9}.tar")])
