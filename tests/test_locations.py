import os
import resource
from pathlib import Path

import pytest

from uap_dist.data.locations import absolute, copy_folder, exists, join, read_file, write_file


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path):
    return (
        str(tmp_path / "there") if request.param == "folder" else f"s3://bucket/there?{request.getfixturevalue('s3')}"
    )


def test_a_folder_is_copied_completely_and_read_back(place, tmp_path):
    own = tmp_path / "own"
    (own / "below").mkdir(parents=True)
    (own / "last").write_bytes(b"1")
    (own / "below/first").write_bytes(b"2")
    assert not exists(join(place, "last"))
    copy_folder(own, place, last="last")
    write_file(join(place, "last"), b"3")
    assert exists(join(place, "last")) and not exists(join(place, "below"))
    assert [read_file(join(place, name)) for name in ("last", "below/first")] == [b"3", b"2"]


def test_a_full_disk_leaves_the_old_file_intact(tmp_path):
    file = tmp_path / "file"
    write_file(str(file), b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # no file may be larger, as if the disk were full
    try:
        with pytest.raises(OSError, match=f"{file}: .*File too large"):
            write_file(str(file), bytes(20_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == b"before"


def test_a_relative_path_may_hold_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:1.txt").write_text("one")
    assert read_file("a:1.txt") == b"one"


def test_absolute_locations_do_not_depend_on_the_working_directory():
    assert absolute("s3://bucket/x?region=r") == "s3://bucket/x?region=r"
    assert absolute("x") == os.path.join(Path.cwd(), "x")
