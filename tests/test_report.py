import csv
import os
import shlex
import stat
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from uap_dist.computing.report import name_random_rates
from uap_dist.errors import ConfigError
from uap_dist.method.rates import Rate, flatten_rates, rate_columns
from uap_dist.tracking.outputs import default_folder, markdown_table, output_folder, save_table, writes_files
from uap_dist.tracking.process import command


@pytest.fixture
def umask():
    old = os.umask(0o022)
    yield
    os.umask(old)


@pytest.mark.parametrize("name", ["../../x-seed0", "/x:build-seed0", "a\nb-seed0", "torchvision-resnet18-seed0"])
def test_a_default_folder_lies_in_outputs_however_the_model_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = output_folder(default_folder(name, "0123456789abcdef"))
    assert folder.parent == tmp_path / "outputs" and folder.name.isprintable() and folder.name.endswith("-012345")


def test_jobs_that_begin_in_the_same_second_have_folders_of_their_own_and_long_names_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    folders = {output_folder(default_folder("vit+" * 100, run_id)) for run_id in ("a" * 32, "b" * 32)}
    assert len(folders) == 2 and max(len(folder.name) for folder in folders) < 128
    with pytest.raises(ConfigError, match="cannot write to --output .*: File name too long"):
        output_folder(Path("outputs") / ("x" * 300))


def test_a_tilde_that_no_shell_expanded_is_refused():
    with pytest.raises(ConfigError, match="~/results: ~ is not expanded here; give the whole path"):
        output_folder(Path("~/results"))


def test_a_new_folder_is_its_owners_alone_and_one_that_is_there_stays_as_it_is(tmp_path, umask):
    (tmp_path / "mine").mkdir()
    save = writes_files(lambda folder: (folder / "result.json").write_text("{}"))
    for folder in ("mine", "new/out"):
        save(output_folder(tmp_path / folder))
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


def test_two_random_perturbations_of_equal_rates_keep_their_names():
    rates = {"linf": Rate(0, 10), "l2": Rate(0, 10)}
    assert list(name_random_rates("l2", rates, are_one=False)) == ["same ℓ2 norm", "same ℓ∞ norm"]
    assert list(name_random_rates("l2", rates, are_one=True)) == ["same ℓ∞ and ℓ2 norm"]


def test_a_command_to_copy_is_quoted(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["my jobs/compute.py"])
    assert shlex.split(command("finetune")) == ["python", "my jobs/finetune.py"]
