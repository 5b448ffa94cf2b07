import csv
import os
import stat

import pyarrow.parquet as pq
import pytest

from uap_dist.method.rates import Rate, flatten_rates, rate_columns
from uap_dist.tracking.outputs import markdown_table, output_folder, save_table, writes_files


@pytest.fixture
def umask():
    old = os.umask(0o022)
    yield
    os.umask(old)


@pytest.mark.parametrize("name", ["../../x-seed0", "/x:build-seed0", "a\nb-seed0", "torchvision-resnet18-seed0"])
def test_a_default_folder_lies_in_outputs_however_the_model_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = output_folder(None, name)
    assert folder.parent == tmp_path / "outputs" and folder.name.isprintable()


def test_a_new_folder_is_its_owners_alone_and_one_that_is_there_stays_as_it_is(tmp_path, umask):
    (tmp_path / "mine").mkdir()
    save = writes_files(lambda folder: (folder / "result.json").write_text("{}"))
    for folder in ("mine", "new/out"):
        save(output_folder(tmp_path / folder, "x"))
    modes = [
        stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("mine", "new", "new/out", "new/out/result.json")
    ]
    assert modes == [0o755, 0o700, 0o700, 0o644]


def test_cells_of_a_markdown_table_stay_as_they_are():
    lines = markdown_table(["name", "rate"], [["1e5", "0.100"], ["a longer name", "007"], [r"a\|b", "–"]]).splitlines()
    assert lines[0] == "| name | rate |" and set(lines[1]) == {"|", "-"}
    assert lines[2:] == ["| 1e5 | 0.100 |", "| a longer name | 007 |", r"| a\|b | – |"]


def test_a_table_is_written_twice_and_a_rate_has_its_interval_and_count(tmp_path):
    row = flatten_rates({"name": "v", "fooling": Rate(5, 10)}) | rate_columns("top1", None)
    save_table(tmp_path / "rates", [row])
    (read,) = pq.read_table(tmp_path / "rates.parquet").to_pylist()
    low, high = Rate(5, 10).interval
    assert read == row and (read["fooling"], read["fooling_low"], read["fooling_high"]) == (0.5, low, high)
    assert read["fooling_num_images"] == 10 and read["top1"] is read["top1_num_images"] is None
    with (tmp_path / "rates.csv").open() as file:
        assert list(next(csv.DictReader(file))) == list(row)
